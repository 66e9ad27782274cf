"""Calibrated probabilities for LoRA fine-tuned language models, by the Laplace approximation."""

from lapora._version import __version__

__all__ = ["__version__"]
