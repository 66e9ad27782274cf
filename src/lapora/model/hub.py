"""An adapter on the Hub: its files fetched to the cache, and nothing else of its repository.

The client is huggingface_hub: token, endpoint, cache and offline mode are its own settings of the environment
(``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE``).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lapora.config import ModelSettings
from lapora.errors import AdapterError, UsageError
from lapora.model.adapter import CONFIG_FILE, WEIGHTS_FILE

_WANTED = [
    CONFIG_FILE,
    WEIGHTS_FILE,
    "added_tokens.json",
    "chat_template*",
    "config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer*",
    "vocab.*",
    "laplace/*",
]


def is_hub_id(location: str) -> bool:
    """Whether a location names a repository on the Hub: ``owner/name``, and no such folder here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", location)) and not Path(location).exists()


def local_model(model: ModelSettings, *, writes: bool = False) -> ModelSettings:
    """The settings with the adapter's files at hand: those of a Hub id are fetched first.

    Args:
        model: Its ``adapter`` is a folder or a Hub id.
        writes: Whether the command writes a posterior, which needs a place that is not the cache.

    Raises:
        AdapterError: The Hub has no such adapter, or cannot be reached.
        UsageError: A revision of a folder, or nowhere to write.
    """
    if not is_hub_id(model.adapter):
        if model.revision is not None:
            raise UsageError(f"--revision goes with an adapter on the Hub, and {model.adapter} is a folder")
        return model
    if writes and model.output_dir is None:
        raise UsageError(f"{model.adapter}: an adapter on the Hub; say where the posterior goes with --output-dir DIR")
    return replace(model, fetched=fetch_adapter(model.adapter, model.revision))


def fetch_adapter(repository: str, revision: str | None = None) -> Path:
    """The folder in the cache that holds an adapter's files, fetched where they are not there yet.

    Args:
        repository: ``owner/name``.
        revision: Branch, tag or commit; None is the default branch.

    Raises:
        AdapterError: Not found, not allowed, or not reachable and not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    with hub_errors(repository, revision):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_WANTED))


@contextmanager
def hub_errors(repository: str, revision: str | None = None) -> Iterator[None]:
    """Say what the Hub's client met in one line, with what to do.

    Raises:
        AdapterError: For every error of the client.
    """
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise AdapterError(
            f"{repository}: gated on the Hub; ask for access on its page, then give a token in HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise AdapterError(
            f"{repository}: no such directory, and not found on the Hub; check the name, and for a private one HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise AdapterError(f"{repository}: the Hub has no revision {revision}; give another --revision") from error
    except HFValidationError as error:
        raise AdapterError(f"{repository}: no such directory, and no name that the Hub could have") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise AdapterError(
                f"{repository}: the Hub does not allow it (status {status}); give a token that may in HF_TOKEN"
            ) from error
        raise AdapterError(f"{repository}: the Hub answered with status {status}; try again later") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if is_offline_mode():
            raise AdapterError(
                f"{repository}: no such directory, and not whole in the Hub's cache, which alone is looked at offline; "
                "unset HF_HUB_OFFLINE, or give a folder"
            ) from error
        raise AdapterError(
            f"{repository}: no such directory, and the Hub cannot be reached; check the network, or give a folder"
        ) from error
    except ConnectionError as error:
        raise AdapterError(f"{repository}: the Hub cannot be reached; check the network and try again") from error
