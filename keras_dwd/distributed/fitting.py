"""`fit` and `evaluate` on several workers."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import integer
from keras_dwd.communicator import Communicator
from keras_dwd.consolidation import Consolidation
from keras_dwd.distributed import data
from keras_dwd.distributed.workers import Workers
from keras_dwd.learner import Learner
from keras_dwd.variables import by_path

# Callbacks that write files: only rank 0 keeps them.
_WRITERS = (keras.callbacks.CSVLogger, keras.callbacks.TensorBoard, keras.callbacks.RemoteMonitor)


def check_compile(learned: Consolidation, workers: Workers, arguments: dict[str, Any]) -> None:
    """Raise `ValueError` for settings that several workers do not support.

    Args:
        learned: The consolidation state of the model.
        workers: The workers that will train the model.
        arguments: The arguments of `compile` by name. With several workers `jit_compile="auto"` is
            changed to `False`, as XLA does not support Horovod.
    """
    if not workers.several:
        return
    if arguments.setdefault("jit_compile", "auto") == "auto":
        arguments["jit_compile"] = False
    if arguments["jit_compile"]:
        raise ValueError("`jit_compile` must be False with several workers: XLA knows no Horovod.")
    losses = [keras.losses.get(loss) for loss in tf.nest.flatten(arguments.get("loss"))]
    if any(getattr(loss, "reduction", None) == "sum" for loss in losses):
        raise ValueError(
            "`loss` must be a mean over examples with several workers. Received one with the "
            "reduction 'sum'."
        )
    if learned.task_graph is not None:
        raise ValueError("A `task_graph` works with one worker only.")
    if not workers.sharded:
        return
    budget = learned.grouping is not None and learned.grouping.budget is not None
    for feature, used in (
        ("the estimator 'batch'", learned.fisher.estimator == "batch"),
        ("strengths with a budget", budget),
    ):
        if used:
            raise ValueError(
                f"`sharded` cannot be with {feature}: no worker has all of the pull, or the "
                "gradient without it."
            )


def share_fit(model: Learner, learned: Consolidation, arguments: dict[str, Any]) -> None:
    """Change the arguments of `fit` in place to this worker's share of the training.

    Args:
        model: A compiled model.
        learned: The consolidation state of the model.
        arguments: The arguments of `fit` by name.
    """
    workers = learned.workers
    rank, size = workers.communicator.rank, workers.communicator.size
    x, orders = arguments.get("x"), list[keras.callbacks.Callback]()
    split = arguments.pop("validation_split", 0.0)
    by_class = arguments.pop("class_weight", None)
    if isinstance(x, tf.data.Dataset):
        x = _same_length(x, arguments, workers.communicator)
        x = x if data.is_own(x) else data.training_dataset(x, rank, size)
        arguments["x"] = x.map(lambda *batch: _by_class(batch, by_class)) if by_class else x
    else:
        if by_class and arguments.get("sample_weight") is not None:
            raise ValueError("Give `class_weight` or `sample_weight`, not both.")
        parts = _arrays("x", (x, arguments.pop("y", None), arguments.pop("sample_weight", None)))
        parts = _by_class(parts, by_class) if by_class else parts
        if split and arguments.get("validation_data") is None:
            count = len(tf.nest.flatten(parts)[0])
            split_at = int(count * (1 - split))
            arguments["validation_data"] = tf.nest.map_structure(lambda a: a[split_at:], parts)
            parts = tf.nest.map_structure(lambda a: a[:split_at], parts)
        seed = None
        if arguments.get("shuffle", True):
            drawn = {"seed": np.random.randint(0, 2**31 - 1, (), "int32")}
            seed = int(workers.communicator.broadcast(drawn, "seed")["seed"])
        batch_size = integer("batch_size", arguments.pop("batch_size", None) or 32, 1)
        ordered = data.TrainingArrays(parts, batch_size, rank, size, seed)
        arguments["x"] = ordered.batches
        orders.append(ordered)
    arguments["shuffle"] = False  # the data is shuffled already
    held_out = arguments.get("validation_data")
    if held_out is not None:
        batch_size = arguments.pop("validation_batch_size", None) or 32
        arguments["validation_data"] = _own(held_out, batch_size, rank, size)
    if not workers.leads:
        arguments["verbose"] = 0
    arguments["callbacks"] = _callbacks(model, learned, arguments.get("callbacks"), orders)


def share_evaluation(workers: Workers, arguments: dict[str, Any]) -> None:
    """Change the arguments of `evaluate` in place to this worker's share of the data."""
    communicator = workers.communicator
    parts = (arguments.get("x"), arguments.pop("y", None), arguments.pop("sample_weight", None))
    all_data = parts[0] if isinstance(parts[0], tf.data.Dataset) else parts
    batch_size = arguments.pop("batch_size", None) or 32
    arguments["x"] = _own(all_data, batch_size, communicator.rank, communicator.size)
    if not workers.leads:
        arguments["verbose"] = 0


def _same_length(
    x: tf.data.Dataset, arguments: dict[str, Any], communicator: Communicator
) -> tf.data.Dataset:
    """Truncate the workers' own datasets to the same number of batches.

    The length must be known: otherwise Keras detects the end of the data by a failing step, after
    which the step counts of the workers' optimizers may differ.
    """
    count = int(x.cardinality())
    counts = [int(message) for message in communicator.messages(str(count).encode(), "lengths")]
    if count < 0 and not arguments.get("steps_per_epoch"):
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
    """`(x, y)` or `(x, y, sample_weight)` of arrays, with lists of inputs turned into tuples."""
    present = [part for part in parts if part is not None]
    arrays = tf.nest.flatten(present)
    if not all(isinstance(array, (np.ndarray, tf.Tensor)) for array in arrays):
        raise ValueError(
            f"`{name}` must be arrays or a `tf.data.Dataset` where several workers train, to be "
            f"divided among them. Received: {type(parts[0]).__name__}"
        )
    return tuple(tuple(part) if isinstance(part, list) else part for part in present)


def _by_class(parts: tuple[Any, ...], weights: Mapping[int, float]) -> tuple[Any, ...]:
    """The data with its sample weights multiplied by the weight of each example's class."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(parts)
    labels = tf.convert_to_tensor(y)
    if len(labels.shape) > 1:
        sparse = labels.shape[-1] == 1
        labels = labels[..., 0] if sparse else tf.argmax(labels, -1)
    table = np.ones(max(weights) + 1, "float32")
    table[list(weights)] = list(weights.values())
    labels = tf.cast(labels, "int32")
    known = labels < len(table)
    weight = tf.where(known, tf.gather(table, tf.where(known, labels, 0)), 1.0)
    return x, y, weight if sample_weight is None else weight * sample_weight


def _callbacks(
    model: Learner, learned: Consolidation, callbacks: Any, orders: list[keras.callbacks.Callback]
) -> Any:
    """The argument `callbacks` of `fit` with those that several workers need."""
    first, last = [*orders, _Averages(model, learned.workers)], _Together(model, learned)
    if isinstance(callbacks, keras.callbacks.CallbackList):
        for callback in (*first, last):
            callbacks.append(callback)
        return callbacks
    if isinstance(callbacks, (list, tuple)):
        listed = list(callbacks)
    else:
        listed = [callbacks] if callbacks else []
    if not learned.workers.leads:
        listed = [
            _Reader(c) if isinstance(c, keras.callbacks.BackupAndRestore) else c for c in listed
        ]
        listed = [callback for callback in listed if not isinstance(callback, _WRITERS)]
    return [*first, *listed, last]


class _Together(keras.callbacks.Callback):
    """Starts all workers from the same model, and ends training on all of them if one fails.

    It is the last callback, as others may change the model at the beginning of training.
    """

    def __init__(self, model: Learner, learned: Consolidation):
        super().__init__()
        self._trained = model  # `CallbackList.append` does not set a callback's model
        self._learned = learned

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        _start_alike(self._trained, self._learned)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._learned.workers.raise_if_failed()


class _Averages(keras.callbacks.Callback):
    """Averages the moving statistics of layers before the model is evaluated or saved."""

    def __init__(self, model: Learner, workers: Workers):
        super().__init__()
        self._trained, self._workers = model, workers

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        _average_moving(self._trained, self._workers)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        _average_moving(self._trained, self._workers)


class _Reader(keras.callbacks.Callback):
    """Restores from a `BackupAndRestore` without writing backups."""

    def __init__(self, backup: Any):
        super().__init__()
        self.backup = backup

    def set_model(self, model: Any) -> None:
        self.backup.set_model(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.backup.on_train_begin(logs)


def metrics_result(model: Learner, workers: Workers, result: Callable[[], Any]) -> dict[str, float]:
    """Metrics over the examples of all workers.

    Args:
        model: The model; its metrics are summed over the workers while `result` is called.
        workers: The workers.
        result: Function that returns the metrics by name.
    """
    variables = [v for metric in model.metrics for v in metric.variables]
    before = [np.asarray(v) for v in variables]
    totals = workers.communicator.total(before, "metrics")
    for variable, total in zip(variables, totals, strict=True):
        variable.assign(total.astype(variable.dtype))
    try:
        return {name: float(np.asarray(v)) for name, v in result().items()}
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def _start_alike(model: Learner, learned: Consolidation) -> None:
    """Copy the weights and the state of rank 0 to all workers.

    Raises:
        RuntimeError: If a worker has built a different model; names its rank and the difference.
    """
    workers = learned.workers
    workers.forget_failures()
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    _compare(workers, _built(model, learned))
    values = {f"w/{path}": v for path, v in by_path(model).items()}
    values |= {f"o/{i}": v for i, v in enumerate(model.optimizer.variables)}
    arrays = {name: np.asarray(v) for name, v in values.items()}
    if workers.differs(arrays, "digests"):
        first = workers.communicator.broadcast(arrays, "weights")
        for name, variable in values.items():
            variable.assign(first[name])
    state = {} if workers.sharded else learned.save(model)
    if workers.differs(state or {"tasks": np.array(learned.tasks_learned)}, "states"):
        if workers.sharded:
            raise RuntimeError(
                "Workers have learned different tasks. With `sharded=True` load the saved "
                "model on each of them."
            )
        first = workers.communicator.broadcast(state, "consolidation")
        if first:
            learned.load(model, first)


def _average_moving(model: Learner, workers: Workers) -> None:
    """Average the moving statistics of layers, such as BatchNormalization's, over the workers."""
    moving = [
        v
        for v in model.non_trainable_variables
        if keras.backend.is_float_dtype(v.dtype) and not v.trainable
    ]
    totals = workers.communicator.total([np.asarray(v) for v in moving], "moving")
    for variable, total in zip(moving, totals, strict=True):
        variable.assign((total / workers.communicator.size).astype(variable.dtype))


def _compare(workers: Workers, built: dict[str, Any]) -> None:
    """Raise `RuntimeError` with the ranks of workers whose model differs from that of most."""
    messages = workers.communicator.messages(json.dumps(built, sort_keys=True).encode(), "built")
    models = [json.loads(message) for message in messages]
    for part in built:
        texts = [json.dumps(built_model.get(part), sort_keys=True) for built_model in models]
        usual, _ = Counter(texts).most_common(1)[0]
        odd = [rank for rank, text in enumerate(texts) if text != usual]
        if odd:
            other = texts.index(usual)
            raise RuntimeError(
                f"Worker {', '.join(map(str, odd))} has built another model than worker "
                f"{other}: its {part} are {_difference(texts[odd[0]], usual)}. All workers "
                "must run the same script."
            )


def _built(model: Learner, learned: Consolidation) -> dict[str, Any]:
    """The variables and settings that must be the same on all workers, as JSON values."""
    serialize = keras.saving.serialize_keras_object
    trainable = {id(v) for v in model.trainable_variables}
    settings = {
        "regularizer": learned.regularizer,
        "fisher": learned.fisher,
        "grouping": learned.grouping,
        "optimizer": model.optimizer,
    }
    built = {
        "variables": {
            path: [list(v.shape), str(v.dtype), id(v) in trainable]
            for path, v in by_path(model).items()
        },
        "settings": {
            name: None if value is None else serialize(value) for name, value in settings.items()
        }
        | {
            "sharded": learned.workers.sharded,
            "steps_per_execution": model.steps_per_execution,
        },
    }
    # `default=str` for learning rates that are NumPy numbers or the like.
    return json.loads(json.dumps(built, default=str))


def _difference(odd: str, usual: str) -> str:
    """Text with the first three entries in which two JSON objects differ."""
    a, b = json.loads(odd), json.loads(usual)
    differing = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    parts = [f"{key!r}: {a.get(key)} where others have {b.get(key)}" for key in differing[:3]]
    return "; ".join(parts)
