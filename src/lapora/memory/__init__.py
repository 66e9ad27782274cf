"""Memory estimate of a fit, without loading weights."""
