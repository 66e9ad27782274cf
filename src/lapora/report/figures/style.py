"""Style of all figures: methods differ by marker and line style, and colors also by lightness."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lapora.errors import DataError
from lapora.storage.files import write_bytes

# Okabe and Ito's colors, ordered so that neighbors also differ in lightness.
_COLORS = ("#000000", "#E69F00", "#0072B2", "#8C8C8C", "#D55E00", "#56B4E9", "#005F46", "#CC79A7")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)))

_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.6,
    "figure.dpi": 110,
    "svg.hashsalt": "lapora",  # the same figure gives the same file
    "svg.fonttype": "path",
}


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure with its name and caption.

    Attributes:
        name: File name without suffix.
        caption: Caption, in a sentence.
        figure: The figure.
    """

    name: str
    caption: str
    figure: Figure

    def __post_init__(self) -> None:
        """Lay out the figure once: another layout would shift it slightly."""
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")


@contextmanager
def style() -> Iterator[None]:
    """Apply the style to figures drawn in the block."""
    with mpl.rc_context(_SETTINGS):
        yield


def line_style(index: int) -> dict[str, Any]:
    """Return color, marker and line of the method at a position."""
    each = index % len(_COLORS)
    return {
        "color": _COLORS[each],
        "marker": _MARKERS[each],
        "linestyle": _LINES[each],
        "markersize": 4.5,
        "linewidth": 1.3,
        "markerfacecolor": "white" if each % 2 else _COLORS[each],
    }


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Return an empty figure with a constrained layout; sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def to_svg(figure: Figure) -> bytes:
    """Return the figure as SVG."""
    with style():
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        return stream.getvalue()


def save_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write each figure as PNG and SVG.

    Raises:
        DataError: The folder cannot be written.
    """
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with style():
            for picture in pictures:
                for ending, options in (("png", {"dpi": 150, "metadata": {"Software": None}}), ("svg", {})):
                    file = folder / f"{picture.name}.{ending}"
                    content = to_svg(picture.figure) if ending == "svg" else _png(picture.figure, options)
                    write_bytes(file, content, follow_symlink=True)
                    files.append(file)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another --plots") from error
    return files


def _png(figure: Figure, options: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", **options)
    return stream.getvalue()
