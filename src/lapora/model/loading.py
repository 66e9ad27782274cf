"""Loading an adapter on its base model, ready to be linearised."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lapora.config import Dtype, Quantisation
from lapora.errors import AdapterError, UsageError, first_line
from lapora.model.adapter import Adapter, ModelKind
from lapora.model.fingerprint import base_fingerprint
from lapora.model.quantisation import (
    keep_inputs_whole,
    quantisation_config,
    saved_quantisation,
    settle_quantisation,
)
from lapora.model.quiet import quiet_libraries
from lapora.model.tokenizer import tokenizer_at


@dataclass(frozen=True)
class LoadedModel:
    """A frozen PEFT model in eval mode with its tokenizer.

    Attributes:
        model: The PEFT model; no parameter requires a gradient.
        tokenizer: The adapter's own tokenizer where it saves one, else the base model's.
        kind: ``causal`` or ``classifier``.
        base_model: Name or path that the base was loaded from.
        revision: Its revision, or None.
        quantize: How the base is quantised.
        dtype: Element type of the base's unquantised weights, such as ``float32``.
        fingerprint: Digest of a sample of every base tensor: another base gives another fingerprint.
        number_of_labels: Outputs of a classification head, or None for a causal model.
    """

    model: PeftModel
    tokenizer: Any
    kind: ModelKind
    base_model: str
    revision: str | None
    quantize: Quantisation
    dtype: str
    fingerprint: str
    number_of_labels: int | None

    @property
    def pad_token_id(self) -> int:
        """The id that batches are padded with; padding is masked, so end-of-text serves where none is set."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return int(candidate)
        return 0


def resolve_device(device: str) -> torch.device:
    """Turn ``auto`` into the GPU where there is one.

    Raises:
        UsageError: No such device, or not available here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: not available on this machine ({first_line(error)})") from error
    return resolved


def load_model(
    adapter: Adapter,
    *,
    base_model: str | None = None,
    quantize: Quantisation | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load the base model and the adapter on it.

    Args:
        adapter: The adapter, as read from its directory.
        base_model: Name or path of the base; by default the one the adapter records.
        quantize: ``none``, ``8bit`` or ``4bit``; None is as the base's own files are.
        dtype: Type of the base's weights; ``auto`` is float32 on a CPU and the base's own on a GPU. LoRA
            weights stay in float32 at least.
        device: ``auto``, ``cpu``, ``cuda`` ...
        trust_remote_code: Let a model's repository run its own code.

    Raises:
        AdapterError: The base cannot be loaded, or the adapter does not fit it.
        UsageError: An impossible device or an impossible combination.
    """
    base_name = base_model or adapter.base_model
    if not base_name:
        raise AdapterError(f"{adapter.path}: the adapter names no base model; give one with --base-model")
    revision = None if base_model else adapter.revision
    where = resolve_device(device)
    with quiet_libraries():
        config = _load_config(base_name, revision, trust_remote_code)
        saved = saved_quantisation(base_name, config)
        quantize = settle_quantisation(base_name, quantize, saved)
        element_type = _element_type(dtype, config, where)
        if quantize != "none" and element_type == torch.float64:
            raise UsageError(f"--dtype float64 cannot be combined with --quantize {quantize}")
        base, missing = _load_base(
            adapter, base_name, revision, config, element_type, quantize, where, trust_remote_code
        )
        fingerprint = base_fingerprint(base, missing)
        tokenizer = tokenizer_at(adapter, base_name, revision, trust_remote_code)
        model = _load_adapter(adapter, base, base_name)
    _refuse_untrained(adapter, model, missing)
    if element_type == torch.float64:
        model = model.double()
    if quantize == "none":
        model = model.to(where)
    model.eval()
    if quantize != "none":
        keep_inputs_whole(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        kind=adapter.kind,
        base_model=str(base_name),
        revision=revision,
        quantize=quantize,
        dtype=str(element_type).removeprefix("torch."),
        fingerprint=fingerprint,
        number_of_labels=getattr(base.config, "num_labels", None) if adapter.kind == "classifier" else None,
    )
    if adapter.kind == "classifier":
        # A decoder with a head finds the answer's position by this id: it must be the one that batches are padded with.
        base.config.get_text_config().pad_token_id = loaded.pad_token_id
    return loaded


def _load_config(base_name: str, revision: str | None, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(base_name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _base_error(base_name, error) from error


def _base_error(base_name: str, error: Exception) -> AdapterError:
    reason = first_line(error, 160)
    looked = "no such folder, and " if not Path(base_name).is_dir() else ""
    if isinstance(error, UnpicklingError):
        reason = "its weights are a pickle of more than tensors, which could run any code and is not opened"
    return AdapterError(
        f"base model {base_name}: {looked}it cannot be loaded ({reason}); "
        "give a local folder with --base-model, or check the name and the network"
    )


def _element_type(dtype: Dtype, config: Any, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    own = getattr(config.get_text_config(), "dtype", None)
    if device.type == "cpu" or own is None:
        return torch.float32
    return cast(torch.dtype, getattr(torch, own) if isinstance(own, str) else own)


def _load_base(
    adapter: Adapter,
    base_name: str,
    revision: str | None,
    config: Any,
    element_type: torch.dtype,
    quantize: Quantisation,
    device: torch.device,
    trust_remote_code: bool,
) -> tuple[Any, set[str]]:
    arguments: dict[str, Any] = {
        "config": config,
        "revision": revision,
        "dtype": element_type,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
    }
    if quantize != "none":
        arguments["device_map"] = {"": device}
        if getattr(config, "quantization_config", None) is None:
            whole = adapter.config.get("modules_to_save") or ()
            arguments["quantization_config"] = quantisation_config(quantize, element_type, whole)
    loader: Any = AutoModelForCausalLM
    if adapter.kind == "classifier":
        loader = AutoModelForSequenceClassification
        labels = adapter.number_of_labels()
        if labels is not None:
            config.num_labels = labels
    try:
        base, information = loader.from_pretrained(base_name, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, UnpicklingError, SafetensorError) as error:
        raise _base_error(base_name, error) from error
    return base, set(information["missing_keys"])


def _load_adapter(adapter: Adapter, base: nn.Module, base_name: str) -> PeftModel:
    try:
        model = PeftModel.from_pretrained(base, os.fspath(adapter.path), is_trainable=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise AdapterError(
            f"{adapter.path}: the adapter does not fit base model {base_name}: "
            + ("; ".join(lines) or first_line(error))
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"{adapter.path}: peft cannot put it on base model {base_name} ({first_line(error)})"
        ) from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    absent = sorted(set(expected) - set(adapter.shapes))
    # peft saves embeddings, and an output layer that has LoRA, whole beside their LoRA weights, and loads them back.
    kept = set(model.state_dict())
    whole = {k for k in adapter.shapes if "embed" in k or (k.endswith(".base_layer.weight") and k in kept)}
    surplus = sorted(set(adapter.shapes) - set(expected) - whole)
    if absent or surplus:
        raise AdapterError(
            f"{adapter.path}: the adapter does not fit base model {base_name}: "
            f"{len(absent)} tensors it should have are missing {absent[:4]}, "
            f"{len(surplus)} that it has fit nowhere {surplus[:4]}"
        )
    return cast(PeftModel, model)


def _refuse_untrained(adapter: Adapter, model: PeftModel, missing: set[str]) -> None:
    """Refuse weights that neither the base nor the adapter has: they would be random."""
    saved = {key.removeprefix("base_model.model.") for key in adapter.shapes}
    unexplained = sorted(key for key in missing if key not in saved)
    tied = {name for name, _ in model.get_base_model().named_parameters()}
    random = [key for key in unexplained if key in tied or _wrapped(key) in tied]
    if random:
        raise AdapterError(
            f"{adapter.path}: neither the base model nor the adapter has {', '.join(random[:4])}"
            f"{' ...' if len(random) > 4 else ''}; save the trained head with the adapter (modules_to_save)"
        )


def _wrapped(key: str) -> str:
    module, _, parameter = key.rpartition(".")
    return f"{module}.original_module.{parameter}"
