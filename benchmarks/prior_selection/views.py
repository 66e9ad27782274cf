"""Inputs of the criteria: logits, inner products of Jacobians and KFAC variances of one adapter.

A view is computed once per adapter and cached, so a criterion can be evaluated in seconds. Every Jacobian is that of
the C-1 differences ``f_c - f_0``, unweighted.
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
from scipy import linalg
from torch import Tensor

from benchmarks.prior_selection.recipes import Recipe, Row, held_out_rows, texts_of, training_rows
from benchmarks.prior_selection.train_adapters import FOLDER, base_model_folder
from lapora.config import COMPLETE, ModelSettings
from lapora.curvature.backward import Linearisation
from lapora.curvature.kfac import KronObserver
from lapora.curvature.passes import collect
from lapora.curvature.per_example import JacobianObserver
from lapora.likelihoods.base import difference_columns
from lapora.likelihoods.categorical import exact_columns
from lapora.models.adapter import read_adapter
from lapora.models.batches import Batch
from lapora.models.batching import BatchFeed, BatchSize
from lapora.models.loading import load_model
from lapora.models.lora_layers import find_bayesian_layers
from lapora.models.outputs import OutputModel
from lapora.posterior.eigen import decompose
from lapora.posterior.gaussian import EigenBlock

Array = NDArray[np.float64]
GRID: Array = np.logspace(-2, 5, 57)
"""Prior precisions at which KFAC's variances are kept; in between they are interpolated in the logarithm."""
THINNED_SHARE = 0.3
"""Share of a row's tokens that are deleted in its thinned copy."""
OTHER_SHARES = (0.2, 0.4)
FEATURES = 400
"""Number of leading directions of the unweighted Jacobian for the refitted linear models."""


@dataclass(frozen=True)
class _Encoded:
    input_ids: list[int]
    token_type_ids: list[int] | None
    answers: tuple[()] = ()


class Network:
    """An adapter on its base, with the rows of one recipe."""

    def __init__(self, one: Recipe, shared: Path) -> None:
        folder = (shared / "adapters" if one.shared else FOLDER) / one.name
        how = ModelSettings("", base_model=str(base_model_folder()), device="cpu")
        loaded = load_model(read_adapter(str(folder)), how)
        self.recipe, self.tokenizer = one, loaded.tokenizer
        self.answers = OutputModel(loaded.model, loaded.kind, loaded.pad_token_id, None)
        self.layers = find_bayesian_layers(loaded.model, "lora")

    def encode(self, rows: Sequence[Row]) -> list[_Encoded]:
        """Token ids, cut to the recipe's length."""
        encoded = self.tokenizer(*texts_of(rows), truncation=True, max_length=self.recipe.max_length)
        return [_Encoded(*pair) for pair in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)]

    def batches(self, encoded: Sequence[_Encoded]) -> list[Batch]:
        """Padded batches of like-long rows."""
        return list(BatchFeed(self.answers, encoded, BatchSize(rows=32)))

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
        classes = len(self.recipe.classes)
        observer = JacobianObserver(layers, classes)
        logits = np.zeros((len(encoded), classes))
        jacobian = torch.zeros(len(encoded), classes - 1, observer.parameters)
        with Linearisation(self.answers, layers, observer) as linearisation:
            for batch in self.batches(encoded):
                rows = list(batch.rows)
                logits[rows] = linearisation.run(batch, difference_columns).double().numpy()
                jacobian[rows] = observer.jacobian(len(rows), classes - 1).transpose(0, 1)
        return logits, jacobian

    def kfac(self, encoded: Sequence[_Encoded]) -> list[EigenBlock]:
        """KFAC-expand over the training rows, with whole factors."""
        observer = KronObserver("expand", COMPLETE)
        collect(self.answers, self.layers, observer, self.batches(encoded), targets=[None] * len(encoded))
        return decompose(self.layers, observer.factors(self.layers), COMPLETE)

    def lora_off(self) -> dict[str, Tensor]:
        """Set every B to zero, A and the head left as trained; returns what :meth:`lora_on` takes."""
        saved = {layer.name: layer.module.weight.detach().clone() for layer in self.layers if layer.role == "B"}
        for layer in self.layers:
            if layer.role == "B":
                layer.module.weight.data.zero_()
        return saved

    def lora_on(self, saved: dict[str, Tensor]) -> None:
        """Restore B."""
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
        assert block.gradient_basis is not None and block.input_basis is not None
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


def thin(encoded: Sequence[_Encoded], share: float, seed: int) -> list[_Encoded]:
    """Delete a share of the tokens between the special ones, at random; at least one stays."""
    chance = random.Random(seed)
    found = []
    for row in encoded:
        types = row.token_type_ids or [0] * len(row.input_ids)
        last = len(row.input_ids) - 1
        inner = range(1, last)
        kept = [i for i in inner if row.input_ids[i] in (101, 102) or chance.random() >= share] or [
            chance.choice(inner)
        ]
        kept = [0, *kept, last]
        found.append(_Encoded([row.input_ids[i] for i in kept], [types[i] for i in kept]))
    return found


class FullPosterior:
    """The exact GGN over all LoRA weights, in the dual: only ``J Jᵀ`` is decomposed (as in ``full``).

    Args:
        jacobian: ``(N, C-1, P)`` of the training rows.
        logits: ``(N, C)`` of the same rows.
    """

    def __init__(self, jacobian: Tensor, logits: Array) -> None:
        self._jacobian = jacobian.flatten(0, 1)
        # Rows 1..C-1 of the Fisher's columns: what weighs the differences.
        self._columns = exact_columns(torch.tensor(logits)).permute(1, 2, 0)[:, 1:].float()
        self._gram = self._jacobian @ self._jacobian.T
        weighted = self._weigh(self._weigh(self._gram).T.contiguous()).double()
        values, self._vectors = torch.linalg.eigh((weighted + weighted.T) / 2)
        self.eigenvalues: Array = values.clamp(min=0.0).numpy()

    def _weigh(self, products: Tensor) -> Tensor:
        rows, columns, _ = self._columns.shape
        by_row = products.reshape(-1, rows, columns)
        return torch.einsum("mnc,ncs->mns", by_row, self._columns).flatten(1)

    def variances(self, jacobian: Tensor) -> NDArray[np.float32]:
        """``(1/δ) [G Gᵀ - G Jᵀ (K + δI)⁻¹ J Gᵀ]`` at every δ of the grid, ``(G, N, C-1, C-1)``."""
        rows, columns, _ = jacobian.shape
        products = jacobian.flatten(0, 1) @ self._jacobian.T
        rotated = (self._weigh(products) @ self._vectors.float()).reshape(rows, columns, -1)
        own = jacobian @ jacobian.transpose(1, 2)
        found = []
        for delta in GRID:
            scaled = rotated * torch.tensor(1.0 / (self.eigenvalues + delta)).float()
            found.append(((own - scaled @ rotated.transpose(1, 2)) / delta).numpy())
        return np.array(found, dtype=np.float32)

    def features(self, count: int) -> NDArray[np.float32]:
        """Leading part of Φ with ``Φ Φᵀ = J Jᵀ``, ``(N, C-1, count)``."""
        rows, columns, _ = self._columns.shape
        size = len(self._gram)
        values, vectors = linalg.eigh(self._gram.numpy(), subset_by_index=[size - min(count, size), size - 1])
        kept = values > values[-1] * 1e-6
        return cast(NDArray[np.float32], (vectors[:, kept] * np.sqrt(values[kept])).reshape(rows, columns, -1))


def make_view(one: Recipe, shared: Path) -> dict[str, Any]:
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

    view["train_logits"], jacobian = network.jacobian(train_encoded)
    view["train_kfac"] = kfac_variances(blocks, jacobian)
    view["train_theta"] = (jacobian @ theta).numpy()
    full = FullPosterior(jacobian, view["train_logits"])
    view["full_eigenvalues"] = full.eigenvalues
    view["train_full"] = full.variances(jacobian)
    view["features"] = full.features(FEATURES)
    pieces: dict[str, list[Any]] = {}
    for start in range(0, len(held_encoded), 250):
        logits, piece = network.jacobian(held_encoded[start : start + 250])
        pieces.setdefault("held_logits", []).append(logits)
        pieces.setdefault("held_kfac", []).append(kfac_variances(blocks, piece))
        pieces.setdefault("held_full", []).append(full.variances(piece))
    for key, parts in pieces.items():
        view[key] = np.concatenate(parts, axis=0 if key == "held_logits" else 1)

    thinned = thin(train_encoded, THINNED_SHARE, one.seed)
    for key, parts in thinned_parts(network, blocks, full, thinned).items():
        view[key] = parts
    del full, jacobian
    for share in OTHER_SHARES:
        view[f"thin_logits_{share}"] = network.logits(thin(train_encoded, share, one.seed))

    saved = network.lora_off()
    view["base_train_logits"] = network.logits(train_encoded)
    view["train_embeddings"] = _embeddings(network, train_encoded)
    network.lora_on(saved)
    return view


def thinned_parts(
    network: Network, blocks: Sequence[EigenBlock], full: FullPosterior, thinned: list[_Encoded]
) -> dict[str, Any]:
    """Logits and variances of the thinned copies, with Jacobians of their own."""
    pieces: dict[str, list[Any]] = {"thin_logits": [], "thin_kfac": [], "thin_full": []}
    for start in range(0, len(thinned), 250):
        logits, piece = network.jacobian(thinned[start : start + 250])
        pieces["thin_logits"].append(logits)
        pieces["thin_kfac"].append(kfac_variances(blocks, piece))
        pieces["thin_full"].append(full.variances(piece))
    return {key: np.concatenate(parts, axis=0 if key == "thin_logits" else 1) for key, parts in pieces.items()}


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


def load_view(one: Recipe, shared: Path, cache: Path) -> dict[str, Any]:
    """Return the view of one adapter, from the cache if it is there."""
    path = cache / f"{one.name}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, **make_view(one, shared))
    with np.load(path) as arrays:
        return dict(arrays)
