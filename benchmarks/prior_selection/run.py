"""Print NLL, ECE and accuracy of every criterion for the prior precision, on rows that none of them used.

Run from the project's root::

    python -m benchmarks.prior_selection.run --shared ../shared

Views of the adapters (products of Jacobians, variances) are cached in ``--cache``; computing them takes a few minutes
per adapter on one core, choosing and scoring takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.prior_selection import criteria
from benchmarks.prior_selection.criteria import Array, Labels
from benchmarks.prior_selection.recipes import RECIPES, Recipe, halves
from benchmarks.prior_selection.views import THINNED_SHARE, load_view
from lapora.metrics import evaluate

Structure = Literal["kfac", "full"]
MAP, TEMPERATURE, VALIDATION = "MAP", "temperature", "validation"
TOLERANCE, KEPT = 0.005, 0.8


@dataclass(frozen=True)
class Score:
    """One method on one adapter: its δ (or temperature) and how it does on the scored rows."""

    setting: float
    nll: float
    ece: float
    accuracy: float


class Adapter:
    """The arrays of one view, cut into tuned and scored rows."""

    def __init__(self, one: Recipe, view: dict[str, Any]) -> None:
        self.recipe, self.view = one, view
        self.labels: Labels = view["train_labels"]
        self.held_labels: Labels = view["held_labels"]
        self.grid: Array = view["grid"]
        self.mean = criteria.differences(view["train_logits"])
        self.held_mean = criteria.differences(view["held_logits"])
        tune, score = halves(len(self.held_labels), len(one.classes))
        self.tune, self.score = np.array(tune), np.array(score)
        initial = [
            shape[0] / 3 for shape, role in zip(view["layer_shapes"], view["layer_roles"], strict=True) if role == "A"
        ]
        self.initial_norm, self.squared_norm = float(sum(initial)), float(view["squared_norms"].sum())

    @property
    def training_nll(self) -> float:
        """NLL of the training rows at the MAP."""
        return criteria.mean_nll(criteria.log_softmax(self.mean), self.labels)

    def eigenvalues(self, structure: Structure) -> Array:
        """λ of one structure."""
        return self.view[f"{structure}_eigenvalues"]

    def margins(self) -> Array:
        """Cross-validated margins of the frozen encoder's probe."""
        half = self.view["train_embeddings"].shape[1] // 2
        embeddings = self.view["train_embeddings"][:, :half].astype(np.float64)
        return criteria.simulated_margins(embeddings, self.labels, len(self.recipe.classes), self.training_nll)

    def at(self, structure: Structure, delta: float) -> Score:
        """Score the scored rows at one δ."""
        mean = self.held_mean[self.score]
        if np.isinf(delta):
            return self._scored(delta, criteria.log_softmax(mean))
        variances = self.view[f"held_{structure}"][:, self.score]
        place = np.interp(np.log(delta), np.log(self.grid), np.arange(len(self.grid)))
        low = min(int(place), len(self.grid) - 2)
        variance = (1 - (place - low)) * variances[low] + (place - low) * variances[low + 1]
        return self._scored(delta, criteria.predictive(mean, variance))

    def tempered(self) -> Score:
        """Temperature scaling tuned on the tuning rows."""
        setting = criteria.temperature(self.held_mean[self.tune], self.held_labels[self.tune])
        return self._scored(setting, criteria.log_softmax(self.held_mean[self.score] / setting))

    def _scored(self, setting: float, log_p: Array) -> Score:
        found = evaluate(torch.tensor(log_p), torch.tensor(self.held_labels[self.score]))
        return Score(setting, found["nll"], found["ece"], found["accuracy"])


def choose(adapter: Adapter, structure: Structure, everything: bool) -> dict[str, float]:
    """δ by every criterion.

    Args:
        adapter: The adapter.
        structure: ``kfac`` (the tool's default) or ``full``.
        everything: Also the attempts that failed.
    """
    view, grid = adapter.view, adapter.grid
    values, norm = adapter.eigenvalues(structure), adapter.squared_norm
    train_variances = view[f"train_{structure}"]
    thinned = criteria.differences(view["thin_logits"])
    outside = criteria.without_own_row(adapter.mean, train_variances)
    thinned_variances = view[f"thin_{structure}"]
    features = view["features"].astype(np.float64)
    prior_mean = adapter.mean - view["train_theta"]
    margins = adapter.margins()
    found = {
        MAP: np.inf,
        "marginal likelihood": criteria.marginal_likelihood(values, norm),
        "adapted evidence": criteria.adapted_evidence(features, prior_mean, adapter.labels),
        VALIDATION: criteria.validation(
            grid,
            adapter.held_mean[adapter.tune],
            view[f"held_{structure}"][:, adapter.tune],
            adapter.held_labels[adapter.tune],
        ),
        "thinned rows": criteria.thinned_rows(grid, thinned, thinned_variances, adapter.labels),
        "probe": criteria.simulated_validation(grid, adapter.mean, train_variances, adapter.labels, margins),
    }
    fewer = criteria.differences(view["thin_logits_0.2"])
    found["thinned, 20%"] = criteria.thinned_rows(grid, fewer, outside, adapter.labels)
    found["evidence if saturated, else thinned 20%"] = criteria.evidence_or_thinned_rows(
        found["marginal likelihood"], found["thinned, 20%"], adapter.training_nll
    )
    found["larger of both"] = max(found["thinned rows"], found["probe"])
    if everything:
        gap = criteria.mean_nll(criteria.log_softmax(margins), adapter.labels) - adapter.training_nll
        from_b = view["kfac_eigenvalues"][view["kfac_roles"] == "B"]
        norm_of_b = float(view["squared_norms"][view["layer_roles"] == "B"].sum())
        change = adapter.mean - criteria.differences(view["base_train_logits"])
        found |= {
            "evidence less initial norm": criteria.without_initialisation(values, norm, adapter.initial_norm),
            "evidence of B (KFAC)": criteria.marginal_likelihood(from_b, norm_of_b),
            "evidence x 10": criteria.tempered(values, norm, 10.0),
            "gated evidence": criteria.gated(values, norm, adapter.training_nll),
            "function change": criteria.function_change(features, change),
            "linearised k-fold": criteria.cross_validated_evidence(features, prior_mean, adapter.labels),
            "leave-one-out at MAP": criteria.leave_one_out_at_map(grid, adapter.mean, train_variances, adapter.labels),
            "matched gap": criteria.matched_gap(grid, adapter.mean, train_variances, gap),
        }
        more = criteria.differences(view["thin_logits_0.4"])
        found["thinned, 40%"] = criteria.thinned_rows(grid, more, outside, adapter.labels)
        same = criteria.thinned_rows(grid, thinned, outside, adapter.labels)
        found[f"thinned, {THINNED_SHARE:.0%}, whole rows' variance"] = same
    return found


def verdict(score: float, at_map: float, tuned: float) -> tuple[bool, bool]:
    """Return whether a method is never worse than the MAP, and whether it keeps the gain of validation, if any."""
    gain = at_map - tuned
    return score <= at_map + TOLERANCE, gain < TOLERANCE or at_map - score >= KEPT * gain


def report(structure: Structure, half: str, scores: dict[str, dict[str, Score]]) -> str:
    """One Markdown table of the scored rows' NLL, a method a column, with the two conditions below."""
    methods = list(next(iter(scores.values())))
    lines = [f"\n### {structure}, {half} half: NLL (setting), x where a condition fails\n"]
    lines += ["| adapter | " + " | ".join(methods) + " |", "| --- " * (len(methods) + 1) + "|"]
    safe, keeps = dict.fromkeys(methods, 0), dict.fromkeys(methods, 0)
    worst, gains = dict.fromkeys(methods, -np.inf), dict.fromkeys(methods, 0.0)
    for name, row in scores.items():
        at_map, tuned = row[MAP].nll, row[VALIDATION].nll
        cells = []
        for method, score in row.items():
            first, second = verdict(score.nll, at_map, tuned)
            safe[method] += first
            keeps[method] += second
            worst[method] = max(worst[method], score.nll - at_map)
            gains[method] += at_map - score.nll
            cells.append(f"{score.nll:.3f} ({score.setting:.2g})" + ("" if first and second else " x"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    count, total = len(scores), gains[VALIDATION]
    lines += [
        "| never worse than MAP + .005 | " + " | ".join(f"{safe[m]}/{count}" for m in methods) + " |",
        "| keeps 80 % of the gain | " + " | ".join(f"{keeps[m]}/{count}" for m in methods) + " |",
        "| worst against MAP | " + " | ".join(f"{worst[m]:+.3f}" for m in methods) + " |",
        "| share of the summed gain | " + " | ".join(f"{gains[m] / total:.2f}" for m in methods) + " |",
    ]
    return "\n".join(lines)


def details(structure: Structure, scores: dict[str, dict[str, Score]]) -> str:
    """NLL, ECE and accuracy of the comparison's methods."""
    methods = list(next(iter(scores.values())))[:10]
    lines = [f"\n### {structure}: NLL / ECE / accuracy\n", "| adapter | " + " | ".join(methods) + " |"]
    lines.append("| --- " * (len(methods) + 1) + "|")
    for name, row in scores.items():
        cells = [f"{row[m].nll:.3f} / {row[m].ece:.3f} / {row[m].accuracy:.3f}" for m in methods]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and adapters/")
    parser.add_argument("--cache", type=Path, default=Path("build/prior_selection"), help="where views are kept")
    parser.add_argument("--only", nargs="*", help="names of adapters; all by default")
    parser.add_argument("--half", choices=["choose", "test", "both"], default="both")
    parser.add_argument("--everything", action="store_true", help="also the attempts that failed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    structures: tuple[Structure, ...] = ("kfac", "full")
    results: dict[Structure, dict[str, dict[str, Score]]] = {structure: {} for structure in structures}
    chosen = [
        one for one in RECIPES if (not options.only or one.name in options.only) and options.half in (one.half, "both")
    ]
    for one in chosen:
        adapter = Adapter(one, load_view(one, options.shared, options.cache))
        for structure in structures:
            settings = choose(adapter, structure, options.everything)
            row = {method: adapter.at(structure, delta) for method, delta in settings.items()}
            head = {MAP: row.pop(MAP), TEMPERATURE: adapter.tempered()}
            results[structure][one.name] = head | row
        print(f"{one.name}: done", file=sys.stderr, flush=True)
    for structure in structures:
        for half in ("choose", "test"):
            part = {one.name: results[structure][one.name] for one in chosen if one.half == half}
            if part:
                print(report(structure, half, part))
        print(details(structure, results[structure]))


if __name__ == "__main__":
    main()
