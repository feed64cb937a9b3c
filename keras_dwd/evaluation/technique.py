"""What a method adds to the training of a `DWDModel`, and the model that it is added to."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.curvature.diagonal import DiagonalFisher
from keras_dwd.files import FileError
from keras_dwd.learner import Learner
from keras_dwd.model import DWDModel
from keras_dwd.regularizer import DWDRegularizer
from keras_dwd.state import Commit
from keras_dwd.training.step import Gradients, TrainingStep
from keras_dwd.variables import Arrays, trainable_by_path, untracked

Named = dict[str, tf.Tensor]
"""One tensor for each variable, by path."""


class Technique:
    """What a method adds to the training of a model. This base class adds nothing.

    A method of your own overrides one or a few of these methods, and is run by `run_sequence` like
    all others. Those that are graph code are part of each training step.

    A measure of importance, that is, of how strongly each parameter is held, needs only
    `importance` and the settings `held_by_importance`.

    Attributes:
        name: Name in result files.
        augment: Graph code that augments inputs, called with inputs and a seed; `None` if the
            training data are not augmented.

    Example:

    ```python
    class Magnitude(Technique):
        name = "magnitude"

        def importance(self, model, data):
            return [np.abs(v) for v in model.trainable_variables]


    method = Method(
        "magnitude", held_by_importance, strength=10.0, technique=lambda strength: Magnitude()
    )
    result = run_sequence(build, scenario, method)
    ```
    """

    name = ""

    def __init__(self) -> None:
        self.augment: Any = None
        self._seed = untracked(np.zeros(()), "seed", "int64")

    # Between tasks.

    def begin_task(self, model: DWDModel) -> None:
        """Prepare for a new task, before its first training step."""

    def importance(self, model: DWDModel, data: Any) -> list[np.ndarray] | None:
        """The importance of parameters for a task that was just learned.

        Args:
            model: The model, which has `held_by_importance` among its settings.
            data: A sample of the task's training data.

        Returns:
            An array ≥ 0 for each of `model.trainable_variables`, in its shape; `None` if the method
            has no measure of importance of its own.
        """
        return None

    def end_task(self, model: DWDModel, data: Any, rng: np.random.Generator) -> None:
        """Keep what is needed of a task that was just learned.

        Args:
            model: The model.
            data: All training data of the task.
            rng: A generator whose seed depends on the run and the task only.
        """

    # In each training step. Graph code.

    def batch(self, model: Learner, data: Any) -> Any:
        """The batch to train on, in place of `data`: `(x, y)` or `(x, y, sample_weight)`."""
        return data

    def gradients(self, model: Learner, data: Any, gradients: Named) -> Named:
        """The gradients to train with, in place of those of the loss of the batch, by path."""
        return gradients

    def moved(self, model: Learner, gradients: Named, moves: Named) -> None:
        """Note a step: the gradients of the loss, and how far each variable was moved."""

    def seed(self, model: Learner, draw: int = 0) -> tf.Tensor:
        """A seed for `tf.random.stateless_uniform`, another one in each step of each task.

        Args:
            model: The model that is trained.
            draw: Number of the draw, if there are several in a step.
        """
        step = tf.cast(tf.convert_to_tensor(model.optimizer.iterations), "int64")
        return tf.random.experimental.stateless_fold_in(tf.stack([self._seed.value, step]), draw)

    # Settings and files.

    def get_config(self) -> dict[str, Any]:
        """The name and the settings, for result files."""
        return {"name": self.name}

    def state(self) -> Arrays:
        """What checkpoints must hold, by name."""
        return {}

    def prepare_state(self, state: Arrays) -> Commit:
        """Check what `state` returned, without changing anything yet.

        Returns:
            A function that applies it and cannot fail.

        Raises:
            FileError: If it does not fit.
        """
        if state:
            raise FileError(f"The checkpoint has {sorted(state)}, which {self.name!r} has not.")
        return lambda: None

    def start(self, seed: int) -> None:
        """Set the seed of a task, before it is trained or resumed."""
        self._seed.assign(seed)


@keras.saving.register_keras_serializable("keras_dwd")
class GivenImportance(DiagonalFisher):
    """Importance of parameters that a `Technique` gives, in place of the Fisher information."""

    def __init__(self) -> None:
        super().__init__("empirical", gamma=None)
        self.importance_by_path: Arrays = {}

    def give(self, importance: Sequence[np.ndarray], model: Learner) -> None:
        """Set the importance for the next boundary, one array for each trainable variable.

        Raises:
            ValueError: If an array does not fit its variable, or has numbers that are not ≥ 0.
        """
        variables = trainable_by_path(model)
        shapes = [np.shape(values) for values in importance]
        if shapes != [tuple(v.shape) for v in variables.values()]:
            raise ValueError(
                "`importance` must give an array for each of `model.trainable_variables`, in its "
                f"shape. Received arrays of shape {shapes}."
            )
        importance_by_path = dict(zip(variables, map(np.asarray, importance), strict=True))
        for path, values in importance_by_path.items():
            if not np.all(values >= 0):
                raise ValueError(
                    f"`importance` must be at least 0. Received for {path!r}: {values.min()}"
                )
        self.importance_by_path = importance_by_path

    def estimate(
        self, optimizer: Any = None, variables: Any = None, summed: bool = False
    ) -> Arrays:
        """The importance given, by `fisher/PATH`."""
        if not self.importance_by_path:
            raise ValueError("No importance was given: the technique must define `importance`.")
        paths = self.importance_by_path if variables is None else variables
        return {
            f"fisher/{p}": np.asarray(self.importance_by_path[p], "float32")
            for p in paths
            if p in self.importance_by_path
        }

    def reset(self) -> None:
        """Forget the importance, at the start of a new task."""
        super().reset()
        self.importance_by_path = {}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments: none."""
        return {}


def held_by_importance(strength: float, decay: float = 1.0) -> dict[str, Any]:
    """Arguments of `DWDModel` for a method with a measure of importance of its own.

    Args:
        strength: λ ≥ 0, the weight of the penalty ½ λ Σ Ω (θ − θ*)² against the loss.
        decay: In [0, 1], the factor for the importance of earlier tasks at each boundary.

    Example:

    ```python
    settings = held_by_importance(strength=10.0)
    model = DWDModel.from_model(network, **settings)
    ```
    """
    return {
        "regularizer": DWDRegularizer(strength, decay),
        "fisher": GivenImportance(),
        "grouping": None,
    }


@keras.saving.register_keras_serializable("keras_dwd")
class TechniqueModel(DWDModel):
    """A `DWDModel` with a `Technique`; without one, as after loading, it is a plain one.

    Attributes:
        technique: What is added to its training.
    """

    technique: Technique | None = None

    def _training_step(self) -> TrainingStep:
        step = super()._training_step()
        if self.technique is None:
            return step
        parts = {field.name: getattr(step, field.name) for field in fields(step)}
        return _Step(**parts, technique=self.technique)

    def end_task(self, data: Any, sample: Any, rng: np.random.Generator) -> None:
        """Let the technique record a task that was learned, before it is consolidated."""
        assert self.technique is not None
        importance = self.technique.importance(self, sample)
        if importance is not None:
            if not isinstance(self.fisher, GivenImportance):
                raise ValueError(
                    f"{self.technique.name!r} has a measure of importance, for which the settings "
                    f"must be `held_by_importance`. Received: {type(self.fisher).__name__}"
                )
            self.fisher.give(importance, self)
        self.technique.end_task(self, data, rng)


@dataclass(frozen=True)
class _Step(TrainingStep):
    """The training step with what a technique adds.

    Attributes:
        technique: The technique.
    """

    technique: Technique

    def __call__(self, model: Learner, data: Any) -> dict[str, Any]:
        return super().__call__(model, self.technique.batch(model, data))

    def _differentiate(
        self, model: Learner, x: Any, y: Any, sample_weight: Any
    ) -> tuple[Any, tf.Tensor, Gradients]:
        y_pred, loss, gradients = super()._differentiate(model, x, y, sample_weight)
        if gradients.scale is not None:
            raise ValueError(
                f"{self.technique.name!r} does not work with a scaled loss, as of mixed_float16."
            )
        changed = self.technique.gradients(model, (x, y, sample_weight), _named(gradients))
        gradients.total = [changed.get(path) for path in gradients.variables]
        return y_pred, loss, gradients

    def _update_weights(self, model: Learner, gradients: Gradients) -> None:
        if type(self.technique).moved is Technique.moved:
            return super()._update_weights(model, gradients)
        named = _named(gradients)
        before = {path: tf.identity(v.value) for path, v in gradients.variables.items()}
        super()._update_weights(model, gradients)
        moves = {path: v.value - before[path] for path, v in gradients.variables.items()}
        self.technique.moved(model, named, moves)


def _named(gradients: Gradients) -> Named:
    """The gradients by path, of the variables that have one."""
    pairs = zip(gradients.variables, gradients.total, strict=True)
    return {path: tf.convert_to_tensor(g) for path, g in pairs if g is not None}
