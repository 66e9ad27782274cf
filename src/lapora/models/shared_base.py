"""Cache of base models to which adapters are attached in turn.

A LoRA adapter replaces or wraps a few modules of the base. Detaching it restores the base's modules; attaching it
again replaces them again, without reading or copying weights.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from lapora.config import ModelSettings
from lapora.models.adapter import Adapter
from lapora.models.loading import LoadedBase, LoadedModel, attach_adapter, load_base, resolve_padding

_Replacement = tuple[nn.Module, str, nn.Module]
"""A parent module, the name of its child, and the adapter's module that replaces the child."""


class BaseCache:
    """Loads adapters, and every base only once; at most one adapter is attached to a base at a time.

    Args:
        max_bases: Maximum number of bases in memory; the least recently used one is evicted.

    Attributes:
        loads: Number of bases loaded so far.
    """

    def __init__(self, max_bases: int = 1) -> None:
        self._max_bases = max_bases
        self._bases: dict[tuple[Any, ...], LoadedBase] = {}
        self._attached: dict[int, LoadedModel] = {}
        self._replacements: WeakKeyDictionary[nn.Module, list[_Replacement]] = WeakKeyDictionary()
        self.loads = 0

    def load(self, adapter: Adapter, how: ModelSettings) -> LoadedModel:
        """Load an adapter and attach it to its base, detaching any other adapter.

        Arguments and errors are those of :func:`lapora.models.loading.load_model`.
        """
        if _changes_base(adapter, how):
            self.loads += 1
            return attach_adapter(adapter, load_base(adapter, how))
        key = (
            how.base_model or adapter.base_model,
            None if how.base_model else adapter.revision,
            adapter.kind,
            adapter.number_of_labels(),
            adapter.embedding_rows(),
            # Modules that the adapter saves whole are not quantized.
            tuple(adapter.config.get("modules_to_save") or ()) if how.quantize in ("4bit", "8bit") else (),
            (how.quantize, how.dtype or "auto", how.device, how.placement, how.trust_remote_code),
        )
        base = self._bases.pop(key, None)
        if base is not None:
            self._bases[key] = base  # the most recently used base is last
        else:
            while len(self._bases) >= self._max_bases:
                self._evict(next(iter(self._bases)))
            self.loads += 1
            base = self._bases[key] = load_base(adapter, how)
        self._detach(id(base.model))
        try:
            loaded = attach_adapter(adapter, base)
        except Exception:
            _detach_modules(base.model)  # other adapters use this base
            raise
        self._attached[id(base.model)] = loaded
        return loaded

    def attach(self, loaded: LoadedModel) -> None:
        """Attach an adapter loaded here to its base again, if another one is attached."""
        base = id(loaded.model.get_base_model())
        replacements = self._replacements.get(loaded.model)
        if replacements is None or self._attached.get(base) is loaded:
            return
        self._detach(base)
        for parent, name, module in replacements:
            setattr(parent, name, module)
        self._attached[base] = loaded
        resolve_padding(loaded)

    def evict(self, loaded: LoadedModel) -> None:
        """Evict an adapter's weights; its base stays in memory."""
        base = id(loaded.model.get_base_model())
        if self._attached.get(base) is loaded:
            self._detach(base)
        self._replacements.pop(loaded.model, None)

    def _detach(self, base: int) -> None:
        loaded = self._attached.pop(base, None)
        if loaded is not None:
            self._replacements[loaded.model] = _detach_modules(cast(nn.Module, loaded.model.get_base_model()))

    def _evict(self, key: tuple[Any, ...]) -> None:
        self._detach(id(self._bases.pop(key).model))


def _detach_modules(base: nn.Module) -> list[_Replacement]:
    """Restore the base's own modules, and return the adapter's."""
    replacements: list[_Replacement] = []
    inside = ""
    for path, module in list(base.named_modules()):
        if (inside and path.startswith(inside)) or not isinstance(module, LoraLayer | ModulesToSaveWrapper):
            continue
        inside = f"{path}."
        parent_path, _, name = path.rpartition(".")
        parent = base.get_submodule(parent_path)
        own = module.get_base_layer() if isinstance(module, LoraLayer) else module.original_module
        replacements.append((parent, name, cast(nn.Module, module)))
        setattr(parent, name, own)
    if hasattr(base, "peft_config"):
        del base.peft_config
    return replacements


_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` for which PEFT does not change the base. For others, such as ``pissa`` and ``olora``,
it subtracts the initial adapter from the base weights each time the adapter is loaded."""


def _changes_base(adapter: Adapter, how: ModelSettings) -> bool:
    """Return whether loading the adapter changes tensors of the base: by its initialization, or by biases it saved."""
    initialization = adapter.config.get("init_lora_weights")
    if isinstance(initialization, str):
        if initialization.lower() not in _KEEPS_BASE:
            return True
        if how.dtype == "float64":  # attach_adapter rounds the base to float32 first
            return True
    modules_to_save = tuple(adapter.config.get("modules_to_save") or ())
    return any(
        not any(part in key for part in (".lora_A.", ".lora_B."))
        and not any(f".{name}." in key for name in modules_to_save)
        for key in adapter.shapes
    )
