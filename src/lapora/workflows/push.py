"""``lapora push``: upload a posterior to the repository of its adapter on the Hub, in one commit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lapora.config import ModelSettings, PushSettings
from lapora.errors import PosteriorError
from lapora.models.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    check_repository,
    files_to_push,
    hub_errors,
    read_config,
)
from lapora.report.card import posterior_section, with_section
from lapora.storage.compatibility import adapter_differences
from lapora.storage.files import json_bytes
from lapora.storage.manifest import Manifest, without_paths
from lapora.storage.saved import FACTORS_FILE, MANIFEST_FILE, open_posterior
from lapora.workflows.results import last_run_of

_CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """Result of ``push``.

    Attributes:
        address: URL of the commit.
        files: Uploaded files.
        notes: What the user should know.
    """

    address: str
    files: tuple[str, ...]
    notes: tuple[str, ...]


def push(model: ModelSettings, settings: PushSettings) -> Pushed:
    """Upload a posterior beside its adapter, and add a section about it to the model card.

    If the repository has no adapter, the adapter and its tokenizer are uploaded too; if it has the adapter, only the
    files of these that it lacks. The local folder from which ``fit`` read the rows is removed from the manifest.

    Args:
        model: The adapter, and the folder of its posterior.
        settings: Repository, name of the posterior, scores.

    Raises:
        AdapterError: There is no adapter, or the Hub refuses the upload or cannot be reached.
        PosteriorError: The posterior is missing or belongs to other weights, or the repository has another adapter.
        DataError: The scores cannot be read, or have no run of the posterior.
        UsageError: The name of the repository is not valid.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import validate_repo_id

    repository, revision = settings.repository, settings.revision
    check_repository(repository)
    adapter, posterior = open_posterior(model, settings.name)
    posterior.check()
    if differences := adapter_differences(posterior.manifest, adapter):
        raise PosteriorError(f"{posterior.folder}: belongs to another adapter: {'; '.join(differences)}; fit again")
    scores = last_run_of(settings.scores, model, posterior) if settings.scores else None
    content = without_paths(posterior.content)
    api = HfApi()
    with hub_errors(repository, revision):
        validate_repo_id(repository)
        api.create_repo(repository, private=settings.private, exist_ok=True)
        own_files = files_to_push(adapter)
        parent = api.model_info(repository, revision=revision).sha
        there = {entry.path: entry for entry in api.get_paths_info(repository, [*own_files, _CARD], revision=parent)}
        if WEIGHTS_FILE in there and not _same(adapter, there[WEIGHTS_FILE]):
            raise PosteriorError(
                f"{repository}: holds another adapter than {adapter.path}; push to the one it came from"
            )
        if WEIGHTS_FILE in there and CONFIG_FILE in there:
            folder = Path(api.hf_hub_download(repository, CONFIG_FILE, revision=parent)).parent
            if differences := adapter_differences(posterior.manifest, replace(adapter, config=read_config(folder))):
                raise PosteriorError(
                    f"{repository}: holds the adapter with another {CONFIG_FILE}, which the posterior was not fitted "
                    f"to: {'; '.join(differences)} (there); push to the one it came from"
                )
        files: dict[str, bytes | Path] = {
            file: adapter.path / file for file in own_files if WEIGHTS_FILE not in there or file not in there
        }
        files[f"laplace/{settings.name}/{MANIFEST_FILE}"] = json_bytes(content, indent=2)
        files[f"laplace/{settings.name}/{FACTORS_FILE}"] = posterior.folder / FACTORS_FILE
        own = adapter.path / _CARD
        if _CARD in there:
            card = Path(api.hf_hub_download(repository, _CARD, revision=parent)).read_text(encoding="utf-8")
        else:
            card = own.read_text(encoding="utf-8") if own.is_file() else "---\nlibrary_name: peft\n---\n"
        section = posterior_section(posterior.manifest, posterior.prior, settings.name, repository, scores, revision)
        files[_CARD] = with_section(card, settings.name, section).encode("utf-8", "backslashreplace")
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        commit = api.create_commit(
            repository,
            operations,
            commit_message=f"Laplace posterior {settings.name}",
            revision=revision,
            parent_commit=parent,  # so that a card that was edited meanwhile is not overwritten
        )
    return Pushed(
        commit.commit_url, tuple(operation.path_in_repo for operation in operations), _notes(posterior.manifest)
    )


def _same(adapter: Adapter, entry: Any) -> bool:
    """Return whether the repository has the adapter's weights: by SHA-256, or for a small file by git's digest."""
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == adapter.sha256)
    content = (adapter.path / WEIGHTS_FILE).read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return bool(entry.blob_id == blob.hexdigest())


def _notes(manifest: Manifest) -> tuple[str, ...]:
    base = manifest.base_model.name
    if not Path(base).exists():
        return ()
    return (f"the base model is recorded as a folder of this machine ({base}): elsewhere --base-model is needed",)
