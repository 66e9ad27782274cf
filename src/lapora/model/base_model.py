"""Loading a base model, without an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, TypedDict, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lapora.config import Dtype, Quantisation, Spread
from lapora.errors import AdapterError, UsageError, first_line
from lapora.model.adapter import Adapter, ModelKind
from lapora.model.fingerprint import fingerprint_of_tensors
from lapora.model.placement import OwnWeights, keep_missing, loading_arguments
from lapora.model.quantisation import quantisation_config, saved_quantisation, settle_quantisation
from lapora.model.quiet import quiet_libraries


@dataclass(frozen=True, eq=False)
class LoadedBase:
    """A base model without an adapter.

    Attributes:
        model: The base model.
        missing: Tensors that its files do not have: an adapter must bring them.
        kind: What it was loaded as.
        name: Name or path that it was loaded from.
        revision: Its revision, or None.
        quantize: How it is quantised.
        element_type: Type of its unquantised weights.
        device: Where it is, unless spread.
        spread: How its layers are spread over devices, or None.
        weights: Its own weights, by name; none where they are quantised.
        fingerprint: Digest of a sample of every tensor.
        trust_remote_code: Whether the repository's own code may run.
    """

    model: Any
    missing: set[str]
    kind: ModelKind
    name: str
    revision: str | None
    quantize: Quantisation
    element_type: torch.dtype
    device: torch.device
    spread: Spread | None
    weights: Mapping[str, torch.Tensor]
    fingerprint: str
    trust_remote_code: bool


class Loading(TypedDict, total=False):
    """How an adapter's base model is loaded; each may be left out.

    Attributes:
        base_model: Name or path of the base; by default the one the adapter records.
        quantize: ``none``, ``8bit`` or ``4bit``; None is as the base's own files are.
        dtype: Type of the base's weights; ``auto`` is float32 on a CPU and the base's own on a GPU. LoRA
            weights stay in float32 at least.
        device: ``auto``, ``cpu``, ``cuda`` ...
        spread: Spread the layers over devices, host and disk; None is one device.
        trust_remote_code: Let a model's repository run its own code.
    """

    base_model: str | None
    quantize: Quantisation | None
    dtype: Dtype
    device: str
    spread: Spread | None
    trust_remote_code: bool


class ChosenBase(NamedTuple):
    """The base model that an adapter asks for, settled before any weight is read."""

    name: str
    revision: str | None
    config: Any
    quantize: Quantisation
    element_type: torch.dtype


def choose_base(
    adapter: Adapter,
    *,
    base_model: str | None,
    quantize: Quantisation | None,
    dtype: Dtype,
    device: torch.device,
    trust_remote_code: bool,
) -> ChosenBase:
    """Settle which base, and in which type; the arguments are those of :class:`Loading`.

    Raises:
        AdapterError: There is no base, or its configuration cannot be read.
        UsageError: An impossible combination.
    """
    name = base_model or adapter.base_model
    if not name:
        raise AdapterError(f"{adapter.path}: the adapter names no base model; give one with --base-model")
    revision = None if base_model else adapter.revision
    config = load_config(name, revision, trust_remote_code)
    quantize = settle_quantisation(name, quantize, saved_quantisation(name, config))
    element_type = element_type_of(dtype, config, device)
    if quantize != "none" and element_type == torch.float64:
        raise UsageError(f"--dtype float64 cannot be combined with --quantize {quantize}")
    return ChosenBase(name, revision, config, quantize, element_type)


def load_base(
    adapter: Adapter,
    *,
    base_model: str | None = None,
    quantize: Quantisation | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    spread: Spread | None = None,
    trust_remote_code: bool = False,
) -> LoadedBase:
    """Load the base model that an adapter asks for; the arguments are those of :class:`Loading`.

    Raises:
        AdapterError: The base cannot be loaded.
        UsageError: An impossible device or an impossible combination.
    """
    where = resolve_device(device)
    with quiet_libraries():
        chosen = choose_base(
            adapter,
            base_model=base_model,
            quantize=quantize,
            dtype=dtype,
            device=where,
            trust_remote_code=trust_remote_code,
        )
        base, missing = _load_base(adapter, chosen, where, spread, trust_remote_code)
        if spread is not None:
            keep_missing(base, missing)
    weights = OwnWeights(base, missing)
    return LoadedBase(
        model=base,
        missing=missing,
        kind=adapter.kind,
        name=str(chosen.name),
        revision=chosen.revision,
        quantize=chosen.quantize,
        element_type=chosen.element_type,
        device=where,
        spread=spread,
        weights=weights if chosen.quantize == "none" else {},
        fingerprint=fingerprint_of_tensors(weights),
        trust_remote_code=trust_remote_code,
    )


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
        reason = first_line(error)
        raise UsageError(f"--device {device}: not available on this machine ({reason})") from error
    return resolved


def load_config(base_name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """A base model's configuration.

    Raises:
        AdapterError: It cannot be read.
    """
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


def element_type_of(dtype: Dtype, config: Any, device: torch.device) -> torch.dtype:
    """Type of a base's weights; ``auto`` is float32 on a CPU and the base's own on a GPU."""
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    own = getattr(config.get_text_config(), "dtype", None)
    if device.type == "cpu" or own is None:
        return torch.float32
    return cast(torch.dtype, getattr(torch, own) if isinstance(own, str) else own)


def _load_base(
    adapter: Adapter, chosen: ChosenBase, device: torch.device, spread: Spread | None, trust_remote_code: bool
) -> tuple[Any, set[str]]:
    arguments: dict[str, Any] = {
        "config": chosen.config,
        "revision": chosen.revision,
        "dtype": chosen.element_type,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
    }
    if spread is not None:
        arguments |= loading_arguments(spread)
    if chosen.quantize != "none":
        arguments.setdefault("device_map", {"": device})
        if getattr(chosen.config, "quantization_config", None) is None:
            whole = adapter.config.get("modules_to_save") or ()
            arguments["quantization_config"] = quantisation_config(chosen.quantize, chosen.element_type, whole)
    loader = loader_of(adapter, chosen.config)
    try:
        base, information = loader.from_pretrained(chosen.name, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, UnpicklingError, SafetensorError) as error:
        raise _base_error(chosen.name, error) from error
    return base, set(information["missing_keys"])


def loader_of(adapter: Adapter, config: Any) -> Any:
    """The class that loads an adapter's kind of base; a classifier's ``config`` is told how many labels there are."""
    if adapter.kind != "classifier":
        return AutoModelForCausalLM
    labels = adapter.number_of_labels()
    if labels is not None:
        config.num_labels = labels
    return AutoModelForSequenceClassification
