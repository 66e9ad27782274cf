"""The linearised predictive: logit moments and the links that turn them into probabilities."""
