"""The methods that are compared: settings of one model, not copies of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from keras_dwd.curvature.fisher import DiagonalFisher
from keras_dwd.curvature.kronecker import KroneckerFisher
from keras_dwd.model import DWDModel
from keras_dwd.regularizer import DWDRegularizer


@dataclass(frozen=True)
class Method:
    """How a sequence of tasks is learned.

    Attributes:
        name: What reports call it.
        settings: Makes the keyword arguments of `DWDModel` from the strength.
        strength: Default λ.
        boundary_pass: Whether the Fisher is estimated in a pass over the task's data at its end,
            rather than during training.
        joint: Train on all tasks at once instead: the upper reference.
    """

    name: str
    settings: Callable[[float], dict[str, Any]]
    strength: float = 0.0
    boundary_pass: bool = False
    joint: bool = False

    def configuration(self, strength: float) -> dict[str, Any]:
        """All settings of the model, defaults included, as they are written to result files."""
        inputs = keras.Input((1,))
        model = DWDModel(inputs, keras.layers.Dense(1)(inputs), **self.settings(strength))
        return {
            "regularizer": model.regularizer.get_config(),
            "fisher": model.fisher.get_config(),
            "grouping": model.grouping.get_config() if model.grouping else None,
            "boundary_pass": self.boundary_pass,
        }


def _ewc(strength: float) -> dict[str, Any]:
    return {
        "regularizer": DWDRegularizer(strength, anchor="folded"),
        "fisher": DiagonalFisher("exact", gamma=None),
        "grouping": None,
    }


def _online_ewc(strength: float) -> dict[str, Any]:
    return {
        "regularizer": DWDRegularizer(strength, decay=0.9),
        "fisher": DiagonalFisher("exact", gamma=None),
        "grouping": None,
    }


def _dwd(strength: float) -> dict[str, Any]:
    return {"strength": strength, "fisher": KroneckerFisher(gamma=None)}


def _dwd_online(strength: float) -> dict[str, Any]:
    return {"strength": strength}


def _dwd_diagonal(strength: float) -> dict[str, Any]:
    return {"strength": strength, "fisher": DiagonalFisher("exact", gamma=None)}


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("finetune", lambda strength: {"strength": 0.0}),
        Method("ewc", _ewc, strength=100.0, boundary_pass=True),
        Method("online-ewc", _online_ewc, strength=100.0, boundary_pass=True),
        Method("dwd", _dwd, strength=10.0, boundary_pass=True),
        Method("dwd-online", _dwd_online, strength=10.0),
        Method("dwd-diagonal", _dwd_diagonal, strength=100.0, boundary_pass=True),
        Method("joint", lambda strength: {"strength": 0.0}, joint=True),
    )
}
"""Every method by name."""
