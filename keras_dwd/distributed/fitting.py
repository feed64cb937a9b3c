"""`fit` and `evaluate` by several workers."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd import optimizer
from keras_dwd.checks import integer
from keras_dwd.distributed import data
from keras_dwd.distributed.communicator import Communicator
from keras_dwd.distributed.workers import Workers

# What writes files of its own; only rank 0 has use for them.
_WRITERS = (keras.callbacks.CSVLogger, keras.callbacks.TensorBoard, keras.callbacks.RemoteMonitor)


def check_compile(model: Any, workers: Workers, given: dict[str, Any]) -> None:
    """Raise `ValueError` on what several workers cannot do, before anything changes.

    Args:
        model: A `DWDModel`.
        workers: That it is to be trained by.
        given: The arguments of `compile` by name; where `jit_compile` is left to Keras it is
            switched off: XLA knows no Horovod.
    """
    if not workers.several:
        return
    if given.setdefault("jit_compile", "auto") == "auto":
        given["jit_compile"] = False
    if given["jit_compile"]:
        raise ValueError("`jit_compile` must be False with several workers: XLA knows no Horovod.")
    losses = [keras.losses.get(each) for each in tf.nest.flatten(given.get("loss"))]
    if any(getattr(each, "reduction", None) == "sum" for each in losses):
        raise ValueError(
            "`loss` must be a mean over examples with several workers. Received one with the "
            "reduction 'sum'."
        )
    if model.task_graph is not None:
        raise ValueError("A `task_graph` works with one worker only.")
    if not workers.sharded:
        return
    budget = model.grouping is not None and model.grouping.budget is not None
    for what, there in (
        ("the estimator 'batch'", model.fisher.estimator == "batch"),
        ("strengths with a budget", budget),
        ("a `DWDOptimizer`", optimizer.find(given.get("optimizer")) is not None),
    ):
        if there:
            raise ValueError(
                f"`sharded` cannot be with {what}: no worker has all of the pull, or the gradient "
                "without it."
            )


def share_fit(model: Any, given: dict[str, Any]) -> None:
    """Change the arguments of `fit` to what this worker has to do.

    Args:
        model: A compiled `DWDModel`.
        given: The arguments by name.
    """
    workers = model.workers
    rank, size = workers.communicator.rank, workers.communicator.size
    x, orders = given.get("x"), list[keras.callbacks.Callback]()
    split = given.pop("validation_split", 0.0)
    by_class = given.pop("class_weight", None)
    if isinstance(x, tf.data.Dataset):
        x = _same_length(x, given, workers.communicator)
        x = x if data.is_own(x) else data.training_dataset(x, rank, size)
        given["x"] = x.map(lambda *batch: _by_class(batch, by_class)) if by_class else x
    else:
        if by_class and given.get("sample_weight") is not None:
            raise ValueError("Give `class_weight` or `sample_weight`, not both.")
        parts = _arrays("x", (x, given.pop("y", None), given.pop("sample_weight", None)))
        parts = _by_class(parts, by_class) if by_class else parts
        if split and given.get("validation_data") is None:
            count = len(tf.nest.flatten(parts)[0])
            kept = int(count * (1 - split))
            given["validation_data"] = tf.nest.map_structure(lambda a: a[kept:], parts)
            parts = tf.nest.map_structure(lambda a: a[:kept], parts)
        seed = None
        if given.get("shuffle", True):
            mine = {"seed": np.random.randint(0, 2**31 - 1, (), "int32")}
            seed = int(workers.communicator.from_first(mine, "seed")["seed"])
        batch_size = integer("batch_size", given.pop("batch_size", None) or 32, 1)
        ordered = data.TrainingArrays(parts, batch_size, rank, size, seed)
        given["x"] = ordered.batches
        orders.append(ordered)
    given["shuffle"] = False  # again
    held_out = given.get("validation_data")
    if held_out is not None:
        batch_size = given.pop("validation_batch_size", None) or 32
        given["validation_data"] = _own(held_out, batch_size, rank, size)
    if not workers.leads:
        given["verbose"] = 0
    given["callbacks"] = _callbacks(model, given.get("callbacks"), orders)


def share_evaluation(model: Any, given: dict[str, Any]) -> None:
    """Change the arguments of `evaluate` to what this worker has to do."""
    communicator = model.workers.communicator
    parts = (given.get("x"), given.pop("y", None), given.pop("sample_weight", None))
    whole = parts[0] if isinstance(parts[0], tf.data.Dataset) else parts
    batch_size = given.pop("batch_size", None) or 32
    given["x"] = _own(whole, batch_size, communicator.rank, communicator.size)
    if not model.workers.leads:
        given["verbose"] = 0


def _same_length(
    x: tf.data.Dataset, given: dict[str, Any], communicator: Communicator
) -> tf.data.Dataset:
    """As many batches on all workers, where each has its own.

    With a length that is not known Keras finds the end by a step that fails, after which the
    optimizers of workers may have counted differently.
    """
    count = int(x.cardinality())
    counts = [int(each) for each in communicator.messages(str(count).encode(), "lengths")]
    if count < 0 and not given.get("steps_per_epoch"):
        raise ValueError(
            "`steps_per_epoch` is needed for a dataset that does not know its length where several "
            "workers train; or give it one by `tf.data.experimental.assert_cardinality`."
        )
    return data.as_own(x.take(min(counts))) if data.is_own(x) and min(counts) >= 0 else x


def _own(held_out: Any, batch_size: int, rank: int, size: int) -> tf.data.Dataset:
    if isinstance(held_out, tf.data.Dataset):
        return data.own_batches(held_out, rank, size)
    parts = data.own_examples(_arrays("validation_data", held_out), rank, size)
    return tf.data.Dataset.from_tensor_slices(parts).batch(batch_size).prefetch(4)


def _arrays(name: str, parts: Any) -> tuple[Any, ...]:
    """`(x, y)` or `(x, y, sample_weight)` with lists of inputs as tuples."""
    given = [part for part in parts if part is not None]
    leaves = tf.nest.flatten(given)
    if not all(isinstance(leaf, (np.ndarray, tf.Tensor)) for leaf in leaves):
        raise ValueError(
            f"`{name}` must be arrays or a `tf.data.Dataset` where several workers train, to be "
            f"divided among them. Received: {type(parts[0]).__name__}"
        )
    return tuple(tuple(part) if isinstance(part, list) else part for part in given)


def _by_class(parts: tuple[Any, ...], weights: Mapping[int, float]) -> tuple[Any, ...]:
    """With the weight of its class for each example."""
    x, y, given = keras.utils.unpack_x_y_sample_weight(parts)
    labels = tf.convert_to_tensor(y)
    if len(labels.shape) > 1:
        one = labels.shape[-1] == 1
        labels = labels[..., 0] if one else tf.argmax(labels, -1)
    table = np.ones(max(weights) + 1, "float32")
    table[list(weights)] = list(weights.values())
    labels = tf.cast(labels, "int32")
    known = labels < len(table)
    found = tf.where(known, tf.gather(table, tf.where(known, labels, 0)), 1.0)
    return x, y, found if given is None else found * given


def _callbacks(model: Any, given: Any, orders: list[keras.callbacks.Callback]) -> Any:
    first, last = [*orders, _Averages(model)], _Together(model)
    if isinstance(given, keras.callbacks.CallbackList):
        for callback in (*first, last):
            given.append(callback)
        return given
    listed = list(given) if isinstance(given, (list, tuple)) else [given] if given else []
    if not model.workers.leads:
        listed = [
            _Reader(c) if isinstance(c, keras.callbacks.BackupAndRestore) else c for c in listed
        ]
        listed = [callback for callback in listed if not isinstance(callback, _WRITERS)]
    return [*first, *listed, last]


class _Together(keras.callbacks.Callback):
    """Starts all workers from the same model, once all callbacks have made of it what they do."""

    def __init__(self, model: Any):
        super().__init__()
        self.trained = model  # a `CallbackList` made before gives callbacks no model

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.trained.workers.begin(self.trained)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.trained.workers.raise_if_failed()


class _Averages(keras.callbacks.Callback):
    """Averages what layers follow of their inputs, before it is evaluated or saved."""

    def __init__(self, model: Any):
        super().__init__()
        self.trained = model

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.trained.workers.average_moving(self.trained)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.trained.workers.average_moving(self.trained)


class _Reader(keras.callbacks.Callback):
    """A `BackupAndRestore` that restores and writes nothing."""

    def __init__(self, backup: Any):
        super().__init__()
        self.backup = backup

    def set_model(self, model: Any) -> None:
        self.backup.set_model(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.backup.on_train_begin(logs)
