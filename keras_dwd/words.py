"""Counts and sizes in words, for messages and reports."""

import difflib
import math
from collections.abc import Iterable


def counted(number: float, of: str) -> str:
    """A number of things: `1 task`, `2 tasks`, `1,000 parameters`, `0.5 epochs`."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {of}{'' if number == 1 else 's'}"


def sized(count: float) -> str:
    """A number of bytes with three digits: `1.31 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def decimals(value: float) -> int:
    """How many decimals a rate is shown with, so that a slow one has two digits and is never 0."""
    return max(0, 1 - math.floor(math.log10(value))) if value > 0 else 0


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'digits'?`, or nothing where no known name is like the given one."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {near[0]!r}?" if near else ""
