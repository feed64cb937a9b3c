"""Base classes of groupings: the data they get, their result, and the numbering of groups."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import keras
import numpy as np
from scipy.optimize import linear_sum_assignment

from keras_dwd.checks import FixedSettings
from keras_dwd.files import FileError
from keras_dwd.groupings.assignment import Assignment, HardAssignment, Responsibilities
from keras_dwd.groupings.strength import Budget, GroupStatistics, Strength, strength_from
from keras_dwd.precision.block import Block
from keras_dwd.state import UNCHANGED, Commit
from keras_dwd.variables import Arrays, Variables

Granularity = Literal["element", "unit", "variable"]
Summary = list[dict[str, Any]]
"""One dictionary per group: its number `group`, `size`, `mean_fisher`, `magnitude` (root mean
square of θ), `strength` λ_k, and `layers`, the number of its parameters in each layer."""

Described = dict[str, tuple[np.ndarray, ...]]
"""Statistics of blocks, by block: a few small arrays each, exchanged between workers."""


class GroupingResult(NamedTuple):
    """The result of applying a grouping to the Fisher information of a task.

    Attributes:
        blocks: The Fisher information, multiplied by the λ_k of its groups.
        groups: The summary of the groups.
        assignments: By block, the array of an `Assignment`: the group of each of its eigenvalues.

    Example:

    ```python
    class Halved(Grouping):
        def apply(self, context):
            blocks = {
                key: block.scale_importances(np.full(block.importances().shape, 0.5))
                for key, block in context.blocks.items()
            }
            return GroupingResult(blocks, groups=[], assignments={})

        def get_config(self):
            return {}
    ```
    """

    blocks: dict[str, Block]
    groups: Summary
    assignments: Arrays


# Number of parameters processed at a time, small enough for the processor's cache.
_CHUNK = 2**16


@dataclass(frozen=True)
class BoundaryContext:
    """The data that a model passes to its grouping at a task boundary.

    Attributes:
        blocks: The Fisher information of the task, by block.
        values: Values of the variables θ, by path.
        anchors: Anchors c before this boundary, by path; variables without one are left out.
        kinds: Class name of each variable's layer, by path, from inputs to outputs.
        groups: Summary of the groups of the last boundary.
        exchange: Function that adds the statistics of the blocks which other workers store.

    Example:

    ```python
    class Told(GaussianMixtureGrouping):
        def apply(self, context):  # a BoundaryContext
            print(sorted(context.blocks))
            return super().apply(context)
    ```
    """

    blocks: Mapping[str, Block]
    values: Arrays
    anchors: Arrays = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    groups: Summary = field(default_factory=list)
    exchange: Callable[[Described], Described] = dict

    def gather(self, described: Described) -> Described:
        """The statistics of the blocks of all workers, in the order of the model's variables."""
        order = {path: i for i, path in enumerate(self.kinds)}
        exchanged = self.exchange(described).items()
        return dict(sorted(exchanged, key=lambda item: (order.get(item[0], len(order)), item[0])))


@dataclass(frozen=True)
class Parameters:
    """The items of one block to be grouped: its eigenvalues and the coordinates of θ along them.

    For a diagonal block the items are the parameters themselves. For Kronecker factors they are
    the eigen-directions of a layer, of shape `(inputs, outputs)`.

    Attributes:
        fisher: The eigenvalues F.
        block: The block.
        context: The data of the boundary.

    Example:

    ```python
    class AboveMean(Partition):
        def fit(self, described):
            return None

        def label(self, fitted, key, part):  # Parameters
            return (part.fisher > part.fisher.mean()).astype("int8")
    ```
    """

    fisher: np.ndarray
    block: Block
    context: BoundaryContext

    @cached_property
    def values(self) -> np.ndarray:
        """Coordinates of θ along the eigenvectors, of the shape of F."""
        return self.block.coordinates(self.context.values)

    @cached_property
    def moved(self) -> np.ndarray | None:
        """Coordinates of θ − c, of the shape of F; `None` before the block has an anchor c."""
        if not all(path in self.context.anchors for path in self.block.paths):
            return None
        differences = {
            p: np.asarray(self.context.values[p], "float32") - self.context.anchors[p]
            for p in self.block.paths
        }
        return self.block.coordinates(differences)

    @property
    def depth(self) -> float:
        """Position among the model's variables, from 0 for the first to 1 for the last."""
        order = list(self.context.kinds)
        path = self.block.paths[0]
        return order.index(path) / max(len(order) - 1, 1) if path in order else 0.0

    @property
    def kind(self) -> str:
        """Class name of the layer."""
        return self.context.kinds.get(self.block.paths[0], "")


class Grouping(FixedSettings, ABC):
    """Divides the Fisher information of a task into groups and multiplies each by its λ_k.

    The groups are determined anew at each task boundary, where the result is folded into the
    precision. A training step costs the same as without groups.

    Example:

    ```python
    @keras.saving.register_keras_serializable("mine")
    class Halved(Grouping):  # every λ_k is 0.5
        def apply(self, context):
            blocks = {
                key: block.scale_importances(np.full(block.importances().shape, 0.5))
                for key, block in context.blocks.items()
            }
            return GroupingResult(blocks, [], {})

        def get_config(self):
            return {}

    model = DWDModel.from_model(network, grouping=Halved())
    ```
    """

    def check(self, variables: Variables) -> None:
        """Raise `ValueError` if these settings do not fit a model's variables, given by path."""

    @property
    def budget(self) -> Budget | None:
        """The `Budget` by which the training step adjusts the λ_k; `None` if λ_k are fixed."""
        return None

    def commit(self) -> None:
        """Called when the last result of `apply` has become part of the model."""

    def state(self) -> Arrays:
        """Arrays learned from task to task, by name: saved with the model, not in the config."""
        return {}

    def prepare_state(self, state: Arrays) -> Commit:
        """Check a saved `state` without applying it yet; an empty one resets the grouping.

        Returns:
            A function that applies the state and cannot fail.

        Raises:
            FileError: If this is not the state of a grouping with these settings.
        """
        earlier = getattr(self, "restore", None)
        if earlier is not None:
            warnings.warn(
                f"`{type(self).__name__}.restore` is deprecated and will not be called from 0.3 "
                "on: define `prepare_state`, which returns the function that applies the state.",
                DeprecationWarning,
                stacklevel=2,
            )
            return lambda: earlier(state)
        if state:
            raise FileError(
                f"The saved state of a grouping, {', '.join(sorted(state))}, is not of a "
                f"{type(self).__name__}: load it into a model with the grouping it was saved with. "
                f"{UNCHANGED}"
            )
        return lambda: None

    @abstractmethod
    def apply(self, context: BoundaryContext) -> GroupingResult:
        """Multiply the Fisher information by the λ_k of its groups."""

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The inverse of `get_config`."""
        return cls(**config)


class Partition(Grouping):
    """A grouping in two steps: `fit` determines the groups, `label` assigns parameters to them.

    Parameters with zero Fisher information belong to no group.

    Args:
        strengths: The rule for λ_k: `"importance"`, `"evidence"`, `"budget"`, a `Strength`, or a
            number for each group.
        granularity: The items that are grouped. `"element"`: single parameters or, where the
            Fisher information has Kronecker factors, single eigen-directions. `"unit"`: all
            parameters (or eigen-directions) of one output, that is, with the same last index.
            `"variable"`: all parameters of a variable or of a layer's matrix.

    Example:

    ```python
    @keras.saving.register_keras_serializable("mine")
    class AboveMean(Partition):  # of each block, what matters more and what matters less
        def fit(self, described):
            return None

        def label(self, fitted, key, part):
            return (part.fisher > part.fisher.mean()).astype("int8")

    model = DWDModel.from_model(network, grouping=AboveMean(strengths=(0.5, 2.0)))
    ```
    """

    def __init__(self, strengths: Any = "importance", granularity: Granularity = "element"):
        if granularity not in get_args(Granularity):
            known = ", ".join(map(repr, get_args(Granularity)))
            raise ValueError(f"`granularity` must be one of {known}. Received: {granularity!r}")
        self.granularity = granularity
        self.strengths: Strength = strength_from(strengths)
        if granularity != "variable" and isinstance(self.strengths, Budget):
            raise ValueError(
                "`granularity` must be 'variable' with strengths that follow a budget. Received: "
                f"{granularity!r}"
            )

    def describe(self, key: str, part: Parameters) -> tuple[np.ndarray, ...]:
        """Statistics of a block that `fit` needs: small arrays, as workers exchange them."""
        return ()

    @abstractmethod
    def fit(self, described: Described) -> Any:
        """Determine the groups.

        Args:
            described: The statistics from `describe`, by block.

        Returns:
            Anything that `label` needs; it is passed to it as `fitted`.
        """

    @abstractmethod
    def label(self, fitted: Any, key: str, part: Parameters) -> np.ndarray | Responsibilities:
        """Assign the parameters of a block to groups.

        Args:
            fitted: The return value of `fit`.
            key: Name of the block.
            part: Parameters of the block.

        Returns:
            Group numbers from 0, −1 for no group, as small signed integers of a shape that
            broadcasts to that of `part.fisher`; the numbers of parameters with F = 0 are ignored.
            Or, where parameters are in several groups, their `Responsibilities`.
        """

    @property
    def budget(self) -> Budget | None:
        """The `Budget` by which the training step adjusts the λ_k; `None` if λ_k are fixed."""
        return self.strengths if isinstance(self.strengths, Budget) else None

    def apply(self, context: BoundaryContext) -> GroupingResult:
        """Multiply the Fisher information by the λ_k of its groups.

        For Kronecker factors the result is the nearest pair of factors, so its trace differs
        slightly from the exact one.
        """
        parameters = {
            key: Parameters(block.importances(), block, context)
            for key, block in context.blocks.items()
        }
        described = {key: self.describe(key, part) for key, part in parameters.items()}
        groups = self.fit(context.gather(described))
        assigned = {
            key: _assigned(self.label(groups, key, part)) for key, part in parameters.items()
        }
        sums: Described = {
            key: (_sums(part, assigned[key], self.strengths.by_movement),)
            for key, part in parameters.items()
        }
        of_all = context.gather(sums)
        count = max((part.shape[1] for (part,) in of_all.values()), default=0)
        members = np.zeros((len(of_all), 5, count))  # fractional for responsibilities
        for i, (part,) in enumerate(of_all.values()):
            members[i, :, : part.shape[1]] = part
        sizes, fisher, squares, moved, unanchored = members.sum(0)
        has_moved = self.strengths.by_movement and (unanchored < sizes).any()
        if has_moved:  # parameters without an anchor get the mean of their group, or of all groups
            anchored = np.maximum(sizes - unanchored, 1)
            mean = moved.sum() / (sizes - unanchored).sum()
            moved = np.where(unanchored < sizes, moved / anchored, mean) * sizes
        summary: Summary = [
            {
                "size": round(sizes[k]),
                "mean_fisher": float(fisher[k] / sizes[k]),
                "magnitude": float(np.sqrt(squares[k] / sizes[k])),
                "layers": {
                    key: round(n) for key, n in zip(of_all, members[:, 0, k], strict=True) if n
                },
            }
            for k in range(count)
            if sizes[k]
        ]
        used = np.flatnonzero(sizes)
        most = self.strengths.most
        before = [g for g in context.groups if most is None or g["group"] < most]
        numbers = _numbers(summary, before)
        order = used[np.argsort(numbers)]
        strengths = np.zeros(count + 1)  # the last entry is for parameters in no group, −1
        strengths[order] = self.strengths.of(
            GroupStatistics(
                np.sort(numbers), sizes[order], fisher[order], moved[order] if has_moved else None
            )
        )
        for group, k, number in zip(summary, used, numbers, strict=True):
            group |= {"group": int(number), "strength": float(strengths[k])}
        table = strengths.astype("float32")
        weighted = {
            key: part.block.scale_importances(
                np.broadcast_to(assigned[key].strengths(table), part.fisher.shape)
            )
            for key, part in parameters.items()
        }
        final = np.full(count, -1)
        final[used] = numbers
        assignments = {key: assignment.renumbered(final) for key, assignment in assigned.items()}
        return GroupingResult(
            weighted, sorted(summary, key=lambda group: group["group"]), assignments
        )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "strengths": keras.saving.serialize_keras_object(self.strengths),
            "granularity": self.granularity,
        }


def _assigned(labels: np.ndarray | Responsibilities) -> Assignment:
    if isinstance(labels, Responsibilities):
        return labels
    return HardAssignment(labels.astype(np.promote_types(labels.dtype, "int8"), copy=False))


def pieces(*arrays: np.ndarray | None) -> Iterator[list[Any]]:
    """Matching pieces of flattened arrays; axes beyond the common ones are kept."""
    ndim = min(a.ndim for a in arrays if a is not None)
    flat = [None if a is None else a.reshape(-1, *a.shape[ndim:]) for a in arrays]
    size = next(len(a) for a in flat if a is not None)
    for start in range(0, size, _CHUNK):
        yield [None if a is None else a[start : start + _CHUNK] for a in flat]


def reduced(array: np.ndarray, granularity: Granularity) -> np.ndarray:
    """Means over each item of a granularity, of a shape that broadcasts to that of `array`."""
    if granularity == "element" or not array.ndim:
        return array
    axes = tuple(range(array.ndim - (granularity == "unit")))
    return array.mean(axes, dtype="float64", keepdims=True) if axes else array


def _sums(part: Parameters, assigned: Assignment, by_movement: bool) -> np.ndarray:
    """Statistics of the groups within one block, of shape `(5, groups)`.

    The rows are: number of members, Σ F, Σ θ², Σ F (θ − c)², and the number of members without an
    anchor c.
    """
    sums = np.zeros((5, assigned.count))
    everywhere = assigned.over(part.fisher.shape)
    moved_by = part.moved if by_movement else None
    for fisher, values, moved, groups in pieces(part.fisher, part.values, moved_by, everywhere):
        weights = [None, fisher, values**2]
        if moved is not None:
            weights.append(fisher * moved**2)
        sums[: len(weights)] += assigned.totals(groups, fisher > 0, weights)
    if moved_by is None:
        sums[4] = sums[0]
    return sums


def _numbers(summary: Summary, previous: Summary) -> np.ndarray:
    """Number the groups so that each keeps the number of the most similar previous group.

    Groups are similar if their parameters are distributed over the same layers and if their mean
    Fisher information and magnitude relative to all groups are alike. The remaining groups, or all
    if there are no previous ones, get the free numbers by rising mean Fisher information.
    """
    numbers = np.full(len(summary), -1)
    if previous and summary:
        new, old = _positions(summary), _positions(previous)
        distance = np.abs(new[:, None] - old[None]).sum(2)
        for i, a in enumerate(summary):
            for j, b in enumerate(previous):
                distance[i, j] += 10 * _layer_distance(a["layers"], b["layers"])
        for i, j in zip(*linear_sum_assignment(distance), strict=True):
            numbers[i] = previous[j]["group"]
    free = iter(sorted(set(range(len(summary) + len(previous))) - set(numbers)))
    for i in np.argsort([group["mean_fisher"] for group in summary]):
        if numbers[i] < 0:
            numbers[i] = next(free)
    return numbers


def _positions(summary: Summary) -> np.ndarray:
    """Log mean Fisher information and log magnitude, relative to all groups, `(groups, 2)`."""
    sizes = np.array([group["size"] for group in summary], float)
    features = np.array([[group["mean_fisher"], group["magnitude"]] for group in summary])
    overall = (sizes[:, None] * features).sum(0) / sizes.sum()
    tiny = np.finfo("float64").tiny
    return np.log(np.maximum(features, tiny) / np.maximum(overall, tiny))


def _layer_distance(a: dict[str, int], b: dict[str, int]) -> float:
    """Distance of two groups' distributions over layers: 0 if equal, 1 if disjoint."""
    total_a, total_b = sum(a.values()), sum(b.values())
    return 1 - sum(min(n / total_a, b.get(key, 0) / total_b) for key, n in a.items())
