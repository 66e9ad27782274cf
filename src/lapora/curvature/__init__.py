"""Curvature: per-layer activations and logit gradients, and the Kronecker factors made of them."""
