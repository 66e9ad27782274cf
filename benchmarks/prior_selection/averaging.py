"""The averaged prior against choosing one prior precision or one temperature, on held-out rows of 22 adapters.

Run from the project's root::

    python -m benchmarks.prior_selection.averaging --shared ../shared [--decoder BASE] [--table]

Moments and tables of each adapter are cached (minutes per adapter, a decoder more), so a run resumes where it was cut.
BASE is the folder of SmolLM2-135M-Instruct; without it the decoders' adapters are left out unless they are cached.
Writes the curves of every method against the number m of labelled rows, means over 60 random splits of the held-out
rows into m that tune and the others, which are scored. ``--table`` prints regrets and results without labelled rows;
``python -m benchmarks.prior_selection.draw_rows`` draws the curves.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp

from benchmarks.prior_selection.moments import PRECISIONS, Moments, decoder_moments, encoder_moments
from benchmarks.prior_selection.recipes import DECODERS, FURTHER, RECIPES, Half
from benchmarks.prior_selection.tables import Tables
from lapora.posterior import averaging

Array = NDArray[np.float64]

SIZES = (0, 5, 10, 20, 50, 100, 200)
"""Numbers m of labelled rows."""
SPLITS = 60
NAMES = ("MAP", "marginal likelihood", "temperature", "temperature, prior", "prior precision", "averaged")
CURVES = Path("docs/notes/averaged-prior-2026.csv")

_SCORED = 90
"""Least number of scored rows: larger m are left out for an adapter with few rows."""
_EVERY = 2
"""Every second of the prior precisions is in the tool's grid."""
_DENSE: Array = 0.02 * np.arange(-230, 231)
"""Logarithms of the temperatures, 0.01 to 100, that plain temperature scaling searches."""
_AT_ONE = int(np.argmin(np.abs(np.log(averaging.TEMPERATURES))))


@dataclass(frozen=True)
class Choice:
    """One method's probabilities in each split: weights over a table of log-probabilities.

    Attributes:
        log_p: ``(K, N, C)``.
        weights: ``(SPLITS, K)``.
    """

    log_p: NDArray[np.float32]
    weights: Array

    @classmethod
    def one(cls, log_p: NDArray[np.float32], chosen: NDArray[np.int64]) -> Choice:
        """The member of the table that each split chose."""
        return cls(log_p, np.eye(len(log_p))[chosen])


@dataclass(frozen=True)
class Adapter:
    """One adapter's tables, with random splits of its held-out rows.

    Attributes:
        name: The adapter.
        half: Whether the rule was chosen on it.
        tables: Its log-probabilities.
    """

    name: str
    half: Half
    tables: Tables

    @property
    def sizes(self) -> list[int]:
        """The m that leave rows to score."""
        return [m for m in SIZES if m <= len(self.tables.labels) - _SCORED]

    @cached_property
    def tolerance(self) -> float:
        """δ₀ by the tool's rule."""
        return averaging.tolerance_of(self.tables.curve(_EVERY))

    def tuned(self, m: int) -> NDArray[np.bool_]:
        """Which rows tune in each split, ``(SPLITS, N)``."""
        chance, rows = np.random.default_rng(0), len(self.tables.labels)
        orders = np.stack([chance.permutation(rows) for _ in range(SPLITS)])
        mask = np.zeros((SPLITS, rows), dtype=bool)
        np.put_along_axis(mask, orders[:, :m], True, axis=1)
        return mask

    def of_labels(self, log_p: NDArray[np.float32]) -> Array:
        """Log-probability of the labels, from ``(K, N, C)`` to ``(K, N)``."""
        return log_p[:, np.arange(len(self.tables.labels)), self.tables.labels].astype(np.float64)

    @cached_property
    def by_precision(self) -> NDArray[np.float32]:
        """At every prior precision and MAP, without a temperature, ``(D+1, N, C)``."""
        return self.tables.log_p[:, _AT_ONE]

    @cached_property
    def by_temperature(self) -> NDArray[np.float32]:
        """MAP at every temperature of the dense grid, ``(T', N, C)``."""
        scaled = self.tables.mean / np.exp(_DENSE)[:, None, None]
        return np.asarray(scaled - logsumexp(scaled, axis=2, keepdims=True), dtype=np.float32)

    def averaged(self, m: int) -> Choice:
        """The tool's rule on the tool's grid."""
        positions = [*range(0, len(PRECISIONS), _EVERY), len(PRECISIONS)]
        precisions = np.append(PRECISIONS[::_EVERY], math.inf)
        log_p = self.tables.log_p[positions]
        shape, flat = log_p.shape[:2], log_p.reshape(-1, *log_p.shape[2:])
        sums = self.tuned(m).astype(np.float64) @ self.of_labels(flat).T
        weights = [
            averaging.average(precisions, averaging.TEMPERATURES, self.tolerance, -each.reshape(shape) / max(m, 1), m)
            for each in sums
        ]
        return Choice(flat, np.stack(weights).reshape(SPLITS, -1))

    def methods(self, m: int) -> dict[str, Choice]:
        """Every method with m labelled rows; without rows, temperature and prior precision are those of MAP."""
        tuned = self.tuned(m).astype(np.float64)
        of_precisions = tuned @ self.of_labels(self.by_precision).T
        of_temperatures = tuned @ self.of_labels(self.by_temperature).T
        of_precisions[:, -1] += 1e-9  # ties, and m = 0, are MAP's
        of_temperatures -= 1e-9 * np.abs(_DENSE)
        held_back = of_temperatures - 0.5 * (_DENSE / averaging.TEMPERATURE_WIDTH) ** 2
        evidence = int(np.argmin(np.abs(np.log(PRECISIONS) - math.log(self.tables.evidence))))
        same = np.zeros(SPLITS, dtype=np.int64)
        return {
            "MAP": Choice.one(self.by_precision, same + len(PRECISIONS)),
            "marginal likelihood": Choice.one(self.by_precision, same + evidence),
            "temperature": Choice.one(self.by_temperature, of_temperatures.argmax(axis=1)),
            "temperature, prior": Choice.one(self.by_temperature, held_back.argmax(axis=1)),
            "prior precision": Choice.one(self.by_precision, of_precisions.argmax(axis=1)),
            "averaged": self.averaged(m),
        }

    def nll(self, choice: Choice, m: int) -> Array:
        """NLL of the scored rows of each split, ``(SPLITS,)``."""
        p = choice.weights @ np.exp(self.of_labels(choice.log_p))
        scored = ~self.tuned(m)
        return np.asarray(-(np.log(np.maximum(p, 1e-300)) * scored).sum(axis=1) / scored.sum(axis=1))

    def ece(self, choice: Choice, m: int, splits: int = SPLITS) -> Array:
        """ECE of the scored rows of each split, 15 bins."""
        used = choice.weights.max(axis=0) > 1e-6
        weights, grid = choice.weights[:splits, used].astype(np.float32), np.exp(choice.log_p[used])
        p = np.tensordot(weights, grid, axes=1)
        p /= p.sum(axis=2, keepdims=True)
        found = []
        for each, tuned in zip(p, self.tuned(m), strict=False):
            confidence, right = each.max(axis=1)[~tuned], (each.argmax(axis=1) == self.tables.labels)[~tuned]
            bins = np.minimum((confidence * 15).astype(int), 14)
            gaps = np.bincount(bins, right - confidence.astype(np.float64), minlength=15)
            found.append(np.abs(gaps).sum() / len(right))
        return np.array(found)


def load_all(shared: Path, cache: Path, decoder: Path | None) -> Iterator[Adapter]:
    """Yield every adapter, its moments and tables computed where they are not cached."""
    halves: dict[str, Half] = {one.name: one.half for one in (*RECIPES, *FURTHER)} | DECODERS
    recipes = {one.name: one for one in (*RECIPES, *FURTHER)}
    for folder in ("moments", "tables"):
        (cache / folder).mkdir(parents=True, exist_ok=True)
    for name in sorted(set(halves) - LEFT_OUT):
        moments, tables = cache / "moments" / f"{name}.npz", cache / "tables" / f"{name}.npz"
        started = time.perf_counter()
        if not tables.exists():
            if not moments.exists():
                if name in recipes:
                    found = encoder_moments(recipes[name], shared)
                elif decoder is None:
                    print(f"{name}: left out, since it needs --decoder", flush=True)
                    continue
                else:
                    found = decoder_moments(name, shared, decoder, cache / "posteriors" / name)
                _write(found, moments)
            _write(Tables.build(Moments.load(moments)), tables)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        yield Adapter(name, halves[name], Tables.load(tables))


LEFT_OUT = {"sources5-under"}
"""Recipes of the earlier experiment that this one did not use."""


def _write(found: Moments | Tables, path: Path) -> None:
    unfinished = path.with_name(f"{path.stem}.unfinished.npz")
    found.save(unfinished)
    unfinished.replace(path)


def regrets(adapters: list[Adapter]) -> Iterator[str]:
    """Lines of the tables of regret: NLL less that of the best of MAP, a temperature and a prior precision."""
    for half in ("choose", "test"):
        own = [each for each in adapters if each.half == half]
        yield (
            f"\n| regret, {half} ({len(own)} adapters): mean, worst | "
            + " | ".join(f"m = {m}" for m in SIZES[1:])
            + " |"
        )
        yield "| --- " * len(SIZES) + "|"
        found: dict[str, dict[int, list[float]]] = {name: {m: [] for m in SIZES[1:]} for name in NAMES}
        for adapter in own:
            for m in adapter.sizes[1:]:
                means = {name: float(adapter.nll(each, m).mean()) for name, each in adapter.methods(m).items()}
                best = min(means[name] for name in ("MAP", "temperature", "prior precision"))
                for name, value in means.items():
                    found[name][m].append(value - best)
        for name, columns in found.items():
            cells = [f"{np.mean(each):+.4f}, {max(each):+.3f}" if each else "" for each in columns.values()]
            yield f"| {name} | " + " | ".join(cells) + " |"


def without_rows(adapters: list[Adapter]) -> Iterator[str]:
    """Lines of the tables without labelled rows, at the tool's width of the prior and at a larger one."""
    for half in ("choose", "test"):
        heads = ["training NLL", "δ₀", "MAP", "marginal likelihood", "averaged", "width 1.5", "best δ", "ECE"]
        yield f"\n| m = 0, {half} | " + " | ".join(heads) + " |"
        yield "| --- " * 9 + "|"
        gains, harms = np.zeros(3), []
        for adapter in (each for each in adapters if each.half == half):
            methods = adapter.methods(0)
            nll = {name: float(adapter.nll(each, 0)[0]) for name, each in methods.items()}
            with patch.object(averaging, "PRECISION_WIDTH_WITHOUT_ROWS", 1.5):
                wider = float(adapter.nll(adapter.averaged(0), 0)[0])
            best = float(-adapter.of_labels(adapter.by_precision).mean(axis=1).max())
            ece = [adapter.ece(methods[name], 0, 1)[0] for name in ("MAP", "averaged")]
            gains += nll["MAP"] - np.array([nll["averaged"], wider, best])
            harms.append((nll["averaged"] - nll["MAP"], wider - nll["MAP"]))
            cells = [nll["MAP"], nll["marginal likelihood"], nll["averaged"], wider, best]
            yield (
                f"| {adapter.name} | {adapter.tables.curve(_EVERY).map_nll:.3f} | {adapter.tolerance:.3g} | "
                f"{' | '.join(f'{cell:.3f}' for cell in cells)} | {ece[0]:.3f} to {ece[1]:.3f} |"
            )
        if harms:
            worst, share = np.max(harms, axis=0), gains[:2] / gains[2]
            yield (
                f"\nshare of the best δ's gain {share[0]:.2f}, worst harm {worst[0]:+.3f}; width 1.5: {share[1]:.2f}, "
                f"{worst[1]:+.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and adapters/")
    parser.add_argument("--cache", type=Path, default=Path("build/averaged_prior"), help="where figures are kept")
    parser.add_argument("--decoder", type=Path, metavar="BASE", help="folder of the decoders' base model")
    parser.add_argument("--curves", type=Path, default=CURVES, help="CSV to write")
    parser.add_argument("--table", action="store_true", help="print the tables of the documentation, no curves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapters = list(load_all(options.shared, options.cache, options.decoder))
    if options.table:
        for line in (*regrets(adapters), *without_rows(adapters)):
            print(line, flush=True)
        return
    with options.curves.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["adapter", "half", "method", "m", "nll", "nll_sd", "ece", "ece_sd"])
        for adapter in adapters:
            for m in adapter.sizes:
                for name, choice in adapter.methods(m).items():
                    nll, ece = adapter.nll(choice, m), adapter.ece(choice, m)
                    scores = [f"{each:.4f}" for each in (nll.mean(), nll.std(), ece.mean(), ece.std())]
                    out.writerow([adapter.name, adapter.half, name, m, *scores])
            print(f"{adapter.name}: scored", flush=True)


if __name__ == "__main__":
    main()
