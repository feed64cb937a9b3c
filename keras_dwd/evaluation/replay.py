"""A memory of examples of earlier tasks, for methods that replay them."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import integer
from keras_dwd.files import FileError
from keras_dwd.state import Commit
from keras_dwd.variables import Arrays, untracked


class Reservoir:
    """A uniform random sample, of limited size, of all examples that were added to it.

    An example consists of several arrays, such as an image, a task id and a label. They are kept in
    variables, so that a training step can draw from them.

    Args:
        size: The largest number of examples to keep.

    Attributes:
        seen: The number of examples that were added.
        slots: One variable for each array of an example.

    Reference:
        [Vitter, 1985](https://doi.org/10.1145/3147.3165), algorithm R.
    """

    def __init__(self, size: int):
        self.size = integer("size", size, 1)
        self.seen = 0
        self.slots: list[keras.Variable] = []
        self._filled = untracked(np.zeros(()), "filled", "int64")

    def add(self, examples: list[Any], rng: np.random.Generator) -> None:
        """Add examples, each of which then has the same chance to be kept as all before.

        Args:
            examples: The arrays, with one entry per example along their first axis.
            rng: Decides which examples are kept.
        """
        arrays = [np.asarray(a) for a in examples]
        count = len(arrays[0])
        numbers = self.seen + np.arange(count)  # of each example, in the order of all
        drawn = rng.integers(0, numbers + 1)
        places = np.where(numbers < self.size, numbers, drawn)
        chosen = np.flatnonzero(places < self.size)
        # Of several examples for one place the last one stays.
        place_of = dict(zip(places[chosen].tolist(), chosen.tolist(), strict=True))
        if not self.slots:
            self.slots = [_slot(np.zeros((self.size, *a.shape[1:]), a.dtype)) for a in arrays]
        for slot, array in zip(self.slots, arrays, strict=True):
            contents = np.array(slot)
            contents[list(place_of)] = array[list(place_of.values())]
            slot.assign(contents)
        self._count(self.seen + count)

    def draw(self, count: tf.Tensor | int, seed: tf.Tensor) -> list[tf.Tensor]:
        """Draw examples with replacement. Graph code.

        Args:
            count: The number of examples.
            seed: Two integers that alone determine which ones.
        """
        filled = tf.maximum(self._filled.value, 1)
        chosen = tf.random.stateless_uniform([count], seed, 0, filled, "int64")
        return [tf.gather(slot.value, chosen) for slot in self.slots]

    def state(self) -> Arrays:
        """The arrays of the examples, as `example/0` and so on, and `seen`."""
        arrays = {f"example/{i}": np.array(slot) for i, slot in enumerate(self.slots)}
        return arrays | {"seen": np.asarray(self.seen, "int64")}

    def prepare_state(self, state: Arrays) -> Commit:
        """Check what `state` returned, without changing anything yet.

        Returns:
            A function that applies it and cannot fail.

        Raises:
            FileError: If it is not the state of a reservoir of this size.
        """
        names = [f"example/{i}" for i in range(len(state) - 1)]
        seen = state.get("seen", np.asarray(-1))
        arrays = [state[name] for name in names if name in state]
        fits = len(arrays) == len(names) and seen.shape == () and seen >= 0
        if not fits or any(a.shape[:1] != (self.size,) for a in arrays):
            raise FileError(
                f"The saved examples are not those of a memory of {self.size}: {sorted(state)}."
            )

        def commit() -> None:
            self.slots = [_slot(array) for array in arrays]
            self._count(int(seen))

        return commit

    def _count(self, seen: int) -> None:
        self.seen = seen
        self._filled.assign(min(seen, self.size))


def _slot(array: np.ndarray) -> keras.Variable:
    # Not int32, which TensorFlow keeps in host memory, out of reach for XLA on a GPU.
    return untracked(array, "example", "int64" if array.dtype.kind in "iu" else str(array.dtype))


def packed_as(examples: list[tf.Tensor], batch: Any) -> Any:
    """Drawn examples in the structure, the dtypes and with the axes of a batch. Graph code."""

    def like(example: tf.Tensor, part: tf.Tensor) -> tf.Tensor:
        shape = tf.concat([tf.shape(example)[:1], tf.shape(part)[1:]], 0)
        shaped = tf.reshape(tf.cast(example, part.dtype), shape)
        return tf.ensure_shape(shaped, (None, *part.shape[1:]))

    parts = tf.nest.flatten(batch)
    flat = [like(e, p) for e, p in zip(examples[: len(parts)], parts, strict=True)]
    return tf.nest.pack_sequence_as(batch, flat)
