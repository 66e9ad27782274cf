"""Base models that stay loaded while one adapter after another is put on them and taken off again.

A LoRA adapter is a few modules that stand around, or in the place of, the base's own. Taking it off puts those back;
putting it on again is as many assignments, and nothing is read or copied.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from lapora.config import ModelSettings
from lapora.models.adapter import Adapter
from lapora.models.loading import LoadedBase, LoadedModel, load_base, put_adapter, resolve_padding

_Place = tuple[nn.Module, str, nn.Module]
"""A parent, the name of its child, and the adapter's module in the child's place."""


class BaseCache:
    """Loads adapters, their bases once; at most one adapter is on a base at a time.

    Args:
        most: How many bases are kept.
    """

    def __init__(self, most: int = 1) -> None:
        self._most = most
        self._bases: dict[tuple[Any, ...], LoadedBase] = {}
        self._on: dict[int, LoadedModel] = {}
        self._places: WeakKeyDictionary[nn.Module, list[_Place]] = WeakKeyDictionary()
        self.loads = 0

    def load(self, adapter: Adapter, how: ModelSettings) -> LoadedModel:
        """As :func:`lapora.models.loading.load_model`; the adapter is on its base, and whichever was on it is off."""
        if _changes_base(adapter):
            self.loads += 1
            return put_adapter(adapter, load_base(adapter, how))
        key = (
            how.base_model or adapter.base_model,
            None if how.base_model else adapter.revision,
            adapter.kind,
            adapter.number_of_labels(),
            (how.quantize, how.dtype, how.device, how.spread, how.trust_remote_code),
        )
        base = self._bases.pop(key, None)
        if base is not None:
            self._bases[key] = base  # the last used stands last
        else:
            while len(self._bases) >= self._most:
                self._evict(next(iter(self._bases)))
            self.loads += 1
            base = self._bases[key] = load_base(adapter, how)
        self._detach(id(base.model))
        try:
            loaded = put_adapter(adapter, base)
        except Exception:
            _detached(base.model)  # whatever of it is on the base, which others use
            raise
        self._on[id(base.model)] = loaded
        return loaded

    def attach(self, loaded: LoadedModel) -> None:
        """Put an adapter that was loaded here on its base again, if another is on it."""
        base = id(loaded.model.get_base_model())
        places = self._places.get(loaded.model)
        if places is None or self._on.get(base) is loaded:
            return
        self._detach(base)
        for parent, name, module in places:
            setattr(parent, name, module)
        self._on[base] = loaded
        resolve_padding(loaded)

    def evict(self, loaded: LoadedModel) -> None:
        """Let go of an adapter's weights; its base stays."""
        base = id(loaded.model.get_base_model())
        if self._on.get(base) is loaded:
            self._detach(base)
        self._places.pop(loaded.model, None)

    def _detach(self, base: int) -> None:
        loaded = self._on.pop(base, None)
        if loaded is not None:
            self._places[loaded.model] = _detached(cast(nn.Module, loaded.model.get_base_model()))

    def _evict(self, key: tuple[Any, ...]) -> None:
        self._detach(id(self._bases.pop(key).model))


def _detached(base: nn.Module) -> list[_Place]:
    """Put the base's own modules back in their places."""
    places: list[_Place] = []
    inside = ""
    for path, module in list(base.named_modules()):
        if (inside and path.startswith(inside)) or not isinstance(module, LoraLayer | ModulesToSaveWrapper):
            continue
        inside = f"{path}."
        parent_path, _, name = path.rpartition(".")
        parent = base.get_submodule(parent_path)
        own = module.get_base_layer() if isinstance(module, LoraLayer) else module.original_module
        places.append((parent, name, cast(nn.Module, module)))
        setattr(parent, name, own)
    if hasattr(base, "peft_config"):
        del base.peft_config
    return places


def _changes_base(adapter: Adapter) -> bool:
    """Whether loading the adapter writes into the base's own tensors: biases, embeddings, anything saved whole."""
    whole = tuple(adapter.config.get("modules_to_save") or ())
    return any(
        not any(part in key for part in (".lora_A.", ".lora_B.")) and not any(f".{name}." in key for name in whole)
        for key in adapter.shapes
    )
