"""Distillation from the model as it was at the last task boundary (Learning without Forgetting)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import FixedSettings, number
from keras_dwd.communicator import Communicator
from keras_dwd.curvature.divergence import Divergence
from keras_dwd.curvature.examples import carries_state, masks_of
from keras_dwd.curvature.likelihood import (
    by_output,
    counted_positions,
    loss_weights_of,
    losses_of,
    output_names,
)
from keras_dwd.files import FileError
from keras_dwd.keras_private import layers_within
from keras_dwd.layers.task_heads import HeadsCall, TaskHeads, recorded_heads
from keras_dwd.learner import Learner
from keras_dwd.state import UNCHANGED, Commit, refuse
from keras_dwd.variables import Arrays, Variables, by_path, insert, untracked, weights_by_path

NAMES = {"teacher", "old_heads"}
"""The names of the arrays of the state that are about a variable."""
PREFIX = "distillation."
"""How the names of its other arrays begin: `boundaries`, `old.OUTPUT` and `seen.OUTPUT`."""


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher makes of a batch.

    Attributes:
        outputs: Its outputs, in a flat list.
        calls: The calls of its `TaskHeads`.
        heads: Its kernel and bias of each `TaskHeads`, by the path of the kernel.
    """

    outputs: list[tf.Tensor]
    calls: list[HeadsCall]
    heads: dict[str, tuple[tf.Tensor, tf.Tensor]]


@keras.saving.register_keras_serializable("keras_dwd")
class Distillation(FixedSettings):
    """Keeps the outputs for earlier tasks close to those of the model at the last task boundary.

    The model as it was at the boundary is a teacher. In each later training step it is run, in
    inference mode, on the same inputs as the model, and the divergence of the model's outputs from
    those of the teacher is added to what is differentiated. No data of earlier tasks are needed.
    This works well where inputs of the new task resemble earlier ones, and together with the
    penalty. With `TaskHeads` the `strength` of the penalty should then be lower, and is by default;
    where tasks share outputs it should not. With `strength=0` this is Learning without Forgetting.

    The loss of an output decides what is compared, T being the temperature:

    - Categorical cross-entropies: T² KL(softmax(t / T) ‖ softmax(s / T)) of the logits t of the
      teacher and s of the model, over the classes of earlier tasks: those that were among the
      labels before the last boundary.
    - Binary cross-entropies: T² times the KL divergence of the tempered probabilities. Of several
      outputs those are compared that had a positive label before the last boundary.
    - The mean squared error and other losses of values: the loss itself, with the output of the
      teacher as label.

    With `TaskHeads` the outputs of all heads of earlier tasks are compared for each example and
    summed. These heads get no gradient from it. `TaskHeads` must be the last layer.

    Masks, sample weights, `loss_weights` and the reduction are those of the loss. The divergence is
    part of the training step, not of the loss: neither the reported `loss`, `model.losses` nor
    `evaluate` has it, and the Fisher information does not see it. In a training loop of your own
    only `train_step` and `train_on_batch` have it.

    The teacher needs no memory for variables whose anchor is stored for the penalty. Of others,
    such as the statistics of BatchNormalization, and with `anchor="folded"` or `sharded=True` of
    all, it is a copy, whose size does not depend on the number of tasks. Each worker has one.

    If no training step came before the first boundary, because the model was trained before, all
    classes and all heads count as those of earlier tasks.

    Args:
        weight: The weight ≥ 0 of the divergence against the loss.
        temperature: T > 0. Higher temperatures give unlikely classes more weight.

    Example:

    ```python
    model = DWDModel.from_model(network, distillation=Distillation())
    ```

    Reference:
        [Li & Hoiem, 2016](https://arxiv.org/abs/1606.09282);
        [Hinton et al., 2015](https://arxiv.org/abs/1503.02531), on the temperature.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 2.0):
        self.weight = number("weight", weight, 0)
        self.temperature = number("temperature", temperature, 0)
        if not self.temperature:
            raise ValueError(f"`temperature` must be a number > 0. Received: {temperature!r}")
        self.boundaries = 0  # task boundaries so far; from the first on there is a teacher
        # The teacher's variables that do not have the value of an anchor, by path.
        self.teacher: Variables = {}
        # Which heads have learned a task, by the path of the kernel of the `TaskHeads`.
        self.old_heads: Variables = {}
        # By index of the output: which classes had labels before and since the last boundary.
        self.old: dict[int, keras.Variable] = {}
        self.seen: dict[int, keras.Variable] = {}

    # Before training.

    def check(self, model: Learner) -> None:
        """Raise `ValueError` if the outputs of a compiled model cannot be compared."""
        stateful = [layer.name for layer in layers_within(model) if carries_state(layer)]
        if stateful:
            raise ValueError(
                "`distillation` does not work with layers that carry a state from one batch to the "
                f"next, which the teacher does not have: {', '.join(stateful)}."
            )
        self._divergences(model)

    def _divergences(self, model: Learner) -> dict[int, Divergence]:
        """The divergence of each output with a loss, by the index of the output."""
        divergences: dict[int, Divergence] = {}
        for index, (name, loss) in enumerate(
            zip(output_names(model), losses_of(model), strict=True)
        ):
            if loss is None:
                continue
            try:
                divergences[index] = Divergence(loss, self.temperature)
            except ValueError as error:
                raise ValueError(f"`distillation`: the output {name!r} {error}") from None
        if not divergences:
            raise ValueError(
                "`distillation` needs a `loss` in `compile`, which tells how outputs are compared. "
                f"Received: {model.loss!r}"
            )
        return divergences

    def is_built(self, model: Learner) -> bool:
        """Whether there is a flag for each class, since the last change of losses."""
        return all(
            index in self.seen and tuple(self.seen[index].shape) == (size,)
            for index, size in self._sizes(model).items()
        )

    def _sizes(self, model: Learner) -> dict[int, int]:
        outputs = model.outputs
        return {i: each.size(outputs[i]) for i, each in self._divergences(model).items()}

    def build(self, model: Learner, anchors: Variables) -> None:
        """Create the slots that a training step needs.

        Args:
            model: A compiled model.
            anchors: The anchors at the last boundary, by path, as far as they are stored whole.

        Raises:
            ValueError: See `check`.
        """
        self.check(model)
        for index, size in self._sizes(model).items():
            for name, flags in (("seen", self.seen), ("old", self.old)):
                if index not in flags or tuple(flags[index].shape) != (size,):
                    known = index in flags and bool(np.asarray(flags[index]).any())
                    flags[index] = untracked(np.full(size, known), name, "bool")
        for path, heads in _heads_by_path(model).items():
            if path not in self.old_heads:
                self.old_heads[path] = untracked(np.zeros(heads.tasks), "old_heads", "bool")
        if self.boundaries:
            # Variables added since, such as those of LoRA, or replaced, such as quantized ones.
            for path, variable in weights_by_path(model).items():
                if not _alike(self.teacher.get(path, anchors.get(path)), variable):
                    self._copy(path, variable)

    def _copy(self, path: str, variable: keras.Variable) -> None:
        """Give a variable of the teacher the value of this one."""
        if _alike(self.teacher.get(path), variable):
            self.teacher[path].assign(variable.value)
            return
        value = tf.identity(variable.value)
        copy = keras.Variable(value, trainable=False, dtype=variable.dtype, name="teacher")
        insert(self.teacher, path, copy)

    # In a training step.

    def teach(self, model: Learner, x: Any, anchors: Variables) -> TeacherOutputs | None:
        """What the teacher makes of a batch, `None` before the first boundary. Graph code.

        Args:
            model: The model, none of whose variables changes.
            x: The inputs.
            anchors: See `build`.
        """
        if not (self.boundaries and self.weight):
            return None
        stored = anchors | self.teacher
        paths = {id(v): path for path, v in by_path(model).items()}

        def value(variable: keras.Variable) -> tf.Tensor:
            known = stored.get(paths.get(id(variable), ""))  # not of random generators
            return tf.cast((variable if known is None else known).value, variable.dtype)

        trainable, others = (
            [value(v) for v in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables)
        )
        with recorded_heads() as calls:
            outputs, _ = model.stateless_call(trainable, others, x, training=False)
        heads = {
            path: (value(layer.kernel), value(layer.bias))
            for path, layer in _heads_by_path(model).items()
        }
        return TeacherOutputs(tf.nest.flatten(outputs), calls, heads)

    def loss(
        self,
        model: Learner,
        taught: TeacherOutputs,
        y: Any,
        y_pred: Any,
        sample_weight: Any,
        calls: Sequence[HeadsCall],
    ) -> tf.Tensor:
        """The weighted divergence from the teacher, a float32 scalar. Graph code.

        Args:
            model: A compiled model.
            taught: What the teacher makes of the batch.
            y: The labels.
            y_pred: The outputs of the model.
            sample_weight: The sample weights, or `None`.
            calls: The calls of `TaskHeads` that have led to `y_pred`.
        """
        outputs, losses = tf.nest.flatten(y_pred), losses_of(model)
        labels, sample_weights = (by_output(structure, losses) for structure in (y, sample_weight))
        factors = loss_weights_of(model)
        heads, of_teacher = _by_output(calls, outputs), _by_output(taught.calls, taught.outputs)
        paths = {id(layer): path for path, layer in _heads_by_path(model).items()}
        terms = []
        for index, divergence in self._divergences(model).items():
            if index in heads:
                path = paths[id(heads[index].layer)]
                values = self._of_heads(
                    divergence, path, heads[index], of_teacher[index], taught.heads[path]
                )
            else:
                old = self.old[index].value
                values = divergence.values(taught.outputs[index], outputs[index], old)
            reduced = divergence.reduced(
                values, outputs[index], labels[index], sample_weights[index]
            )
            terms.append(factors[index] * reduced)
        return self.weight * tf.add_n(terms)

    def _of_heads(
        self,
        divergence: Divergence,
        path: str,
        student: HeadsCall,
        teacher: HeadsCall,
        taught: tuple[tf.Tensor, tf.Tensor],
    ) -> tf.Tensor:
        """The divergence of the outputs of all old heads, summed for each example."""
        layer = student.layer
        # Old heads stay as they are: it is their features that training has changed.
        own = [tf.stop_gradient(v.value) for v in (layer.kernel, layer.bias)]
        of_student, of_teacher = (
            layer.outputs_of_all(*(tf.cast(t, "float32") for t in (call.features, *values)))
            for call, values in ((student, own), (teacher, taught))
        )
        every = tf.ones((layer.units,), "bool")
        of_each = divergence.values(of_teacher, of_student, every, axis=-1)
        return tf.reduce_sum(tf.where(self.old_heads[path].value, of_each, 0.0), 1)

    def record_labels(
        self, model: Learner, y: Any, y_pred: Any, sample_weight: Any, calls: Sequence[HeadsCall]
    ) -> None:
        """Record which classes the labels of a batch have. Graph code.

        The arguments are those of `loss`.
        """
        outputs, labels = tf.nest.flatten(y_pred), by_output(y, losses_of(model))
        heads = _by_output(calls, outputs)  # the head gate records which of these are in use
        counted = counted_positions(model, y, y_pred, masks_of(y_pred), sample_weight)
        for index, divergence in self._divergences(model).items():
            if index not in heads:
                now = divergence.labelled(labels[index], outputs[index], counted[index])
                self.seen[index].assign(self.seen[index].value | now)

    # The boundary.

    def prepare_task(
        self,
        model: Learner,
        anchors: Variables,
        in_use: Mapping[str, keras.Variable],
        communicator: Communicator,
    ) -> Commit:
        """Prepare that the model as it is becomes the teacher.

        Args:
            model: A compiled model.
            anchors: The anchors, by path, as far as they are stored whole: those that the boundary
                gives when the result is applied.
            in_use: The heads that the task has used, see `HeadGate`.
            communicator: The workers, each of which has seen the labels of its own batches.

        Returns:
            A function that applies the change, after that of the anchors, and cannot fail.

        Raises:
            ValueError: See `check`. Nothing is changed then.
        """
        self.build(model, anchors)
        summed = communicator.total([np.asarray(v) for v in self.seen.values()], "seen")
        seen = {index: total > 0 for index, total in zip(self.seen, summed, strict=True)}
        used = {path: np.array(flags) for path, flags in in_use.items()}

        def commit() -> None:
            for index, now in seen.items():
                _add(self.old[index], now)
                self.seen[index].assign(np.zeros_like(now))
            for path, flags in self.old_heads.items():
                _add(flags, used.get(path, np.zeros(flags.shape, bool)))
            variables = weights_by_path(model)
            for path, variable in variables.items():
                if path in anchors and _equal(anchors[path], variable):
                    self.teacher.pop(path, None)
                else:
                    self._copy(path, variable)
            for path in set(self.teacher) - set(variables):
                del self.teacher[path]
            self.boundaries += 1

        return commit

    def layout(self) -> Any:
        """What tracing builds into the training step: if it changes, the step is traced again."""
        slots = {path: (tuple(v.shape), v.dtype) for path, v in self.teacher.items()}
        return self.boundaries > 0, slots

    # Files.

    @property
    def has_state(self) -> bool:
        """Whether there is anything to save: a teacher, or classes that have had labels."""
        return bool(self.boundaries or any(np.asarray(v).any() for v in self.seen.values()))

    def state(self) -> Arrays:
        """The state as arrays by `NAME/PATH` or `NAME`."""
        return {
            **{f"teacher/{path}": np.asarray(v) for path, v in self.teacher.items()},
            **{f"old_heads/{path}": np.asarray(v) for path, v in self.old_heads.items()},
            **{f"{PREFIX}old.{index}": np.asarray(v) for index, v in self.old.items()},
            **{f"{PREFIX}seen.{index}": np.asarray(v) for index, v in self.seen.items()},
            f"{PREFIX}boundaries": np.asarray(self.boundaries, "int64"),
        }

    def prepare_state(
        self, model: Learner, state: Arrays, scalars: Arrays, anchors: Arrays
    ) -> Commit:
        """Check a state, as returned by `state` for any model, without changing anything yet.

        Args:
            model: A model, which need not be compiled.
            state: The arrays by `NAME/PATH`, with names from `NAMES`.
            scalars: The other arrays by name, without the `PREFIX`; none if there was no teacher.
            anchors: The anchors that will not be stored whole, by path.

        Returns:
            A function that applies the state and cannot fail.

        Raises:
            FileError: If an array does not fit the model.
        """
        variables, heads = by_path(model), _heads_by_path(model)
        values: Arrays = {}
        old_heads: Arrays = {}
        for key, array in state.items():
            name, _, path = key.partition("/")
            if name == "teacher":
                shape, fitting = tuple(variables[path].shape), values
            else:
                shape, fitting = (heads[path].tasks,) if path in heads else (-1,), old_heads
            if array.shape != shape:
                refuse(name, path, array)
            fitting[path] = array
        boundaries = scalars.get("boundaries", np.zeros((), "int64"))
        if boundaries.shape != () or not 0 <= boundaries < 2**31:
            raise FileError(f"The saved '{PREFIX}boundaries' cannot be. {UNCHANGED}")
        flags: dict[str, dict[int, np.ndarray]] = {"old": {}, "seen": {}}
        for key, array in scalars.items():
            name, _, index = key.partition(".")
            if key == "boundaries":
                continue
            known = name in flags and index.isdigit() and int(index) < len(model.outputs)
            sizes = (1, *model.outputs[int(index)].shape[1:]) if known else ()
            if len(array.shape) != 1 or len(array) not in sizes:
                raise FileError(
                    f"The saved '{PREFIX}{key}', of shape {array.shape}, fits no output of the "
                    f"model. {UNCHANGED}"
                )
            flags[name][int(index)] = array.astype("bool")

        def commit() -> None:
            self.boundaries = int(boundaries)
            for slots in (self.teacher, self.old_heads, self.old, self.seen):
                slots.clear()
            for path, array in (anchors | values).items() if self.boundaries else ():
                kind = variables[path].dtype
                copy = keras.Variable(array, trainable=False, dtype=kind, name="teacher")
                insert(self.teacher, path, copy)
            for path, array in old_heads.items():
                self.old_heads[path] = untracked(array, "old_heads", "bool")
            for name, slots in (("old", self.old), ("seen", self.seen)):
                for index, array in flags[name].items():
                    slots[index] = untracked(array, name, "bool")

        return commit

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"weight": self.weight, "temperature": self.temperature}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Distillation":
        """The inverse of `get_config`."""
        return cls(**config)


def grown_flags(
    state: Arrays, previous: Learner, model: Learner, names: Mapping[str, str]
) -> Arrays:
    """A state with the classes of a smaller model as those of a grown one. New ones are not old.

    Args:
        state: A state, by `NAME/PATH` or `NAME`.
        previous: The smaller model.
        model: The grown model.
        names: The new path of each path of the smaller model that is not dropped.
    """
    grown = {k: a for k, a in state.items() if not k.startswith((f"{PREFIX}old", f"{PREFIX}seen"))}
    after = output_names(model)
    for index, name in enumerate(output_names(previous)):
        flags = state.get(f"{PREFIX}old.{index}")
        of_layer = [path for path in by_path(previous) if path.startswith(f"{name}/")]
        new_paths = [names[path] for path in of_layer if path in names]
        if flags is None or (of_layer and not new_paths):  # the layer was dropped
            continue
        name = new_paths[0].partition("/")[0] if new_paths else name
        other = after.index(name) if name in after else index
        key = f"{PREFIX}old.{other}"
        if other >= len(after) or key in grown:
            continue
        shapes = [tuple(outputs[i].shape) for outputs, i in _pairs(previous, index, model, other)]
        size = len(flags)
        if len(shapes[0]) == len(shapes[1]):
            axes = [a for a, n in enumerate(shapes[0]) if a and n == size]
            size = shapes[1][axes[-1]] or size if axes else size
        grown[key] = np.zeros(max(size, len(flags)), "bool")
        grown[key][: len(flags)] = flags
    return grown


def _pairs(one: Learner, index: int, other: Learner, place: int) -> list[tuple[Any, int]]:
    return [(one.outputs, index), (other.outputs, place)]


def _heads_by_path(model: Learner) -> dict[str, TaskHeads]:
    """The `TaskHeads` of a model by the path of their kernel."""
    layers = [layer for layer in layers_within(model) if isinstance(layer, TaskHeads)]
    kernels = {id(layer.kernel): layer for layer in layers}
    return {path: kernels[id(v)] for path, v in by_path(model).items() if id(v) in kernels}


def _by_output(calls: Sequence[HeadsCall], outputs: Sequence[tf.Tensor]) -> dict[int, HeadsCall]:
    """The call of a `TaskHeads` that has made an output, by the index of the output."""
    call_of_output = {
        index: call
        for index, output in enumerate(outputs)
        for call in calls
        if call.outputs is output
    }
    for call in calls:
        if not any(call is used for used in call_of_output.values()):
            raise ValueError(
                "With `distillation`, `TaskHeads` must be the last layer, as no output of the "
                f"model shows its other heads. Layers follow {call.layer.name!r}: give it their "
                "activation as `activation`, and their dtype as `dtype`."
            )
    return call_of_output


def _alike(stored: keras.Variable | None, variable: keras.Variable) -> bool:
    """Whether a stored value may be one of a variable: of its shape, and numbers of its kind."""
    if stored is None:
        return False
    floats = [keras.backend.is_float_dtype(v.dtype) for v in (stored, variable)]
    return tuple(stored.shape) == tuple(variable.shape) and floats[0] == floats[1]


def _equal(anchor: keras.Variable, variable: keras.Variable) -> bool:
    one, other = (np.asarray(v).astype("float64") for v in (anchor, variable))
    return np.array_equal(one, other)


def _add(flags: keras.Variable, now: np.ndarray) -> None:
    """Set the flags that `now` has; all if none has been set so far."""
    together = np.asarray(flags) | now
    flags.assign(together if together.any() else np.ones_like(together))
