"""An adapter's tokenizer: its own where it saves one, else the base model's."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from lapora.errors import AdapterError, first_line
from lapora.model.adapter import Adapter
from lapora.model.quiet import quiet_libraries


def load_tokenizer(adapter: Adapter, base_model: str | None = None) -> Any:
    """The adapter's tokenizer alone, without the model.

    Raises:
        AdapterError: It cannot be loaded, or the adapter names no base model.
    """
    base_name = base_model or adapter.base_model
    if not base_name:
        raise AdapterError(f"{adapter.path}: the adapter names no base model; give one with --base-model")
    with quiet_libraries():
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
