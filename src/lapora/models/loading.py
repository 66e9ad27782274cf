"""Load an adapter on its base model, frozen and in eval mode."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as transformers_logging

from lapora.config import Dtype, ModelSettings, Placement, Quantization
from lapora.errors import AdapterError, UsageError, first_line
from lapora.models.adapter import LFS_POINTER, Adapter, ModelKind, is_hub_id
from lapora.models.device_map import (
    BaseWeights,
    device_map_arguments,
    initialize_missing,
    place_adapter,
    without_placement,
)
from lapora.models.fingerprint import digest_at_dtype, fingerprint_of_tensors
from lapora.models.outputs import embedding_rows
from lapora.models.quantization import (
    quantization_config,
    resolve_quantization,
    saved_quantization,
    set_to_eval,
    unquantized_modules,
)


@dataclass(frozen=True)
class LoadedModel:
    """A frozen PEFT model in eval mode with its tokenizer.

    Attributes:
        model: The PEFT model; no parameter requires a gradient.
        tokenizer: The adapter's tokenizer if it has one, else the base model's.
        kind: ``causal`` or ``classifier``.
        base_model: Name or path of the base model.
        revision: Revision of the base model, or None.
        quantize: Quantization of the base.
        dtype: Element type of the base's unquantized weights, such as ``float32``.
        fingerprint: Digest of a sample of every base tensor, which identifies the base.
        number_of_labels: Number of outputs of a classification head, or None for a causal model.
        weights: The base's weights by name; empty if quantized.
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
        """Compute the digest of all base weights, rounded to an element type not more precise than the model's."""
        return digest_at_dtype(dtype, self.weights)

    def digest_of_used(self, dtype: str) -> str:
        """Compute the digest as :meth:`digest`, without the modules that the adapter replaces (``modules_to_save``)."""
        modules = cast(nn.Module, self.model.get_base_model()).named_modules()
        replaced = tuple(f"{name}." for name, module in modules if isinstance(module, ModulesToSaveWrapper))
        used = [name for name in self.weights if not name.startswith(replaced)]
        return digest_at_dtype(dtype, {name: self.weights[name] for name in used})

    @property
    def pad_token_id(self) -> int:
        """Padding id: the tokenizer's, else its end-of-text id (padding is masked), else 0; one with an embedding."""
        rows = self.embedding_rows
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None and (rows is None or candidate < rows):
                return int(candidate)
        return 0

    @property
    def embedding_rows(self) -> int | None:
        """Number of token ids that have an embedding, or None if the model does not say."""
        return embedding_rows(self.model.get_base_model())


Loader = Callable[[Adapter, ModelSettings], "LoadedModel"]
"""Loads an adapter; :func:`load_model`, or one that shares base models."""


def load_model(adapter: Adapter, how: ModelSettings) -> LoadedModel:
    """Load the base model and the adapter on it.

    Args:
        adapter: The adapter, as read from its directory.
        how: Base model, quantization, type and devices.

    Raises:
        AdapterError: The base cannot be loaded, or the adapter does not fit it.
        UsageError: The device is not available, or options cannot be combined.
    """
    return attach_adapter(adapter, load_base(adapter, how))


def load_once() -> Loader:
    """Return a loader for one adapter that loads it at the first call and then returns the same model."""
    loaded: list[LoadedModel] = []

    def load(adapter: Adapter, how: ModelSettings) -> LoadedModel:
        if not loaded:
            loaded.append(load_model(adapter, how))
        return loaded[0]

    return load


def attach_adapter(adapter: Adapter, base: LoadedBase) -> LoadedModel:
    """Attach an adapter to a base model without one.

    Args:
        adapter: The adapter, as read from its directory.
        base: The base model.

    Raises:
        AdapterError: The adapter does not fit the base, or its tokenizer cannot be loaded.
    """
    if base.element_type == torch.float64 and isinstance(adapter.config.get("init_lora_weights"), str):
        base.model.float()  # PEFT computes these initializations in float32 at most
    with silence_libraries():
        tokenizer = tokenizer_at(adapter, base.name, base.revision, base.trust_remote_code)
        with without_placement(base.model):
            model = _load_adapter(adapter, base.model, base.name)
    _check_all_initialized(adapter, model, base.missing)
    if base.placement is not None:
        place_adapter(model, load_peft_weights(os.fspath(adapter.path), device="cpu"))
    if base.element_type == torch.float64:
        model = model.double()
    if base.quantize == "none" and base.placement is None:
        model = model.to(base.device)
    set_to_eval(model, base.quantize)
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
    """Set the padding id in a classifier's configuration, by which a decoder with a head finds the last token."""
    if loaded.kind == "classifier":
        cast(Any, loaded.model.get_base_model()).config.get_text_config().pad_token_id = loaded.pad_token_id


def _load_adapter(adapter: Adapter, base: nn.Module, base_name: str) -> PeftModel:
    try:
        model = PeftModel.from_pretrained(base, os.fspath(adapter.path), is_trainable=False)
    except (RuntimeError, ValueError, TypeError, ImportError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if lines:
            raise AdapterError(
                f"{adapter.path}: the adapter does not fit base model {base_name}: {'; '.join(lines)}"
            ) from error
        if isinstance(error, KeyError) and str(error.args[0]).endswith((".weight", ".bias")):
            raise AdapterError(
                f"{adapter.path}: its weights have no {error.args[0]}, which peft reads from them; save the trained "
                "head with the adapter (modules_to_save)"
            ) from error
        raise AdapterError(
            f"{adapter.path}: peft cannot attach it to base model {base_name} ({first_line(error)})"
        ) from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    absent = sorted(set(expected) - set(adapter.shapes))
    # peft also saves embeddings, and an output layer with LoRA, in full, and loads them back.
    state = set(model.state_dict())
    full = {k for k in adapter.shapes if "embed" in k or k in state}
    unexpected = sorted(set(adapter.shapes) - set(expected) - full)
    if absent or unexpected:
        raise AdapterError(
            f"{adapter.path}: the adapter does not fit base model {base_name}: "
            f"{len(absent)} missing tensors {absent[:4]}, "
            f"{len(unexpected)} unexpected tensors {unexpected[:4]}; check --base-model"
        )
    return cast(PeftModel, model)


def _check_all_initialized(adapter: Adapter, model: PeftModel, missing: set[str]) -> None:
    """Reject a model with weights that neither the base's files nor the adapter contain: they would be random."""
    saved = {key.removeprefix("base_model.model.") for key in adapter.shapes}
    uninitialized = sorted(key for key in missing if key not in saved)
    parameters = {name for name, _ in model.get_base_model().named_parameters()}  # tied weights occur once
    random = [key for key in uninitialized if key in parameters or _wrapped(key) in parameters]
    if random:
        raise AdapterError(
            f"{adapter.path}: neither the base model nor the adapter contains {', '.join(random[:4])}"
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
        missing: Names of tensors that are not in its files; the adapter must contain them.
        kind: ``causal`` or ``classifier``.
        name: Name or path.
        revision: Revision, or None.
        quantize: Quantization.
        element_type: Dtype of its unquantized weights.
        device: Its device, without a placement.
        placement: Placement of its layers on devices, CPU memory and disk, or None.
        weights: Its weights by name; empty if quantized.
        fingerprint: Digest of a sample of every tensor.
        trust_remote_code: Whether the repository's Python code may run.
    """

    model: Any
    missing: set[str]
    kind: ModelKind
    name: str
    revision: str | None
    quantize: Quantization
    element_type: torch.dtype
    device: torch.device
    placement: Placement | None
    weights: Mapping[str, torch.Tensor]
    fingerprint: str
    trust_remote_code: bool


class ResolvedBase(NamedTuple):
    """Name, configuration, quantization and dtype of a base model, resolved before any weight is read."""

    name: str
    revision: str | None
    config: Any
    quantize: Quantization
    element_type: torch.dtype


def resolve_base(adapter: Adapter, how: ModelSettings, device: torch.device) -> ResolvedBase:
    """Resolve which base model is loaded, and in which type; reads only its configuration.

    Raises:
        AdapterError: No base model is given, or its configuration cannot be read.
        UsageError: Options cannot be combined.
    """
    name = _base_name(adapter, how.base_model)
    revision = None if how.base_model else adapter.revision
    config = load_config(name, revision, how.trust_remote_code)
    quantize = resolve_quantization(name, how.quantize, saved_quantization(name, config))
    element_type = element_type_of(how.dtype or "auto", config, device)
    if element_type == torch.float64:
        if quantize != "none":
            raise UsageError(f"--dtype float64 cannot be combined with --quantize {quantize}")
        config._experts_implementation = "eager"  # the grouped matrix product of experts has no float64
    return ResolvedBase(name, revision, config, quantize, element_type)


def tokenizer_and_embeddings(adapter: Adapter, how: ModelSettings) -> tuple[Any, int | None]:
    """Return the tokenizer and the number of token ids that will have an embedding; reads no weights.

    Raises:
        AdapterError: The configuration or the tokenizer cannot be read.
    """
    with silence_libraries():
        name = _base_name(adapter, how.base_model)
        revision = None if how.base_model else adapter.revision
        config = load_config(name, revision, how.trust_remote_code)
        tokenizer = tokenizer_at(adapter, name, revision, how.trust_remote_code)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return tokenizer, max(rows, adapter.embedding_rows() or 0) if isinstance(rows, int) else None


def _base_name(adapter: Adapter, base_model: str | None) -> str:
    name = base_model or adapter.base_model
    if not name:
        raise AdapterError(f"{adapter.path}: the adapter names no base model; give one with --base-model")
    return os.path.abspath(name) if Path(name).is_dir() else name


def load_base(adapter: Adapter, how: ModelSettings) -> LoadedBase:
    """Load the base model of an adapter, or the one given.

    Args:
        adapter: The adapter, as read from its directory.
        how: Base model, quantization, type and devices.

    Raises:
        AdapterError: The base cannot be loaded.
        UsageError: The device is not available, or options cannot be combined.
    """
    device = resolve_device(how.device)
    has_gpu = torch.cuda.is_available() or torch.xpu.is_available()
    if adapter.config.get("init_lora_weights") == "loftq" and not has_gpu:
        raise AdapterError(
            f"{adapter.path}: init_lora_weights is loftq, by which PEFT quantizes the base weights on a GPU each time "
            "the adapter is loaded, and this machine has none; load it on a GPU, or train with a base saved in its "
            "quantized form and init_lora_weights true"
        )
    with silence_libraries():
        resolved = resolve_base(adapter, how, device)
        base, missing = _load_base(adapter, resolved, device, how)
        resize_embeddings(base, adapter)
        if how.placement is not None:
            initialize_missing(base, missing)
    weights = BaseWeights(base, missing)
    return LoadedBase(
        model=base,
        missing=missing,
        kind=adapter.kind,
        name=str(resolved.name),
        revision=resolved.revision,
        quantize=resolved.quantize,
        element_type=resolved.element_type,
        device=device,
        placement=how.placement,
        weights=weights if resolved.quantize == "none" else {},
        fingerprint=fingerprint_of_tensors(weights),
        trust_remote_code=how.trust_remote_code,
    )


def resize_embeddings(base: Any, adapter: Adapter) -> None:
    """Add the token embeddings that the adapter saved beyond the base's own, as for an added padding token."""
    rows = embedding_rows(base)
    saved = adapter.embedding_rows()
    if rows is None or saved is None or saved <= rows:
        return
    base.resize_token_embeddings(saved, mean_resizing=False)
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        if module is not None:  # rows that the adapter does not overwrite would be random
            module.weight.data[rows:] = 0


def resolve_device(device: str) -> torch.device:
    """Return the device for a name; ``auto`` is the GPU if there is one, else the CPU.

    Raises:
        UsageError: The device does not exist on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, dtype=torch.float64, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:  # TypeError: a device without float64, such as mps
        reason = first_line(error)
        raise UsageError(f"--device {device}: not available on this machine ({reason}); use --device auto") from error
    return resolved


def load_config(base_name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Load the configuration of a base model.

    Raises:
        AdapterError: The configuration cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(base_name, revision=revision, trust_remote_code=trust_remote_code)
        config.get_text_config()  # raises for a model with several text models
        return config
    except (OSError, ValueError, KeyError) as error:
        raise _base_error(base_name, error) from error


def _base_error(base_name: str, error: Exception) -> AdapterError:
    reason = first_line(error, 160)
    no_folder = "no such folder, and " if not Path(base_name).is_dir() else ""
    if no_folder and not is_hub_id(base_name):
        return AdapterError(f"base model {base_name}: no such folder; give its folder or Hub id with --base-model")
    for file in Path(base_name).glob("*.safetensors"):
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                return AdapterError(f"{file}: a Git LFS pointer, not the weights; download them with `git lfs pull`")
    if isinstance(error, UnpicklingError):
        reason = "its weights are a pickle with objects other than tensors, which could run code and is not opened"
    return AdapterError(
        f"base model {base_name}: {no_folder}it cannot be loaded ({reason}); "
        "give a local folder with --base-model, or check the name and the network"
    )


def element_type_of(dtype: Dtype, config: Any, device: torch.device) -> torch.dtype:
    """Return the dtype of a base's weights; ``auto`` is float32 on a CPU and the base's own dtype on a GPU."""
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    own = getattr(config.get_text_config(), "dtype", None)
    if device.type == "cpu" or own is None:
        return torch.float32
    return cast(torch.dtype, getattr(torch, own) if isinstance(own, str) else own)


_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    RuntimeError,
    ImportError,
    UnpicklingError,
    SafetensorError,
)


def _load_base(
    adapter: Adapter, resolved: ResolvedBase, device: torch.device, how: ModelSettings
) -> tuple[Any, set[str]]:
    arguments: dict[str, Any] = {
        "config": resolved.config,
        "revision": resolved.revision,
        "dtype": resolved.element_type,
        "trust_remote_code": how.trust_remote_code,
        "output_loading_info": True,
    }
    if how.placement is not None:
        arguments |= device_map_arguments(how.placement)
    loader = auto_class(adapter, resolved.config)
    try:
        if resolved.quantize != "none":
            arguments.setdefault("device_map", {"": device})
            if getattr(resolved.config, "quantization_config", None) is None:
                empty = empty_base(adapter, resolved, how.trust_remote_code)
                skipped = unquantized_modules(empty, adapter.config.get("modules_to_save") or ())
                arguments["quantization_config"] = quantization_config(
                    resolved.quantize, resolved.element_type, skipped
                )
        base, information = loader.from_pretrained(resolved.name, **arguments)
    except _LOADING_ERRORS as error:
        raise _base_error(resolved.name, error) from error
    return base, set(information["missing_keys"])


def empty_base(adapter: Adapter, resolved: ResolvedBase, trust_remote_code: bool) -> Any:
    """Return the base model on the ``meta`` device, without weights and unquantized."""
    config = copy.deepcopy(resolved.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loader = auto_class(adapter, config)
    arguments: dict[str, Any] = {"dtype": resolved.element_type, "trust_remote_code": trust_remote_code}
    code = (getattr(config, "auto_map", None) or {}).get(loader.__name__, "")
    if trust_remote_code and code and resolved.revision and code.rpartition("--")[0] in ("", config.name_or_path):
        arguments["code_revision"] = resolved.revision  # the base's own code: that of its revision
    with torch.device("meta"):
        return loader.from_config(config, **arguments)


def auto_class(adapter: Adapter, config: Any) -> Any:
    """Return transformers' auto class for the kind of model; sets ``config.num_labels`` of a classifier."""
    if adapter.kind != "classifier":
        return AutoModelForCausalLM
    labels = adapter.number_of_labels()
    if labels is not None:
        config.num_labels = labels
    return AutoModelForSequenceClassification


def load_tokenizer(adapter: Adapter, base_model: str | None = None) -> Any:
    """Load the adapter's tokenizer without the model.

    Raises:
        AdapterError: The tokenizer cannot be loaded, or there is no base model in the adapter's configuration.
    """
    base_name = _base_name(adapter, base_model)
    with silence_libraries():
        return tokenizer_at(adapter, base_name, None if base_model else adapter.revision, False)


def tokenizer_at(adapter: Adapter, base_name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Load the tokenizer in the adapter's folder, else that of the base at a revision.

    Raises:
        AdapterError: The tokenizer cannot be loaded.
    """
    own = any((adapter.path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    source, at = (adapter.path, None) if own else (base_name, revision)
    try:
        return AutoTokenizer.from_pretrained(source, revision=at, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not own and not Path(base_name).is_dir():
            raise _base_error(base_name, error) from error
        raise AdapterError(
            f"{source}: its tokenizer cannot be loaded ({first_line(error, 160)}); save the tokenizer in the "
            "adapter's folder"
        ) from error


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Silence third-party progress bars, warnings and load reports."""
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
