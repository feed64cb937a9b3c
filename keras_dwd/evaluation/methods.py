"""The compared methods, each a configuration of the same model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras

from keras_dwd.curvature.fisher import DiagonalFisher, Estimator, Fisher
from keras_dwd.curvature.kronecker import KroneckerFisher
from keras_dwd.grouping.fixed import LayerGrouping, SingleGroup
from keras_dwd.grouping.gmm import GaussianMixtureGrouping
from keras_dwd.grouping.grouping import Grouping
from keras_dwd.grouping.policy import GroupingPolicy
from keras_dwd.grouping.spectral import SpectralGrouping
from keras_dwd.grouping.strength import Importance
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
        graph: μ of a `TaskGraph` with inputs of the first task as probe, or 0 for none.
        joint: Train on all tasks at once instead: the upper reference.
    """

    name: str
    settings: Callable[..., dict[str, Any]]
    strength: float = 0.0
    boundary_pass: bool = False
    decoupled: bool = False
    graph: float = 0.0
    joint: bool = False

    def configuration(self, strength: float) -> dict[str, Any]:
        """All settings of the model, defaults included, as they are written to result files."""
        inputs = keras.Input((8,))
        model = DWDModel(inputs, keras.layers.Dense(8)(inputs), **self.settings(strength))
        grouping = model.grouping
        return {
            "regularizer": model.regularizer.get_config(),
            "fisher": model.fisher.get_config(),
            "grouping": grouping and {"class": type(grouping).__name__, **grouping.get_config()},
            "boundary_pass": self.boundary_pass,
            **({"decoupled": True} if self.decoupled else {}),
            **({"task_graph": self.graph} if self.graph else {}),
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
        Method("dwd", _dwd, strength=200.0, boundary_pass=True),
        Method("dwd-online", _dwd_online, strength=200.0),
        Method("dwd-diagonal", _dwd_diagonal, strength=100.0, boundary_pass=True),
        Method("joint", _plain, joint=True),
    )
}
"""Every method by name."""


def _with(**settings: Any) -> Callable[[Method], Method]:
    """A method with other arguments of `DWDModel`, made from what it has."""

    def change(method: Method) -> Method:
        def changed(strength: float, **others: Any) -> dict[str, Any]:
            before = method.settings(strength, **others)
            return before | {name: make(before) for name, make in settings.items()}

        return replace(method, settings=changed)

    return change


def _grouped(make: Callable[[], Grouping | None]) -> Callable[[Method], Method]:
    return _with(grouping=lambda before: make())


def _decaying(decay: float) -> Callable[[Method], Method]:
    """With another decay of the precision of earlier tasks."""

    def regularizer(before: dict[str, Any]) -> DWDRegularizer:
        found = before.get("regularizer") or DWDRegularizer(before["strength"])
        return DWDRegularizer(**found.get_config() | {"decay": decay})

    return _with(regularizer=regularizer, strength=lambda before: None)


def _estimated(**arguments: Any) -> Callable[[Method], Method]:
    """With other arguments of its Fisher estimate."""

    def fisher(before: dict[str, Any]) -> Fisher:
        found = before["fisher"]
        return type(found)(**found.get_config() | arguments)

    return _with(fisher=fisher)


VARIANTS: dict[str, Callable[[Method], Method]] = {
    "no-groups": _grouped(lambda: None),
    "layers": _grouped(LayerGrouping),
    "spectral": _grouped(SpectralGrouping),
    "bic": _grouped(lambda: GaussianMixtureGrouping("bic")),
    "units": _grouped(lambda: GaussianMixtureGrouping(granularity="unit")),
    "variables": _grouped(lambda: GaussianMixtureGrouping(granularity="variable")),
    "movement": _grouped(
        lambda: GaussianMixtureGrouping(features=("fisher", "magnitude", "movement"))
    ),
    "soft": _grouped(lambda: GaussianMixtureGrouping(soft=True)),
    "levelled": _grouped(lambda: GaussianMixtureGrouping(strengths=Importance(-0.5))),
    "evidence": _grouped(lambda: GaussianMixtureGrouping(strengths="evidence")),
    "budget": _grouped(lambda: LayerGrouping("budget")),
    "one-budget": _grouped(lambda: SingleGroup("budget")),
    "policy": _grouped(
        lambda: GroupingPolicy(
            [
                SingleGroup(),
                LayerGrouping(),
                *(GaussianMixtureGrouping(k, Importance(a)) for k in (2, 4) for a in (-0.5, 0.5)),
            ]
        )
    ),
    "gamma-0.9": _estimated(gamma=0.9),
    "gamma-0.99": _estimated(gamma=0.99),
    "decay-0.5": _decaying(0.5),
    "decay-0.8": _decaying(0.8),
    "diagonal": _with(fisher=lambda before: DiagonalFisher("influence")),
    "every-step": _estimated(every=1),
    "pass": lambda method: replace(_estimated(gamma=None)(method), boundary_pass=True),
    "decoupled": lambda method: replace(method, decoupled=True),
    "graph": lambda method: replace(method, graph=0.001),
}
"""Changes of one setting of a method, by name."""


def method_named(name: str) -> Method:
    """A method by its name.

    Args:
        name: `NAME[:ESTIMATOR][+VARIANT]…`: one of `METHODS`, with another estimator of the Fisher
            information and with changes of `VARIANTS`.

    Raises:
        ValueError: If there is none of that name, with those there are.
    """
    plain, *variants = name.split("+")
    base, colon, estimator = plain.partition(":")
    method = METHODS.get(base)
    fixed = method is not None and method.settings is _plain
    if method is None or (fixed and (colon or variants)):
        raise ValueError(f"Unknown method {name!r}. Known: {', '.join(METHODS)}.")
    if colon:
        method = replace(method, settings=partial(method.settings, estimator=estimator))
        if estimator == "adam":  # which only training can estimate
            method = replace(method, boundary_pass=False, decoupled=True)
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"Unknown variant {variant!r}. Known: {', '.join(VARIANTS)}.")
        method = VARIANTS[variant](method)
    method.settings(1.0)  # raises with the estimators there are
    return replace(method, name=name)
