"""What all groupings share: what is grouped, what each group weighs, and which group is which."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import keras
import numpy as np
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits

from keras_dwd.curvature.fisher import Block
from keras_dwd.files import FileError
from keras_dwd.grouping.assignment import Assignment, Numbers, Responsibilities
from keras_dwd.grouping.strength import Budget, GroupStatistics, Strength, strength_from
from keras_dwd.variables import Arrays, Variables

Granularity = Literal["element", "unit", "variable"]
Summary = list[dict[str, Any]]
"""Of each group its number `group`, `size`, `mean_fisher`, `magnitude` (root mean square of θ),
`strength` λ_k, and `layers`: how many of its parameters are in which."""

Described = dict[str, tuple[np.ndarray, ...]]
"""What there is to say of blocks, by block: a few small arrays each."""


class Grouped(NamedTuple):
    """What a grouping makes of the Fisher information of a task.

    Attributes:
        blocks: It, weighted by the λ_k of its groups.
        groups: The summary of these.
        assignments: By block the array of an `Assignment`: which group each of its eigenvalues is
            in.
    """

    blocks: dict[str, Block]
    groups: Summary
    assignments: Arrays


# As many parameters at a time: what is computed of them stays in the processor's cache.
_CHUNK = 2**16


@dataclass(frozen=True)
class Learned:
    """What a model knows at the end of a task.

    Attributes:
        blocks: The Fisher information of the task.
        values: The variables θ, by path.
        anchors: What they were pulled to so far, of those that were.
        kinds: The class of each variable's layer, by path, from inputs to outputs.
        groups: The summary of the last boundary.
        exchange: Adds what other workers say of the blocks that are theirs.
    """

    blocks: Mapping[str, Block]
    values: Arrays
    anchors: Arrays = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    groups: Summary = field(default_factory=list)
    exchange: Callable[[Described], Described] = dict

    def of_all(self, described: Described) -> Described:
        """What all workers say of their blocks, in the order of the model's variables."""
        order = {path: i for i, path in enumerate(self.kinds)}
        every = self.exchange(described).items()
        return dict(sorted(every, key=lambda item: (order.get(item[0], len(order)), item[0])))


@dataclass(frozen=True)
class Parameters:
    """What is grouped of one block: its eigenvalues, and where the parameters are along them.

    For a diagonal these are the parameters themselves; for Kronecker factors the eigen-directions
    of a layer, of `(inputs, outputs)`.

    Attributes:
        fisher: The eigenvalues F.
        block: The block.
        learned: What it is from.
    """

    fisher: np.ndarray
    block: Block
    learned: Learned

    @cached_property
    def values(self) -> np.ndarray:
        """θ along the eigenvectors, of the shape of F."""
        return self.block.coordinates(self.learned.values)

    @cached_property
    def moved(self) -> np.ndarray | None:
        """θ − c along the eigenvectors, of the shape of F; `None` where there is no c yet."""
        if not all(path in self.learned.anchors for path in self.block.paths):
            return None
        differences = {
            p: np.asarray(self.learned.values[p], "float32") - self.learned.anchors[p]
            for p in self.block.paths
        }
        return self.block.coordinates(differences)

    @property
    def depth(self) -> float:
        """From 0, the first of the model's variables, to 1, the last."""
        order = list(self.learned.kinds)
        path = self.block.paths[0]
        return order.index(path) / max(len(order) - 1, 1) if path in order else 0.0

    @property
    def kind(self) -> str:
        """The class of the layer."""
        return self.learned.kinds.get(self.block.paths[0], "")


class Grouping(ABC):
    """Divides the Fisher information of a task into groups and weighs each by its λ_k.

    Done anew at each boundary, where the result is folded into the precision: a training step
    costs the same as without groups.
    """

    def check(self, variables: Variables) -> None:  # noqa: B027 (most have nothing to check)
        """Raise `ValueError` if these settings do not fit a model's variables, by path."""

    @property
    def budget(self) -> Budget | None:
        """What the training step is to adjust the λ_k by, if it is."""
        return None

    def commit(self) -> None:  # noqa: B027
        """Told when what `apply` gave last has become part of the model."""

    def state(self) -> Arrays:
        """What was learned from task to task, by name; saved with the model, not with settings."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Take over what `state` gave; of nothing, be as new.

        Raises:
            FileError: If it is not that of a grouping of these settings. Nothing changes then.
        """
        if state:
            raise FileError(
                f"The saved state of a grouping, {', '.join(sorted(state))}, is not of a "
                f"{type(self).__name__}: load it into a model with the grouping it was saved with. "
                "The model's consolidation state was left as it was."
            )

    @abstractmethod
    def apply(self, learned: Learned) -> Grouped:
        """Weigh the Fisher information by the λ_k of its groups."""

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The inverse of `get_config`."""
        return cls(**config)


class Partition(Grouping):
    """A grouping that finds parameters that belong together: in `fit`, and in `label` which.

    Parameters with zero Fisher information belong to no group.

    Args:
        strengths: The rule for λ_k: `"importance"`, `"evidence"`, a `Strength`, or a number for
            each group.
        granularity: What is grouped: `"element"`, single parameters or, where the Fisher
            information has Kronecker factors, eigen-directions; `"unit"`, all of them with the
            same last index, the output (or direction of outputs) they lead to; or `"variable"`, all
            of a variable or of a layer's matrix.
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
        """What `fit` is to know of a block: small, as workers send it to each other."""
        return ()

    @abstractmethod
    def fit(self, described: Described) -> Any:
        """Find the groups.

        Args:
            described: By block, what `describe` says of it.

        Returns:
            What `label` is to know.
        """

    @abstractmethod
    def label(self, found: Any, key: str, part: Parameters) -> np.ndarray | Responsibilities:
        """Say which group each of a block's parameters is in.

        Args:
            found: As of `fit`.
            key: Of the block.
            part: Its parameters.

        Returns:
            Numbers of groups from 0 on, −1 for none, as small integers of a shape that broadcasts
            to that of `fisher`. What has no Fisher information may have any. Or, where parameters
            are in several groups, their `Responsibilities`.
        """

    @property
    def budget(self) -> Budget | None:
        """What the training step is to adjust the λ_k by, if it is."""
        return self.strengths if isinstance(self.strengths, Budget) else None

    def apply(self, learned: Learned) -> Grouped:
        """Weigh the Fisher information by the λ_k of its groups.

        Of Kronecker factors the result is the nearest pair of factors: its total differs a little.
        """
        parameters = {
            key: Parameters(block.spectrum(), block, learned)
            for key, block in learned.blocks.items()
        }
        described = {key: self.describe(key, part) for key, part in parameters.items()}
        # Small problems, which more threads only slow down, and sum up in another order each time.
        with threadpool_limits(1):
            found = self.fit(learned.of_all(described))
        assigned = {
            key: _assigned(self.label(found, key, part)) for key, part in parameters.items()
        }
        sums: Described = {
            key: (_sums(part, assigned[key], self.strengths.by_movement),)
            for key, part in parameters.items()
        }
        of_all = learned.of_all(sums)
        count = max((part.shape[1] for (part,) in of_all.values()), default=0)
        members = np.zeros((len(of_all), 5, count))  # in parts of one where they are in several
        for i, (part,) in enumerate(of_all.values()):
            members[i, :, : part.shape[1]] = part
        sizes, fisher, squares, moved, still = members.sum(0)
        has_moved = self.strengths.by_movement and (still < sizes).any()
        if has_moved:  # what has no c yet counts as the rest of its group, or of all
            known = np.maximum(sizes - still, 1)
            mean = moved.sum() / (sizes - still).sum()
            moved = np.where(still < sizes, moved / known, mean) * sizes
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
        before = [g for g in learned.groups if most is None or g["group"] < most]
        numbers = _numbers(summary, before)
        order = used[np.argsort(numbers)]
        strengths = np.zeros(count + 1)  # the last is that of no group, −1
        strengths[order] = self.strengths.of(
            GroupStatistics(
                np.sort(numbers), sizes[order], fisher[order], moved[order] if has_moved else None
            )
        )
        for group, k, number in zip(summary, used, numbers, strict=True):
            group |= {"group": int(number), "strength": float(strengths[k])}
        table = strengths.astype("float32")
        weighted = {
            key: part.block.scaled(
                np.broadcast_to(assigned[key].strengths(table), part.fisher.shape)
            )
            for key, part in parameters.items()
        }
        final = np.full(count, -1)
        final[used] = numbers
        assignments = {key: each.renumbered(final) for key, each in assigned.items()}
        return Grouped(weighted, sorted(summary, key=lambda group: group["group"]), assignments)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "strengths": keras.saving.serialize_keras_object(self.strengths),
            "granularity": self.granularity,
        }


def _assigned(labels: np.ndarray | Responsibilities) -> Assignment:
    if isinstance(labels, Responsibilities):
        return labels
    return Numbers(labels.astype(np.promote_types(labels.dtype, "int8"), copy=False))


def pieces(*arrays: np.ndarray | None) -> Iterator[list[Any]]:
    """Arrays of one shape, some with more axes, flat up to these, a piece of each at a time."""
    ndim = min(a.ndim for a in arrays if a is not None)
    flat = [None if a is None else a.reshape(-1, *a.shape[ndim:]) for a in arrays]
    size = next(len(a) for a in flat if a is not None)
    for start in range(0, size, _CHUNK):
        yield [None if a is None else a[start : start + _CHUNK] for a in flat]


def reduced(array: np.ndarray, granularity: Granularity) -> np.ndarray:
    """The means over what belongs together, of a shape that broadcasts to that of `array`."""
    if granularity == "element" or not array.ndim:
        return array
    axes = tuple(range(array.ndim - (granularity == "unit")))
    return array.mean(axes, dtype="float64", keepdims=True) if axes else array


def _sums(part: Parameters, assigned: Assignment, by_movement: bool) -> np.ndarray:
    """Of each group the number of members, their sums of F, of θ² and of F (θ − c)².

    And last the number of those that have no c yet.
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
    """The number of each group: that of the most similar one before, free ones for the rest.

    Groups are similar that have the same share of their parameters in the same layers, and the
    same mean Fisher information and magnitude relative to all groups. Without any before they are
    numbered by rising mean Fisher information.
    """
    numbers = np.full(len(summary), -1)
    if previous and summary:
        new, old = _positions(summary), _positions(previous)
        distance = np.abs(new[:, None] - old[None]).sum(2)
        for i, a in enumerate(summary):
            for j, b in enumerate(previous):
                distance[i, j] += 10 * _apart(a["layers"], b["layers"])
        for i, j in zip(*linear_sum_assignment(distance), strict=True):
            numbers[i] = previous[j]["group"]
    free = iter(sorted(set(range(len(summary) + len(previous))) - set(numbers)))
    for i in np.argsort([group["mean_fisher"] for group in summary]):
        if numbers[i] < 0:
            numbers[i] = next(free)
    return numbers


def _positions(summary: Summary) -> np.ndarray:
    """Log mean Fisher information and log magnitude of groups, against those of all, `(K, 2)`."""
    sizes = np.array([group["size"] for group in summary], float)
    found = np.array([[group["mean_fisher"], group["magnitude"]] for group in summary])
    overall = (sizes[:, None] * found).sum(0) / sizes.sum()
    tiny = np.finfo("float64").tiny
    return np.log(np.maximum(found, tiny) / np.maximum(overall, tiny))


def _apart(a: dict[str, int], b: dict[str, int]) -> float:
    """From 0, the same shares in the same layers, to 1, none in common."""
    total_a, total_b = sum(a.values()), sum(b.values())
    return 1 - sum(min(n / total_a, b.get(key, 0) / total_b) for key, n in a.items())
