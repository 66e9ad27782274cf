"""Quantised base models, by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from lapora.config import Quantisation
from lapora.errors import UsageError


def quantisation_config(quantize: Quantisation, compute_dtype: torch.dtype) -> Any | None:
    """Build what transformers needs to load a base model in 8 or 4 bits.

    Args:
        quantize: ``none``, ``8bit`` (LLM.int8) or ``4bit`` (NF4 with double quantisation, as QLoRA uses).
        compute_dtype: Type of the dequantised products in 4 bits.

    Raises:
        UsageError: bitsandbytes cannot be imported on this machine.
    """
    if quantize == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--quantize {quantize} needs bitsandbytes, which cannot be imported: {error}") from error
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
