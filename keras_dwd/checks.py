"""Checks of arguments."""

from typing import Any

import numpy as np


def number(name: str, given: Any, low: float, high: float = np.inf, closed: bool = True) -> float:
    """Return `given` as a float; raise `ValueError` unless it is a finite number in [low, high].

    Args:
        name: Name of the argument, for the message.
        given: Value of the argument.
        low: Smallest value allowed.
        high: Largest value allowed.
        closed: Whether `high` itself is allowed.
    """
    valid = isinstance(given, (int, float, np.number)) and not isinstance(given, bool)
    if not (valid and np.isfinite(given) and low <= given <= high and (closed or given != high)):
        end = "]" if closed and np.isfinite(high) else ")"
        raise ValueError(f"`{name}` must be a number in [{low}, {high}{end}. Received: {given!r}")
    return float(given)


def integer(name: str, given: Any, low: int) -> int:
    """Return `given` as an `int`; raise `ValueError` unless it is an integer >= low."""
    if not isinstance(given, (int, np.integer)) or isinstance(given, bool) or given < low:
        raise ValueError(f"`{name}` must be an integer >= {low}. Received: {given!r}")
    return int(given)
