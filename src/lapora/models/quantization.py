"""Quantized base models, by bitsandbytes.

The gradient of a quantized layer, in 4 or 8 bits, is that of a linear layer with the dequantized weight. LLM.int8 also
rounds a layer's inputs, except for outlier columns that depend on the whole batch; on a CPU, where this saves nothing,
input rounding is disabled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lapora.config import Quantization
from lapora.errors import AdapterError, UsageError

_HEADS = ("classifier", "lm_head", "score")


def quantization_config(
    quantize: Quantization, compute_dtype: torch.dtype, unquantized: Sequence[str] = ()
) -> Any | None:
    """Return the quantization config for ``from_pretrained``, or None without quantization.

    Args:
        quantize: ``none``, ``8bit`` (LLM.int8) or ``4bit`` (NF4 with double quantization, as in QLoRA).
        compute_dtype: Dtype of matrix products in 4 bits.
        unquantized: Modules that are not quantized, from :func:`unquantized_modules`.

    Raises:
        UsageError: bitsandbytes cannot be imported.
    """
    if quantize == "none":
        return None
    _require_bitsandbytes(f"--quantize {quantize}")
    from transformers import BitsAndBytesConfig

    skipped = list(unquantized)
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skipped,
    )


def unquantized_modules(base: PreTrainedModel, modules_to_save: Sequence[str] = ()) -> list[str]:
    """Return the names of modules that are never quantized.

    These are heads, the adapter's ``modules_to_save``, and what transformers does not quantize by default: the output
    layer, whatever its name, and modules with tied weights.

    Args:
        base: The base model; it may be on the ``meta`` device.
        modules_to_save: The adapter's ``modules_to_save``.
    """
    own = [*_HEADS, *modules_to_save]
    of_base = list(base._keep_in_fp32_modules or ())
    return sorted(HfQuantizer.get_modules_to_not_convert(base, own, of_base, add_default_skips=True))


def quantized_layers(base: PreTrainedModel, unquantized: Sequence[str]) -> list[nn.Module]:
    """Return the layers of an unquantized base model that bitsandbytes would quantize."""
    return [
        module
        for name, module in base.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, list(unquantized))
    ]


def saved_quantization(base_name: str, config: Any) -> Quantization:
    """Return the quantization of a base model's files, from its configuration's ``quantization_config``.

    Raises:
        AdapterError: The method is not bitsandbytes.
        UsageError: bitsandbytes cannot be imported.
    """
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return "none"
    settings = cast("dict[str, Any]", saved if isinstance(saved, dict) else saved.to_dict())
    found: Quantization = "8bit" if settings.get("load_in_8bit") else "4bit" if settings.get("load_in_4bit") else "none"
    if found == "none":
        method = settings.get("quant_method") or "an unknown method"
        raise AdapterError(
            f"base model {base_name}: quantization by {method} is not supported, only by bitsandbytes; "
            "give the unquantized base with --base-model, and --quantize 4bit or 8bit if it is too large"
        )
    _require_bitsandbytes(f"base model {base_name}, which is quantized to {found.removesuffix('bit')} bits,")
    return found


def resolve_quantization(base_name: str, requested: Quantization | None, saved: Quantization) -> Quantization:
    """Resolve the quantization to load a base model in: the requested one, else that of its files.

    Raises:
        UsageError: The two contradict each other.
    """
    if saved == "none":
        return requested or "none"
    if requested not in (None, saved):
        raise UsageError(
            f"--quantize {requested}: base model {base_name} is already quantized to {saved.removesuffix('bit')} bits; "
            "omit --quantize, or give the unquantized base with --base-model"
        )
    return saved


def set_to_eval(model: nn.Module, quantize: Quantization) -> None:
    """Set a model to eval mode, in which quantized layers on a CPU do not round their inputs."""
    model.eval()
    if quantize != "none":
        disable_input_rounding(model)


def disable_input_rounding(model: nn.Module) -> None:
    """Make quantized layers on a CPU multiply by the dequantized weight, without rounding their inputs.

    By default 8-bit layers round inputs to int8, and on CPUs with AVX512-BF16 4-bit layers round them to bfloat16.
    bitsandbytes does not round in training mode, which has no other effect on these layers.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt | bitsandbytes.nn.Linear4bit):
            module.train(module.weight.device.type == "cpu")


def _require_bitsandbytes(what: str) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{what} requires bitsandbytes, which cannot be imported: {error}; install it") from error
