"""Read a PEFT adapter from disk or the Hub, and check that it is supported.

The base model is not loaded, so that reading an adapter is fast.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from lapora.config import ModelSettings
from lapora.errors import AdapterError, UsageError

ModelKind = Literal["causal", "classifier"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LFS_POINTER = b"version https://git-lfs"

_KIND_BY_TASK_TYPE: dict[str, ModelKind] = {"CAUSAL_LM": "causal", "SEQ_CLS": "classifier"}

# Settings of a LoraConfig under which a layer no longer computes  W x + scaling * B A x.
_UNSUPPORTED_SETTINGS = {
    "use_qalora": "QA-LoRA (use_qalora)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow routing (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
}


# Initializations by which PEFT changes the base weights at every load, differently each time.
_REDRAWN = re.compile(r"pissa_niter_\d+|lora_ga")


@dataclass(frozen=True)
class Head:
    """Known properties of a model's outputs.

    Attributes:
        kind: ``causal`` or ``classifier``.
        labels: Number of outputs of a classification head, or None.
        problem_type: ``problem_type`` of the base model's configuration, or None.
        source: Evidence for the kind, in words.
    """

    kind: ModelKind
    labels: int | None = None
    problem_type: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Adapter:
    """A supported adapter, as read from its directory.

    Attributes:
        path: The directory.
        config: The parsed ``adapter_config.json``.
        kind: Kind of model, from the adapter's ``task_type``.
        sha256: Digest of the weights file, which identifies the posterior mean.
        shapes: Shape of every tensor in the weights file, by key.
        notes: Trained parameters that the posterior does not include, in words.
    """

    path: Path
    config: dict[str, Any]
    kind: ModelKind
    sha256: str
    shapes: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = field(default=())

    @property
    def base_model(self) -> str | None:
        """Name or absolute path of the base model in the adapter's configuration.

        A relative path may be beside the adapter.
        """
        return _base_model(self.config, self.path)

    @property
    def revision(self) -> str | None:
        """Revision of the base model in the adapter's configuration."""
        return self.config.get("revision")

    def on_base(self, name: str, revision: str | None) -> Adapter:
        """Return the adapter on another base model than the one in its configuration."""
        return replace(self, config={**self.config, "base_model_name_or_path": name, "revision": revision})

    @property
    def head(self) -> Head:
        """Properties of the outputs, from the adapter's own files."""
        return Head(self.kind, self.number_of_labels(), source=_source_of_kind(self.config))

    def number_of_labels(self) -> int | None:
        """Return the number of outputs of the saved classification head, or None without one."""
        return _number_of_labels(self.shapes)

    def embedding_rows(self) -> int | None:
        """Return the number of token embeddings saved with the adapter, or None without them."""
        rows = [
            shape[0]
            for key, shape in self.shapes.items()
            if key.endswith(_EMBEDDINGS) and len(shape) == 2 and not _in_block(key.split("."))
        ]
        return max(rows, default=None)


def _base_model(config: Mapping[str, Any], path: Path) -> str | None:
    name: str | None = config.get("base_model_name_or_path")
    if name and not os.path.isabs(name):
        for folder in (Path(), path, path.parent):
            if (folder / name).is_dir():
                return os.path.abspath(folder / name)
    return name


_EMBEDDINGS = tuple(
    f".{name}.weight" for name in ("embed_tokens", "word_embeddings", "wte", "embed_in", "embed_out", "lm_head")
)
"""Suffixes of the names of fully saved token embeddings and language-model heads."""

_HEADS = ("logits_proj", "linear_out", "out_proj", "classifier", "score", "summary")
"""Names of the layer that writes the outputs of a classification head: XLNet's, Funnel's, RoBERTa's, ..., XLM's."""


def _number_of_labels(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    saved = {
        tuple(key.split(".")): shape
        for key, shape in shapes.items()
        if key.endswith(".weight") and "lora_" not in key and len(shape) == 2
    }
    for head in _HEADS:
        found = [shape[0] for parts, shape in saved.items() if parts[-2] == head and not _in_block(parts)]
        if found:
            return found[-1]
    return None


def _in_block(parts: Sequence[str]) -> bool:
    """Return whether a parameter is in a numbered block, such as a fully trained attention layer."""
    return any(part.isdigit() for part in parts)


def check_adapter_files(path: Path) -> dict[str, Any]:
    """Check an adapter directory without reading its weights, and return its configuration.

    Raises:
        AdapterError: The directory is not a PEFT adapter, or its method is not plain LoRA on linear layers.
    """
    if not path.is_dir():
        raise AdapterError(f"{path}: no such directory; give a folder with {CONFIG_FILE}, or a Hub id (owner/name)")
    if not _is_utf8(path):
        raise AdapterError(f"{path}: its path is not UTF-8, which safetensors cannot read; rename the folder")
    config = read_config(path)
    _check_supported(path, config)
    task_type = config.get("task_type")
    if task_type is not None and task_type not in _KIND_BY_TASK_TYPE:
        raise AdapterError(
            f"{path / CONFIG_FILE}: task_type {task_type!r} is not supported; it must be CAUSAL_LM or SEQ_CLS "
            "(set it, if the adapter is one of these)"
        )
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        if (path / "adapter_model.bin").is_file():
            raise AdapterError(
                f"{path}: only adapter_model.bin, a pickle, which lapora never opens; "
                "load it with peft and save it again to get adapter_model.safetensors"
            )
        if list(path.glob("adapter_model*-of-*.safetensors")):
            raise AdapterError(
                f"{path}: the adapter's weights are in several files (shards); load it with peft and save it again "
                f"with a larger max_shard_size, to get one {WEIGHTS_FILE}"
            )
        raise AdapterError(f"{path}: missing {WEIGHTS_FILE}; save the adapter with save_pretrained")
    with weights.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise AdapterError(f"{weights}: a Git LFS pointer, not the weights; download them with `git lfs pull`")
    return config


def read_adapter(location: str | Path) -> Adapter:
    """Read an adapter directory.

    Args:
        location: A directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The adapter, with a digest of its weights but without loading them.

    Raises:
        AdapterError: The directory is not a PEFT adapter, or its method is not plain LoRA on linear layers.
    """
    path = Path(location)
    config = check_adapter_files(path)
    weights = path / WEIGHTS_FILE
    shapes = _tensor_shapes(weights)
    return Adapter(
        path=path,
        config=config,
        kind=_kind(config, shapes),
        sha256=_digest(weights),
        shapes=shapes,
        notes=_notes(config, shapes),
    )


def read_head(model: ModelSettings) -> Head:
    """Return the properties of the head from the files of the adapter and a local base model; imports no torch.

    Raises:
        AdapterError: As :func:`read_adapter`.
    """
    config = check_adapter_files(model.folder)
    shapes = _tensor_shapes(model.folder / WEIGHTS_FILE)
    base = _base_config(model.base_model or _base_model(config, model.folder), config.get("revision"))
    labels = _number_of_labels(shapes)
    if labels is None and str((base.get("architectures") or [""])[0]).endswith("ForSequenceClassification"):
        labels = len(base.get("id2label") or ()) or base.get("num_labels", 2)  # the default, 2, is not saved
    return Head(_kind(config, shapes), labels, base.get("problem_type"), _source_of_kind(config))


def _base_config(name: str | None, revision: str | None) -> dict[str, Any]:
    """Return the configuration of a base model in a folder or in the Hub's cache; empty if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        file: Any = Path(name or "") / "config.json"
        if name and not Path(name).is_dir():
            file = try_to_load_from_cache(name, "config.json", revision=revision)
        found = json.loads(Path(file).read_text(encoding="utf-8")) if name and file else {}
    except (OSError, TypeError, ValueError):  # loading the model raises a better error
        return {}
    return found if isinstance(found, dict) else {}


def _source_of_kind(config: Mapping[str, Any]) -> str:
    task_type = config.get("task_type")
    return f"{CONFIG_FILE} has task_type {task_type}" if task_type else "no task_type, and no saved head"


def _kind(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelKind:
    task_type = config.get("task_type")
    if task_type is not None:
        return _KIND_BY_TASK_TYPE[task_type]
    return "causal" if _number_of_labels(shapes) is None else "classifier"


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` in a folder.

    Raises:
        AdapterError: It is missing, or not a JSON object.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        if inner := sorted(each.parent.name for each in path.glob(f"*/{CONFIG_FILE}")):
            raise AdapterError(
                f"{path}: no adapter itself, but a folder of {'one' if len(inner) == 1 else 'several'}: give "
                f"{' or '.join(str(path / name) for name in inner[:3])}"
                + (f" or another of {len(inner)}" if len(inner) > 3 else "")
                + ("; `lapora eval --checkpoints` compares them" if inner[0].startswith("checkpoint-") else "")
            )
        if snapshots := sorted(str(each.parent) for each in path.glob(f"snapshots/*/{CONFIG_FILE}")):
            raise AdapterError(f"{path}: a folder of the Hub's cache; give the adapter's id, or {snapshots[-1]}")
        if (path / "config.json").is_file():
            raise AdapterError(
                f"{path}: a full model, not an adapter (config.json but no {CONFIG_FILE}); give the adapter's folder, "
                "and a base model with --base-model; merged adapters are not supported: give the adapter as it was "
                "before merging"
            )
        raise AdapterError(f"{path}: missing {CONFIG_FILE}; give a folder saved by peft")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{file}: cannot be read as JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file}: not a JSON object; save the adapter again")
    return config


def _check_supported(path: Path, config: dict[str, Any]) -> None:
    peft_type = config.get("peft_type")
    if peft_type is None or (peft_type != "LORA" and str(peft_type).upper() == "LORA"):
        written = "no peft_type" if peft_type is None else f"peft_type {peft_type!r}"
        raise AdapterError(f'{path / CONFIG_FILE}: {written}, which peft cannot read; write "peft_type": "LORA"')
    if peft_type != "LORA":
        raise AdapterError(f"{path}: peft_type {peft_type} is not supported; only LORA is")
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str) and _REDRAWN.fullmatch(initialization.lower()):
        raise AdapterError(
            f"{path}: init_lora_weights is {initialization}, which changes the base weights by a random decomposition "
            "each time the adapter is loaded, so that no posterior fits it; convert the adapter to plain LoRA where "
            'it was trained: model.save_pretrained(DIR, path_initial_model_for_weight_conversion="INITIAL_ADAPTER")'
        )
    found = [name for key, name in _UNSUPPORTED_SETTINGS.items() if config.get(key)]
    if found:
        raise AdapterError(f"{path}: {', '.join(found)} is not supported; LoRA, rsLoRA and DoRA are")


def _notes(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    fixed = []
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        fixed.append("the adapter's biases")
    if config.get("trainable_token_indices"):
        fixed.append("trained token embeddings")
    if any("lora_embedding_A" in key for key in shapes):
        fixed.append("LoRA on embeddings")
    if any(".lora_A." in key and len(shape) > 2 for key, shape in shapes.items()):
        fixed.append("LoRA on convolutions")
    if any(".base_layer.out_proj.lora_A." in key for key in shapes):
        fixed.append("LoRA on nn.MultiheadAttention")
    if config.get("use_dora"):
        fixed.append("DoRA's magnitudes")
    if config.get("target_parameters"):
        fixed.append("LoRA on experts (target_parameters)")
    notes = [f"fixed at their trained values, not in the posterior: {', '.join(fixed)}"] if fixed else []
    if config.get("task_type") is None:
        kind = "a causal model: no" if _number_of_labels(shapes) is None else "a classifier: a"
        notes.append(f"task_type is missing in {CONFIG_FILE}; taken for {kind} classification head is saved")
    unknown = _unknown_settings(config)
    if unknown:
        notes.append(
            f"{CONFIG_FILE} has settings that the installed PEFT does not know and ignores: {', '.join(unknown)}"
        )
    return tuple(notes)


def _unknown_settings(config: dict[str, Any]) -> list[str]:
    """Return the settings with a value that the installed PEFT has no field for."""
    from peft import LoraConfig

    known = {each.name for each in fields(LoraConfig)}
    return sorted(key for key, value in config.items() if key not in known and value not in (None, False, "", [], {}))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file}: corrupt, or not a safetensors file ({error}); save or download it again"
        ) from error


_TOKENIZER_FILES = (
    "added_tokens.json",
    "additional_chat_templates/*",
    "bpe.codes",
    "chat_template*",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer*",
    "vocab.*",
)
_DOWNLOADED_FILES = (CONFIG_FILE, WEIGHTS_FILE, *_TOKENIZER_FILES, "config.json", "laplace/*")


def files_to_push(adapter: Adapter) -> list[str]:
    """Return the paths, in the adapter's folder, of its configuration, its weights and its tokenizer's files."""
    found = [file for pattern in _TOKENIZER_FILES for file in adapter.path.glob(pattern) if file.is_file()]
    return [CONFIG_FILE, WEIGHTS_FILE, *sorted(file.relative_to(adapter.path).as_posix() for file in found)]


def check_repository(repository: str) -> None:
    """Check the name of a repository to upload to, and that uploads are not switched off.

    Raises:
        UsageError: The name has no owner.
        AdapterError: HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import is_offline_mode

    if "/" not in repository:
        raise UsageError(f"{repository}: REPO is owner/name")
    if is_offline_mode():
        raise AdapterError(f"{repository}: HF_HUB_OFFLINE is set, so that nothing is uploaded; unset it")


def is_hub_id(location: str) -> bool:
    """Return whether a location is a Hub repository: ``owner/name``, and not a local folder."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", location)) and not Path(location).exists()


def local_model(model: ModelSettings, *, writes: bool = False) -> ModelSettings:
    """Return the settings with the adapter's local folder; an adapter on the Hub is downloaded.

    Args:
        model: Settings whose ``adapter`` is a folder or a Hub id.
        writes: Whether the command writes a posterior, which requires a folder outside the Hub's cache.

    Raises:
        AdapterError: The Hub has no such adapter, or cannot be reached.
        UsageError: A revision is given for a folder, or ``output_dir`` is required and missing.
    """
    if not is_hub_id(model.adapter):
        if model.revision is not None:
            raise UsageError(f"--revision requires an adapter on the Hub; {model.adapter} is a folder")
        return model
    if writes and model.output_dir is None:
        raise UsageError(
            f"{model.adapter}: an adapter on the Hub; give a folder for the posterior with --output-dir DIR"
        )
    return replace(model, fetched=fetch_adapter(model.adapter, model.revision))


def fetch_adapter(repository: str, revision: str | None = None) -> Path:
    """Download an adapter from the Hub, and return its folder in the cache.

    Args:
        repository: ``owner/name``.
        revision: Branch, tag or commit; None is the default branch.

    Raises:
        AdapterError: The repository is not found, access is denied, or the Hub is unreachable and the files are not
            cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    with hub_errors(repository, revision):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(_DOWNLOADED_FILES)))


@contextmanager
def hub_errors(repository: str, revision: str | None = None) -> Iterator[None]:
    """Convert the errors of the Hub's client into one-line errors with a remedy.

    Raises:
        AdapterError: For every error of the client.
    """
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of the client's HTTP library: no response
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise AdapterError(f"{repository}: gated on the Hub; request access on its page, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise AdapterError(
            f"{repository}: no such directory, and not found on the Hub; check the name, and HF_TOKEN if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise AdapterError(f"{repository}: the Hub has no revision {revision}; give another --revision") from error
    except HFValidationError as error:
        raise AdapterError(f"{repository}: no such directory, and not a valid Hub id; check the name") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise AdapterError(
                f"{repository}: access denied by the Hub (status {status}); set HF_TOKEN to a token with access"
            ) from error
        if status == 412:
            raise AdapterError(
                f"{repository}: the repository was changed meanwhile, so nothing was uploaded; run the command again"
            ) from error
        raise AdapterError(f"{repository}: the Hub returned status {status}; try again later") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if is_offline_mode():
            raise AdapterError(
                f"{repository}: no such directory, and not completely in the Hub's cache (HF_HUB_OFFLINE is set); "
                "unset HF_HUB_OFFLINE, or give a folder"
            ) from error
        raise AdapterError(
            f"{repository}: no such directory, and the Hub cannot be reached; check the network, or give a folder"
        ) from error
    except (ConnectionError, HTTPError) as error:
        raise AdapterError(f"{repository}: the Hub cannot be reached; check the network and try again") from error
