"""How strongly each group of parameters is held: the rules for λ_k."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_dwd.checks import number


@dataclass(frozen=True)
class GroupStatistics:
    """Sums over the parameters of each group, each of shape `(groups,)`.

    Attributes:
        numbers: Of the groups, rising.
        sizes: |G_k|, how many parameters there are.
        fisher: Σ F.
        moved: Σ F (θ − c)², with c the anchor so far; `None` before there is one, or where the rule
            does not need it.
    """

    numbers: np.ndarray
    sizes: np.ndarray
    fisher: np.ndarray
    moved: np.ndarray | None


class Strength(ABC):
    """Gives each group its λ_k.

    Attributes:
        by_movement: Whether it needs to know how far parameters moved.
        most: The largest number of groups it has strengths for; `None` for any.
    """

    by_movement: bool = False
    most: int | None = None

    @abstractmethod
    def of(self, groups: GroupStatistics) -> np.ndarray:
        """λ_k ≥ 0 of each group, of shape `(groups,)`."""

    def check(self, groups: int) -> None:
        """Raise `ValueError` if there are not enough strengths for so many groups."""
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
        alpha: 0 gives every group the same strength; above 0 important groups are held tighter
            than their Fisher alone would, below 0 the differences are levelled.
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

    Groups that moved little during the last task, for their importance, are held tighter. All have
    the same strength at the first boundary, before which there is no c to have moved from. No group
    gets more than 100 times, or less than a hundredth of, what all together would.

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
    """λ_k as given, group by group.

    Args:
        values: One number ≥ 0 for each group; groups are numbered by rising mean Fisher
            information at the first boundary.
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
    """λ_k follows the training: the pull on each group is to be a given share of its gradient.

    With g the gradient of the loss by a group's parameters and p the pull on them, the share is
    ‖p‖ / (‖p‖ + ‖g‖). After each step log λ_k rises by `rate` times what is missing of it. Needs
    groups of whole variables; λ_k starts at 1 and goes on from task to task.

    Args:
        share: In (0, 1).
        rate: > 0.
    """

    def __init__(self, share: float = 0.2, rate: float = 0.1):
        self.share = number("share", share, 0, 1, closed=False)
        self.rate = number("rate", rate, 0)

    def of(self, groups: GroupStatistics) -> np.ndarray:
        """One for each: the rest is up to the training step."""
        return np.ones(len(groups.sizes))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"share": self.share, "rate": self.rate}


def strength_from(given: Any) -> Strength:
    """A rule from what a user may give for it: a rule, its name, its config, or the numbers."""
    known = {"importance": Importance, "evidence": Evidence, "budget": Budget}
    if isinstance(given, Strength):
        return given
    if isinstance(given, dict) and "class_name" in given:
        return keras.saving.deserialize_keras_object(given)
    if isinstance(given, str) and given in known:
        return known[given]()
    if isinstance(given, Sequence) and not isinstance(given, str) and given:
        return Fixed(given)
    raise ValueError(
        f"`strengths` must be one of {', '.join(map(repr, known))}, a `Strength`, or a number for "
        f"each group. Received: {given!r}"
    )


def _of_same_total(relative: np.ndarray, groups: GroupStatistics) -> np.ndarray:
    """In these proportions, with Σ_k λ_k Σ_{G_k} F = Σ F: `strength` alone sets how much."""
    weighted = (relative * groups.fisher).sum()
    return relative * (groups.fisher.sum() / weighted) if weighted > 0 else relative
