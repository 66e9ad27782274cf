"""Names in docstrings (`:func:` and its like) become links on the site, where the site has a place for them."""

from __future__ import annotations

import xml.etree.ElementTree as etree
from typing import Any

from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.util import AtomicString

_ROLE = r":(?:func|class|meth|mod|data):`([\w.]+)`"


def on_config(config: Any) -> Any:
    """Add the form to the site's Markdown."""
    config["markdown_extensions"].append(_References())
    return config


class _References(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        """Look for names before code, of which they would be a part."""
        md.inlinePatterns.register(_Reference(_ROLE, md), "reference", 195)


class _Reference(InlineProcessor):
    def handleMatch(self, m: Any, data: str) -> tuple[etree.Element, int, int]:  # type: ignore[override]
        link = etree.Element("autoref", {"identifier": m.group(1), "optional": ""})
        etree.SubElement(link, "code").text = AtomicString(m.group(1))
        return link, m.start(0), m.end(0)
