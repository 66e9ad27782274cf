"""Training-free Bayesianization (Shi et al. 2024, arXiv 2412.05723), scored on the rows that ``lapora eval`` scores.

With ``B = U diag(d) Vᵀ`` the update ``B A`` is ``(U diag(d)) (Vᵀ A)``; the weights ``Vᵀ A`` get the deviations
``σ / d_i``. σ is the largest whose NLL on training rows is at most .03 nats above that of the adapter (bisection of
log σ), and ten samples are averaged. Prints accuracy, ECE and NLL as JSON.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lapora import metrics
from lapora.config import DataSettings, EvalSettings, ModelSettings
from lapora.tasks import EncodedExample
from lapora.workflows.evaluate import make_plan
from lapora.workflows.rows import read_labelled_rows
from lapora.workflows.scoring import forward_table
from lapora.workflows.task_model import Fitted, open_fitted

SAMPLES = 10
_ANCHORS = {"classifier": 200, "causal": 50}
"""Training rows that choose σ, by kind of model."""
_TOLERANCE, _BISECTIONS = 0.03, 8
_LEAST, _MOST = 1e-4, 1.0


def main() -> None:
    adapter, base, names = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
    limit = int(sys.argv[4])
    model = ModelSettings(adapter, base_model=base, device="cpu", dtype="float32")
    plan = make_plan(model, EvalSettings(names=tuple(names)))
    fitted = open_fitted(model, names[0])
    manifest = fitted.posterior.manifest
    train = DataSettings(data_dir=Path(manifest.data.data_dir or "."), split="train", limit=_ANCHORS[fitted.model.kind])
    anchors = read_labelled_rows(fitted.posterior, fitted.model.kind, train)
    rows = read_labelled_rows(
        fitted.posterior, fitted.model.kind, replace(DataSettings(), limit=limit), exclude=plan.tuning_digests
    )
    coded = fitted.model.encode(anchors.examples)
    plain = metrics.row_nll(forward_table(fitted.model, coded), anchors.targets).mean()
    low, high = math.log(_LEAST), math.log(_MOST)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        nll = metrics.row_nll(sampled(fitted, coded, math.exp(middle), 4), anchors.targets).mean()
        low, high = (middle, high) if nll - plain <= _TOLERANCE else (low, middle)
    log_p = sampled(fitted, fitted.model.encode(rows.examples), math.exp(low), SAMPLES)
    scores = metrics.evaluate(log_p, rows.targets)
    print(json.dumps({"sigma": math.exp(low), "n": len(rows.examples), **scores}))


def sampled(fitted: Fitted, coded: Sequence[EncodedExample], sigma: float, samples: int) -> Tensor:
    """Log of the probabilities averaged over sampled weights, ``(N, C)``."""
    layers = [module for module in fitted.model.loaded.model.modules() if isinstance(module, LoraLayer)]
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(samples):
        kept = []
        with torch.no_grad():
            for layer in layers:
                for name in layer.lora_A:
                    weight = layer.lora_A[name].weight
                    kept.append((weight, weight.clone()))
                    _, d, right = torch.linalg.svd(layer.lora_B[name].weight, full_matrices=False)
                    scale = sigma / d.clamp(min=1e-3 * d[0]).unsqueeze(1)
                    noise = scale * torch.randn(weight.shape, generator=generator)
                    weight += right.T @ noise
        drawn.append(forward_table(fitted.model, coded))
        with torch.no_grad():
            for weight, old in kept:
                weight.copy_(old)
    return torch.logsumexp(torch.stack(drawn), dim=0) - math.log(samples)


if __name__ == "__main__":
    main()
