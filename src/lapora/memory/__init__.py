"""Memory estimate of a fit, from a model without weights."""
