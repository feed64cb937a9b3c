"""Groups that the user names, each with its own strength λ_k."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import keras
import numpy as np

from keras_dwd.checks import number
from keras_dwd.curvature.fisher import Block
from keras_dwd.grouping.grouping import Grouping, Summary
from keras_dwd.variables import Arrays, Variables


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
        self.strengths = {
            pattern: number(f"strengths[{pattern!r}]", strength, 0)
            for pattern, strength in strengths.items()
        }

    def check(self, variables: Variables) -> None:
        """Raise `ValueError` if a pattern fits none of the variables."""
        for pattern in self.strengths:
            if not any(fnmatchcase(path, pattern) for path in variables):
                raise ValueError(
                    f"`strengths` names {pattern!r}, which fits none of the model's variables: "
                    f"{', '.join(variables)}."
                )

    def apply(
        self, blocks: Mapping[str, Block], values: Arrays
    ) -> tuple[dict[str, Block], Summary]:
        """Weigh the Fisher information by the λ_k of its groups."""
        weighted: dict[str, Block] = {}
        found: dict[str, list[float]] = {}  # size, number and sum of eigenvalues of each group
        for key, block in blocks.items():
            groups = {path: self._group_of(path) for path in block.paths}
            weighted[key] = block.weighted({p: self._strength(g) for p, g in groups.items()})
            spectrum = block.spectrum()
            for path, group in groups.items():
                found.setdefault(group, [0, 0, 0.0])[0] += int(np.size(values[path]))
            for group in set(groups.values()):
                found[group][1] += spectrum.size
                found[group][2] += float(spectrum.sum())
        summary = [
            {
                "size": size,
                "mean_fisher": total / count,
                "strength": self._strength(group),
                "pattern": group,
            }
            for group, (size, count, total) in found.items()
        ]
        return weighted, sorted(summary, key=lambda group: group["mean_fisher"])

    def _group_of(self, path: str) -> str:
        """The pattern of a variable's group, `"*"` where it is in none."""
        return next((p for p in self.strengths if fnmatchcase(path, p)), "*")

    def _strength(self, group: str) -> float:
        return self.strengths.get(group, 1.0)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"strengths": dict(self.strengths)}
