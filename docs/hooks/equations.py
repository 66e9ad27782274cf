"""Equations become MathML while the site is built: nothing is fetched, and no script runs in the reader's browser.

Pages write TeX as GitHub reads it: `$...$` in a line, and a fence marked `math` for a line of its own.
"""

from __future__ import annotations

import xml.etree.ElementTree as etree
from typing import Any

from latex2mathml.converter import convert, convert_to_element
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor

_INLINE = r"(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=[^\s\\])\$(?![\w$])"


def on_config(config: Any) -> Any:
    """Add both forms to the site's Markdown."""
    config["markdown_extensions"].append(InlineEquations())
    fences = config["mdx_configs"].setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "equation", "format": displayed})
    return config


def displayed(source: str, *_: Any, **__: Any) -> str:
    """A fence marked `math`, one equation for each paragraph of it."""
    equations = [part.strip() for part in source.split("\n\n") if part.strip()]
    return "".join(f'<div class="equation">{convert(equation, display="block")}</div>' for equation in equations)


class InlineEquations(Extension):
    """`$...$`."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Look for equations after code and escapes, before emphasis, which would read their underscores."""
        md.inlinePatterns.register(_Equation(_INLINE, md), "equation", 179)


class _Equation(InlineProcessor):
    def handleMatch(self, m: Any, data: str) -> tuple[etree.Element, int, int]:  # type: ignore[override]
        return convert_to_element(m.group(1)), m.start(0), m.end(0)
