"""Published methods to compare with, each a `Technique`."""

from collections.abc import Sequence
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
_TINY = float(np.finfo("float32").eps)


class L2(Technique):
    """L2: all parameters that the task has trained are equally important.

    Reference:
        [Kirkpatrick et al., 2017](https://arxiv.org/abs/1612.00796), figure 2.
    """

    name = "l2"

    def importance(self, model: DWDModel, data: Any) -> list[np.ndarray]:
        importances = {path: np.ones(v.shape) for path, v in trainable_by_path(model).items()}
        for path, flags in model._consolidation.head_gate.in_use.items():  # heads of other tasks
            importances[path] *= np.reshape(
                np.asarray(flags), (-1, *[1] * (importances[path].ndim - 1))
            )
        return list(importances.values())


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


class Tracking(Technique):
    """The base of methods that keep arrays with an entry for each parameter.

    Attributes:
        names: Names of these arrays.
        slots: Of each name one for each trainable variable, in their order: layers may have other
            names when a run is resumed.
    """

    names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.slots: dict[str, list[keras.Variable]] = {}

    def begin_task(self, model: DWDModel) -> None:
        if not self.slots:
            shapes = [v.shape for v in model.trainable_variables]
            self.slots = {n: [untracked(np.zeros(s), n) for s in shapes] for n in self.names}

    def begin(self, name: str, values: Sequence[Any] | None = None) -> None:
        """Set the arrays of a name to `values`, to zeros by default."""
        for i, variable in enumerate(self.slots[name]):
            variable.assign(np.zeros(variable.shape) if values is None else values[i])

    def of(self, path: str, model: Learner) -> list[keras.Variable]:
        """The arrays of a trainable variable, in the order of `names`."""
        at = list(trainable_by_path(model)).index(path)
        return [self.slots[name][at] for name in self.names]

    def state(self) -> Arrays:
        return {f"{n}/{i}": np.array(v) for n, vs in self.slots.items() for i, v in enumerate(vs)}

    def prepare_state(self, state: Arrays) -> Commit:
        numbers = range(len(state) // len(self.names))
        if state.keys() != {f"{name}/{i}" for name in self.names for i in numbers}:
            raise FileError(f"The checkpoint is not one of {self.name!r}: it has {sorted(state)}.")

        def commit() -> None:
            if state:
                self.slots = {
                    n: [untracked(state[f"{n}/{i}"], n) for i in numbers] for n in self.names
                }

        return commit


class SynapticIntelligence(Tracking):
    """SI: how much each parameter has contributed to lowering the loss while a task was learned.

    Each step adds `−g Δθ` to ω, with the gradient g of the loss and the move Δθ of the parameter.
    The importance is `max(ω, 0) / (d² + ξ)`, with the distance d of the whole task.

    Args:
        damping: ξ > 0, which bounds the importance of parameters that hardly moved.

    Reference:
        [Zenke et al., 2017](https://arxiv.org/abs/1703.04200), equations 3 to 5.
    """

    name = "si"
    names = ("work", "start")

    def __init__(self, damping: float = 0.1):
        super().__init__()
        self.damping = number("damping", damping, 1e-12)

    def begin_task(self, model: DWDModel) -> None:
        super().begin_task(model)
        self.begin("work")
        self.begin("start", model.trainable_variables)

    def moved(self, model: Learner, gradients: Named, moves: Named) -> None:
        for path, gradient in gradients.items():
            work, _ = self.of(path, model)
            work.assign_sub(tf.cast(gradient * moves[path], "float32"))

    def importance(self, model: DWDModel, data: Any) -> list[np.ndarray]:
        importances = []
        for path, variable in trainable_by_path(model).items():
            work, start = (np.asarray(v, "float64") for v in self.of(path, model))
            distance = np.asarray(variable, "float64") - start
            importances.append(np.maximum(work, 0) / (distance**2 + self.damping))
        return importances

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "damping": self.damping}


class RiemannianWalk(Tracking):
    """RWalk: the Fisher information, plus what each parameter has done for the loss on its way.

    The Fisher information is a moving average `F ← α g² + (1 − α) F` of squared gradients of
    batches. At every n-th step the score s grows by `Σ −g Δθ / (½ F d² + ε)`, with the sum over
    these n steps and their distance d. After a task s is averaged with that of the tasks before.
    The importance is `F / max F + max(s, 0) / max s`, with the largest values of all parameters.

    Args:
        alpha: α in [0, 1].
        interval: n, the number of steps.

    Reference:
        [Chaudhry et al., 2018](https://arxiv.org/abs/1801.10112), equations 6 to 8.
    """

    name = "rwalk"
    names = ("fisher", "work", "start", "score", "earlier")

    def __init__(self, alpha: float = 0.9, interval: int = 10):
        super().__init__()
        self.alpha = number("alpha", alpha, 0, 1)
        self.interval = integer("interval", interval, 1)

    def begin_task(self, model: DWDModel) -> None:
        super().begin_task(model)
        self.begin("work")
        self.begin("score")
        self.begin("start", model.trainable_variables)

    def moved(self, model: Learner, gradients: Named, moves: Named) -> None:
        step = tf.convert_to_tensor(model.optimizer.iterations)  # which has counted this one
        due = step % self.interval == 0
        variables = trainable_by_path(model)
        for path, gradient in gradients.items():
            fisher, work, start, score, _ = self.of(path, model)
            g, move = tf.cast(gradient, "float32"), tf.cast(moves[path], "float32")
            value = tf.cast(variables[path].value, "float32")
            fisher.assign(self.alpha * g**2 + (1 - self.alpha) * fisher.value)
            done = work.value - g * move
            gain = done / (0.5 * fisher.value * (value - start.value) ** 2 + _TINY)
            score.assign_add(tf.where(due, gain, tf.zeros_like(gain)))
            work.assign(tf.where(due, tf.zeros_like(done), done))
            start.assign(tf.where(due, value, start.value))

    def importance(self, model: DWDModel, data: Any) -> list[np.ndarray]:
        first = model.tasks_learned == 0
        fishers, scores = [], []
        for path in trainable_by_path(model):
            fisher, _, _, score, earlier = self.of(path, model)
            earlier.assign(score if first else 0.5 * (earlier.value + score.value))
            fishers.append(np.asarray(fisher, "float64"))
            scores.append(np.maximum(np.asarray(earlier, "float64"), 0))
        largest = [max(float(a.max()) for a in arrays) or 1.0 for arrays in (fishers, scores)]
        return [f / largest[0] + s / largest[1] for f, s in zip(fishers, scores, strict=True)]

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "alpha": self.alpha, "interval": self.interval}


class Freezing(Tracking):
    """Freezes after each task the parameters that are largest in absolute value, as PackNet does.

    Of each variable a share of the parameters that are not yet frozen is frozen for good. Later
    tasks train the rest. PackNet also sets that rest to zero, trains again, and knows at inference
    the task id and which parameters its task had: this does not, so that it takes any scenario, and
    later tasks can disturb earlier ones. Heads of single tasks are not frozen: only their own task
    trains them.

    Args:
        share: The share, in [0, 1].

    Reference:
        [Mallya & Lazebnik, 2018](https://arxiv.org/abs/1711.05769), section 3.
    """

    name = "freeze"
    names = ("frozen", "value")

    def __init__(self, share: float = 0.5):
        super().__init__()
        self.share = number("share", share, 0, 1)

    def moved(self, model: Learner, gradients: Named, moves: Named) -> None:
        variables = trainable_by_path(model)
        for path in gradients:
            frozen, value = self.of(path, model)
            variable = variables[path]
            before = tf.cast(value.value, variable.dtype)
            variable.assign(tf.where(frozen.value > 0, before, variable.value))

    def end_task(self, model: DWDModel, data: Any, rng: np.random.Generator) -> None:
        for path, variable in trainable_by_path(model).items():
            if getattr(variable, "per_task", False):
                continue
            frozen, value = self.of(path, model)
            now, flags = np.asarray(variable, "float32"), np.array(frozen)
            free = np.flatnonzero(flags == 0)
            largest = free[np.argsort(-np.abs(now.ravel()[free]), kind="stable")]
            flags.ravel()[largest[: round(self.share * len(free))]] = 1
            frozen.assign(flags)
            value.assign(now)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "share": self.share}


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
            example = (x, y) if weight is None else (x, y, weight)
            if weight is not None and not self.weighted:
                raise ValueError(f"{self.name!r} does not work with sample weights.")
            self.memory.add([*tf.nest.flatten(example), *self.extras(model, x)], rng)
        if empty and model.train_function is not None:  # steps draw from the memory from now on
            model.make_train_function(force=True)

    def extras(self, model: DWDModel, x: Any) -> list[Any]:
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
            Inputs, labels, and what `extras` has added to them.
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
        x, y, weights = self.replayed(model, data, count_of(data[0]))
        both = tf.nest.map_structure(lambda a, b: tf.concat([a, b], 0), tuple(data[:2]), (x, y))
        if len(data) < 3 or data[2] is None:
            return both
        # Examples of a task without weights count as much as those of weight 1.
        replayed = (
            packed_as(weights, data[2]) if weights else tf.nest.map_structure(tf.ones_like, data[2])
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

    def extras(self, model: DWDModel, x: Any) -> list[Any]:
        return tf.nest.flatten(model(x, training=False))

    def gradients(self, model: Learner, data: Any, gradients: Named) -> Named:
        if not self.memory.slots:
            return gradients
        count = count_of(data[0])
        variables = trainable_by_path(model)
        with tf.GradientTape() as tape:
            x, _, old_outputs = self.replayed(model, data, count)
            outputs = tf.nest.flatten(model(x, training=True))
            distances = [
                tf.reduce_sum(tf.cast(z - f, "float32") ** 2) / tf.cast(count, "float32")
                for z, f in zip(old_outputs, outputs, strict=True)
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
    gradients = tape.gradient(
        loss, [v.value for v in variables.values()], unconnected_gradients="zero"
    )
    return {path: tf.convert_to_tensor(g) for path, g in zip(variables, gradients, strict=True)}
