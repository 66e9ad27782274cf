"""Quantised base models, by bitsandbytes.

Gradients pass through a quantised layer as through a linear layer with the dequantised weight, in 4 and in 8 bits.
LLM.int8 rounds a layer's inputs too, and which columns it spares depends on the whole batch; on a CPU, where that
saves nothing, its inputs are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from lapora.config import Quantization
from lapora.errors import AdapterError, UsageError

_HEADS = ("classifier", "lm_head", "score")


def quantization_config(quantize: Quantization, compute_dtype: torch.dtype, whole: Sequence[str] = ()) -> Any | None:
    """Build what transformers needs to load a base model in 8 or 4 bits.

    Args:
        quantize: ``none``, ``8bit`` (LLM.int8) or ``4bit`` (NF4 with double quantisation, as QLoRA uses).
        compute_dtype: Type of the dequantised products in 4 bits.
        whole: Modules that the adapter saves whole: they are left as they are, like every head.

    Raises:
        UsageError: bitsandbytes cannot be imported on this machine.
    """
    if quantize == "none":
        return None
    _need_bitsandbytes(f"--quantize {quantize}")
    from transformers import BitsAndBytesConfig

    skipped = sorted(unquantized_modules(whole))
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skipped,
    )


def unquantized_modules(whole: Sequence[str] = ()) -> set[str]:
    """Names of modules that are never quantised: heads, and what the adapter saves whole."""
    return {*_HEADS, *whole}


def saved_quantization(base_name: str, config: Any) -> Quantization:
    """How a base model's own files are quantised, by the ``quantization_config`` in its configuration.

    Raises:
        AdapterError: By another method than bitsandbytes.
        UsageError: bitsandbytes cannot be imported on this machine.
    """
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return "none"
    settings = cast("dict[str, Any]", saved if isinstance(saved, dict) else saved.to_dict())
    found: Quantization = "8bit" if settings.get("load_in_8bit") else "4bit" if settings.get("load_in_4bit") else "none"
    if found == "none":
        method = settings.get("quant_method") or "an unknown method"
        raise AdapterError(
            f"base model {base_name}: quantised by {method}, and lapora covers bitsandbytes alone; "
            "give the unquantised base with --base-model, and --quantize 4bit or 8bit if it is too large"
        )
    _need_bitsandbytes(f"base model {base_name}, which is quantised to {found.removesuffix('bit')} bits,")
    return found


def resolve_quantization(base_name: str, asked: Quantization | None, saved: Quantization) -> Quantization:
    """What a base is loaded in: as asked, and as its files are where nothing is asked.

    Raises:
        UsageError: The two contradict each other.
    """
    if saved == "none":
        return asked or "none"
    if asked not in (None, saved):
        raise UsageError(
            f"--quantize {asked}: base model {base_name} is saved in {saved.removesuffix('bit')} bits already; leave "
            "--quantize out, or give the unquantised base with --base-model"
        )
    return saved


def disable_input_rounding(model: nn.Module) -> None:
    """Let quantised layers on a CPU multiply by the dequantised weight, without rounding their inputs.

    Otherwise 8-bit layers round them to integers and, where the CPU has AVX512-BF16, 4-bit layers to bfloat16.
    bitsandbytes leaves them whole for layers in training mode, which has no other meaning for them.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt | bitsandbytes.nn.Linear4bit):
            module.train(module.weight.device.type == "cpu")


def _need_bitsandbytes(what: str) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{what} needs bitsandbytes, which cannot be imported: {error}") from error
