"""Bad data, said clearly and before anything changes."""

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.variables import Variables


def number(name: str, given: Any, low: float, high: float = np.inf, closed: bool = True) -> float:
    """`given` as a float, or `ValueError` unless it is a finite number in [low, high].

    Args:
        name: Of the argument.
        given: What was passed.
        low: Smallest value allowed.
        high: Largest value allowed.
        closed: Whether `high` itself is allowed.
    """
    valid = isinstance(given, (int, float, np.number)) and not isinstance(given, bool)
    if not (valid and np.isfinite(given) and low <= given <= high and (closed or given != high)):
        end = "]" if closed and np.isfinite(high) else ")"
        raise ValueError(f"`{name}` must be a number in [{low}, {high}{end}. Received: {given!r}")
    return float(given)


def integer(name: str, given: Any, low: int) -> int:
    """`given`, or `ValueError` unless it is an integer >= low."""
    if not isinstance(given, (int, np.integer)) or isinstance(given, bool) or given < low:
        raise ValueError(f"`{name}` must be an integer >= {low}. Received: {given!r}")
    return int(given)


def check_fit(model: keras.Model, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` on arguments of `fit` that no model can learn from.

    Args:
        model: A compiled model.
        given: The arguments by name.
    """
    held_out = given.get("validation_data")
    held_out = held_out if isinstance(held_out, (tuple, list)) else (held_out,)
    weighed = (given.get("x"), given.get("y"), given.get("sample_weight"))
    for prefix, data in (("", weighed), ("validation_data: ", held_out)):
        for name, part in zip(("x", "y", "sample_weight"), data, strict=False):
            check_finite(f"{prefix}{name}", part)
        check_labels(model, data[1] if len(data) > 1 else None)


def check_batch(model: keras.Model, x: Any, y: Any, sample_weight: Any) -> None:
    """Raise `ValueError` on a batch of data that does not fit a model."""
    check_inputs(model, x)
    for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        check_finite(f"data: {name}", part)
    check_labels(model, y)


def check_finite(name: str, data: Any) -> None:
    """Raise `ValueError` if an array in the structure `data` is empty, holds NaN or infinity."""
    if isinstance(data, tf.data.Dataset) and data.cardinality() == 0:
        raise ValueError(f"`{name}` is empty: a dataset without elements.")
    for array in _arrays(data):
        if array.size == 0:
            raise ValueError(f"`{name}` is empty: it has shape {array.shape}.")
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            bad = int(np.size(array) - np.isfinite(array).sum())
            raise ValueError(f"`{name}` must be finite. Received {bad} values that are NaN or Inf.")


def check_weights(variables: Variables) -> None:
    """Raise `ValueError` naming the variable if a value is not finite."""
    for path, variable in variables.items():
        if not np.isfinite(np.asarray(variable, "float32")).all():
            raise ValueError(
                f"The weights {path!r} are not finite: training has diverged. Nothing was changed."
            )


def output_names(model: keras.Model) -> list[str]:
    """What `compile` and `fit` call the outputs, in the order of `model.outputs`."""
    return sorted(model.output) if isinstance(model.output, dict) else model.output_names


def losses_of(model: keras.Model) -> list[Any]:
    """The loss of each output, in the order of `model.outputs`; `None` where it has none."""
    loss: Any = model.loss
    if isinstance(loss, dict):
        found = [loss.get(name) for name in output_names(model)]
    else:
        found = list(loss) if isinstance(loss, (list, tuple)) else [loss]
    found += [found[-1] if len(found) == 1 else None] * (len(model.outputs) - len(found))
    return [keras.losses.get(each) if isinstance(each, str) else each for each in found]


def check_labels(model: keras.Model, y: Any) -> None:
    """Raise `ValueError` if integer labels fall outside the model's outputs.

    On a CPU TensorFlow would fail in the middle of an epoch, on a GPU the loss turns NaN.
    Applies to outputs with a sparse categorical cross-entropy.
    """
    names, losses = output_names(model), losses_of(model)
    if isinstance(y, dict):
        given = [y.get(name) for name in names]
    else:
        given = list(y) if isinstance(y, (list, tuple)) and len(names) > 1 else [y]
    if len(given) != len(names):  # some outputs have no loss
        return
    for name, output, loss, part in zip(names, model.outputs, losses, given, strict=False):
        if loss is keras.losses.sparse_categorical_crossentropy:
            loss = keras.losses.SparseCategoricalCrossentropy()
        if not isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
            continue
        if loss.get_config().get("ignore_class") is not None:
            continue
        classes = output.shape[loss._fn_kwargs.get("axis", -1)]
        if classes is None:
            continue
        for labels in _arrays(part):
            if labels.size and (labels.min() < 0 or labels.max() >= classes):
                raise ValueError(
                    f"Labels must be in [0, {classes}), the number of outputs of the model"
                    f"{f' at {name!r}' if len(names) > 1 else ''}. Received labels from "
                    f"{labels.min()} to {labels.max()}."
                )


def check_inputs(model: keras.Model, x: Any) -> None:
    """Raise `ValueError` if `x` does not have the shapes of the model's inputs, or is no number."""
    if isinstance(x, dict):  # matched by name, which Keras does; the order says nothing
        missing = [i.name for i in model.inputs if i.name not in x]
        if missing and len(x) != len(model.inputs):
            raise ValueError(f"The data has no {missing[0]!r}, an input of the model.")
        return
    given = tf.nest.flatten(x)
    if len(given) != len(model.inputs):
        raise ValueError(
            f"The model has {len(model.inputs)} inputs, but the data has {len(given)} a batch."
        )
    for expected, tensor in zip(model.inputs, given, strict=True):
        if tf.as_dtype(tensor.dtype) == tf.string != tf.as_dtype(expected.dtype):
            raise ValueError(f"The model's input {expected.name!r} must be numbers, not text.")
        want, shape = tuple(expected.shape[1:]), tuple(tensor.shape[1:])
        if shape == want or (*want, 1) == shape or want == (*shape, 1):
            continue  # Keras adds or drops a last axis of one
        if len(shape) != len(want) or any(
            None not in (a, b) and a != b for a, b in zip(shape, want, strict=True)
        ):
            raise ValueError(
                f"Examples of shape {shape} do not fit the model's input {expected.name!r} of "
                f"shape {want}."
            )


def batches(data: Any, batch_size: int) -> Iterator[tuple[Any, Any, Any]]:
    """`(x, y, sample_weight)` tensors from all that `fit` takes, `batch_size` at the most.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` of arrays, a batched `tf.data.Dataset`, a
            `PyDataset` or any other iterable of such batches.
        batch_size: Larger batches are split.
    """
    endless = (
        isinstance(data, tf.data.Dataset) and data.cardinality() == tf.data.INFINITE_CARDINALITY
    )
    if endless or (isinstance(data, keras.utils.PyDataset) and data.num_batches is None):
        raise ValueError("`data` must end. Received an endless dataset: use `take(steps)`.")
    if isinstance(data, tuple):
        data = [data]
    for batch in data:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        if y is None:
            raise ValueError(
                "`data` must give (x, y) or (x, y, sample_weight). Received inputs without labels."
            )
        parts = (x, y) if sample_weight is None else (x, y, sample_weight)
        lengths = {int(np.shape(a)[0]) for a in tf.nest.flatten(parts)}
        if len(lengths) != 1:
            raise ValueError(
                f"`data` must hold as many labels as examples. Received {sorted(lengths)}."
            )
        for start in range(0, lengths.pop(), batch_size):
            piece = tf.nest.map_structure(
                lambda a, start=start: tf.convert_to_tensor(a[start : start + batch_size]), parts
            )
            yield (*piece, None) if sample_weight is None else piece


def _arrays(data: Any) -> list[np.ndarray]:
    """The arrays and eager tensors in a structure; anything else cannot be looked into cheaply."""
    if data is None or isinstance(data, (tf.data.Dataset, keras.utils.PyDataset)):
        return []
    leaves = tf.nest.flatten(data)
    return [np.asarray(a) for a in leaves if isinstance(a, (np.ndarray, tf.Tensor))]
