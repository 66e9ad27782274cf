"""Peak memory of one batch, measured by running it on fake tensors (shapes without data).

The code is that of a real pass: the model, the cuts of its graph, the directions and the observer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from lapora.config import Structure
from lapora.curvature.backward import Linearisation, Observer
from lapora.curvature.checkpointing import blocks_of
from lapora.curvature.per_example import JacobianObserver, LayerBasis, SecondMomentObserver
from lapora.likelihoods.base import class_columns
from lapora.models.batches import Batch
from lapora.models.lora_layers import BayesianLayer
from lapora.models.meta_model import LiveMemory, MetaModel, MetaOutputModel, fake_tensors, first_batch

_FEW, _MORE = 4, 8
_DIRECTIONS = 2


class _InputOwners:
    """Observer that records the owner of each layer's input and stores no tensors."""

    def __init__(self) -> None:
        self.input_owners: dict[str, str] = {}

    def begin(self, batch: Batch) -> None: ...

    def observe_input(self, layer: BayesianLayer, input_owner: str, inputs: Tensor, mask: Tensor | None) -> Any:
        self.input_owners[layer.name] = input_owner

    def observe_gradient(self, layer: BayesianLayer, saved: Any, gradient: Tensor) -> None: ...

    def finish(self, layer: BayesianLayer) -> None: ...

    def end(self, rows: int, directions: int) -> None: ...


def input_owners_of(meta_model: MetaModel, layers: Sequence[BayesianLayer], classes: int) -> dict[str, str]:
    """Return for every layer the name of the first layer with the same input.

    If all transformer blocks are identical, only the first one runs.

    Args:
        meta_model: The model.
        layers: The Bayesian layers.
        classes: Number of answers C.
    """
    observer = _InputOwners()
    identical = _count_identical_blocks(meta_model, layers)
    batch = first_batch(meta_model, 1, 2)
    with _first_blocks(meta_model, layers, None if identical is None else 1) as remaining:
        _peak_bytes(meta_model, remaining, observer, batch, classes, 1, recompute_blocks=False)
    owners = observer.input_owners
    if identical is not None:
        (blocks,) = _block_lists(meta_model, layers)
        path = next(name for name, module in meta_model.model.named_modules() if module is blocks)
        first = f"{path}.0."
        for name, input_owner in list(owners.items()):
            if name.startswith(first):
                for index in range(1, identical):
                    block = f"{path}.{index}."
                    owners[block + name.removeprefix(first)] = block + input_owner.removeprefix(first)
    return owners


def batch_memory(
    meta_model: MetaModel,
    layers: Sequence[BayesianLayer],
    structure: Structure,
    batch: Batch,
    *,
    classes: int,
    directions: int,
    recompute_blocks: bool = False,
    input_owners: Mapping[str, str] | None = None,
) -> int:
    """Estimate the peak memory of a batch in bytes, without the weights and the sums of a pass.

    Memory is linear in the number of identical blocks and of directions: many blocks are extrapolated from few, and
    more than two directions from one and two.

    Args:
        meta_model: The model.
        layers: The Bayesian layers.
        structure: Curvature structure; the tensors that its observer stores for a batch are included.
        batch: Rows without padding.
        classes: Number of answers C.
        directions: Number of directions K, gradients per row.
        recompute_blocks: Blocks store only their inputs (gradient checkpointing).
        input_owners: The result of :func:`input_owners_of` if the batch is also predicted, as for the training curve:
            unlike Kronecker sums, a prediction stores the inputs of all layers.
    """

    def peak(blocks: int | None, count: int) -> int:
        with _first_blocks(meta_model, layers, blocks) as remaining:
            observer = _observer(structure, remaining, classes, count, input_owners)
            return _peak_bytes(
                meta_model, remaining, observer, batch, classes, count, recompute_blocks=recompute_blocks
            )

    def of_directions(count: int) -> int:
        blocks = _count_identical_blocks(meta_model, layers)
        if blocks is None or blocks <= _MORE:
            return peak(None, count)
        few, more = peak(_FEW, count), peak(_MORE, count)
        return more + (blocks - _MORE) * (more - few) // (_MORE - _FEW)

    if directions <= _DIRECTIONS:
        return of_directions(directions)
    one, two = of_directions(1), of_directions(_DIRECTIONS)
    return two + (directions - _DIRECTIONS) * (two - one)


def _observer(
    structure: Structure,
    layers: Sequence[BayesianLayer],
    classes: int,
    directions: int,
    input_owners: Mapping[str, str] | None = None,
) -> Observer:
    if structure == "kron":
        if input_owners is None:
            return _InputOwners()
        bases = {layer.name: LayerBasis(input_owners[layer.name]) for layer in layers}
        return SecondMomentObserver(bases, directions=directions)
    if structure in ("lowrank", "full"):
        return JacobianObserver(layers, classes)
    return SecondMomentObserver({layer.name: LayerBasis(layer.name) for layer in layers}, directions=directions)


def _peak_bytes(
    meta_model: MetaModel,
    layers: Sequence[BayesianLayer],
    observer: Observer,
    batch: Batch,
    classes: int,
    directions: int,
    *,
    recompute_blocks: bool,
) -> int:
    with fake_tensors(meta_model.model):
        tokens = [0] * classes if meta_model.kind == "causal" and batch.answers is None else None
        output_model = MetaOutputModel(meta_model.model, meta_model.kind, 0, tokens, recompute_blocks=recompute_blocks)
        with Linearisation(output_model, layers, observer) as linearisation:
            linearisation.probe(batch)
        with LiveMemory(meta_model.model) as memory, Linearisation(output_model, layers, observer) as linearisation:
            linearisation.run(batch, lambda logits: class_columns(logits)[:1].expand(directions, *logits.shape))
        return memory.peak


def _block_lists(meta_model: MetaModel, layers: Sequence[BayesianLayer]) -> list[nn.ModuleList]:
    blocks = set(blocks_of(cast(nn.Module, meta_model.model.get_base_model()), layers))
    return [each for each in meta_model.model.modules() if isinstance(each, nn.ModuleList) and blocks & set(each)]


def _count_identical_blocks(meta_model: MetaModel, layers: Sequence[BayesianLayer]) -> int | None:
    """Return the number of blocks if they are in one list with the same shapes and Bayesian layers, else None."""
    lists = _block_lists(meta_model, layers)
    if len(lists) != 1:
        return None
    bayesian = {layer.module for layer in layers}
    kinds = {
        (
            tuple((name, weight.shape) for name, weight in block.named_parameters()),
            tuple(name for name, module in block.named_modules() if module in bayesian),
        )
        for block in lists[0]
    }
    return len(lists[0]) if len(kinds) == 1 else None


@contextmanager
def _first_blocks(
    meta_model: MetaModel, layers: Sequence[BayesianLayer], count: int | None
) -> Iterator[Sequence[BayesianLayer]]:
    """Truncate the model to its first blocks within the context; yields the remaining Bayesian layers."""
    if count is None:
        yield layers
        return
    (blocks,) = _block_lists(meta_model, layers)
    original = dict(blocks._modules)
    removed = {module for block in list(blocks)[count:] for module in block.modules()}
    blocks._modules = dict(list(original.items())[:count])
    try:
        yield [layer for layer in layers if layer.module not in removed]
    finally:
        blocks._modules = original
