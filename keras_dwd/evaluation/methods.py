"""The methods that are compared, each a configuration of `DWDModel`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras

from keras_dwd.checks import number
from keras_dwd.curvature.diagonal import DiagonalFisher
from keras_dwd.curvature.fisher import EARLIER_NAMES, Fisher
from keras_dwd.curvature.kronecker import KroneckerFisher
from keras_dwd.distillation import Distillation
from keras_dwd.evaluation.peers import (
    L2,
    AveragedGEM,
    DarkExperienceReplay,
    ExperienceReplay,
    Freezing,
    MemoryAwareSynapses,
    RiemannianWalk,
    SynapticIntelligence,
)
from keras_dwd.evaluation.technique import Technique, held_by_importance
from keras_dwd.groupings.fixed import LayerGrouping, SingleGroup
from keras_dwd.groupings.gmm import GaussianMixtureGrouping
from keras_dwd.groupings.grouping import Grouping
from keras_dwd.groupings.policy import GroupingPolicy
from keras_dwd.groupings.spectral import SpectralGrouping
from keras_dwd.groupings.strength import Importance
from keras_dwd.model import DWDModel
from keras_dwd.regularizer import DWDRegularizer
from keras_dwd.settings import dwd, ewc, online_ewc
from keras_dwd.words import nearest


@dataclass(frozen=True)
class Method:
    """A method for learning a sequence of tasks.

    Attributes:
        name: Name in reports.
        settings: Function that returns the keyword arguments of `DWDModel`. It takes the strength
            and, for a method with a Fisher estimate, optionally an `estimator`.
        strength: Default λ; for a method without a penalty, the default weight of its
            distillation.
        boundary_pass: Whether the Fisher information is estimated by a pass over the task's data at
            the task boundary instead of during training.
        decoupled: Whether the penalty is applied as a separate step by a `DWDOptimizer`.
        graph: μ of a `TaskGraph` with inputs of the first task as probe, or 0 for none.
        joint: Whether to train on all tasks at once, as an upper bound for the accuracy.
        task_norm: Whether the network keeps the statistics of batch normalization for each task,
            see `with_task_normalization`.
        keep_state: Whether the optimizer keeps its state from task to task, whatever the recipe.
        technique: Function that returns what the method adds to training, see `Technique`, for a
            strength.

    Example:

    ```python
    def settings(strength):
        return {"strength": strength, "grouping": LayerGrouping()}

    result = run_sequence(build, scenario, Method("layers", settings, 50.0), epochs=1)
    ```
    """

    name: str
    settings: Callable[..., dict[str, Any]]
    strength: float = 0.0
    boundary_pass: bool = False
    decoupled: bool = False
    graph: float = 0.0
    joint: bool = False
    task_norm: bool = False
    keep_state: bool = False
    technique: Callable[[float], Technique] | None = None

    def configuration(self, strength: float) -> dict[str, Any]:
        """All settings of the model, including defaults, as they are written to result files."""
        inputs = keras.Input((8,))
        model = DWDModel(inputs, keras.layers.Dense(8)(inputs), **self.settings(strength))
        grouping = model.grouping
        technique = self.technique and self.technique(strength)
        return {
            "regularizer": model.regularizer.get_config(),
            "fisher": model.fisher.get_config(),
            "grouping": grouping and {"class": type(grouping).__name__, **grouping.get_config()},
            "boundary_pass": self.boundary_pass,
            **({"decoupled": True} if self.decoupled else {}),
            **({"task_graph": self.graph} if self.graph else {}),
            **({"task_norm": True} if self.task_norm else {}),
            **({"keep_state": True} if self.keep_state else {}),
            **({"distillation": model.distillation.get_config()} if model.distillation else {}),
            **({"technique": technique.get_config()} if technique else {}),
            # Where it is not that of the penalty.
            **({"strength": strength} if technique or self.settings is _lwf else {}),
        }


def _plain(strength: float) -> dict[str, Any]:
    return {"strength": 0.0}


def _lwf(strength: float) -> dict[str, Any]:
    return {"strength": 0.0, "distillation": Distillation(strength)}


def _ewc(strength: float, estimator: str = "empirical") -> dict[str, Any]:
    return {**ewc(strength), "fisher": DiagonalFisher(estimator, gamma=None)}


def _online_ewc(strength: float, estimator: str = "empirical") -> dict[str, Any]:
    return {**online_ewc(strength), "fisher": DiagonalFisher(estimator, gamma=None)}


def _dwd(strength: float, estimator: str = "influence") -> dict[str, Any]:
    return {**dwd(strength), "fisher": KroneckerFisher(estimator, gamma=None)}


def _dwd_online(strength: float, estimator: str = "influence") -> dict[str, Any]:
    return {**dwd(strength), "fisher": KroneckerFisher(estimator)}


def _dwd_diagonal(strength: float, estimator: str = "empirical") -> dict[str, Any]:
    return {**dwd(strength), "fisher": DiagonalFisher(estimator, gamma=None)}


def _held_by_the_newest(strength: float) -> dict[str, Any]:
    return held_by_importance(strength, decay=0.0)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("finetune", _plain),
        Method("ewc", _ewc, strength=100.0, boundary_pass=True),
        Method("online-ewc", _online_ewc, strength=100.0, boundary_pass=True),
        Method("dwd", _dwd, strength=200.0, boundary_pass=True),
        Method("dwd-online", _dwd_online, strength=200.0),
        Method("dwd-diagonal", _dwd_diagonal, strength=100.0, boundary_pass=True),
        Method("lwf", _lwf, strength=1.0),
        Method("l2", _held_by_the_newest, strength=1.0, technique=lambda _: L2()),
        Method("mas", held_by_importance, strength=1.0, technique=lambda _: MemoryAwareSynapses()),
        Method("si", held_by_importance, strength=1.0, technique=lambda _: SynapticIntelligence()),
        Method("rwalk", _held_by_the_newest, strength=1.0, technique=lambda _: RiemannianWalk()),
        # So that every strength is a share: that of 1 is a half.
        Method("freeze", _plain, strength=1.0, technique=lambda s: Freezing(s / (1 + s))),
        Method("er", _plain, technique=lambda _: ExperienceReplay()),
        Method("der++", _plain, strength=0.1, technique=DarkExperienceReplay),
        Method("a-gem", _plain, technique=lambda _: AveragedGEM()),
        Method("joint", _plain, joint=True),
    )
}
"""Every method by name."""


def _with(**settings: Any) -> Callable[[Method], Method]:
    """A change of a method's arguments of `DWDModel`; each value is computed from all of them."""

    def change(method: Method) -> Method:
        def changed(strength: float, **others: Any) -> dict[str, Any]:
            arguments = method.settings(strength, **others)
            return arguments | {name: make(arguments) for name, make in settings.items()}

        return replace(method, settings=changed)

    return change


def _grouped(make: Callable[[], Grouping | None]) -> Callable[[Method], Method]:
    return _with(grouping=lambda before: make())


def _decaying(decay: float) -> Callable[[Method], Method]:
    """A change of the decay of the precision of earlier tasks."""

    def regularizer(before: dict[str, Any]) -> DWDRegularizer:
        return DWDRegularizer(**before["regularizer"].get_config() | {"decay": decay})

    return _with(regularizer=regularizer)


def _estimated(**arguments: Any) -> Callable[[Method], Method]:
    """A change of the arguments of a method's Fisher estimate."""

    def fisher(before: dict[str, Any]) -> Fisher:
        original = before["fisher"]
        return type(original)(**original.get_config() | arguments)

    return _with(fisher=fisher)


def _replaying(method: Method) -> Method:
    """The method with experience replay."""
    if method.technique is not None:
        raise ValueError(f"{method.name!r} has a technique of its own: it takes no `+er`.")
    return replace(method, technique=lambda strength: ExperienceReplay())


BEST_EWC = "online-ewc+keep-state"
"""EWC in its best form: the anchor at the newest parameters, and an optimizer that is not reset."""

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
    "damping-0": _estimated(damping=0.0),
    "damping-1": _estimated(damping=1.0),
    "decay-0.5": _decaying(0.5),
    "decay-0.8": _decaying(0.8),
    "diagonal": _with(fisher=lambda before: DiagonalFisher("influence")),
    "every-step": _estimated(every=1),
    "pass": lambda method: replace(_estimated(gamma=None)(method), boundary_pass=True),
    "decoupled": lambda method: replace(method, decoupled=True),
    "graph": lambda method: replace(method, graph=0.001),
    "task-norm": lambda method: replace(method, task_norm=True),
    "keep-state": lambda method: replace(method, keep_state=True),
    "distill": _with(distillation=lambda before: Distillation()),
    "er": _replaying,
}
"""Variants of a method: functions that change one setting, by name."""


def strength_of(configuration: dict[str, Any]) -> float:
    """The strength of a method in its `Method.configuration`."""
    own = configuration.get("strength", configuration["regularizer"]["strength"])
    return number("strength", own, 0)


def same_settings(one: Any, other: Any) -> bool:
    """Whether two `Method.configuration`s are equal, up to names that have changed since."""
    return _by_present_names(one) == _by_present_names(other)


def _by_present_names(settings: Any) -> Any:
    """A configuration without modules of classes, and with the current names of estimators."""
    if isinstance(settings, dict):
        renamed = {k: _by_present_names(v) for k, v in settings.items() if k != "module"}
        if renamed.get("estimator") in EARLIER_NAMES:
            renamed["estimator"] = EARLIER_NAMES[renamed["estimator"]]
        return renamed
    return [_by_present_names(s) for s in settings] if isinstance(settings, list) else settings


def method_named(name: str) -> Method:
    """The method with this name.

    Args:
        name: `NAME[:ESTIMATOR][+VARIANT]…`: the name of one of `METHODS`, optionally with another
            estimator of the Fisher information and with changes from `VARIANTS`.

    Raises:
        ValueError: If a part of the name is unknown; lists the known names.
    """
    # The names of some methods have a "+" in them.
    named = [m for m in METHODS if name == m or name.startswith((f"{m}:", f"{m}+"))]
    base = max(named, key=len, default="")
    plain, *variants = name[len(base) :].split("+")
    _, colon, estimator = plain.partition(":")
    method = METHODS.get(base)
    fixed = method is not None and method.settings in (_plain, _lwf)
    # Methods without a penalty take only the variants that do not change the penalty.
    if method is None or (fixed and (colon or {*variants} - {"task-norm", "keep-state"})):
        raise ValueError(
            f"Unknown method {name!r}.{nearest(name, METHODS)} Known: {', '.join(METHODS)}."
        )
    if colon and "estimator" not in inspect.signature(method.settings).parameters:
        raise ValueError(f"Unknown method {name!r}: {base!r} has no estimator to choose.")
    if colon:
        method = replace(method, settings=partial(method.settings, estimator=estimator))
        if estimator == "adam":  # can only be estimated during training
            method = replace(method, boundary_pass=False, decoupled=True)
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(
                f"Unknown variant {variant!r}.{nearest(variant, VARIANTS)} Known: "
                f"{', '.join(VARIANTS)}."
            )
        method = VARIANTS[variant](method)
    method.settings(1.0)  # raises `ValueError` for an unknown estimator
    return replace(method, name=name)
