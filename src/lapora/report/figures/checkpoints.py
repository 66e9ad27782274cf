"""The paper's figures: accuracy, ECE and NLL, or another likelihood's scores, against training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from lapora.config import method_label
from lapora.report.figures.style import Picture, line_style, new_figure, style
from lapora.report.tables import BEST_IS_HIGH, checkpoint_scores

_LABELS = {"ece": "ECE", "nll": "NLL", "rmse": "RMSE", "crps": "CRPS", "f1_micro": "F1"}
_LINKS = ("mc-joint", "mc-indep", "probit", "bridge")
# (label in the legend, posterior); each has the same style in every figure.
_MAP = ("MAP", None)
_LLLA, _LA = ("LLLA", "llla-kron"), ("LA", "la-kron")
_DIAGONAL = (("LLLA, diagonal", "llla-diag"), ("LA, diagonal", "la-diag"))
_LOOKS = {label: index for index, label in enumerate(("MAP", "LLLA", "LA", "-", "LLLA, diagonal", "LA, diagonal"))}

Curve = tuple[str, str | None]


def checkpoint_pictures(record: Mapping[str, Any]) -> list[Picture]:
    """Return the figures of a training run's checkpoints.

    Args:
        record: Record of ``lapora eval RUN_DIR --checkpoints``.

    Returns:
        Figures 1 to 3 (MAP, LLLA, LA), 4 (the links) and 5 to 7 (diagonal against KFAC) of Yang et al., as far as
        their links and posteriors were scored.
    """
    found = {method_label(r["method"], r.get("name"), r.get("link")) for r in record["checkpoints"][0]["results"]}
    links = [link for link in _LINKS if any(label.endswith(f"({link})") for label in found)]
    if not links:
        return []
    where = f"{record['task']}, {record['n']} rows of {record['split']}"
    names = [_LABELS.get(score, score) for score in checkpoint_scores(record)]
    dashed = f"Dashed line: checkpoint with the best MAP {names[0]}."
    scores = f"{', '.join(names[:-1])} and {names[-1]}"
    chosen = "" if record.get("prior_method") == "marglik" else " The priors were chosen for mc-joint."
    with style():
        pictures = [
            Picture(
                "checkpoints",
                f"{scores[0].upper()}{scores[1:]} against training step: MAP, LLLA and LA (KFAC, {links[0]}); {where}. "
                f"{dashed}",
                _grid(record, [_MAP, _LLLA, _LA], links[:1], across="scores"),
            )
        ]
        if len(links) > 1:
            pictures.append(
                Picture(
                    "checkpoints-links",
                    f"The links side by side (KFAC); {where}. {dashed}{chosen}",
                    _grid(record, [_MAP, _LLLA, _LA], links, across="links"),
                )
            )
        pictures.append(
            Picture(
                "checkpoints-structures",
                f"Diagonal against KFAC ({links[0]}); {where}. {dashed}",
                _grid(record, [_MAP, _LLLA, _LA, *_DIAGONAL], links[:1], across="scores"),
            )
        )
    return pictures


def _grid(record: Mapping[str, Any], curves: Sequence[Curve], links: Sequence[str], *, across: str) -> Any:
    """Return one column per score for one link, or one column per link and one row per score."""
    title = f"{record['task']}, {record['n']} rows of {record['split']}"
    scores = checkpoint_scores(record)
    if across == "scores":
        figure = new_figure(8.4, 3.4, title)
        axes = figure.subplots(1, len(scores), squeeze=False)
        panels = [(axes[0, index], score, links[0]) for index, score in enumerate(scores)]
    else:
        figure = new_figure(2.6 * len(links) + 0.4, 6.4, title)
        axes = figure.subplots(len(scores), len(links), sharex=True, sharey="row", squeeze=False)
        panels = [
            (axes[row, column], score, link) for row, score in enumerate(scores) for column, link in enumerate(links)
        ]
        for column, link in enumerate(links):
            axes[0, column].set_title(link)
    handles: dict[str, Any] = {}
    for axis, score, link in panels:
        _draw(axis, record, curves, score, link, handles)
        first_column = across == "scores" or link == links[0]
        if first_column:
            axis.set_ylabel(_LABELS.get(score, score))
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles))
    return figure


def _draw(
    axis: Axes, record: Mapping[str, Any], curves: Sequence[Curve], score: str, link: str, handles: dict[str, Any]
) -> None:
    steps = [checkpoint["step"] for checkpoint in record["checkpoints"]]
    for label, posterior in curves:
        wanted = "map" if posterior is None else method_label("laplace", posterior, link)
        values = [_value(checkpoint, wanted, score) for checkpoint in record["checkpoints"]]
        if any(value is not None for value in values):
            shown = [float("nan") if value is None else value for value in values]
            (handles[label],) = axis.plot(steps, shown, label=label, **line_style(_LOOKS[label]))
    first = checkpoint_scores(record)[0]
    at_map = [_value(checkpoint, "map", first) or 0.0 for checkpoint in record["checkpoints"]]
    best = steps[at_map.index(max(at_map) if first in BEST_IS_HIGH else min(at_map))]
    line: dict[str, Any] = {"color": "#555555", "linestyle": (0, (4, 3)), "linewidth": 1, "zorder": 0}
    handles[f"best MAP {_LABELS.get(first, first)}"] = axis.axvline(best, **line)
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.locator_params(axis="x", nbins=5, integer=True)


def _value(checkpoint: Mapping[str, Any], label: str, score: str) -> float | None:
    for result in checkpoint["results"]:
        if method_label(result["method"], result.get("name"), result.get("link")) == label:
            value: float | None = result[score]
            return value
    return None
