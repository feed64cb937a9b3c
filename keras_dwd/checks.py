"""Checks of arguments."""

import inspect
from typing import Any

import numpy as np


class FixedSettings:
    """Settings that are given when an object is made, and cannot be assigned afterwards.

    The training step is traced with them, and slots and files have their shapes. A setting that can
    change is a property.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self) and name in _settings(type(self)):
            raise AttributeError(
                f"`{name}` of a {type(self).__name__} is given when it is made and cannot be "
                f"assigned. Make a new one, and a new DWDModel with it, which can `inherit`."
            )
        super().__setattr__(name, value)


def _settings(kind: type) -> set[str]:
    """The arguments of the constructors of the package's own classes that a class derives from."""
    own = [c for c in kind.__mro__ if c.__module__.startswith("keras_dwd.")]
    constructors: list[Any] = [vars(c)["__init__"] for c in own if "__init__" in vars(c)]
    return {n for init in constructors for n in inspect.signature(init).parameters} - {"self"}


def number(name: str, value: Any, low: float, high: float = np.inf, closed: bool = True) -> float:
    """Return `value` as a float; raise `ValueError` unless it is a finite number in [low, high].

    Args:
        name: Name of the argument, for the message.
        value: Value of the argument.
        low: Smallest value allowed.
        high: Largest value allowed.
        closed: Whether `high` itself is allowed.
    """
    valid = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not (valid and np.isfinite(value) and low <= value <= high and (closed or value != high)):
        end = "]" if closed and np.isfinite(high) else ")"
        raise ValueError(f"`{name}` must be a number in [{low}, {high}{end}. Received: {value!r}")
    return float(value)


def integer(name: str, value: Any, low: int) -> int:
    """Return `value` as an `int`; raise `ValueError` unless it is an integer >= low."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
        raise ValueError(f"`{name}` must be an integer >= {low}. Received: {value!r}")
    return int(value)
