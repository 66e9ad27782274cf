"""The fine-tuned model: adapter files, base model, Bayesian layers, batches and answer logits."""

import logging

# On some CPUs bitsandbytes says, whenever PEFT imports it, that it lacks a faster kernel: no news for the user.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
