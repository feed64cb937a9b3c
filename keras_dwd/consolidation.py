"""The consolidation state of a model: what it keeps of earlier tasks, and how tasks are added."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from threadpoolctl import threadpool_limits

from keras_dwd import growing
from keras_dwd.curvature.fisher import NAMES as STATISTICS
from keras_dwd.curvature.fisher import SCALARS as FISHER_SCALARS
from keras_dwd.curvature.fisher import Fisher
from keras_dwd.curvature.kronecker import KroneckerFisher
from keras_dwd.curvature.likelihood import sums_examples
from keras_dwd.curvature.rules import places_of
from keras_dwd.distillation import NAMES as DISTILLATION_ARRAYS
from keras_dwd.distillation import PREFIX as DISTILLATION
from keras_dwd.distillation import Distillation, grown_flags
from keras_dwd.distributed.workers import Workers, block_sizes
from keras_dwd.files import FileError
from keras_dwd.groupings.assignment import assignment_of
from keras_dwd.groupings.grouping import BoundaryContext, Grouping, GroupingResult, Summary
from keras_dwd.groupings.histograms import histograms
from keras_dwd.keras_private import layers_within
from keras_dwd.learner import Learner
from keras_dwd.precision.block import Block, Place
from keras_dwd.regularizer import NAMES as REGULARIZER_ARRAYS
from keras_dwd.regularizer import SCALARS as REGULARIZER_SCALARS
from keras_dwd.regularizer import DWDRegularizer
from keras_dwd.state import (
    FORMAT,
    UNCHANGED,
    Commit,
    check_numbers,
    from_file,
    groups_of,
    json_array,
    refuse,
    to_file,
)
from keras_dwd.task_graph.graph import TaskGraph
from keras_dwd.training import optimizer
from keras_dwd.training.batch_statistics import BatchStatistics
from keras_dwd.training.boundary_pass import BoundaryPass
from keras_dwd.training.data import check_weights
from keras_dwd.training.head_gate import HeadGate
from keras_dwd.training.step import TrainingStep
from keras_dwd.variables import (
    Arrays,
    Variables,
    by_path,
    digest_of,
    kinds_of,
    trainable_by_path,
    untracked,
    weights_by_path,
)

_GROUPING = "grouping."
_OWN = {"value", "group"}
_SCALARS = {"format", "tasks_learned", *FISHER_SCALARS, *REGULARIZER_SCALARS}
_BYTES = {"weights_digest", "groups"}


class LastBoundary(NamedTuple):
    """What was recorded at the last boundary, for reports; it is not saved.

    Attributes:
        examples: The number of examples of the pass over the task's data; `None` without a pass.
        seconds: The time that the boundary took.
        histograms: See `histograms`.
    """

    examples: int | None = None
    seconds: float | None = None
    histograms: dict[str, Any] = {}  # noqa: RUF012


class Consolidation:
    """The state that earlier tasks have left in a model, and all operations that change it.

    Changes have two phases. First each part prepares its change and may raise an error; then all
    parts commit, which cannot fail. An error therefore leaves the state unchanged.

    The model is an argument of each method and is not stored.

    Args:
        regularizer: Holds precision and anchor, and computes the pull.
        fisher: Estimates the Fisher information of the current task.
        grouping: Sets the strengths λ_k of groups of parameters, or `None`.
        task_graph: Compares tasks, to pull towards similar ones, or `None`.
        distillation: Keeps the outputs close to those at the last boundary, or `None`.

    Attributes:
        workers: The workers that train together, and how they share the state.
        head_gate: Records which heads, and other parts per task, the current task uses.
        tasks_learned: The number of tasks learned.
        groups: The groups of the last boundary.
        assignments: The group of each parameter at the last boundary, by block.
        weights_digest: A digest of the weights at the last boundary. Until they change, there is
            nothing to consolidate.
        last_boundary: What was recorded at the last boundary.
    """

    def __init__(
        self,
        regularizer: DWDRegularizer,
        fisher: Fisher,
        grouping: Grouping | None,
        task_graph: TaskGraph | None,
        distillation: Distillation | None = None,
    ):
        if regularizer.anchor == "folded" and isinstance(fisher, KroneckerFisher):
            raise ValueError(
                "`anchor` 'folded' is the exact sum over tasks, which only a diagonal has. Use "
                "`fisher=DiagonalFisher(...)` with it."
            )
        if distillation is not None and fisher.estimator == "adam":
            raise ValueError(
                "`distillation` does not work with the estimator 'adam', the optimizer's second "
                "moment, which has the gradient of the distillation in it. Use another estimator."
            )
        self.regularizer = regularizer
        self.fisher = fisher
        self.grouping = grouping
        self.task_graph = task_graph
        self.distillation = distillation
        self.head_gate = HeadGate()
        self.workers = Workers()
        self.tasks_learned = 0
        self.groups: Summary = []
        self.assignments: Arrays = {}
        self.weights_digest = b""
        self.last_boundary = LastBoundary()
        # Incremented whenever a traced training step becomes outdated, see `check_traced`.
        self._version = untracked(np.zeros(()), "version", "int64")
        self._statistics = BatchStatistics()
        self._pass = BoundaryPass(self._statistics)
        self._built_for: set[str] | None = None

    # During training.

    def pulled_variables(self, model: Learner) -> Variables:
        """The trainable variables that have a strength above zero, or had one, by path."""
        trainable = trainable_by_path(model).items()
        return {path: v for path, v in trainable if self.regularizer.holds(path, v)}

    def is_built(self, model: Learner) -> bool:
        """Whether `build` was called since the last change of which variables have a strength."""
        distils = self.distillation is None or self.distillation.is_built(model)
        return distils and self._held_paths(model) == self._built_for

    def _held_paths(self, model: Learner) -> set[str]:
        """Paths of all variables that have a strength, trainable or not."""
        return {path for path, v in by_path(model).items() if self.regularizer.holds(path, v)}

    def build(self, model: Learner) -> None:
        """Create what the training step needs when it is traced anew, and drop what it does not."""
        self._statistics.forget()
        if self.distillation is not None:
            self.distillation.build(model, self._whole_anchors())
        paths = self._held_paths(model)
        if self._built_for is not None and paths != self._built_for:
            self._version.assign_add(1)
        self._built_for = paths
        pulled = self.pulled_variables(model)
        if self.fisher.online and pulled:
            self.fisher.forget_all_but(self.fisher.shapes(model, by_path(model)))
            shapes = self.local_shard(model, self.fisher.shapes(model, pulled))
            self.fisher.build(shapes, optimizer.find(model.optimizer))
        self.head_gate.build(trainable_by_path(model))

    def check_traced(self) -> None:
        """Fail if a `tf.function` still runs a step traced before the last boundary. Graph code.

        `fit` traces its own function again; a `tf.function` of the user would omit the penalty.
        """
        if tf.inside_function():
            with tf.init_scope():
                traced = int(self._version)
            tf.debugging.assert_equal(
                self._version.value,
                tf.constant(traced, "int64"),
                "The model was consolidated, or its state loaded, after this `tf.function` was "
                "traced, so that it does not hold earlier tasks. Make a new `tf.function` then.",
            )

    def _whole_anchors(self) -> Variables:
        """The anchors, by path, if this worker has all of them and they are of the last task."""
        whole = self.regularizer.anchor == "latest" and not self.workers.sharded
        return self.regularizer.anchors if whole else {}

    def training_step(self, model: Learner) -> TrainingStep:
        """The training step for `DWDModel.train_step`."""
        pulled = self.pulled_variables(model)
        return TrainingStep(
            self.regularizer,
            self.fisher if self.fisher.online and pulled else None,
            self._statistics,
            pulled,
            self.grouping.budget if self.grouping is not None else None,
            self.head_gate,
            self.workers,
            self.distillation,
            self._whole_anchors(),
        )

    def penalty(self, model: Learner) -> tf.Tensor:
        """The penalty ½ (θ − c)ᵀ Λ (θ − c), a float32 scalar, summed over all workers."""
        return self.workers.total(self.regularizer.value(by_path(model)))

    def local_shard(self, model: Learner, of_blocks: Mapping[str, Any]) -> dict[str, Any]:
        """The entries, by `NAME/PATH`, that belong to blocks which this worker keeps."""
        variables = self.pulled_variables(model)
        self.workers.divide(block_sizes(self.fisher.shapes(model, variables), variables))
        return {
            key: entry
            for key, entry in of_blocks.items()
            if self.workers.keeps(key.partition("/")[2])
        }

    # The boundary.

    def add_task(self, model: Learner, data: Any, batch_size: int, verbose: int = 0) -> None:
        """Consolidate the current task, see `DWDModel.consolidate`."""
        started = time.perf_counter()
        digest = digest_of(weights_by_path(model))
        if self._is_last(digest):
            raise ValueError(
                "The weights are those of the last boundary: train the model on the next task "
                "before consolidating again."
            )
        if self.task_graph is not None:
            self.task_graph.check(model, self.tasks_learned, self.weights_digest)
        variables = self.pulled_variables(model)
        check_weights(variables)
        statistics: Arrays = {}
        if variables:
            statistics = self._estimated(model, variables, data, batch_size, verbose)
        # The matrices are small: several threads would wait for each other, on a busy machine ten
        # times as long, and the results would depend on their number.
        with threadpool_limits(1):
            blocks: dict[str, Block] = {}
            result = GroupingResult({}, [], {})
            if variables:
                blocks = self.fisher.blocks(model, variables, statistics)
                result = self._grouped(model, blocks)
            parameter_histograms = histograms(blocks, result.assignments)
            adjusted: dict[str, int] = {}
            if self.grouping is not None and self.grouping.budget is not None:
                adjusted = {key: g["group"] for g in result.groups for key in g["layers"]}
            commits = [self.regularizer.prepare_task(by_path(model), result.blocks, adjusted)]
        if self.distillation is not None:
            commits.append(
                self.distillation.prepare_task(
                    model, self._whole_anchors(), self.head_gate.in_use, self.workers.communicator
                )
            )
        if self.task_graph is not None:
            self.task_graph.add(model, digest)

        layout = self._layout()
        for commit in commits:
            commit()
        if adjusted:
            for group in result.groups:
                group["strength"] = float(self.regularizer.budget_strengths.values[group["group"]])
        self.fisher.reset()
        self.head_gate.reset()
        if self.grouping is not None:
            self.grouping.commit()
        self.tasks_learned += 1
        self.groups, self.assignments = result.groups, result.assignments
        self.weights_digest = digest
        self.regularizer.record_left_out(trainable_by_path(model), self.tasks_learned)
        try:
            self.update_task_graph(model)
        finally:
            examples = None if data is None or not variables else self._pass.examples
            seconds = time.perf_counter() - started
            self.last_boundary = LastBoundary(examples, seconds, parameter_histograms)
            if self._layout() != layout:
                self._retrace(model)

    def has_nothing_new(self, model: Learner) -> bool:
        """Whether the weights are those of the last boundary."""
        return self._is_last(digest_of(weights_by_path(model)))

    def _is_last(self, digest: bytes) -> bool:
        return self.tasks_learned > 0 and digest == self.weights_digest

    def _layout(self) -> Any:
        """What tracing builds into the training step: if it changes, the step is traced again."""
        distillation = None if self.distillation is None else self.distillation.layout()
        return self.regularizer.layout(), distillation

    def update_task_graph(self, model: Learner) -> None:
        """Compute the edge weights to the current task, and the anchor that follows from them."""
        regularizer, variables = self.regularizer, by_path(model)
        in_use = regularizer.strength > 0 or any(
            regularizer.regularizer_of(variables[path]) is regularizer
            for path in regularizer.folded
        )
        if self.task_graph is not None and in_use:
            weights = self.task_graph.weights_to(model)
            regularizer.pull_to_tasks(*self.task_graph.anchor(weights, variables))

    def _estimated(
        self, model: Learner, variables: Variables, data: Any, batch_size: int, verbose: int
    ) -> Arrays:
        """The statistics of the current task, which its Fisher information is made of."""
        if data is None:
            built_for = self._held_paths(model) if self._built_for is None else self._built_for
            if self.fisher.online and self._held_paths(model) - built_for:
                raise ValueError(
                    "There is no online Fisher estimate of variables whose `strength` was raised "
                    "from 0 since the last call of `fit`. Call `fit` first, or pass a sample of "
                    "the data: `consolidate(x, y)`."
                )
            local_variables = {path: v for path, v in variables.items() if self.workers.keeps(path)}
            summed = self.fisher.estimator == "adam" and sums_examples(model)
            dwd_optimizer = optimizer.find(model.optimizer)
            statistics = self.fisher.estimate(dwd_optimizer, local_variables, summed)
        else:
            statistics = self.pass_statistics(model, data, batch_size, verbose)
        blocks = [a for name, a in statistics.items() if not name.startswith("margin/")]
        local_sum = np.asarray(sum(np.abs(a).sum(dtype="float64") for a in blocks))
        coupled, wrong = (
            np.asarray(data is None and known)
            for known in (self.fisher.compares_examples, self.fisher.contradicts)
        )
        total = self.workers.communicator.total([local_sum, coupled, wrong], "information.total")
        if total[1]:  # on any worker
            self.fisher.refuse_coupling()
        if total[2]:
            self.fisher.refuse_rules()
        self.fisher.check(statistics, float(total[0]), model)
        return statistics

    def pass_statistics(
        self, model: Learner, data: Any, batch_size: int, verbose: int = 0
    ) -> Arrays:
        """The mean statistics over `data`, for the blocks that this worker keeps."""
        variables, communicator = self.pulled_variables(model), self.workers.communicator
        verbose = verbose if self.workers.leads else 0
        statistics = self._pass(
            model, self.fisher, variables, data, batch_size, communicator, verbose
        )
        return self.local_shard(model, statistics)

    def _grouped(self, model: Learner, blocks: dict[str, Block]) -> GroupingResult:
        """The Fisher information multiplied by the strengths of its groups, and these groups."""
        if self.grouping is None:
            return GroupingResult(blocks, [], {})
        return self.grouping.apply(self.boundary_context(model, blocks))

    def boundary_context(self, model: Learner, blocks: Mapping[str, Block]) -> BoundaryContext:
        """What a grouping is told at the end of a task with this Fisher information."""
        return BoundaryContext(
            blocks,
            {path: np.asarray(v) for path, v in by_path(model).items()},
            {path: np.asarray(v) for path, v in self.regularizer.anchors.items()},
            kinds_of(model),
            self.groups,
            self.workers.exchange,
        )

    @property
    def bytes(self) -> int:
        """The size of the state on this worker, in memory."""
        slots = [*self.regularizer.slots().values(), *self.fisher.slots.values()]
        if self.distillation is not None:
            slots += [*self.distillation.teacher.values()]
        return sum(int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in slots)

    # Files.

    @property
    def has_learned(self) -> bool:
        """Whether there is anything to save: a task learned, or records of one in training."""
        distils = self.distillation is not None and self.distillation.has_state
        estimated = self.fisher.slots or float(self.fisher.weight)
        return bool(self.tasks_learned or estimated or distils)

    def state(self, model: Learner) -> Arrays:
        """The state that this worker keeps, by `NAME/PATH` or `NAME`; empty if there is none."""
        unsaved = _unsaved_variables(model)
        if not (self.has_learned or unsaved):
            return {}
        grouping = {} if self.grouping is None else self.grouping.state()
        # Each worker has the whole teacher, even of a sharded state: one of them saves it.
        distils = self.distillation is not None and (self.workers.leads or not self.workers.sharded)
        return {
            **(self.distillation.state() if self.distillation and distils else {}),
            **self.regularizer.state(),
            **self.fisher.state(),
            **self.head_gate.state(),
            **{f"value/{path}": np.asarray(v) for path, v in unsaved.items()},
            **{f"{_GROUPING}{name}": array for name, array in grouping.items()},
            **{f"group/{path}": array for path, array in self.assignments.items()},
            "format": np.asarray(FORMAT, "int64"),
            "tasks_learned": np.asarray(self.tasks_learned, "int64"),
            "weights_digest": np.frombuffer(self.weights_digest, "uint8"),
            "groups": json_array(self.groups),
        }

    def load_state(self, model: Learner, state: Arrays) -> None:
        """Load a state as returned by `state` for a model with the same variables.

        Raises:
            FileError: If the state does not fit the model. Nothing is changed then.
        """
        check_numbers(state)
        variables = by_path(model)
        scalars = _check_names(state, variables)
        parts = _by_owner(state)
        places = places_of(model)
        shapes = self.fisher.shapes(model, variables)
        groups = groups_of(scalars["groups"])
        grouping = _with_prefix(_GROUPING, scalars)
        commits: list[Commit] = [
            self.regularizer.prepare_state(
                parts["regularizer"],
                variables,
                places,
                self.fisher.rank,
                self.fisher.correction,
                self.workers.keeps,
            ),
            self.fisher.prepare_state(
                parts["fisher"],
                shapes,
                lambda statistics: self.local_shard(model, statistics),
            ),
            self.head_gate.prepare_state(parts["head_gate"], variables),
            self._prepare_own(model, parts["own"], places, groups),
        ]
        if self.grouping is not None:
            commits.append(self.grouping.prepare_state(grouping))
        if self.distillation is not None:
            anchors = _with_prefix("anchor/", parts["regularizer"])
            commits.append(
                self.distillation.prepare_state(
                    model,
                    parts["distillation"],
                    _with_prefix(DISTILLATION, scalars),
                    anchors if self._whole_anchors() is not self.regularizer.anchors else {},
                )
            )
        self.local_shard(model, {})  # gives blocks an owner, before parts ask which ones to keep
        for commit in commits:
            commit()
        self.tasks_learned = int(scalars["tasks_learned"])
        self.last_boundary = LastBoundary()
        self.weights_digest = scalars["weights_digest"].tobytes()
        self.regularizer.record_left_out(trainable_by_path(model), self.tasks_learned, loaded=True)
        self._retrace(model)

    def _prepare_own(
        self, model: Learner, arrays: Arrays, places: Mapping[str, Place], groups: Summary
    ) -> Commit:
        """Check the assignments to groups, and the values of variables that Keras does not save."""
        variables = by_path(model)
        group_ids = {group["group"] for group in groups}
        values: Arrays = {}
        assignments: Arrays = {}
        for key, array in arrays.items():
            name, _, path = key.partition("/")
            shape: tuple[int, ...] = places[path].shapes[0]
            if name == "value":
                values[path] = array
                if array.shape != shape:
                    refuse(name, path, array)
                continue
            assignments[path] = array
            form = places[path].form
            try:
                assignment = assignment_of(array)
            except ValueError:
                refuse(name, path, array)
            if form is not None and len(assignment.shape) == 2:  # by eigenvectors of the matrix
                shape = (form.rows, form.shape[1])
            if not (assignment.within(group_ids) and _broadcasts(assignment.shape, shape)):
                refuse(name, path, array)

        def commit() -> None:
            for path, value in values.items():
                variables[path].assign(value)
            self.groups = groups
            self.assignments = {p: a for p, a in assignments.items() if self.workers.keeps(p)}

        return commit

    def save(self, model: Learner) -> Arrays:
        """The whole state in the format of files; all workers must call it together."""
        return to_file(self.workers.whole_state(self.state(model)), by_path(model))

    def load(self, model: Learner, saved: Arrays) -> None:
        """Load what `save` returned, see `load_state`."""
        self.load_state(model, from_file(saved, list(by_path(model))))

    def divide(self, model: Learner, workers: Workers) -> None:
        """Divide the state among other workers."""
        state = self.save(model) if self.workers.sharded != workers.sharded else {}
        self.workers = workers
        if state:
            self.load(model, state)

    def _retrace(self, model: Learner) -> None:
        """Trace the training step again, because the traced step does not include new slots.

        A callback may call this during `fit`: the next step then uses the new function.
        """
        self._version.assign_add(1)
        if model.train_function is not None:
            model.make_train_function(force=True)

    # Growing models.

    def inherit(
        self,
        model: Learner,
        previous: Learner,
        learned: "Consolidation",
        renamed: Mapping[str, str],
        dropped: Sequence[str],
    ) -> None:
        """Take over the weights and state of a smaller model, see `DWDModel.inherit`.

        Args:
            model: The model of this state.
            previous: The smaller model.
            learned: The state of `previous`.
            renamed: New paths by old paths.
            dropped: Patterns of old paths to drop.
        """
        for name, consolidation in (("previous", learned), ("this model", self)):
            if consolidation.task_graph is not None:
                raise ValueError(
                    f"`{name}` has a task graph, whose files are of one architecture: a model that "
                    "grows has to do without. Nothing was changed."
                )
        old, new = weights_by_path(previous), weights_by_path(model)
        names = growing.names_of(old, new, renamed, dropped)
        values = growing.values_of(old, new, names)
        state = learned.workers.whole_state(learned.state(previous))
        if state:
            grouping_arrays = {} if self.grouping is None else self.grouping.state()
            grown = growing.grown_state(
                state,
                names,
                values,
                places_of(previous),
                places_of(model),
                {f"{_GROUPING}{name}" for name in grouping_arrays},
            )
            self.load_state(model, grown_flags(grown, previous, model, names))
        at_boundary = bool(state) and learned.weights_digest == digest_of(old)
        for path, value in values.items():
            new[path].assign(value)
        if at_boundary:
            self.weights_digest = digest_of(new)


def _unsaved_variables(model: Learner) -> Variables:
    """Variables that Keras does not save as they are, by path.

    Keras does not save the states of random generators, and saves LoRA merged with the kernel.
    """
    lora = [layer for layer in layers_within(model) if getattr(layer, "lora_enabled", False)]
    saved = {id(v) for v in model.weights} - {id(v) for layer in lora for v in layer.variables}
    return {path: v for path, v in by_path(model).items() if id(v) not in saved}


def _with_prefix(prefix: str, arrays: Arrays) -> Arrays:
    """The arrays whose names begin so, by the rest of their names."""
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _check_names(state: Arrays, variables: Variables) -> Arrays:
    """Check all names in a state; returns the arrays that belong to no variable, by name."""
    scalars = {name: array for name, array in state.items() if "/" not in name}
    version = scalars.get("format", np.ones(()))
    if version.shape != () or version > FORMAT:
        raise FileError(
            f"The consolidation state was saved by a newer version of keras_dwd, in format "
            f"{version}: this one reads formats up to {FORMAT}. Install that version. {UNCHANGED}"
        )
    names = {name for name in scalars if not name.startswith((_GROUPING, DISTILLATION))}
    invalid = {
        name
        for name in names - _BYTES
        if scalars[name].shape or not 0 <= float(scalars[name]) < 2.0**63
    }
    if names | {"format"} != _SCALARS | _BYTES or invalid:
        raise FileError(
            f"The file holds an incomplete or unknown consolidation state: {sorted(names)}. "
            f"{UNCHANGED}"
        )
    missing = {name.partition("/")[2] for name in state if "/" in name} - set(variables)
    if missing:
        raise FileError(
            f"The saved state is about {', '.join(map(repr, sorted(missing)))}, which the model "
            "has not. Load it into a model with the same layers, of the same names; another one "
            f"can then `inherit` from that. {UNCHANGED}"
        )
    return scalars


def _by_owner(state: Arrays) -> dict[str, Arrays]:
    """The arrays in a state by the part that they belong to."""
    names = {
        "regularizer": REGULARIZER_ARRAYS,
        "fisher": STATISTICS,
        "head_gate": {"in_use"},
        "distillation": DISTILLATION_ARRAYS,
        "own": _OWN,
    }
    scalars = {"regularizer": REGULARIZER_SCALARS, "fisher": FISHER_SCALARS}
    parts: dict[str, Arrays] = {owner: {} for owner in names}
    for key, array in state.items():
        name, _, path = key.partition("/")
        owners = names if path else scalars
        owner = next((owner for owner, known in owners.items() if name in known), None)
        if owner is not None:
            parts[owner][key] = array
        elif path:
            refuse(name, path, array)
    return parts


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an assignment of this shape fits `to`: it may have fewer axes or directions."""
    return len(shape) <= len(to) and all(
        0 < a <= b for a, b in zip(shape, to[len(to) - len(shape) :], strict=True)
    )
