"""What the criteria are computed from: logits, Jacobians' inner products and KFAC variances of one adapter.

A view is made once per adapter and kept in a scratch folder, so that a criterion can be tried in seconds. Every
Jacobian is that of the C-1 differences ``f_c - f_0``, unweighted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.prior_selection.recipes import Recipe, Row, held_out_rows, texts_of, training_rows
from benchmarks.prior_selection.train_adapters import FOLDER, base_model_folder
from lapora.curvature.fisher import difference_columns, no_columns
from lapora.curvature.kron import KronObserver
from lapora.curvature.linearisation import Linearisation
from lapora.model.adapter import read_adapter
from lapora.model.answers import AnswerModel
from lapora.model.batches import Batch, collate, plan_batches
from lapora.model.bayesian_layers import BayesianLayer, find_bayesian_layers
from lapora.model.loading import load_model
from lapora.posterior.gaussian import EigenBlock, decompose
from lapora.workflows.fit import collect

Array = NDArray[np.float64]
GRID: Array = np.logspace(-2, 5, 57)
"""Prior precisions at which KFAC's variances are kept; in between they are interpolated in the logarithm."""
CORRUPTION = (0.2, 0.3, 0.4)
CORRUPTION_WITH_VARIANCE = 0.3


@dataclass(frozen=True)
class _Encoded:
    input_ids: list[int]
    token_type_ids: list[int] | None


class _JacobianObserver:
    """Keeps every layer's per-example gradients; see :class:`lapora.curvature.linearisation.Observer`."""

    def __init__(self) -> None:
        self.gradients: dict[str, list[Tensor]] = {}

    def begin(self, batch: Batch) -> None:
        self.gradients = {}

    def see_input(self, layer: BayesianLayer, leader: str, inputs: Tensor, mask: Tensor | None) -> Tensor:
        return inputs

    def see_gradient(self, layer: BayesianLayer, kept: Tensor | None, gradient: Tensor) -> None:
        assert kept is not None
        self.gradients.setdefault(layer.name, []).append((gradient.transpose(1, 2) @ kept).flatten(1))

    def finish(self, layer: BayesianLayer) -> None:
        """Nothing to close."""


class Network:
    """An adapter on its base, with the rows of one recipe."""

    def __init__(self, one: Recipe, shared: Path) -> None:
        folder = (shared / "adapters" if one.shared else FOLDER) / one.name
        loaded = load_model(read_adapter(str(folder)), base_model=str(base_model_folder()), device="cpu")
        self.recipe, self.tokenizer = one, loaded.tokenizer
        self.answers = AnswerModel(loaded.model, loaded.kind, loaded.pad_token_id, None)
        self.layers = find_bayesian_layers(loaded.model, "lora")

    def encode(self, rows: Sequence[Row]) -> list[_Encoded]:
        """Token ids, cut to the recipe's length."""
        encoded = self.tokenizer(*texts_of(rows), truncation=True, max_length=self.recipe.max_length)
        return [_Encoded(*pair) for pair in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)]

    def batches(self, encoded: Sequence[_Encoded]) -> list[Batch]:
        """Padded batches of like-long rows."""
        plan = plan_batches([len(row.input_ids) for row in encoded], batch_size=32, token_budget=0)
        pad = self.answers.pad_token_id
        return [collate([encoded[i] for i in rows], rows, pad_token_id=pad, padding_side="right") for rows in plan]

    def logits(self, encoded: Sequence[_Encoded]) -> Array:
        """Logits alone, ``(N, C)``."""
        found = np.zeros((len(encoded), len(self.recipe.classes)))
        with torch.no_grad():
            for batch in self.batches(encoded):
                found[list(batch.rows)] = self.answers.logits(batch).double().numpy()
        return found

    def jacobian(self, encoded: Sequence[_Encoded], role: str | None = None) -> tuple[Array, Tensor]:
        """Logits ``(N, C)`` and Jacobian ``(N, C-1, P)`` in float32, layers in the posterior's order."""
        layers = [layer for layer in self.layers if role is None or layer.role == role]
        sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
        classes = len(self.recipe.classes)
        logits = np.zeros((len(encoded), classes))
        jacobian = torch.zeros(len(encoded), classes - 1, sum(sizes))
        observer = _JacobianObserver()
        with Linearisation(self.answers, layers, observer) as linearisation:
            for batch in self.batches(encoded):
                rows = list(batch.rows)
                logits[rows] = linearisation.run(batch, difference_columns).double().numpy()
                start = 0
                for layer, size in zip(layers, sizes, strict=True):
                    for column, gradient in enumerate(observer.gradients[layer.name]):
                        jacobian[rows, column, start : start + size] = gradient
                    start += size
        return logits, jacobian

    def kfac(self, encoded: Sequence[_Encoded]) -> list[EigenBlock]:
        """The tool's default posterior: KFAC-expand over the training rows."""
        observer = KronObserver("expand")
        collect(self.answers, self.layers, observer, self.batches(encoded), targets=[None] * len(encoded))
        return decompose(self.layers, observer.factors(self.layers))

    def lora_off(self) -> dict[str, Tensor]:
        """Set every B to zero, A and the head left as trained; returns what :meth:`lora_on` takes."""
        saved = {layer.name: layer.module.weight.detach().clone() for layer in self.layers if layer.role == "B"}
        for layer in self.layers:
            if layer.role == "B":
                layer.module.weight.data.zero_()
        return saved

    def lora_on(self, saved: dict[str, Tensor]) -> None:
        """Put B back."""
        for layer in self.layers:
            if layer.name in saved:
                layer.module.weight.data.copy_(saved[layer.name])


def kfac_variances(blocks: Sequence[EigenBlock], jacobian: Tensor) -> NDArray[np.float32]:
    """Covariance of the logit differences at every δ of the grid, ``(G, N, C-1, C-1)``."""
    rows, columns, _ = jacobian.shape
    grid = torch.tensor(GRID)
    total = torch.zeros(len(GRID), rows, columns, columns, dtype=torch.float64)
    start = 0
    for block in blocks:
        high, wide = block.shape
        gradient = jacobian[:, :, start : start + high * wide].reshape(rows * columns, high, wide)
        # Transposed, so that both rotations are one large product each: (n i) x o and (n o) x i.
        rotated = gradient.transpose(1, 2).reshape(-1, high) @ block.gradient_basis.float()
        rotated = rotated.reshape(-1, wide, high).transpose(1, 2).reshape(-1, wide) @ block.input_basis.float()
        rotated = rotated.reshape(rows, columns, high * wide)
        variance = (1.0 / (block.eigenvalues.reshape(-1, 1) + grid)).float()
        for first in range(columns):
            for second in range(first, columns):
                term = ((rotated[:, first] * rotated[:, second]) @ variance).T.double()
                total[:, :, first, second] += term
                if second != first:
                    total[:, :, second, first] += term
        start += high * wide
    return cast(NDArray[np.float32], total.float().numpy())


def corrupt(encoded: Sequence[_Encoded], share: float, seed: int) -> list[_Encoded]:
    """Delete a share of the tokens between the special ones, at random; at least one stays."""
    chance = random.Random(seed)
    found = []
    for row in encoded:
        types = row.token_type_ids or [0] * len(row.input_ids)
        last = len(row.input_ids) - 1
        inner = range(1, last)
        kept = [i for i in inner if row.input_ids[i] in (101, 102) or chance.random() >= share] or [chance.choice(inner)]
        kept = [0, *kept, last]
        found.append(_Encoded([row.input_ids[i] for i in kept], [types[i] for i in kept]))
    return found


def _grams(left: Tensor, right: Tensor, layers: Sequence[BayesianLayer]) -> dict[str, NDArray[np.float32]]:
    """``left rightᵀ`` apart for A's and B's parameters, layer by layer."""
    first, second = left.flatten(0, 1), right.flatten(0, 1)
    found = {role: torch.zeros(len(first), len(second)) for role in ("A", "B")}
    for layer, at in _slices(layers):
        found[layer.role].addmm_(first[:, at], second[:, at].T)
    return {role: gram.numpy() for role, gram in found.items()}


def _grams_of_rows(jacobian: Tensor, layers: Sequence[BayesianLayer]) -> dict[str, NDArray[np.float32]]:
    """``J_n J_nᵀ`` of every row, apart for A's and B's parameters."""
    rows, columns, _ = jacobian.shape
    found = {role: torch.zeros(rows, columns, columns) for role in ("A", "B")}
    for layer, at in _slices(layers):
        found[layer.role] += jacobian[:, :, at] @ jacobian[:, :, at].transpose(1, 2)
    return {role: gram.numpy() for role, gram in found.items()}


def _slices(layers: Sequence[BayesianLayer]) -> list[tuple[BayesianLayer, slice]]:
    found, start = [], 0
    for layer in layers:
        end = start + layer.shape[0] * layer.shape[1]
        found.append((layer, slice(start, end)))
        start = end
    return found


def make_view(one: Recipe, shared: Path, early: Path | None = None) -> dict[str, Any]:
    """Compute everything the criteria and the comparison read, for one adapter."""
    network = Network(one, shared)
    train, held = training_rows(one, shared / "data"), held_out_rows(one, shared / "data")
    train_encoded, held_encoded = network.encode(train), network.encode(held)
    view: dict[str, Any] = {
        "train_labels": np.array([row.label for row in train]),
        "held_labels": np.array([row.label for row in held]),
        "grid": GRID,
    }
    blocks = network.kfac(train_encoded)
    view["kfac_eigenvalues"] = np.concatenate([block.eigenvalues.flatten().numpy() for block in blocks])
    view["kfac_roles"] = np.concatenate([[block.role] * block.eigenvalues.numel() for block in blocks])
    view["squared_norms"] = np.array([block.squared_norm for block in blocks])
    view["layer_roles"] = np.array([block.role for block in blocks])
    view["layer_shapes"] = np.array([block.shape for block in blocks])
    theta = torch.cat([layer.module.weight.detach().flatten() for layer in network.layers])
    split = [int(layer.role == "A") for layer in network.layers for _ in range(layer.shape[0] * layer.shape[1])]
    is_a = torch.tensor(split).float()

    view["train_logits"], jacobian = network.jacobian(train_encoded)
    view["train_kfac"] = kfac_variances(blocks, jacobian)
    for role, gram in _grams(jacobian, jacobian, network.layers).items():
        view[f"train_train_{role}"] = gram
    view["train_theta_A"] = (jacobian @ (theta * is_a)).numpy()
    view["train_theta_B"] = (jacobian @ (theta * (1 - is_a))).numpy()

    def against(encoded: list[_Encoded], name: str) -> None:
        pieces: dict[str, list[Any]] = {}
        for start in range(0, len(encoded), 250):
            logits, piece = network.jacobian(encoded[start : start + 250])
            pieces.setdefault(f"{name}_logits", []).append(logits)
            pieces.setdefault(f"{name}_kfac", []).append(np.moveaxis(kfac_variances(blocks, piece), 1, 0))
            if name == "corrupt":
                continue
            for role, gram in _grams(piece, jacobian, network.layers).items():
                pieces.setdefault(f"{name}_train_{role}", []).append(gram)
            for role, own in _grams_of_rows(piece, network.layers).items():
                pieces.setdefault(f"{name}_self_{role}", []).append(own)
            pieces.setdefault(f"{name}_theta_A", []).append((piece @ (theta * is_a)).numpy())
            pieces.setdefault(f"{name}_theta_B", []).append((piece @ (theta * (1 - is_a))).numpy())
        for key, parts in pieces.items():
            view[key] = np.concatenate(parts)
        view[f"{name}_kfac"] = np.moveaxis(view[f"{name}_kfac"], 0, 1)

    against(held_encoded, "held")
    against(corrupt(train_encoded, CORRUPTION_WITH_VARIANCE, one.seed), "corrupt")
    for share in CORRUPTION:
        view[f"corrupt_logits_{share}"] = network.logits(corrupt(train_encoded, share, one.seed))
    del jacobian

    saved = network.lora_off()
    view["base_train_logits"] = network.logits(train_encoded)
    view["base_held_logits"] = network.logits(held_encoded)
    view["train_embeddings"], view["held_embeddings"] = _embeddings(network, train_encoded), _embeddings(network, held_encoded)
    network.lora_on(saved)
    if early is not None and (early / one.name).exists():
        view["early_train_logits"] = _early(one, early / one.name, network, train_encoded)
        view["early_held_logits"] = _early(one, early / one.name, network, held_encoded)
    return view


def _early(one: Recipe, folder: Path, network: Network, encoded: Sequence[_Encoded]) -> Array:
    loaded = load_model(read_adapter(str(folder)), base_model=str(base_model_folder()), device="cpu")
    kept = network.answers
    network.answers = AnswerModel(loaded.model, loaded.kind, loaded.pad_token_id, None)
    logits = network.logits(encoded)
    network.answers = kept
    return logits


def _embeddings(network: Network, encoded: Sequence[_Encoded]) -> NDArray[np.float32]:
    """Mean last hidden state and pooled state of each row, ``(N, 2·width)``."""
    body = cast(Any, network.answers.network).bert
    found = np.zeros((len(encoded), 2 * body.config.hidden_size), dtype=np.float32)
    with torch.no_grad():
        for batch in network.batches(encoded):
            output = body(batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids)
            mask = batch.attention_mask.unsqueeze(-1).float()
            mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
            found[list(batch.rows)] = torch.cat([mean, output.pooler_output], 1).numpy()
    return found


def load_view(one: Recipe, shared: Path, cache: Path, early: Path | None = None) -> dict[str, Any]:
    """The view of one adapter, from the scratch folder where it is there."""
    path = cache / f"{one.name}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            torch.set_num_threads(1)
        np.savez(path, **make_view(one, shared, early))
    with np.load(path) as arrays:
        return dict(arrays)
