"""Which group each parameter is in: one, or several in parts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np

WHOLE = 255
"""A parameter is in groups in parts of this many, so that each part is a byte."""


class Assignment(ABC):
    """Which groups the parameters of a block are in.

    Args:
        array: As it is kept and saved.
    """

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """It broadcasts to that of the parameters."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many groups it may speak of."""

    @abstractmethod
    def over(self, shape: tuple[int, ...]) -> np.ndarray:
        """The array, broadcast to all parameters."""

    @abstractmethod
    def totals(
        self, piece: np.ndarray, used: np.ndarray, weights: Sequence[np.ndarray | None]
    ) -> np.ndarray:
        """The sums of weights over each group, `(weights, count)`; `None` stands for ones.

        Args:
            piece: Of the array, of some parameters.
            used: Which of them count.
            weights: Of each of them.
        """

    @abstractmethod
    def strengths(self, table: np.ndarray) -> np.ndarray:
        """λ of each parameter from those of the groups; the last is that of no group."""

    @abstractmethod
    def renumbered(self, numbers: np.ndarray) -> np.ndarray:
        """The array with these numbers of the groups, −1 for one without members."""

    @abstractmethod
    def within(self, numbers: set[int]) -> bool:
        """Whether it speaks of groups of these numbers only."""


class Numbers(Assignment):
    """One group each.

    Args:
        array: Signed integers, −1 for none.
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

    @cached_property  # `totals` asks for it at each piece
    def count(self) -> int:
        return int(self.array.max(initial=-1)) + 1

    def over(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.broadcast_to(self.array, shape)

    def totals(
        self, piece: np.ndarray, used: np.ndarray, weights: Sequence[np.ndarray | None]
    ) -> np.ndarray:
        count = self.count + 1
        groups = np.where(used, piece.astype(np.intp) + 1, 0)
        return np.stack([np.bincount(groups, each, count)[1:] for each in weights])

    def strengths(self, table: np.ndarray) -> np.ndarray:
        return table[self.array]

    def renumbered(self, numbers: np.ndarray) -> np.ndarray:
        numbers = np.append(numbers, -1)
        return numbers.astype(np.min_scalar_type(-int(numbers.max()) - 2))[self.array]

    def within(self, numbers: set[int]) -> bool:
        return set(np.unique(self.array).tolist()) <= numbers | {-1}


class Responsibilities(Assignment):
    """Several groups each, in 255ths: bytes that sum to 255, or are all 0 for no group.

    Args:
        array: `uint8`, of the shape of the parameters with one more axis, that of the groups; see
            `rounded`.
    """

    def __init__(self, array: np.ndarray):
        array = np.asarray(array)
        bytes_of_each = array.dtype == "uint8" and array.ndim
        sums = array.sum(-1, dtype="uint32") if bytes_of_each else np.array(1)
        if not ((sums == 0) | (sums == WHOLE)).all():
            raise ValueError(
                f"`array` must hold bytes that sum to {WHOLE}, or to 0, along its last axis. "
                f"Received: {array.dtype} of shape {array.shape}"
            )
        super().__init__(array)

    @staticmethod
    def rounded(probabilities: np.ndarray) -> np.ndarray:
        """Probabilities along the last axis as bytes that sum to 255."""
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
        each = [used if weight is None else used * weight for weight in weights]
        return np.stack(each).astype("float64") @ piece / WHOLE

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
        found = self.array.any(tuple(range(self.array.ndim - 1)))
        return set(np.flatnonzero(found).tolist()) <= numbers


def assignment_of(array: np.ndarray) -> Assignment:
    """What an array that was kept says: responsibilities are unsigned, numbers are not.

    Raises:
        ValueError: If it is neither.
    """
    return Responsibilities(array) if array.dtype == "uint8" else Numbers(array)
