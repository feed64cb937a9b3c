"""What all groupings share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from keras_dwd.curvature.fisher import Block
from keras_dwd.variables import Arrays, Variables

Summary = list[dict[str, Any]]
"""Of each group its `size`, `mean_fisher` and `strength` λ_k."""


class Grouping(ABC):
    """Divides the Fisher information of a task into groups and weighs each by its λ_k."""

    @abstractmethod
    def check(self, variables: Variables) -> None:
        """Raise `ValueError` if these settings do not fit a model's variables, by path."""

    @abstractmethod
    def apply(
        self, blocks: Mapping[str, Block], values: Arrays
    ) -> tuple[dict[str, Block], Summary]:
        """Weigh the Fisher information by the λ_k of its groups.

        Args:
            blocks: The Fisher information.
            values: The variables' values by path.

        Returns:
            The weighted blocks, and a summary of the groups.
        """

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The inverse of `get_config`."""
        return cls(**config)
