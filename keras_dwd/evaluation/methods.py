"""The compared methods, each a configuration of the same model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras

from keras_dwd.curvature.fisher import DiagonalFisher, Estimator
from keras_dwd.curvature.kronecker import KroneckerFisher
from keras_dwd.model import DWDModel
from keras_dwd.regularizer import DWDRegularizer


@dataclass(frozen=True)
class Method:
    """How a sequence of tasks is learned.

    Attributes:
        name: What reports call it.
        settings: Makes the keyword arguments of `DWDModel` from the strength and, of a method with
            a Fisher estimate, from `estimator` where that is not the method's own.
        strength: Default λ.
        boundary_pass: Whether the Fisher is estimated in a pass over the task's data at its end,
            rather than during training.
        decoupled: Whether the pull is a step of its own, by a `DWDOptimizer`.
        joint: Train on all tasks at once instead: the upper reference.
    """

    name: str
    settings: Callable[..., dict[str, Any]]
    strength: float = 0.0
    boundary_pass: bool = False
    decoupled: bool = False
    joint: bool = False

    def configuration(self, strength: float) -> dict[str, Any]:
        """All settings of the model, defaults included, as they are written to result files."""
        inputs = keras.Input((8,))
        model = DWDModel(inputs, keras.layers.Dense(8)(inputs), **self.settings(strength))
        return {
            "regularizer": model.regularizer.get_config(),
            "fisher": model.fisher.get_config(),
            "grouping": model.grouping.get_config() if model.grouping else None,
            "boundary_pass": self.boundary_pass,
            **({"decoupled": True} if self.decoupled else {}),
        }


def _plain(strength: float) -> dict[str, Any]:
    return {"strength": 0.0}


def _ewc(strength: float, estimator: Estimator = "exact") -> dict[str, Any]:
    return {
        "regularizer": DWDRegularizer(strength, anchor="folded"),
        "fisher": DiagonalFisher(estimator, gamma=None),
        "grouping": None,
    }


def _online_ewc(strength: float, estimator: Estimator = "exact") -> dict[str, Any]:
    return {
        "regularizer": DWDRegularizer(strength, decay=0.9),
        "fisher": DiagonalFisher(estimator, gamma=None),
        "grouping": None,
    }


def _dwd(strength: float, estimator: Estimator = "influence") -> dict[str, Any]:
    return {"strength": strength, "fisher": KroneckerFisher(estimator, gamma=None)}


def _dwd_online(strength: float, estimator: Estimator = "influence") -> dict[str, Any]:
    return {"strength": strength, "fisher": KroneckerFisher(estimator)}


def _dwd_diagonal(strength: float, estimator: Estimator = "exact") -> dict[str, Any]:
    return {"strength": strength, "fisher": DiagonalFisher(estimator, gamma=None)}


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("finetune", _plain),
        Method("ewc", _ewc, strength=100.0, boundary_pass=True),
        Method("online-ewc", _online_ewc, strength=100.0, boundary_pass=True),
        Method("dwd", _dwd, strength=30.0, boundary_pass=True),
        Method("dwd-online", _dwd_online, strength=30.0),
        Method("dwd-diagonal", _dwd_diagonal, strength=100.0, boundary_pass=True),
        Method("joint", _plain, joint=True),
    )
}
"""Every method by name."""


def method_named(name: str) -> Method:
    """A method by its name, `NAME` of `METHODS` or `NAME:ESTIMATOR` for another estimator.

    Raises:
        ValueError: If there is none of that name, with those there are.
    """
    base, colon, estimator = name.partition(":")
    known = METHODS.get(base)
    if known is None or (colon and known.settings is _plain):
        raise ValueError(f"Unknown method {name!r}. Known: {', '.join(METHODS)}.")
    if not colon:
        return known
    method = replace(known, name=name, settings=partial(known.settings, estimator=estimator))
    if estimator == "adam":  # which only training can estimate
        method = replace(method, boundary_pass=False, decoupled=True)
    method.settings(1.0)  # raises with the estimators there are
    return method
