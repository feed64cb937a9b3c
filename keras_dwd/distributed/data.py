"""Division of training and evaluation data among workers."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


class TrainingArrays(keras.callbacks.Callback):
    """One worker's share of the batches of arrays, shuffled anew in each epoch.

    In each step the workers share one global batch of `batch_size * size` examples. The order
    depends on the seed and the epoch only; this object is a callback so that it learns the epoch.
    The last, smaller global batch is divided as well. If it cannot be divided evenly, some examples
    are seen by two workers, with sample weights such that the mean over all workers counts each
    example once.

    Args:
        parts: `(x, y)` or `(x, y, sample_weight)`.
        batch_size: Examples per worker and step.
        rank: Rank of this worker.
        size: Number of workers.
        seed: Seed of the order; `None` keeps the order of the examples.
        change: Graph code that changes a batch `(x, y, …)` at random, called with the batch and a
            seed of two integers, which depends on `seed`, the epoch, the step and the rank only.

    Attributes:
        batches: The batches of one epoch, a `tf.data.Dataset`.
    """

    def __init__(
        self,
        parts: tuple[Any, ...],
        batch_size: int,
        rank: int,
        size: int,
        seed: int | None,
        change: Callable[[tuple[Any, ...], tf.Tensor], tuple[Any, ...]] | None = None,
    ):
        super().__init__()
        parts = tf.nest.map_structure(tf.convert_to_tensor, parts)
        count = len(tf.nest.flatten(parts)[0])
        global_batch = batch_size * size
        with tf.device("CPU"):
            epoch = tf.Variable(0, trainable=False)
        self._epoch = epoch

        def ordered(_: Any) -> tf.data.Dataset:
            order = tf.range(count)
            if seed is not None:
                order = tf.random.experimental.stateless_shuffle(order, (seed, epoch))
            return tf.data.Dataset.range(0, count, global_batch, output_type=tf.int32).map(
                lambda start: _part(order[start : start + global_batch], rank, size)
            )

        def batch(chosen: tf.Tensor, weights: tf.Tensor) -> tuple[Any, ...]:
            picked = tf.nest.map_structure(lambda a: tf.gather(a, chosen), parts)
            if change is not None:  # no two batches of an epoch begin with the same example
                drawn = tf.random.experimental.stateless_fold_in((seed or 0, epoch), chosen[0])
                picked = change(picked, drawn)
            return picked if count % size == 0 else _weighted(picked, weights)

        batches = tf.data.Dataset.range(1).flat_map(ordered).map(batch)
        steps = tf.data.experimental.assert_cardinality(-(-count // global_batch))
        self.batches = as_own(batches.apply(steps).prefetch(4))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Set the epoch that determines the order; `fit` creates the iterator after this."""
        self._epoch.assign(epoch)


def training_dataset(data: tf.data.Dataset, rank: int, size: int) -> tf.data.Dataset:
    """One worker's share of the batches of a dataset that is the same on all workers.

    Each step uses `size` batches of the dataset, one for each worker. All batches but the last must
    have the same number of examples.
    """
    known = tf.nest.flatten(data.element_spec)[0].shape[0]
    batch_size = known or len(tf.nest.flatten(next(iter(data.take(1))))[0])

    def part(*batch: Any) -> tuple[Any, ...]:
        chosen, weights = _part(tf.range(tf.shape(tf.nest.flatten(batch)[0])[0]), rank, size)
        picked = tf.nest.map_structure(lambda a: tf.gather(a, chosen), batch)
        return _weighted(picked, weights) if len(batch) > 1 else picked

    batches = data.rebatch(batch_size * size).map(part)
    count = int(data.cardinality())
    if count > 0:
        batches = batches.apply(tf.data.experimental.assert_cardinality(-(-count // size)))
    elif count == tf.data.INFINITE_CARDINALITY:
        batches = batches.repeat()  # restores the infinite cardinality that `rebatch` loses
    return batches.prefetch(4)


def own_examples(parts: tuple[Any, ...], rank: int, size: int) -> tuple[Any, ...]:
    """One worker's share of the examples of arrays; all if there are fewer than workers."""
    count = len(tf.nest.flatten(parts)[0])
    if count < size:
        return parts
    ends = [count * r // size for r in (rank, rank + 1)]
    return tf.nest.map_structure(lambda a: a[ends[0] : ends[1]], parts)


def own_batches(data: tf.data.Dataset, rank: int, size: int) -> tf.data.Dataset:
    """One worker's share of an evaluation dataset: each example is seen by exactly one worker."""
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
    """Whether the dataset is marked as this worker's share already (auto-shard policy OFF)."""
    policy = data.options().experimental_distribute.auto_shard_policy
    return policy == tf.data.experimental.AutoShardPolicy.OFF


def as_own(data: tf.data.Dataset) -> tf.data.Dataset:
    """Mark a dataset as this worker's share, so that it is not divided again."""
    options = tf.data.Options()
    policy = tf.data.experimental.AutoShardPolicy.OFF
    options.experimental_distribute.auto_shard_policy = policy
    return data.with_options(options)


def _part(batch: tf.Tensor, rank: int, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """One worker's share of a global batch, and the weights of its examples."""
    count = tf.shape(batch)[0]
    share = -(-count // size)  # the same on all workers
    places = rank * share + tf.range(share)
    weights = tf.where(places < count, tf.cast(share * size, "float32"), 0.0)
    return tf.gather(batch, places % count), weights / tf.cast(count, "float32")


def _weighted(batch: tuple[Any, ...], weights: tf.Tensor) -> tuple[Any, ...]:
    """The batch with its sample weights multiplied by `weights`."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)

    def times(sample_weight: tf.Tensor) -> tf.Tensor:
        shape = [-1] + [1] * (len(sample_weight.shape) - 1)
        return tf.cast(sample_weight, "float32") * tf.reshape(weights, shape)

    return x, y, weights if sample_weight is None else tf.nest.map_structure(times, sample_weight)
