"""Loading an adapter on its base model, ready to be linearised."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as transformers_logging

from lapora.config import Dtype, ModelSettings, Placement, Quantization
from lapora.errors import AdapterError, UsageError, first_line
from lapora.models.adapter import Adapter, ModelKind
from lapora.models.device_map import OwnWeights, keep_missing, loading_arguments, place_adapter, without_placement
from lapora.models.fingerprint import digest_in, fingerprint_of_tensors
from lapora.models.quantization import (
    keep_inputs_whole,
    quantization_config,
    resolve_quantization,
    saved_quantization,
)


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
        weights: The base's own weights, by name; none where they are quantised.
    """

    model: PeftModel
    tokenizer: Any
    kind: ModelKind
    base_model: str
    revision: str | None
    quantize: Quantization
    dtype: str
    fingerprint: str
    number_of_labels: int | None
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def digest(self, dtype: str) -> str:
        """Digest of all of the base's weights, rounded to an element type that is no finer than the model's."""
        return digest_in(dtype, self.weights)

    @property
    def pad_token_id(self) -> int:
        """The id that batches are padded with; padding is masked, so end-of-text serves where none is set."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return int(candidate)
        return 0


def load_model(adapter: Adapter, how: ModelSettings) -> LoadedModel:
    """Load the base model and the adapter on it.

    Args:
        adapter: The adapter, as read from its directory.
        how: Base model, quantization, type and devices.

    Raises:
        AdapterError: The base cannot be loaded, or the adapter does not fit it.
        UsageError: An impossible device or an impossible combination.
    """
    return put_adapter(adapter, load_base(adapter, how))


def put_adapter(adapter: Adapter, base: LoadedBase) -> LoadedModel:
    """Put an adapter on a base that has none.

    Raises:
        AdapterError: It does not fit, or its tokenizer cannot be loaded.
    """
    with silence_libraries():
        tokenizer = tokenizer_at(adapter, base.name, base.revision, base.trust_remote_code)
        with without_placement(base.model):
            model = _load_adapter(adapter, base.model, base.name)
    _refuse_untrained(adapter, model, base.missing)
    if base.spread is not None:
        place_adapter(model, load_peft_weights(os.fspath(adapter.path), device="cpu"))
    if base.element_type == torch.float64:
        model = model.double()
    if base.quantize == "none" and base.spread is None:
        model = model.to(base.device)
    model.eval()
    if base.quantize != "none":
        keep_inputs_whole(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        kind=adapter.kind,
        base_model=base.name,
        revision=base.revision,
        quantize=base.quantize,
        dtype=str(base.element_type).removeprefix("torch."),
        fingerprint=base.fingerprint,
        number_of_labels=getattr(base.model.config, "num_labels", None) if adapter.kind == "classifier" else None,
        weights=base.weights,
    )
    resolve_padding(loaded)
    return loaded


def resolve_padding(loaded: LoadedModel) -> None:
    """A decoder with a head finds the answer's position by the padding id: it must be the batches' own."""
    if loaded.kind == "classifier":
        cast(Any, loaded.model.get_base_model()).config.get_text_config().pad_token_id = loaded.pad_token_id


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
    quantize: Quantization
    element_type: torch.dtype
    device: torch.device
    spread: Placement | None
    weights: Mapping[str, torch.Tensor]
    fingerprint: str
    trust_remote_code: bool


class ChosenBase(NamedTuple):
    """The base model that an adapter asks for, settled before any weight is read."""

    name: str
    revision: str | None
    config: Any
    quantize: Quantization
    element_type: torch.dtype


def choose_base(adapter: Adapter, how: ModelSettings, device: torch.device) -> ChosenBase:
    """Resolve which base model is loaded, and in which type; reads its configuration alone.

    Raises:
        AdapterError: There is no base, or its configuration cannot be read.
        UsageError: An impossible combination.
    """
    name = how.base_model or adapter.base_model
    if not name:
        raise AdapterError(f"{adapter.path}: the adapter names no base model; give one with --base-model")
    revision = None if how.base_model else adapter.revision
    config = load_config(name, revision, how.trust_remote_code)
    quantize = resolve_quantization(name, how.quantize, saved_quantization(name, config))
    element_type = element_type_of(how.dtype or "auto", config, device)
    if quantize != "none" and element_type == torch.float64:
        raise UsageError(f"--dtype float64 cannot be combined with --quantize {quantize}")
    return ChosenBase(name, revision, config, quantize, element_type)


def load_base(adapter: Adapter, how: ModelSettings) -> LoadedBase:
    """Load the base model that an adapter asks for.

    Args:
        adapter: The adapter, as read from its directory.
        how: Base model, quantization, type and devices.

    Raises:
        AdapterError: The base cannot be loaded.
        UsageError: An impossible device or an impossible combination.
    """
    where = resolve_device(how.device)
    with silence_libraries():
        chosen = choose_base(adapter, how, where)
        base, missing = _load_base(adapter, chosen, where, how)
        if how.spread is not None:
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
        spread=how.spread,
        weights=weights if chosen.quantize == "none" else {},
        fingerprint=fingerprint_of_tensors(weights),
        trust_remote_code=how.trust_remote_code,
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


def _load_base(adapter: Adapter, chosen: ChosenBase, device: torch.device, how: ModelSettings) -> tuple[Any, set[str]]:
    arguments: dict[str, Any] = {
        "config": chosen.config,
        "revision": chosen.revision,
        "dtype": chosen.element_type,
        "trust_remote_code": how.trust_remote_code,
        "output_loading_info": True,
    }
    if how.spread is not None:
        arguments |= loading_arguments(how.spread)
    if chosen.quantize != "none":
        arguments.setdefault("device_map", {"": device})
        if getattr(chosen.config, "quantization_config", None) is None:
            whole = adapter.config.get("modules_to_save") or ()
            arguments["quantization_config"] = quantization_config(chosen.quantize, chosen.element_type, whole)
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


def load_tokenizer(adapter: Adapter, base_model: str | None = None) -> Any:
    """The adapter's tokenizer alone, without the model.

    Raises:
        AdapterError: It cannot be loaded, or the adapter names no base model.
    """
    base_name = base_model or adapter.base_model
    if not base_name:
        raise AdapterError(f"{adapter.path}: the adapter names no base model; give one with --base-model")
    with silence_libraries():
        return tokenizer_at(adapter, base_name, None if base_model else adapter.revision, False)


def tokenizer_at(adapter: Adapter, base_name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer beside the adapter, or else of the base at a revision.

    Raises:
        AdapterError: It cannot be loaded.
    """
    own = any((adapter.path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    source, at = (adapter.path, None) if own else (base_name, revision)
    try:
        return AutoTokenizer.from_pretrained(source, revision=at, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise AdapterError(
            f"{source}: its tokenizer cannot be loaded ({first_line(error, 160)}); save the tokenizer beside the "
            "adapter"
        ) from error


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Keep the libraries' progress bars and load reports off the terminal; what matters becomes an error."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
