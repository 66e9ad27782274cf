"""Other libraries for Laplace posteriors, on the same batches of the same model.

laplace-torch with its two backends, and bayesian-lora (PyPI) if it is installed. laplace-torch runs as documented,
``Laplace(model, ...)`` with all but the LoRA weights frozen, and also (``helped``) through :mod:`lapora.interop`,
restricted to the LoRA weights: otherwise ASDL also computes per-example gradients of the frozen base. bayesian-lora
accumulates the curvature of each row's last position only, truncates wide factors to rank 10 and does not mask
padding: only its time is compared, not its result.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.models import Subject
from lapora.curvature.passes import CurvatureRun
from lapora.interop import kron_laplace
from lapora.laplace_torch import asdl_factors, curvlinops_factors
from lapora.laplace_torch.network import as_inputs, silence_warnings, trainable
from lapora.posterior.gaussian import BlockPosterior
from lapora.posterior.structures import fit_structure

_RANK, _WIDE = 10, 128


def peers(it: Subject) -> dict[str, tuple[int, Callable[[], object]]]:
    """Programs to measure, each with the number of backward passes of its floor."""
    from laplace.curvature import AsdlGGN, CurvlinopsGGN

    less = it.classes - 1
    found: dict[str, tuple[int, Callable[[], object]]] = {}
    for name, backend, factors in (
        ("asdl", AsdlGGN, asdl_factors),
        ("curvlinops", CurvlinopsGGN, curvlinops_factors),
    ):
        documented = _Documented(copy.deepcopy(it), backend)
        found[f"laplace-torch {name} fit"] = (less, documented.fit)
        found[f"laplace-torch {name} predict"] = (less, documented.predict)
        found[f"laplace-torch {name} fit, helped"] = (
            less,
            lambda factors=factors: _laplace_torch_fit(it, factors),
        )
        found[f"laplace-torch {name} predict, helped"] = (
            less,
            lambda backend=backend: _laplace_torch_predict(it, backend),
        )
    if importlib.util.find_spec("bayesian_lora"):
        own = copy.deepcopy(it)  # its hooks leave marks on the modules, on which ASDL stumbles
        factors = _bayesian_lora_fit(own)
        found["bayesian-lora fit"] = (less, lambda: _bayesian_lora_fit(own))
        found["bayesian-lora predict"] = (less, lambda: _bayesian_lora_predict(own, factors))
    return found


class _Network(nn.Module):
    def __init__(self, it: Subject) -> None:
        super().__init__()
        self.model = it.answers.model
        self._answers = it.answers

    def forward(self, data: Any) -> torch.Tensor:
        logits = self.model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
        return logits if self._answers.kind == "classifier" else logits[:, -1, self._answers.answer_token_ids]


class _Rows(list[Any]):
    """Batches with the length that laplace-torch needs."""

    dataset: range


class _Documented:
    """laplace-torch, used as documented."""

    def __init__(self, it: Subject, backend: Any) -> None:
        from transformers import BatchEncoding

        for parameter in it.answers.model.parameters():
            parameter.requires_grad_(False)
        for layer in it.layers:
            layer.module.weight.requires_grad_(True)
        self._network, self._backend = _Network(it).eval(), backend
        self._rows = _Rows(
            BatchEncoding(
                {
                    "input_ids": batch.input_ids,
                    "attention_mask": batch.attention_mask,
                    "labels": torch.zeros(len(batch), dtype=torch.long),
                }
            )
            for batch in it.batches
        )
        self._rows.dataset = range(it.rows)
        self._laplace: Any = None

    def fit(self) -> None:
        from laplace import Laplace

        with silence_warnings():
            self._laplace = Laplace(
                self._network,
                "classification",
                subset_of_weights="all",
                hessian_structure="kron",
                backend=self._backend,
            )
            self._laplace.fit(self._rows)

    def predict(self) -> None:
        if self._laplace is None:
            self.fit()
        with silence_warnings():
            for batch in self._rows:
                self._laplace(batch, pred_type="glm", link_approx="mc", n_samples=100)


def _laplace_torch_fit(it: Subject, factors: Any) -> None:
    """Fit with laplace-torch's backend and eigendecomposition."""
    from laplace.utils.matrix import Kron

    found, _ = factors(it.answers, it.layers, it.batches, [0] * it.rows)
    Kron([[each.gradient_sum, each.input_sum] for each in found.values()]).decompose()


def _laplace_torch_predict(it: Subject, backend: Any) -> None:
    """Compute laplace-torch's functional variance of every batch, and 100 samples of the softmax."""
    run = CurvatureRun(it.answers, it.layers, lambda: it.batches, [0] * it.rows, it.classes)
    posterior = fit_structure("kron", run)[0]
    assert isinstance(posterior, BlockPosterior)
    laplace = kron_laplace(
        it.answers, it.layers, posterior.blocks, 1.0, classes=it.classes, rows=it.rows, log_likelihood=0.0
    )
    with silence_warnings(), trainable(it.layers):
        engine = backend(laplace.model, "classification")
        for batch in it.batches:
            jacobian, mean = engine.jacobians(as_inputs(batch))
            _sample(mean.detach(), laplace.functional_variance(jacobian.detach()))


def _sample(mean: torch.Tensor, variance: torch.Tensor) -> None:
    positive = variance + 1e-4 * torch.eye(variance.shape[-1])
    draws = torch.distributions.MultivariateNormal(mean, positive).sample((100,))
    torch.softmax(draws, dim=-1).mean(dim=0)


@contextmanager
def _as_bayesian_lora_wants(it: Subject) -> Iterator[None]:
    """Restore the model: bayesian-lora uses all trainable weights, and leaves training mode on."""
    try:
        with trainable(it.layers):
            yield
    finally:
        it.answers.model.eval()


def _answer(it: Subject, outputs: Any) -> torch.Tensor:
    logits = outputs.logits
    return logits if it.answers.answer_token_ids is None else logits[:, -1][:, it.answers.answer_token_ids]


def _bayesian_lora_fit(it: Subject) -> Any:
    from bayesian_lora import calculate_kronecker_factors, cholesky_decompose_small_factors

    with _as_bayesian_lora_wants(it):
        factors = calculate_kronecker_factors(
            it.answers.model,
            lambda model, batch: _answer(it, model(**as_inputs(batch))),
            it.batches,
            n_kfac=_RANK,
            lr_threshold=_WIDE,
            target_module_keywords=["lora"],
        )
        return cholesky_decompose_small_factors(factors, _WIDE, "cpu", torch.float32)


def _bayesian_lora_predict(it: Subject, factors: Any) -> None:
    from bayesian_lora.main import jacobian_mean, variance
    from transformers import BatchEncoding

    rank = min(it.layers[0].shape)
    with _as_bayesian_lora_wants(it):
        for batch in it.batches:
            inputs = BatchEncoding(dict(as_inputs(batch)))
            jacobian, mean = jacobian_mean(
                it.answers.model, inputs, output_callback=lambda outputs: _answer(it, outputs)
            )
            jacobian = {name: each.detach() for name, each in jacobian.items()}
            found = variance(inputs, jacobian, factors, torch.tensor(1.0), it.classes, rank, _RANK, "cpu")
            _sample(mean.detach(), found)
