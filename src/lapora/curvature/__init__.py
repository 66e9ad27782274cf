"""Curvature: per-layer inputs and output gradients, and the sums that approximate the Fisher."""
