"""Likelihoods: from logits to Fisher columns, probabilities and scores; one file each."""
