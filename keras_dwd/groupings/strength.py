"""Rules for λ_k, the strength with which each group of parameters is pulled to its anchor."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_dwd.checks import FixedSettings, number


@dataclass(frozen=True)
class GroupStatistics:
    """Sums over the parameters of each group, each of shape `(groups,)`.

    Attributes:
        numbers: Group numbers, ascending.
        sizes: |G_k|, the number of parameters.
        fisher: Σ F.
        moved: Σ F (θ − c)² with the previous anchor c; `None` before there is one, or if the rule
            does not need it.
    """

    numbers: np.ndarray
    sizes: np.ndarray
    fisher: np.ndarray
    moved: np.ndarray | None


class Strength(FixedSettings, ABC):
    """A rule for the strength λ_k of each group.

    Attributes:
        by_movement: Whether the rule needs `GroupStatistics.moved`.
        most: Maximum number of groups that the rule has strengths for; `None` for any number.

    Example:

    ```python
    @keras.saving.register_keras_serializable("mine")
    class BySize(Strength):  # small groups are held more strongly
        def of(self, groups):
            return groups.sizes.mean() / groups.sizes

    model = DWDModel.from_model(network, grouping=LayerGrouping(BySize()))
    ```
    """

    by_movement: bool = False
    most: int | None = None

    @abstractmethod
    def of(self, groups: GroupStatistics) -> np.ndarray:
        """λ_k ≥ 0 of each group, of shape `(groups,)`."""

    def check(self, groups: int) -> None:
        """Raise `ValueError` if the rule has strengths for fewer groups than this."""
        if self.most is not None and self.most < groups:
            raise ValueError(
                f"`strengths` must have a value for each of {groups} groups. Received {self.most}."
            )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The inverse of `get_config`."""
        return cls(**config)


@keras.saving.register_keras_serializable("keras_dwd")
class Importance(Strength):
    """λ_k ∝ (mean F in G_k / mean F)^alpha, with the total precision unchanged.

    Args:
        alpha: With 0 every group has the same strength. Values above 0 amplify the differences in
            Fisher information between groups, values below 0 reduce them.

    Example:

    ```python
    model = DWDModel.from_model(network, grouping=LayerGrouping(Importance(alpha=-0.5)))
    ```
    """

    def __init__(self, alpha: float = 0.5):
        self.alpha = number("alpha", alpha, -np.inf)

    def of(self, groups: GroupStatistics) -> np.ndarray:
        """λ_k of each group."""
        overall = groups.fisher.sum() / max(groups.sizes.sum(), 1)
        means = groups.fisher / np.maximum(groups.sizes, 1)
        ratio = np.divide(means, overall, out=np.ones_like(means), where=means > 0)
        return _of_same_total(ratio**self.alpha, groups)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"alpha": self.alpha}


@keras.saving.register_keras_serializable("keras_dwd")
class Evidence(Strength):
    """λ_k ∝ |G_k| / Σ_{G_k} F (θ − c)², with the total precision unchanged.

    Groups that moved little during the last task, relative to their importance, get a larger λ_k.
    At the first boundary there is no anchor c yet, and all groups have the same strength. The ratio
    is limited to between 1/100 and 100 times the ratio of all groups together.

    Example:

    ```python
    model = DWDModel.from_model(network, grouping=GaussianMixtureGrouping(4, Evidence()))
    ```

    Reference:
        MacKay, "Bayesian interpolation", Neural Computation 4, 1992, equation 4.9, whose effective
        number of parameters is taken as |G_k| here.
    """

    LIMIT = 100.0
    by_movement = True

    def of(self, groups: GroupStatistics) -> np.ndarray:
        """λ_k of each group."""
        if groups.moved is None or not groups.moved.sum() > 0:
            return np.ones(len(groups.sizes))
        overall = groups.sizes.sum() / groups.moved.sum()
        alone = np.divide(
            groups.sizes,
            groups.moved,
            out=np.full(len(groups.sizes), np.inf),
            where=groups.moved > 0,
        )
        return _of_same_total(np.clip(alone / overall, 1 / self.LIMIT, self.LIMIT), groups)


@keras.saving.register_keras_serializable("keras_dwd")
class Fixed(Strength):
    """Fixed values of λ_k.

    Args:
        values: One number ≥ 0 for each group. The groups are numbered by ascending mean Fisher
            information at the first boundary and keep their numbers at later ones.
    """

    def __init__(self, values: Sequence[float]):
        self.values = [number(f"strengths[{k}]", value, 0) for k, value in enumerate(values)]
        self.most = len(self.values)

    def of(self, groups: GroupStatistics) -> np.ndarray:
        """λ_k of each group."""
        self.check(int(groups.numbers.max(initial=-1)) + 1)
        return np.array(self.values)[groups.numbers]

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"values": self.values}


@keras.saving.register_keras_serializable("keras_dwd")
class Budget(Strength):
    """Adjusts λ_k during training so that the penalty has a fixed share of each group's gradient.

    With g the gradient of the loss and p the gradient of the penalty for a group's parameters, the
    share is ‖p‖ / (‖p‖ + ‖g‖). After each step log λ_k rises by `rate` times the difference between
    the target and the actual share. The groups must consist of whole variables. λ_k starts at 1 and
    is carried over from task to task.

    Args:
        share: Target share, in (0, 1).
        rate: Step size of log λ_k, ≥ 0.

    Example:

    ```python
    model = DWDModel.from_model(network, grouping=LayerGrouping(Budget(share=0.3)))
    ```
    """

    def __init__(self, share: float = 0.2, rate: float = 0.1):
        self.share = number("share", share, 0, 1, closed=False)
        self.rate = number("rate", rate, 0)

    def of(self, groups: GroupStatistics) -> np.ndarray:
        """1 for each group; the training step adjusts it."""
        return np.ones(len(groups.sizes))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"share": self.share, "rate": self.rate}


def strength_from(setting: Any) -> Strength:
    """The rule for the argument `strengths`: a rule, its name, its config, or a list of numbers."""
    known = {"importance": Importance, "evidence": Evidence, "budget": Budget}
    if isinstance(setting, Strength):
        return setting
    if isinstance(setting, dict) and "class_name" in setting:
        return keras.saving.deserialize_keras_object(setting)
    if isinstance(setting, str) and setting in known:
        return known[setting]()
    if isinstance(setting, Sequence) and not isinstance(setting, str) and setting:
        return Fixed(setting)
    raise ValueError(
        f"`strengths` must be one of {', '.join(map(repr, known))}, a `Strength`, or a number for "
        f"each group. Received: {setting!r}"
    )


def _of_same_total(relative: np.ndarray, groups: GroupStatistics) -> np.ndarray:
    """λ_k in these proportions, scaled so that Σ_k λ_k Σ_{G_k} F = Σ F."""
    weighted = (relative * groups.fisher).sum()
    return relative * (groups.fisher.sum() / weighted) if weighted > 0 else relative
