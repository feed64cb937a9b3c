"""How a network is trained on each task: optimizer, learning rate and augmentation of images."""

from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_dwd.checks import integer, number
from keras_dwd.evaluation.scenario import Task
from keras_dwd.variables import untracked

# The default learning rate of each optimizer.
_LEARNING_RATES = {"adam": 1e-3, "sgd": 0.05}
OPTIMIZERS = tuple(_LEARNING_RATES)
SCHEDULES = ("constant", "cosine")

_MOMENTUM = 0.9
# Pixels added on each side of an image before it is cropped to its size again.
_PADDING = 4


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on each task.

    Attributes:
        optimizer: `"adam"` or `"sgd"`.
        learning_rate: Learning rate at the start of each task; by default 0.001 for Adam and 0.05
            for SGD.
        schedule: `"constant"`, or `"cosine"`: half a period of the cosine, from the learning rate
            at the first step of each task to 0 after its last.
        weight_decay: For Adam the decoupled weight decay of AdamW. For SGD the factor of the
            weights in the gradient, as usual; it is applied decoupled, divided by
            `1 − momentum`, which adds up to the same.
        momentum: Momentum of SGD, 0.9 by default; `None` for Adam.
        augment: Whether training images are cropped at random, after padding by 4 pixels of zeros,
            and flipped horizontally at random.
        bucket: For sequences that are padded at their ends, with a sample weight for each time
            step: those of similar length are trained on together, without the padding beyond a
            multiple of this number of time steps. `None` for other data.

    Raises:
        ValueError: If a setting is not one of those above.

    Reference:
        [Loshchilov & Hutter, 2017](https://arxiv.org/abs/1608.03983), for the cosine;
        [Loshchilov & Hutter, 2019](https://arxiv.org/abs/1711.05101), for weight decay;
        [He et al., 2016](https://arxiv.org/abs/1512.03385), section 4.2, for crops and flips.
    """

    optimizer: str = "adam"
    learning_rate: float | None = None
    schedule: str = "constant"
    weight_decay: float = 0.0
    momentum: float | None = None
    augment: bool = False
    bucket: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(known)}. Received: {getattr(self, name)!r}"
                )
        sgd = self.optimizer == "sgd"
        if self.momentum is not None and not sgd:
            raise ValueError(f"`momentum` is a setting of SGD. Received: {self.momentum!r}")
        if not isinstance(self.augment, bool):
            raise ValueError(f"`augment` must be True or False. Received: {self.augment!r}")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", _LEARNING_RATES[self.optimizer])
        if self.momentum is None and sgd:
            object.__setattr__(self, "momentum", _MOMENTUM)
        object.__setattr__(self, "learning_rate", number("learning_rate", self.learning_rate, 0))
        if not self.learning_rate:
            raise ValueError("`learning_rate` must be above 0. Received: 0")
        number("weight_decay", self.weight_decay, 0)
        if self.bucket is not None:
            integer("bucket", self.bucket, 1)
        if sgd:
            number("momentum", self.momentum, 0, 1, closed=False)

    def changed(self, **settings: Any) -> "Recipe":
        """This recipe with those settings that are not `None`.

        Another optimizer has its own default learning rate and momentum.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        if given.get("optimizer", self.optimizer) != self.optimizer:
            given = {"learning_rate": None, "momentum": None} | given
        return replace(self, **given)

    def rate(self) -> "float | CosineOfTask":
        """The learning rate as a new optimizer takes it: a number or a schedule."""
        assert self.learning_rate is not None
        return CosineOfTask(self.learning_rate) if self.schedule == "cosine" else self.learning_rate

    def made_optimizer(self, rate: "float | CosineOfTask") -> keras.optimizers.Optimizer:
        """A new optimizer with this learning rate, see `rate`."""
        if self.momentum is None:
            return keras.optimizers.Adam(rate, weight_decay=self.weight_decay or None)
        decay = self.weight_decay / (1 - self.momentum)
        return keras.optimizers.SGD(rate, self.momentum, weight_decay=decay or None)

    def configuration(self) -> dict[str, Any]:
        """The learning rate, and the settings that are not the default ones, for result files."""
        sgd = {"optimizer": "SGD", "momentum": self.momentum} if self.optimizer == "sgd" else {}
        return {
            "learning_rate": self.learning_rate,
            **sgd,
            **({"schedule": self.schedule} if self.schedule != "constant" else {}),
            **({"weight_decay": self.weight_decay} if self.weight_decay else {}),
            **({"augment": "crop and flip"} if self.augment else {}),
            **({"bucket": self.bucket} if self.bucket else {}),
        }

    def __str__(self) -> str:
        """The recipe in words, as in reports."""
        momentum = "" if self.momentum is None else f" (momentum {self.momentum:g})"
        return ", ".join(
            [
                f"{'SGD' if self.optimizer == 'sgd' else 'Adam'} {self.learning_rate:g}{momentum} "
                "reset for each task",
                *(["falling to 0 by a cosine"] if self.schedule == "cosine" else []),
                *([f"weight decay {self.weight_decay:g}"] if self.weight_decay else []),
                *(["random crops and flips"] if self.augment else []),
                *(["batches of similar length"] if self.bucket else []),
            ]
        )


@keras.saving.register_keras_serializable("keras_dwd")
class CosineOfTask(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that falls from its first value to 0 by half a period of the cosine.

    The number of steps can be assigned between tasks, without tracing the training step again.

    Args:
        learning_rate: The learning rate at the first step.
        steps: Number of steps after which it is 0.
    """

    def __init__(self, learning_rate: float, steps: int = 1):
        super().__init__()
        self.learning_rate = learning_rate
        self.steps = untracked(np.asarray(steps), "steps")

    def __call__(self, step: Any) -> Any:
        share = ops.minimum(ops.cast(step, "float32") / self.steps.value, 1.0)
        return self.learning_rate * 0.5 * (1.0 + ops.cos(np.pi * share))

    def get_config(self) -> dict[str, Any]:
        return {"learning_rate": self.learning_rate, "steps": int(np.asarray(self.steps))}


def cropped_and_flipped(x: Any, seed: tf.Tensor) -> Any:
    """Crop and flip each image of a batch at random, see `Recipe`. Graph code.

    Args:
        x: A structure of tensors; those of shape `(batch, height, width, channels)` are images.
        seed: Two integers that alone determine the crops and flips.
    """

    def changed(images: tf.Tensor) -> tf.Tensor:
        if len(images.shape) != 4:
            return images
        count, height, width = tf.unstack(tf.shape(images)[:3])
        drawn = tf.random.stateless_uniform((3, count), seed, 0, 2**16, "int32")
        size = 2 * _PADDING + 1
        rows = (drawn[0] % size)[:, None] + tf.range(height)
        columns = tf.range(width)[None]
        flipped = tf.where((drawn[1] % 2 == 1)[:, None], width - 1 - columns, columns)
        columns = (drawn[2] % size)[:, None] + flipped
        sides = [_PADDING, _PADDING]
        padded = tf.pad(images, [[0, 0], sides, sides, [0, 0]])
        cropped = tf.gather(padded, rows, axis=1, batch_dims=1)
        result = tf.gather(cropped, columns, axis=2, batch_dims=1)
        return tf.ensure_shape(result, images.shape)

    return tf.nest.map_structure(changed, x)


def check_time_steps(task: Task) -> None:
    """Raise `ValueError` if a task has no sample weight for each time step, as `bucket` needs."""
    arrays = tf.nest.flatten(task.train) if isinstance(task.train, (tuple, list)) else []
    shapes = [np.shape(array) for array in arrays]
    if len(task.train) != 3 or any(len(s) < 2 or s[:2] != shapes[-1] for s in shapes):
        raise ValueError(
            "`bucket` needs arrays (x, y, sample_weight), all with an axis of examples and one of "
            f"time steps. Received for task {task.name!r}: "
            f"{', '.join(map(str, shapes)) or type(task.train).__name__}"
        )


def check_images(x: Any) -> None:
    """Raise `ValueError` if no array in the structure `x` holds images."""
    shapes = [np.shape(array) for array in tf.nest.flatten(x)]
    if not any(len(shape) == 4 for shape in shapes):
        raise ValueError(
            "`augment` needs images, of shape (examples, height, width, channels). Received inputs "
            f"of shape {', '.join(map(str, shapes))}."
        )
