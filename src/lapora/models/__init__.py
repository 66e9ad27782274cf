"""Fine-tuned models: adapter files, base model, Bayesian layers, batches and logits of the answers."""

import logging

# Silence bitsandbytes' message about a missing CPU kernel, logged whenever PEFT imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
