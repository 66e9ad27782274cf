"""Choosing the prior precision from training data alone: adapters, criteria and the comparison."""
