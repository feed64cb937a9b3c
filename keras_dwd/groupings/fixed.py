"""Groupings that depend on the architecture alone, not on the Fisher information."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import keras
import numpy as np

from keras_dwd.checks import number
from keras_dwd.groupings.grouping import (
    BoundaryContext,
    Described,
    Grouping,
    GroupingResult,
    Parameters,
    Partition,
    Summary,
)
from keras_dwd.precision.block import Block
from keras_dwd.variables import Variables


@keras.saving.register_keras_serializable("keras_dwd")
class SingleGroup(Partition):
    """Puts all parameters into one group with one strength, as in EWC.

    Args:
        strengths: The rule for λ, see `Partition`. Only `"budget"`, which adjusts λ during
            training, or a number such as `(2.0,)` makes a difference.

    Example:

    ```python
    model = DWDModel.from_model(network, grouping=SingleGroup())
    ```
    """

    def __init__(self, strengths: Any = "importance"):
        super().__init__(strengths, "variable")

    def fit(self, described: Described) -> None:
        """Do nothing: there is only one group."""

    def label(self, fitted: None, key: str, part: Parameters) -> np.ndarray:
        """Group 0 for all parameters."""
        return np.zeros((), "int8")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"strengths": super().get_config()["strengths"]}


@keras.saving.register_keras_serializable("keras_dwd")
class LayerGrouping(Partition):
    """Makes each variable, or each matrix of a kernel and its bias, a group of its own.

    Args:
        strengths: The rule for λ_k, see `Partition`.

    Example:

    ```python
    model = DWDModel.from_model(network, grouping=LayerGrouping())
    ```
    """

    def __init__(self, strengths: Any = "importance"):
        super().__init__(strengths, "variable")

    def fit(self, described: Described) -> dict[str, int]:
        """Number the blocks: each is one group."""
        return {key: i for i, key in enumerate(described)}

    def label(self, fitted: dict[str, int], key: str, part: Parameters) -> np.ndarray:
        """The group of the block, for all its parameters."""
        return np.array(fitted[key], "int32")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"strengths": super().get_config()["strengths"]}


@keras.saving.register_keras_serializable("keras_dwd")
class FixedGrouping(Grouping):
    """Multiplies the model's strength by a fixed λ_k for each group of variables.

    Args:
        strengths: Maps a pattern of variable paths to λ_k ≥ 0. In a pattern `*` matches anything:
            `"conv_*"`, `"*/kernel"`. The first matching pattern applies; variables that match none
            get λ_k = 1. Where a kernel and its bias form one Kronecker-factored matrix, different
            strengths for the two are applied only approximately. To exclude one of the two exactly,
            give the layer a `DWDRegularizer(0.0)` for it.

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

    @property
    def strengths(self) -> dict[str, float]:
        """λ_k by pattern."""
        return dict(self.patterns)

    def check(self, variables: Variables) -> None:
        """Raise `ValueError` if a pattern matches none of the variables."""
        for pattern in self.patterns:
            if not any(fnmatchcase(path, pattern) for path in variables):
                raise ValueError(
                    f"`strengths` names {pattern!r}, which fits none of the model's variables: "
                    f"{', '.join(variables)}."
                )

    def apply(self, context: BoundaryContext) -> GroupingResult:
        """Multiply the Fisher information by the λ_k of its groups."""
        weighted: dict[str, Block] = {}
        statistics: Described = {}
        for key, block in context.blocks.items():
            groups = {path: self._group_of(path) for path in block.paths}
            weighted[key] = block.scale_variables({p: self._strength(g) for p, g in groups.items()})
            mean = block.trace / sum(context.values[path].size for path in block.paths)
            for path in block.paths:
                values = context.values[path]
                squares = np.square(values, dtype="float64").sum()
                statistics[path] = (np.array([values.size, values.size * mean, squares]),)
        members: dict[str, dict[str, np.ndarray]] = {}
        for path, (sums,) in context.gather(statistics).items():
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
        return GroupingResult(weighted, summary, numbers)

    def _group_of(self, path: str) -> str:
        """The first pattern that matches a variable, `"*"` if none does."""
        return next((p for p in self.patterns if fnmatchcase(path, p)), "*")

    def _strength(self, group: str) -> float:
        return self.patterns.get(group, 1.0)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"strengths": dict(self.patterns)}
