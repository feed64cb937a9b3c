"""Groups that follow from the architecture alone."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import keras
import numpy as np

from keras_dwd.checks import number
from keras_dwd.curvature.fisher import Block
from keras_dwd.grouping.grouping import (
    Described,
    Grouped,
    Grouping,
    Learned,
    Parameters,
    Partition,
    Summary,
)
from keras_dwd.variables import Variables


@keras.saving.register_keras_serializable("keras_dwd")
class SingleGroup(Partition):
    """All parameters are one group, with one strength, as in EWC.

    With `"budget"` that one strength is found while training.

    Args:
        strengths: The rule for λ, see `Partition`; only a `Budget`, or a number such as `(2.0,)`,
            makes a difference.
    """

    def __init__(self, strengths: Any = "importance"):
        super().__init__(strengths, "variable")

    def fit(self, described: Described) -> None:
        """There is nothing to find."""

    def label(self, found: None, key: str, part: Parameters) -> np.ndarray:
        """One group for all."""
        return np.zeros((), "int8")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"strengths": super().get_config()["strengths"]}


@keras.saving.register_keras_serializable("keras_dwd")
class LayerGrouping(Partition):
    """Each variable, or matrix of a kernel and its bias, is a group of its own.

    Args:
        strengths: The rule for λ_k, see `Partition`.
    """

    def __init__(self, strengths: Any = "importance"):
        super().__init__(strengths, "variable")

    def fit(self, described: Described) -> dict[str, int]:
        """One group for each block."""
        return {key: i for i, key in enumerate(described)}

    def label(self, found: dict[str, int], key: str, part: Parameters) -> np.ndarray:
        """That of the block."""
        return np.array(found[key], "int32")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"strengths": super().get_config()["strengths"]}


@keras.saving.register_keras_serializable("keras_dwd")
class FixedGrouping(Grouping):
    """Gives the variables of each group a strength of their own, times that of the model.

    Args:
        strengths: λ_k ≥ 0 by a pattern for the paths of a group's variables, in which `*` stands
            for anything: `"conv_*"`, `"*/kernel"`. The first pattern that fits counts; variables
            that none fits have 1. Where a kernel and its bias are one matrix, two strengths hold
            up to what the factor says of all its rows alike: to exclude one of them, give the layer
            a `DWDRegularizer(0.0)`.

    Example:

    ```python
    model = DWDModel(inputs, outputs, grouping=FixedGrouping({"conv_*": 2.0, "head/*": 0.5}))
    ```
    """

    def __init__(self, strengths: Mapping[str, float]):
        if not isinstance(strengths, Mapping):
            raise ValueError(f"`strengths` must map patterns to numbers. Received: {strengths!r}")
        self.patterns = {
            pattern: number(f"strengths[{pattern!r}]", strength, 0)
            for pattern, strength in strengths.items()
        }

    def check(self, variables: Variables) -> None:
        """Raise `ValueError` if a pattern fits none of the variables."""
        for pattern in self.patterns:
            if not any(fnmatchcase(path, pattern) for path in variables):
                raise ValueError(
                    f"`strengths` names {pattern!r}, which fits none of the model's variables: "
                    f"{', '.join(variables)}."
                )

    def apply(self, learned: Learned) -> Grouped:
        """Weigh the Fisher information by the λ_k of its groups."""
        weighted: dict[str, Block] = {}
        mine: Described = {}
        for key, block in learned.blocks.items():
            groups = {path: self._group_of(path) for path in block.paths}
            weighted[key] = block.weighted({p: self._strength(g) for p, g in groups.items()})
            mean = block.trace / sum(learned.values[path].size for path in block.paths)
            for path in block.paths:
                values = learned.values[path]
                squares = np.square(values, dtype="float64").sum()
                mine[path] = (np.array([values.size, values.size * mean, squares]),)
        members: dict[str, dict[str, np.ndarray]] = {}
        for path, (sums,) in learned.of_all(mine).items():
            members.setdefault(self._group_of(path), {})[path] = sums
        summary: Summary = []
        for pattern in dict.fromkeys([*self.patterns, "*"]):
            if pattern not in members:
                continue
            size, fisher, squares = np.sum(list(members[pattern].values()), 0)
            summary.append(
                {
                    "group": len(summary),
                    "pattern": pattern,
                    "size": int(size),
                    "mean_fisher": float(fisher / size),
                    "magnitude": float(np.sqrt(squares / size)),
                    "strength": self._strength(pattern),
                    "layers": {path: int(sums[0]) for path, sums in members[pattern].items()},
                }
            )
        of_group = {path: group["group"] for group in summary for path in group["layers"]}
        numbers = {key: np.array(of_group[key], "int16") for key in weighted}
        return Grouped(weighted, summary, numbers)

    def _group_of(self, path: str) -> str:
        """The pattern of a variable's group, `"*"` where it is in none."""
        return next((p for p in self.patterns if fnmatchcase(path, p)), "*")

    def _strength(self, group: str) -> float:
        return self.patterns.get(group, 1.0)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"strengths": dict(self.patterns)}
