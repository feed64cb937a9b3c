"""Turns the LaTeX formulas of the documentation into MathML, which browsers draw by themselves.

A hook of mkdocs, see `mkdocs.yml`.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $…$ and of $$…$$.
_FORMULA = re.compile(r'class="arithmatex">\\([(\[])(.*?)\\[)\]]<', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The HTML of a page, with its formulas in MathML."""

    def drawn(match: re.Match[str]) -> str:
        display = "inline" if match[1] == "(" else "block"
        return f'class="arithmatex">{convert(html.unescape(match[2]).strip(), display=display)}<'

    return _FORMULA.sub(drawn, content)
