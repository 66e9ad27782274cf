"""Loading an adapter on its base model, ready to be linearised."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Unpack, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn

from lapora.config import Quantisation
from lapora.errors import AdapterError, first_line
from lapora.model.adapter import Adapter, ModelKind
from lapora.model.base_model import LoadedBase, Loading, load_base
from lapora.model.fingerprint import digest_in
from lapora.model.placement import settle_adapter, unspread
from lapora.model.quantisation import (
    keep_inputs_whole,
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
        weights: The base's own weights, by name; none where they are quantised.
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


def load_model(adapter: Adapter, **how: Unpack[Loading]) -> LoadedModel:
    """Load the base model and the adapter on it.

    Args:
        adapter: The adapter, as read from its directory.
        how: See :class:`lapora.model.base_model.Loading`.

    Raises:
        AdapterError: The base cannot be loaded, or the adapter does not fit it.
        UsageError: An impossible device or an impossible combination.
    """
    return put_adapter(adapter, load_base(adapter, **how))


def put_adapter(adapter: Adapter, base: LoadedBase) -> LoadedModel:
    """Put an adapter on a base that has none.

    Raises:
        AdapterError: It does not fit, or its tokenizer cannot be loaded.
    """
    with quiet_libraries():
        tokenizer = tokenizer_at(adapter, base.name, base.revision, base.trust_remote_code)
        with unspread(base.model):
            model = _load_adapter(adapter, base.model, base.name)
    _refuse_untrained(adapter, model, base.missing)
    if base.spread is not None:
        settle_adapter(model, load_peft_weights(os.fspath(adapter.path), device="cpu"))
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
    settle_padding(loaded)
    return loaded


def settle_padding(loaded: LoadedModel) -> None:
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
