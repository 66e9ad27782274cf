"""The HTML report: one self-contained page with facts, tables, figures and manifests."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from lapora.config import ENOUGH_ROWS
from lapora.errors import DataError
from lapora.report.tables import HEADINGS, SHIFT_MEASURES, checkpoint_scores, label_of, number, shift_columns, threshold
from lapora.storage.files import write_bytes


@dataclass(frozen=True)
class PageTable:
    """A table.

    Attributes:
        title: Title.
        headings: Headings of the columns; all columns but the first are numbers.
        rows: Rows of cells.
        note: Note below the table.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """Content of the page; everything is escaped when it is written.

    Attributes:
        title: Heading.
        facts: Facts about the run, by name.
        tables: Tables.
        pictures: Caption and SVG of each figure.
        warnings: Warnings.
        manifests: JSON records of the result, by name.
        verdict: The result in a sentence.
    """

    title: str
    facts: Mapping[str, str]
    tables: Sequence[PageTable]
    pictures: Sequence[tuple[str, bytes]] = ()
    warnings: Sequence[str] = ()
    manifests: Mapping[str, Any] = field(default_factory=dict)
    verdict: str = ""


def write_page(file: Path, page: Page) -> None:
    """Write the page.

    Raises:
        DataError: The file cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    source = (resources.files("lapora.report") / "page.html").read_text(encoding="utf-8")
    # Pictures are images, not inline markup: their ids cannot collide and nothing in them can run.
    pictures = [(caption, base64.b64encode(svg).decode("ascii")) for caption, svg in page.pictures]
    manifests = {name: json.dumps(content, indent=2, ensure_ascii=False) for name, content in page.manifests.items()}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(source).render(page=page, pictures=pictures, manifests=manifests)
    try:
        write_bytes(file, text.encode("utf-8", "backslashreplace"), follow_symlink=True)
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror}); give another --report") from error


def verdict(record: Mapping[str, Any]) -> str:
    """Return a sentence: whether Laplace has a lower NLL than the plain adapter, by how much and how surely.

    Args:
        record: The record of ``eval``; its first posterior is judged under its first link.
    """
    results = {result["method"]: result for result in reversed(record["results"])}
    plain, found = results["map"], results.get("laplace")
    if found is None or "difference_to_map" not in found:
        ece = f" and an ECE of {number(plain['ece'])}" if "ece" in plain else ""
        return f"The plain adapter has an NLL of {number(plain['nll'])}{ece}."
    difference = found["difference_to_map"]["nll"]
    low, high = difference["interval"]
    if record["n"] < ENOUGH_ROWS:
        how = f"scored on fewer than {ENOUGH_ROWS} rows, which are too few to judge by"
    elif high < 0:
        how = "better calibrated than the plain adapter"
    else:
        how = "worse than the plain adapter" if low > 0 else "no better than the plain adapter"
    ece = f", ECE {number(found['ece'])} against {number(plain['ece'])}" if "ece" in found else ""
    return (
        f"{label_of(found)} is {how}: NLL {number(found['nll'])} against {number(plain['nll'])} (difference "
        f"{difference['value']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}){ece}."
    )


def evaluation_tables(record: Mapping[str, Any]) -> list[PageTable]:
    """Return the tables of an evaluation."""
    results = record["results"]
    scores = [score for score in HEADINGS if score in results[0]]
    compared = [score for score in ("nll", "ece", "crps") if score in scores]
    tables = [
        PageTable(
            f"Scores on {record['n']} rows of {record['split']}",
            ["method", *(HEADINGS[score] for score in scores), *(f"{score} minus MAP (95 %)" for score in compared)],
            [
                [
                    label_of(result),
                    *(_with_interval(result, score) for score in scores),
                    *(_difference(result, score) for score in compared),
                ]
                for result in results
            ],
            "Below each score: its 95 % bootstrap interval. Differences are paired by row. Calibration errors and "
            "their intervals are biased upwards on few rows.",
        )
    ]
    if "coverage" in results[0]:
        tables.append(
            PageTable(
                f"Coverage of {results[0]['coverage']['asked']:.0%} of the rows",
                ["method", "--abstain-below", "rows answered", "accuracy of these", "accuracy of all"],
                [
                    [
                        label_of(result),
                        threshold(result["coverage"]["threshold"]),
                        f"{result['coverage']['coverage']:.1%}",
                        number(result["coverage"]["accuracy"]),
                        number(result["accuracy"]),
                    ]
                    for result in results
                ],
            )
        )
    for shifted in record.get("ood", []):
        score, means, measures = shift_columns(shifted["results"][0])
        keys = (score, *(key for mean in means for key in (mean, f"{mean}_in")))
        tables.append(
            PageTable(
                f"Out of distribution: {shifted['task']}, {shifted['n']} rows of {shifted['split']}",
                [
                    "method",
                    HEADINGS[score],
                    *(heading for mean in means for heading in (mean, "(in distr.)")),
                    *(f"AUROC by {SHIFT_MEASURES[measure]}" for measure in measures),
                ],
                [
                    [
                        label_of(result),
                        *(number(result[key]) for key in keys),
                        *(number(result["auroc"][measure]) for measure in measures),
                    ]
                    for result in shifted["results"]
                ],
                "AUROC of separating these rows from in-distribution rows; 0.5 is chance.",
            )
        )
    return tables


def checkpoint_page_tables(record: Mapping[str, Any]) -> list[PageTable]:
    """Return the scores of every checkpoint: methods by training steps."""
    checkpoints = record["checkpoints"]
    columns = [{label_of(result): result for result in checkpoint["results"]} for checkpoint in checkpoints]
    headings = ["method", *(f"step {checkpoint['step']}" for checkpoint in checkpoints)]
    tables = []
    for score in checkpoint_scores(record):
        rows = [
            [label, *(number(column[label][score]) if label in column else "" for column in columns)]
            for label in columns[0]
        ]
        name = HEADINGS[score].upper() if len(score) <= len("rmse") else HEADINGS[score].capitalize()
        title = f"{name} on {record['n']} rows of"
        tables.append(PageTable(f"{title} {record['split']}", headings, rows))
    return tables


def _with_interval(result: Mapping[str, Any], score: str) -> str:
    interval = result["intervals"].get(score)
    text = number(result[score])
    return f"{text}\n{interval[0]:.3f}\u2013{interval[1]:.3f}" if interval else text


def _difference(result: Mapping[str, Any], score: str) -> str:
    found = result.get("difference_to_map", {}).get(score)
    return f"{found['value']:+.3f}\n{found['interval'][0]:+.3f} to {found['interval'][1]:+.3f}" if found else ""
