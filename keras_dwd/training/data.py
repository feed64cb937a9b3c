"""Checks of data before training changes anything, and batches from all data that `fit` takes."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.curvature.examples import arrays_in, map_arrays, part_of
from keras_dwd.curvature.likelihood import (
    check_likelihoods,
    losses_of,
    needs_labels,
    output_names,
)
from keras_dwd.keras_private import (
    KerasChangedError,
    build_before_tracing,
    class_axis,
    inputs_of_calls,
    layers_within,
)
from keras_dwd.layers.task_heads import TaskHeads
from keras_dwd.layers.task_normalization import TaskNormalization
from keras_dwd.learner import Learner
from keras_dwd.variables import Variables


def check_fit(model: Learner, arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the data in the arguments of `fit` is invalid.

    Args:
        model: A compiled model.
        arguments: The arguments of `fit` by name.
    """
    validation = arguments.get("validation_data")
    validation = validation if isinstance(validation, (tuple, list)) else (validation,)
    training = (arguments.get("x"), arguments.get("y"), arguments.get("sample_weight"))
    for prefix, data in (("", training), ("validation_data: ", validation)):
        for name, part in zip(("x", "y", "sample_weight"), data, strict=False):
            check_finite(f"{prefix}{name}", part)
        check_labels(model, data[1] if len(data) > 1 else None)


def build_state(model: Learner, arguments: Mapping[str, Any]) -> None:
    """Create the variables of metrics and optimizer before the training step is traced.

    A step that creates variables would be traced twice. Does nothing for data whose batch shapes
    are unknown without a pass over it, which is anything but arrays and `tf.data` datasets.

    Args:
        model: A compiled model.
        arguments: The arguments of `fit` by name.
    """
    x = arguments.get("x")
    batch: Any = (x, arguments.get("y"), arguments.get("sample_weight"))
    if isinstance(x, tf.data.Dataset):
        batch = x.element_spec
    elif not all(isinstance(a, (np.ndarray, tf.Tensor)) for a in arrays_in(batch[:1])):
        return
    try:
        build_before_tracing(model, tf.nest.map_structure(_with_any_batch_size, batch))
    except KerasChangedError:
        raise
    except Exception:  # invalid data: `fit` raises the error of Keras
        return


def _with_any_batch_size(array: Any) -> Any:
    """A `KerasTensor` like an array, tensor or specification, but with any batch size."""
    shape = getattr(array, "shape", None)
    if shape is None or not len(shape):
        return array
    return keras.KerasTensor((None, *shape[1:]), keras.backend.standardize_dtype(array.dtype))


def check_batch(model: Learner, x: Any, y: Any, sample_weight: Any) -> None:
    """Raise `ValueError` if a batch of data is invalid or does not fit the model."""
    check_inputs(model, x)
    if y is None and needs_labels(model):
        check_likelihoods(model, unlabelled=True)
    for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        check_finite(f"data: {name}", part)
    check_labels(model, y)


def check_finite(name: str, data: Any) -> None:
    """Raise `ValueError` if an array in the structure `data` is empty or has NaN or infinity."""
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


def check_labels(model: Learner, y: Any) -> None:
    """Raise `ValueError` if integer labels fall outside the model's outputs.

    Checks outputs with a sparse categorical cross-entropy. Without this check TensorFlow fails in
    the middle of an epoch on a CPU, and the loss becomes NaN on a GPU.
    """
    names, losses = output_names(model), losses_of(model)
    if isinstance(y, dict):
        targets = [y.get(name) for name in names]
    else:
        targets = list(y) if isinstance(y, (list, tuple)) and len(names) > 1 else [y]
    if len(targets) != len(names):  # some outputs have no loss
        return
    for name, output, loss, target in zip(names, model.outputs, losses, targets, strict=False):
        if loss is keras.losses.sparse_categorical_crossentropy:
            loss = keras.losses.SparseCategoricalCrossentropy()
        if not isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
            continue
        if loss.get_config().get("ignore_class") is not None:
            continue
        classes = output.shape[class_axis(loss)]
        if classes is None:
            continue
        for labels in _arrays(target):
            if labels.dtype.kind in "SUO" and any(isinstance(v, (str, bytes)) for v in labels.flat):
                raise ValueError(
                    "Labels must be numbers, not text: turn each class into its number, from 0 "
                    f"to {classes - 1}. Received: {labels.flat[0]!r}"
                )
            if labels.size and (labels.min() < 0 or labels.max() >= classes):
                raise ValueError(
                    f"Labels must be in [0, {classes}), the number of outputs of the model"
                    f"{f' at {name!r}' if len(names) > 1 else ''}. Received labels from "
                    f"{labels.min()} to {labels.max()}."
                )


def check_inputs(model: Learner, x: Any) -> None:
    """Raise `ValueError` if `x` does not have the shapes of the model's inputs, or is text."""
    tensors = tf.nest.flatten(x)
    nested = isinstance(x, dict) and any(isinstance(v, (dict, list, tuple)) for v in x.values())
    if isinstance(x, dict) and not nested:  # Keras matches the entries with the inputs by name
        missing = [i.name for i in model.inputs if i.name not in x]
        if missing and len(tensors) != len(model.inputs):
            raise ValueError(f"The data has no {missing[0]!r}, an input of the model.")
        return
    if len(tensors) != len(model.inputs):
        raise ValueError(
            f"The model has {len(model.inputs)} inputs, but the data has {len(tensors)} a batch."
        )
    for expected, tensor in zip(model.inputs, tensors, strict=True):
        if tensor is None:  # Keras knows whether the input is optional
            continue
        if tf.as_dtype(tensor.dtype) == tf.string != tf.as_dtype(expected.dtype):
            raise ValueError(f"The model's input {expected.name!r} must be numbers, not text.")
        want, shape = tuple(expected.shape[1:]), tuple(tensor.shape[1:])
        if shape == want or (*want, 1) == shape or want == (*shape, 1):
            continue  # Keras adds or drops a last axis of size one
        if len(shape) != len(want) or any(
            None not in (a, b) and a != b for a, b in zip(shape, want, strict=True)
        ):
            raise ValueError(
                f"Examples of shape {shape} do not fit the model's input {expected.name!r} of "
                f"shape {want}."
            )


def batches(data: Any, batch_size: int) -> Iterator[tuple[Any, Any, Any]]:
    """Yield batches `(x, y, sample_weight)` of tensors from all data that `fit` takes.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` of arrays, a batched `tf.data.Dataset`, a
            `PyDataset` or any other iterable of such batches. Without labels `(x,)` or one array,
            or `(x, None, sample_weight)`. Arrays may be sparse or ragged, and may be `None` where
            Keras allows.
        batch_size: The largest number of examples per batch; larger batches are split.
    """
    endless = (
        isinstance(data, tf.data.Dataset) and data.cardinality() == tf.data.INFINITE_CARDINALITY
    )
    if endless or (isinstance(data, keras.utils.PyDataset) and data.num_batches is None):
        raise ValueError(
            "`x` must end. Received an endless dataset: say how many batches to take, in `steps`."
        )
    if isinstance(data, (tuple, dict)) or hasattr(data, "shape"):
        data = [data]
    elif isinstance(data, keras.utils.PyDataset):
        # Iteration over a `PyDataset` itself ends at its length only in newer versions of Keras.
        # The batches are taken one at a time: `map` holds none of them.
        data = map(data.__getitem__, range(data.num_batches))
    for batch in data:
        parts = keras.utils.unpack_x_y_sample_weight(batch)
        lengths = {_length(a) for a in arrays_in(parts)}
        if len(lengths) != 1:
            raise ValueError(
                f"`x` and `y` must hold as many examples as each other. Received {sorted(lengths)}."
            )
        for start in range(0, lengths.pop(), batch_size):
            piece = partial(_piece, start=start, stop=start + batch_size)
            x, y, sample_weight = map_arrays(piece, parts)
            yield x, y, sample_weight


def examples_in(data: Any) -> int | None:
    """The number of examples in arrays, as `batches` takes them; `None` for other data."""
    if not (isinstance(data, (tuple, dict)) or hasattr(data, "shape")):
        return None
    arrays = list(arrays_in(keras.utils.unpack_x_y_sample_weight(data)))
    return _length(arrays[0]) if arrays else None


def _length(array: Any) -> int:
    """The number of examples in an array, in any form that Keras takes."""
    shape = array.shape if hasattr(array, "shape") else np.shape(array)
    if not len(shape):
        raise ValueError(
            "`data` must give arrays with one entry an example. Received single numbers, as "
            f"{array!r}: batch a dataset with `.batch(32)`, and pass labels as an array."
        )
    return int(shape[0])


def _piece(array: Any, start: int, stop: int) -> Any:
    """The examples of an array from `start` to `stop` as a tensor, sparse or ragged if it is."""
    stop = min(stop, _length(array))
    if isinstance(array, tf.SparseTensor):
        return part_of(array, start, stop - start)
    if _is_scipy(array):
        rows = array.tocsr()[start:stop].tocoo()
        indices = np.stack([rows.row, rows.col], 1).astype("int64")
        return tf.sparse.reorder(tf.SparseTensor(indices, rows.data, rows.shape))
    piece = array[start:stop]
    return piece if isinstance(piece, tf.RaggedTensor) else tf.convert_to_tensor(piece)


def _is_scipy(array: Any) -> bool:
    """Whether an array is a sparse matrix of SciPy, which need not be installed."""
    return type(array).__module__.startswith("scipy.sparse")


def _arrays(data: Any) -> list[np.ndarray]:
    """The arrays and eager tensors in a structure; other data cannot be inspected cheaply."""
    if data is None or isinstance(data, (tf.data.Dataset, keras.utils.PyDataset)):
        return []
    arrays = []
    for leaf in arrays_in(data):
        if isinstance(leaf, tf.RaggedTensor):
            leaf = leaf.flat_values
        elif isinstance(leaf, tf.SparseTensor):
            leaf = leaf.values
        elif _is_scipy(leaf):
            leaf = leaf.tocoo().data
        if isinstance(leaf, (np.ndarray, tf.Tensor)):
            arrays.append(np.asarray(leaf))
    return arrays


def check_task_ids(model: Learner, x: Any) -> None:
    """Raise `ValueError` if an array of task ids in `x` has an id that a layer per task has not."""
    per_task = [x for x in layers_within(model) if isinstance(x, (TaskHeads, TaskNormalization))]
    known = {
        id(tensor): (layer.tasks, type(layer).__name__)
        for layer in per_task
        for tensors in inputs_of_calls(layer)
        for tensor in tensors[1:]
    }
    arrays = [x.get(i.name) for i in model.inputs] if isinstance(x, dict) else tf.nest.flatten(x)
    for tensor, ids in zip(model.inputs, arrays, strict=False):
        tasks, layer = known.get(id(tensor), (0, ""))
        if not tasks or not isinstance(ids, (np.ndarray, tf.Tensor)) or not np.size(ids):
            continue
        low, high = int(np.min(ids)), int(np.max(ids))
        if low < 0 or high >= tasks:
            raise ValueError(
                f"Task ids must be in [0, {tasks}), the number of tasks of `{layer}`. Received "
                f"ids from {low} to {high} as the input {tensor.name!r}."
            )
