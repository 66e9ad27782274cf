"""Choose the prior precision from training rows alone: adapters, criteria and comparison."""
