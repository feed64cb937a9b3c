"""Published methods to compare with, each a `Technique`."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import integer, number
from keras_dwd.curvature.examples import count_of, part_of
from keras_dwd.evaluation.replay import Reservoir, packed_as
from keras_dwd.evaluation.technique import Named, Technique
from keras_dwd.files import FileError
from keras_dwd.learner import Learner, data_loss
from keras_dwd.model import DWDModel
from keras_dwd.state import Commit
from keras_dwd.training.data import batches
from keras_dwd.variables import Arrays, Variables, trainable_by_path, untracked

_BATCH = 256  # of passes over data at a boundary


class L2(Technique):
    """L2: all parameters that the task has trained are equally important.

    Reference:
        [Kirkpatrick et al., 2017](https://arxiv.org/abs/1612.00796), figure 2.
    """

    name = "l2"

    def importance(self, model: DWDModel, data: Any) -> list[np.ndarray]:
        found = {path: np.ones(v.shape) for path, v in trainable_by_path(model).items()}
        for path, flags in model._consolidation.head_gate.in_use.items():  # heads of other tasks
            found[path] *= np.reshape(np.asarray(flags), (-1, *[1] * (found[path].ndim - 1)))
        return list(found.values())


class MemoryAwareSynapses(Technique):
    """MAS: how much the squared norm of the outputs depends on each parameter.

    The importance is the mean of `|∂‖f(x)‖² / ∂θ|` over single examples, in inference mode. Labels
    are not used.

    Reference:
        [Aljundi et al., 2018](https://arxiv.org/abs/1711.09601), section 4.1.
    """

    name = "mas"

    def __init__(self) -> None:
        super().__init__()
        self._traced: Any = None

    def importance(self, model: DWDModel, data: Any) -> list[np.ndarray]:
        variables = model.trainable_variables
        if self._traced is None:
            self._traced = tf.function(reduce_retracing=True, autograph=False)(
                lambda x: _sensitivity(model, variables, x)
            )
        sums, count = [np.zeros(v.shape) for v in variables], 0
        for x, _, _ in batches(data, _BATCH):
            sums = [s + np.asarray(a) for s, a in zip(sums, self._traced(x), strict=True)]
            count += int(count_of(x))
        return [s / count for s in sums]


def _sensitivity(model: Learner, variables: list[Any], x: Any) -> list[tf.Tensor]:
    """Σ |∂‖f(x)‖² / ∂θ| over the examples of a batch, for each variable. Graph code."""

    def add(sums: list[tf.Tensor], index: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(model(part_of(x, index, 1), training=False))
            norm = tf.add_n([tf.reduce_sum(tf.cast(o, "float32") ** 2) for o in outputs])
        gradients = tape.gradient(norm, [v.value for v in variables], unconnected_gradients="zero")
        return [
            s + tf.abs(tf.cast(tf.convert_to_tensor(g), "float32"))
            for s, g in zip(sums, gradients, strict=True)
        ]

    return tf.foldl(add, tf.range(count_of(x)), [tf.zeros(v.shape) for v in variables])


class SynapticIntelligence(Technique):
    """SI: how much each parameter has contributed to lowering the loss while a task was learned.

    Each step adds `−g Δθ` to ω, with the gradient g of the loss and the move Δθ of the parameter.
    The importance is `max(ω, 0) / (d² + ξ)`, with the distance d of the whole task.

    Args:
        damping: ξ > 0, which bounds the importance of parameters that hardly moved.

    Reference:
        [Zenke et al., 2017](https://arxiv.org/abs/1703.04200), equations 3 to 5.
    """

    name = "si"

    def __init__(self, damping: float = 0.1):
        super().__init__()
        self.damping = number("damping", damping, 1e-12)
        # Of each trainable variable, in their order: layers may have other names when resumed.
        self._work: list[keras.Variable] = []
        self._start: list[keras.Variable] = []

    def begin_task(self, model: DWDModel) -> None:
        variables = model.trainable_variables
        if not self._work:
            self._work = [untracked(np.zeros(v.shape), "work") for v in variables]
            self._start = [untracked(np.zeros(v.shape), "start") for v in variables]
        for work, start, variable in zip(self._work, self._start, variables, strict=True):
            work.assign(np.zeros(work.shape))
            start.assign(variable)

    def moved(self, model: Learner, gradients: Named, moves: Named) -> None:
        for path, work in zip(trainable_by_path(model), self._work, strict=True):
            if path in gradients:
                work.assign_sub(tf.cast(gradients[path] * moves[path], "float32"))

    def importance(self, model: DWDModel, data: Any) -> list[np.ndarray]:
        found = []
        variables = model.trainable_variables
        for variable, work, start in zip(variables, self._work, self._start, strict=True):
            distance = np.asarray(variable, "float64") - np.asarray(start)
            lowered = np.maximum(np.asarray(work, "float64"), 0)
            found.append(lowered / (distance**2 + self.damping))
        return found

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "damping": self.damping}

    def state(self) -> Arrays:
        both = {"work": self._work, "start": self._start}
        return {f"{name}/{i}": np.array(v) for name, s in both.items() for i, v in enumerate(s)}

    def prepare_state(self, state: Arrays) -> Commit:
        numbers = range(len(state) // 2)
        if state.keys() != {f"{name}/{i}" for name in ("work", "start") for i in numbers}:
            raise FileError(f"The checkpoint is not one of {self.name!r}: it has {sorted(state)}.")

        def commit() -> None:
            self._work = [untracked(state[f"work/{i}"], "work") for i in numbers]
            self._start = [untracked(state[f"start/{i}"], "start") for i in numbers]

        return commit


class Replay(Technique):
    """The base of methods that keep a uniform sample of the examples of earlier tasks.

    The sample is renewed at each boundary; the current task is not in it.

    Args:
        size: The number of examples to keep, of all tasks together.

    Attributes:
        weighted: Whether examples may have sample weights, which are kept with them.
    """

    weighted = False

    def __init__(self, size: int = 200):
        super().__init__()
        self.memory = Reservoir(integer("size", size, 1))

    def end_task(self, model: DWDModel, data: Any, rng: np.random.Generator) -> None:
        empty = not self.memory.slots
        for x, y, weight in batches(data, _BATCH):
            kept = (x, y) if weight is None else (x, y, weight)
            if weight is not None and not self.weighted:
                raise ValueError(f"{self.name!r} does not work with sample weights.")
            self.memory.add([*tf.nest.flatten(kept), *self.noted(model, x)], rng)
        if empty and model.train_function is not None:  # steps draw from the memory from now on
            model.make_train_function(force=True)

    def noted(self, model: DWDModel, x: Any) -> list[Any]:
        """What to keep with examples besides inputs and labels."""
        return []

    def replayed(
        self, model: Learner, data: Any, count: tf.Tensor, draw: int = 0
    ) -> tuple[Any, Any, list[tf.Tensor]]:
        """Examples drawn from the memory, augmented as the training data are. Graph code.

        Args:
            model: The model that is trained.
            data: The current batch, as a pattern for the structure of examples.
            count: The number of examples.
            draw: Number of the draw, if there are several in a step.

        Returns:
            Inputs, labels, and what was noted with them.
        """
        pattern = tuple(data[:2])
        seed = self.seed(model, draw)
        drawn = self.memory.draw(count, seed)
        x, y = packed_as(drawn, pattern)
        if self.augment is not None:
            x = self.augment(x, seed)
        return x, y, drawn[len(tf.nest.flatten(pattern)) :]

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "size": self.memory.size}

    def state(self) -> Arrays:
        return self.memory.state()

    def prepare_state(self, state: Arrays) -> Commit:
        return self.memory.prepare_state(state)


class ExperienceReplay(Replay):
    """ER: each step trains on the batch and on as many examples of earlier tasks.

    Args:
        size: The number of examples to keep, of all tasks together.

    Reference:
        [Chaudhry et al., 2019](https://arxiv.org/abs/1902.10486), algorithm 1.
    """

    name = "er"
    weighted = True

    def batch(self, model: Learner, data: Any) -> Any:
        if not self.memory.slots:
            return data
        x, y, kept = self.replayed(model, data, count_of(data[0]))
        both = tf.nest.map_structure(lambda a, b: tf.concat([a, b], 0), tuple(data[:2]), (x, y))
        if len(data) < 3 or data[2] is None:
            return both
        # Examples of a task without weights count as much as those of weight 1.
        replayed = (
            packed_as(kept, data[2]) if kept else tf.nest.map_structure(tf.ones_like, data[2])
        )
        return (*both, tf.nest.map_structure(lambda a, b: tf.concat([a, b], 0), data[2], replayed))


class DarkExperienceReplay(Replay):
    """DER++: earlier examples keep their outputs, and their labels are trained again.

    The loss of each step has two more terms, each of as many earlier examples as the batch has:
    `α ‖z − f(x)‖²`, with the outputs z at the end of their task, and β times their own loss.

    Args:
        alpha: α ≥ 0.
        beta: β ≥ 0.
        size: The number of examples to keep, of all tasks together.

    Reference:
        [Buzzega et al., 2020](https://arxiv.org/abs/2004.07211), equation 6.
    """

    name = "der++"

    def __init__(self, alpha: float = 0.1, beta: float = 0.5, size: int = 200):
        super().__init__(size)
        self.alpha, self.beta = number("alpha", alpha, 0), number("beta", beta, 0)

    def noted(self, model: DWDModel, x: Any) -> list[Any]:
        return tf.nest.flatten(model(x, training=False))

    def gradients(self, model: Learner, data: Any, gradients: Named) -> Named:
        if not self.memory.slots:
            return gradients
        count = count_of(data[0])
        variables = trainable_by_path(model)
        with tf.GradientTape() as tape:
            x, _, noted = self.replayed(model, data, count)
            outputs = tf.nest.flatten(model(x, training=True))
            distances = [
                tf.reduce_sum(tf.cast(z - f, "float32") ** 2) / tf.cast(count, "float32")
                for z, f in zip(noted, outputs, strict=True)
            ]
            x, y, _ = self.replayed(model, data, count, draw=1)
            again = data_loss(model, x, y, model(x, training=True))
            loss = self.alpha * tf.add_n(distances) + self.beta * again
        added = _gradients_of(tape, loss, variables)
        return {path: added[path] + gradients.get(path, 0.0) for path in variables}

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"alpha": self.alpha, "beta": self.beta}


class AveragedGEM(Replay):
    """A-GEM: a step never raises the loss of a sample of earlier examples, to first order.

    Where the gradient g and that of the sample, r, point in opposite directions, the part of g
    along r is removed: `g − (g·r / r·r) r`.

    Args:
        size: The number of examples to keep, of all tasks together.
        sample: The number of examples of which r is computed in each step.

    Reference:
        [Chaudhry et al., 2019](https://arxiv.org/abs/1812.00420), equation 11.
    """

    name = "a-gem"

    def __init__(self, size: int = 200, sample: int = 64):
        super().__init__(size)
        self.sample = integer("sample", sample, 1)

    def gradients(self, model: Learner, data: Any, gradients: Named) -> Named:
        if not self.memory.slots:
            return gradients
        variables = trainable_by_path(model)
        x, y, _ = self.replayed(model, data, tf.constant(self.sample))
        with tf.GradientTape() as tape:
            loss = data_loss(model, x, y, model(x, training=True))
        return projected(gradients, _gradients_of(tape, loss, variables))

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"sample": self.sample}


def projected(gradients: Named, reference: Named) -> Named:
    """Gradients without the part that opposes a reference, see `AveragedGEM`. Graph code."""
    product = tf.add_n([tf.reduce_sum(g * reference[path]) for path, g in gradients.items()])
    squares = tf.add_n([tf.reduce_sum(r**2) for r in reference.values()])
    share = tf.math.divide_no_nan(tf.minimum(product, 0.0), squares)
    return {path: gradients.get(path, 0.0) - share * r for path, r in reference.items()}


def _gradients_of(tape: tf.GradientTape, loss: tf.Tensor, variables: Variables) -> Named:
    found = tape.gradient(loss, [v.value for v in variables.values()], unconnected_gradients="zero")
    return {path: tf.convert_to_tensor(g) for path, g in zip(variables, found, strict=True)}
