"""Which examples each worker sees: together they see those that one worker would."""

from typing import Any

import keras
import tensorflow as tf


class TrainingArrays(keras.callbacks.Callback):
    """One worker's part of the batches of arrays, in another order in each epoch.

    Every worker sees its part of the same global batch of `batch_size * size` examples, in an
    order that only seed and epoch decide: as a callback this is told the epoch. What is left at the
    end of an epoch is divided as well: where it cannot be divided evenly some examples are seen
    twice, with weights that make the mean over all workers that of the examples once.

    Args:
        parts: `(x, y)` or `(x, y, sample_weight)`.
        batch_size: Examples per worker and step.
        rank: Of this worker.
        size: Number of workers.
        seed: Of the order; `None` takes the examples as they come.

    Attributes:
        batches: Those of an epoch, a `tf.data.Dataset`.
    """

    def __init__(
        self, parts: tuple[Any, ...], batch_size: int, rank: int, size: int, seed: int | None
    ):
        super().__init__()
        parts = tf.nest.map_structure(tf.convert_to_tensor, parts)
        count = len(tf.nest.flatten(parts)[0])
        whole = batch_size * size
        with tf.device("CPU"):
            epoch = tf.Variable(0, trainable=False)
        self._epoch = epoch

        def ordered(_: Any) -> tf.data.Dataset:
            order = tf.range(count)
            if seed is not None:
                order = tf.random.experimental.stateless_shuffle(order, (seed, epoch))
            return tf.data.Dataset.range(0, count, whole, output_type=tf.int32).map(
                lambda start: _part(order[start : start + whole], rank, size)
            )

        def batch(chosen: tf.Tensor, weights: tf.Tensor) -> tuple[Any, ...]:
            picked = tf.nest.map_structure(lambda a: tf.gather(a, chosen), parts)
            return picked if count % size == 0 else _weighted(picked, weights)

        made = tf.data.Dataset.range(1).flat_map(ordered).map(batch)
        steps = tf.data.experimental.assert_cardinality(-(-count // whole))
        self.batches = as_own(made.apply(steps).prefetch(4))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Take the order of this epoch; `fit` makes the iterator after this."""
        self._epoch.assign(epoch)


def training_dataset(data: tf.data.Dataset, rank: int, size: int) -> tf.data.Dataset:
    """One worker's part of the batches of a dataset that all workers have alike.

    Each step takes `size` batches, one for each worker. All but the last must be of as many
    examples.
    """
    known = tf.nest.flatten(data.element_spec)[0].shape[0]
    batch_size = known or len(tf.nest.flatten(next(iter(data.take(1))))[0])

    def part(*batch: Any) -> tuple[Any, ...]:
        chosen, weights = _part(tf.range(tf.shape(tf.nest.flatten(batch)[0])[0]), rank, size)
        picked = tf.nest.map_structure(lambda a: tf.gather(a, chosen), batch)
        return _weighted(picked, weights) if len(batch) > 1 else picked

    made = data.rebatch(batch_size * size).map(part)
    count = int(data.cardinality())
    if count > 0:
        made = made.apply(tf.data.experimental.assert_cardinality(-(-count // size)))
    elif count == tf.data.INFINITE_CARDINALITY:
        made = made.repeat()  # which knows that it is endless
    return made.prefetch(4)


def own_examples(parts: tuple[Any, ...], rank: int, size: int) -> tuple[Any, ...]:
    """One worker's examples of arrays, each example at one worker; all of them if there are few."""
    count = len(tf.nest.flatten(parts)[0])
    if count < size:
        return parts
    ends = [count * r // size for r in (rank, rank + 1)]
    return tf.nest.map_structure(lambda a: a[ends[0] : ends[1]], parts)


def own_batches(data: tf.data.Dataset, rank: int, size: int) -> tf.data.Dataset:
    """One worker's part of a dataset to evaluate on, each example at one worker."""
    if is_own(data):
        return data

    def examples(batch: Any) -> tf.Tensor:
        return tf.shape(tf.nest.flatten(batch)[0])[0]

    def part(*batch: Any) -> Any:
        n = examples(batch)
        picked = tf.nest.map_structure(
            lambda a: a[n * rank // size : n * (rank + 1) // size], batch
        )
        return picked if len(batch) > 1 else picked[0]

    return data.map(part).filter(lambda *batch: examples(batch) > 0)


def is_own(data: tf.data.Dataset) -> bool:
    """Whether its owner said that it is not to be divided."""
    policy = data.options().experimental_distribute.auto_shard_policy
    return policy == tf.data.experimental.AutoShardPolicy.OFF


def as_own(data: tf.data.Dataset) -> tf.data.Dataset:
    """A dataset that is not to be divided: it is this worker's part already."""
    options = tf.data.Options()
    policy = tf.data.experimental.AutoShardPolicy.OFF
    options.experimental_distribute.auto_shard_policy = policy
    return data.with_options(options)


def _part(batch: tf.Tensor, rank: int, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Of a global batch what a worker sees, and the weights of its examples."""
    count = tf.shape(batch)[0]
    share = -(-count // size)  # the same for all
    places = rank * share + tf.range(share)
    weights = tf.where(places < count, tf.cast(share * size, "float32"), 0.0)
    return tf.gather(batch, places % count), weights / tf.cast(count, "float32")


def _weighted(batch: tuple[Any, ...], weights: tf.Tensor) -> tuple[Any, ...]:
    x, y, given = keras.utils.unpack_x_y_sample_weight(batch)

    def times(given: tf.Tensor) -> tf.Tensor:
        shape = [-1] + [1] * (len(given.shape) - 1)
        return tf.cast(given, "float32") * tf.reshape(weights, shape)

    return x, y, weights if given is None else tf.nest.map_structure(times, given)
