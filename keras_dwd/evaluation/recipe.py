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
from keras_dwd.words import counted

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
        warmup: Epochs at the start of each task in which the learning rate of the cosine is
            multiplied by a factor that rises linearly from 0 to 1.
        weight_decay: For Adam the decoupled weight decay of AdamW. For SGD the factor of the
            weights in the gradient, as usual; it is applied decoupled, divided by
            `1 − momentum`, which adds up to the same.
        momentum: Nesterov momentum of SGD, 0.9 by default; `None` for Adam.
        augment: Whether training images are cropped at random, after padding by 4 pixels of zeros,
            and flipped horizontally at random.
        mixup: If above 0, training examples are mixed in pairs, and their labels alike: a share m
            of one and 1 − m of the other, with m from the distribution Beta(mixup, mixup). Pairs
            of different tasks, as in joint training with task ids, are not mixed.
        keep_state: Whether the optimizer keeps its state, such as Adam's moments, from task to task
            instead of starting each task anew. A new Adam moves every parameter by about the
            learning rate in its first steps, however small its gradient, and so forgets more.
        bucket: For sequences that are padded at their ends, with a sample weight for each time
            step: those of similar length are trained on together, without the padding beyond a
            multiple of this number of time steps. `None` for other data. Methods that replay
            earlier examples train on whole sequences.

    Raises:
        ValueError: If a setting is not one of those above.

    Example:

    ```python
    recipe = Recipe("sgd", learning_rate=0.05, schedule="cosine", weight_decay=2e-4)
    result = run_sequence(build, scenario, "finetune", recipe=recipe, epochs=1)
    ```

    Reference:
        [Loshchilov & Hutter, 2017](https://arxiv.org/abs/1608.03983), for the cosine;
        [Loshchilov & Hutter, 2019](https://arxiv.org/abs/1711.05101), for weight decay;
        [He et al., 2016](https://arxiv.org/abs/1512.03385), section 4.2, for crops and flips;
        [Zhang et al., 2018](https://arxiv.org/abs/1710.09412), for mixup.
    """

    optimizer: str = "adam"
    learning_rate: float | None = None
    schedule: str = "constant"
    weight_decay: float = 0.0
    momentum: float | None = None
    augment: bool = False
    warmup: float = 0.0
    mixup: float = 0.0
    keep_state: bool = False
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
        for name in ("augment", "keep_state"):
            if not isinstance(getattr(self, name), bool):
                flag = getattr(self, name)
                raise ValueError(f"`{name}` must be True or False. Received: {flag!r}")
        if self.keep_state and self.schedule == "cosine":
            raise ValueError(
                "`keep_state` needs the schedule 'constant': 'cosine' counts the steps of each "
                "task from 0, as a new optimizer does."
            )
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", _LEARNING_RATES[self.optimizer])
        if self.momentum is None and sgd:
            object.__setattr__(self, "momentum", _MOMENTUM)
        object.__setattr__(self, "learning_rate", number("learning_rate", self.learning_rate, 0))
        if not self.learning_rate:
            raise ValueError("`learning_rate` must be above 0. Received: 0")
        for name in ("weight_decay", "warmup", "mixup"):
            number(name, getattr(self, name), 0)
        if self.bucket is not None:
            integer("bucket", self.bucket, 1)
        if self.warmup and self.schedule != "cosine":
            raise ValueError(
                f"`warmup` is a setting of the schedule 'cosine'. Received: {self.warmup!r} with "
                f"`schedule` {self.schedule!r}"
            )
        if sgd:
            number("momentum", self.momentum, 0, 1, closed=False)

    def changed(self, **settings: Any) -> "Recipe":
        """This recipe with those settings that are not `None`.

        Another optimizer has its own default learning rate and momentum, and a constant learning
        rate no warm-up.
        """
        changes = {name: value for name, value in settings.items() if value is not None}
        if changes.get("optimizer", self.optimizer) != self.optimizer:
            changes = {"learning_rate": None, "momentum": None} | changes
        if changes.get("schedule") == "constant":
            changes = {"warmup": 0.0} | changes
        return replace(self, **changes)

    def rate(self) -> "float | CosineOfTask":
        """The learning rate as a new optimizer takes it: a number or a schedule."""
        assert self.learning_rate is not None
        return CosineOfTask(self.learning_rate) if self.schedule == "cosine" else self.learning_rate

    def build_optimizer(self, rate: "float | CosineOfTask") -> keras.optimizers.Optimizer:
        """A new optimizer with this learning rate, see `rate`."""
        if self.momentum is None:
            return keras.optimizers.Adam(rate, weight_decay=self.weight_decay or None)
        decay = self.weight_decay / (1 - self.momentum)
        return keras.optimizers.SGD(
            rate, self.momentum, nesterov=self.momentum > 0, weight_decay=decay or None
        )

    @property
    def changes_batches(self) -> bool:
        """Whether training batches are changed at random."""
        return self.augment or self.mixup > 0

    def changed_batch(self, batch: tuple[Any, ...], seed: tf.Tensor) -> tuple[Any, ...]:
        """Augment and mix a training batch, `(x, y, …)`, as `seed` alone determines. Graph code."""
        if self.augment:
            batch = (cropped_and_flipped(batch[0], seed), *batch[1:])
        return mixed(batch, self.mixup, seed) if self.mixup else batch

    def configuration(self) -> dict[str, Any]:
        """The learning rate, and the settings that are not the default ones, for result files."""
        sgd = {"optimizer": "SGD", "momentum": self.momentum} if self.optimizer == "sgd" else {}
        return {
            "learning_rate": self.learning_rate,
            **sgd,
            **({"schedule": self.schedule} if self.schedule != "constant" else {}),
            **({"weight_decay": self.weight_decay} if self.weight_decay else {}),
            **({"augment": "crop and flip"} if self.augment else {}),
            **({"warmup": self.warmup} if self.warmup else {}),
            **({"mixup": self.mixup} if self.mixup else {}),
            **({"keep_state": True} if self.keep_state else {}),
            **({"bucket": self.bucket} if self.bucket else {}),
        }

    def __str__(self) -> str:
        """The recipe in words, as in reports."""
        momentum = "" if self.momentum is None else f" (Nesterov momentum {self.momentum:g})"
        return ", ".join(
            [
                f"{'SGD' if self.optimizer == 'sgd' else 'Adam'} {self.learning_rate:g}{momentum} "
                f"{'kept from task to task' if self.keep_state else 'reset for each task'}",
                *([f"rising for {counted(self.warmup, 'epoch')}"] if self.warmup else []),
                *(["falling to 0 by a cosine"] if self.schedule == "cosine" else []),
                *([f"weight decay {self.weight_decay:g}"] if self.weight_decay else []),
                *(["random crops and flips"] if self.augment else []),
                *([f"mixup {self.mixup:g}"] if self.mixup else []),
                *(["batches of similar length"] if self.bucket else []),
            ]
        )


@keras.saving.register_keras_serializable("keras_dwd")
class CosineOfTask(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that falls from its first value to 0 by half a period of the cosine.

    The numbers of steps can be assigned between tasks, without tracing the training step again.

    Args:
        learning_rate: The learning rate at the first step, without a warm-up.
        steps: Number of steps after which it is 0.
        warmup: Number of first steps in which it is multiplied by a factor that rises to 1.
    """

    def __init__(self, learning_rate: float, steps: int = 1, warmup: int = 0):
        super().__init__()
        self.learning_rate = learning_rate
        self.steps = untracked(np.asarray(steps), "steps")
        self.warmup = untracked(np.asarray(warmup), "warmup")

    def begin_task(self, epochs: int, batches: int, warmup: float) -> None:
        """Set the numbers of steps for a task of so many epochs of so many batches."""
        self.steps.assign(epochs * batches)
        self.warmup.assign(round(warmup * batches))

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        share = ops.minimum(step / self.steps.value, 1.0)
        risen = ops.minimum((step + 1.0) / ops.maximum(self.warmup.value, 1.0), 1.0)
        return self.learning_rate * risen * 0.5 * (1.0 + ops.cos(np.pi * share))

    def get_config(self) -> dict[str, Any]:
        numbers = {n: int(np.asarray(getattr(self, n))) for n in ("steps", "warmup")}
        return {"learning_rate": self.learning_rate, **numbers}


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


def mixed(batch: tuple[Any, ...], mixup: float, seed: tf.Tensor) -> tuple[Any, ...]:
    """Mix each example of a batch, and its label, with another one, see `Recipe`. Graph code.

    Args:
        batch: `(x, y)` or `(x, y, sample_weight)`. Numbers that are not floats, as task ids, and
            sample weights stay as they are. Pairs that differ in such numbers are not mixed: of
            two tasks, the label of one is none of the head of the other.
        mixup: The parameter of the distribution of the shares, above 0.
        seed: Two integers that alone determine the share, which all pairs of the batch have.
    """
    drawn = tf.random.stateless_gamma((2,), seed, mixup, dtype="float64")
    share = tf.cast(drawn[0] / tf.reduce_sum(drawn), "float32")
    examples = tf.nest.map_structure(tf.convert_to_tensor, batch[:2])
    alike = tf.ones(tf.shape(tf.nest.flatten(examples)[0])[:1], "bool")
    for array in tf.nest.flatten(examples):
        if not array.dtype.is_floating:
            same = tf.reshape(array == tf.roll(array, 1, 0), (tf.shape(array)[0], -1))
            alike &= tf.reduce_all(same, 1)
    shares = tf.where(alike, share, 1.0)

    def changed(array: tf.Tensor) -> tf.Tensor:
        if not array.dtype.is_floating:
            return array
        part = tf.reshape(tf.cast(shares, array.dtype), [-1] + [1] * (len(array.shape) - 1))
        return part * array + (1 - part) * tf.roll(array, 1, 0)

    return (*tf.nest.map_structure(changed, examples), *batch[2:])


def check_floats(x: Any) -> None:
    """Raise `ValueError` if no array in the structure `x` holds floats, which `mixup` mixes."""
    dtypes = [np.asarray(array).dtype for array in tf.nest.flatten(x)]
    if not any(tf.as_dtype(dtype).is_floating for dtype in dtypes):
        raise ValueError(
            "`mixup` mixes inputs, which must be floats. Received inputs of dtype "
            f"{', '.join(map(str, dtypes))}."
        )


def check_images(x: Any) -> None:
    """Raise `ValueError` if no array in the structure `x` holds images."""
    shapes = [np.shape(array) for array in tf.nest.flatten(x)]
    if not any(len(shape) == 4 for shape in shapes):
        raise ValueError(
            "`augment` needs images, of shape (examples, height, width, channels). Received inputs "
            f"of shape {', '.join(map(str, shapes))}."
        )
