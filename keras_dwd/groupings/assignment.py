"""Assignment of parameters to groups: hard (one group each) or soft (responsibilities)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np

WHOLE = 255
"""Responsibilities are stored as integers that sum to this number, so each fits in one byte."""


class Assignment(ABC):
    """The groups of the parameters of one block.

    Args:
        array: The assignment in the form in which it is stored and saved.
    """

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the assignment, which broadcasts to the shape of the parameters."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of groups, including those without members."""

    @abstractmethod
    def over(self, shape: tuple[int, ...]) -> np.ndarray:
        """The array, broadcast to parameters of this shape."""

    @abstractmethod
    def totals(
        self, piece: np.ndarray, used: np.ndarray, weights: Sequence[np.ndarray | None]
    ) -> np.ndarray:
        """Sums of weights over the members of each group.

        Args:
            piece: The part of the array that belongs to some of the parameters.
            used: Boolean mask: which of these parameters to include.
            weights: Arrays with one weight per parameter; `None` stands for weights of one.

        Returns:
            Array of shape `(len(weights), count)`.
        """

    @abstractmethod
    def strengths(self, table: np.ndarray) -> np.ndarray:
        """λ of each parameter.

        Args:
            table: λ of each group; the last entry is for parameters that are in no group.
        """

    @abstractmethod
    def renumbered(self, numbers: np.ndarray) -> np.ndarray:
        """The array with renumbered groups.

        Args:
            numbers: New number of each group, −1 for a group without members.
        """

    @abstractmethod
    def within(self, numbers: set[int]) -> bool:
        """Whether all parameters are in groups with these numbers, or in none."""


class HardAssignment(Assignment):
    """Each parameter is in one group or in none.

    Args:
        array: Group numbers as signed integers, −1 for no group.
    """

    def __init__(self, array: np.ndarray):
        if np.asarray(array).dtype.kind != "i":
            raise ValueError(
                "`array` must hold the numbers of groups, signed integers. Received: "
                f"{np.asarray(array).dtype}"
            )
        super().__init__(array)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @cached_property  # read by every call of `totals`
    def count(self) -> int:
        return int(self.array.max(initial=-1)) + 1

    def over(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.broadcast_to(self.array, shape)

    def totals(
        self, piece: np.ndarray, used: np.ndarray, weights: Sequence[np.ndarray | None]
    ) -> np.ndarray:
        count = self.count + 1
        groups = np.where(used, piece.astype(np.intp) + 1, 0)
        return np.stack([np.bincount(groups, weight, count)[1:] for weight in weights])

    def strengths(self, table: np.ndarray) -> np.ndarray:
        return table[self.array]

    def renumbered(self, numbers: np.ndarray) -> np.ndarray:
        numbers = np.append(numbers, -1)
        return numbers.astype(np.min_scalar_type(-int(numbers.max()) - 2))[self.array]

    def within(self, numbers: set[int]) -> bool:
        return set(np.unique(self.array).tolist()) <= numbers | {-1}


class Responsibilities(Assignment):
    """Each parameter is in several groups, in proportion to its responsibilities.

    Args:
        array: `uint8`, of the shape of the parameters plus a last axis for the groups. Along that
            axis the values sum to 255, or are all 0 for no group; see `rounded`.

    Example:

    ```python
    class Undecided(Partition):
        def fit(self, described):
            return None

        def label(self, fitted, key, part):
            shares = np.empty((*part.fisher.shape, 2), "uint8")
            shares[..., 0], shares[..., 1] = 200, 55  # they sum to 255
            return Responsibilities(shares)
    ```
    """

    def __init__(self, array: np.ndarray):
        array = np.asarray(array)
        has_group_axis = array.dtype == "uint8" and array.ndim
        sums = array.sum(-1, dtype="uint32") if has_group_axis else np.array(1)
        if not ((sums == 0) | (sums == WHOLE)).all():
            raise ValueError(
                f"`array` must hold bytes that sum to {WHOLE}, or to 0, along its last axis. "
                f"Received: {array.dtype} of shape {array.shape}"
            )
        super().__init__(array)

    @staticmethod
    def rounded(probabilities: np.ndarray) -> np.ndarray:
        """Probabilities along the last axis, rounded to bytes that sum to exactly 255."""
        bounds = np.rint(WHOLE * np.cumsum(probabilities, -1)).astype("uint8")
        return np.diff(bounds, prepend=np.uint8(0))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[:-1]

    @property
    def count(self) -> int:
        return self.array.shape[-1]

    def over(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.broadcast_to(self.array, (*shape, self.count))

    def totals(
        self, piece: np.ndarray, used: np.ndarray, weights: Sequence[np.ndarray | None]
    ) -> np.ndarray:
        masked = [used if weight is None else used * weight for weight in weights]
        return np.stack(masked).astype("float64") @ piece / WHOLE

    def strengths(self, table: np.ndarray) -> np.ndarray:
        strengths = np.zeros(self.shape, "float32")
        for k in range(self.count):
            strengths += self.array[..., k] * (table[k] / np.float32(WHOLE))
        return strengths

    def renumbered(self, numbers: np.ndarray) -> np.ndarray:
        renumbered = np.zeros((*self.shape, int(numbers.max(initial=-1)) + 1), "uint8")
        for k in range(self.count):
            if numbers[k] >= 0:
                renumbered[..., numbers[k]] = self.array[..., k]
        return renumbered

    def within(self, numbers: set[int]) -> bool:
        has_members = self.array.any(tuple(range(self.array.ndim - 1)))
        return set(np.flatnonzero(has_members).tolist()) <= numbers


def assignment_of(array: np.ndarray) -> Assignment:
    """The assignment that a stored array represents: `uint8` is soft, signed integers are hard.

    Raises:
        ValueError: If the array is neither.
    """
    return Responsibilities(array) if array.dtype == "uint8" else HardAssignment(array)
