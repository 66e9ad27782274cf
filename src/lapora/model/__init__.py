"""The fine-tuned model: adapter files, base model, Bayesian layers, batches and answer logits."""
