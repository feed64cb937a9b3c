"""The arguments of `consolidate` as data for the pass at a boundary."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import integer
from keras_dwd.learner import Learner

_HOW = "Pass `consolidate(x, y)`, or a dataset of batches."


def data_of(model: Learner, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
    """The arguments of `fit` as one argument for `batches`.

    Args:
        model: The model, whose inputs tell a list of inputs from `[x, y]`.
        x: Inputs, or anything that may have the labels in it.
        y: Labels, if `x` has none. Without labels, these are drawn from the model.
        sample_weight: A weight for each example, with `x` as inputs.

    Returns:
        `(x, y)`, `(x, y, sample_weight)` or `(x,)`, or an iterable of such batches. `y` may be
        `None` where there are weights.

    Raises:
        ValueError: If labels or weights are given twice or without inputs, or if `x` is ambiguous.
    """
    for name, argument in (("y", y), ("sample_weight", sample_weight)):
        if argument is None:
            continue
        if x is None:
            raise ValueError(f"`{name}` was given without `x`.")
        if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)) or _is_iterator(x):
            what = "labels" if name == "y" else "weights"
            raise ValueError(
                f"`{name}` must not be given with `x` of type {type(x).__name__}, which has to "
                f"give the {what} with the inputs."
            )
    if y is not None:
        return _numpy((x, y) if sample_weight is None else (x, y, sample_weight))
    if _are_inputs(model, x):
        if isinstance(x, list) and not tf.nest.is_nested(model.input):
            (x,) = x
        return _numpy((x,) if sample_weight is None else (x, None, sample_weight))
    if sample_weight is not None:
        raise ValueError(
            "`sample_weight` was given beside inputs and labels in one argument. Pass "
            "`consolidate(x, y, sample_weight)`."
        )
    if isinstance(x, list):
        return _of_list(model, x)
    if isinstance(x, tuple):
        return _numpy(x)
    if isinstance(x, tf.data.Dataset):
        _check_batched(model, x.element_spec)
    elif isinstance(x, (str, bytes)) or not isinstance(x, (Iterable, keras.utils.PyDataset)):
        raise ValueError(f"`x` must be arrays or a dataset of batches. {_HOW} Received: {x!r}")
    return x


def first_batches(data: Any, steps: int | None) -> Any:
    """The first batches of what `data_of` returns; all of it if `steps` is `None`.

    Raises:
        ValueError: If `steps` is given with arrays.
    """
    if steps is None:
        return data
    steps = integer("steps", steps, 1)
    if data is None or isinstance(data, (tuple, dict)) or hasattr(data, "shape"):
        raise ValueError(
            "`steps` is the number of batches to take from a dataset or generator. Received: "
            f"steps={steps} with {'no data' if data is None else 'arrays'}"
        )
    if isinstance(data, keras.utils.PyDataset):
        steps = steps if data.num_batches is None else min(steps, data.num_batches)
        return map(data.__getitem__, range(steps))
    return data.take(steps) if isinstance(data, tf.data.Dataset) else islice(data, steps)


def _are_inputs(model: Learner, x: Any) -> bool:
    """Whether this is certain to be inputs alone: an array, a dictionary, or a list as long."""
    if isinstance(x, list):
        return len(x) == len(model.inputs) and all(hasattr(part, "shape") for part in x)
    return isinstance(x, dict) or hasattr(x, "shape")


def _of_list(model: Learner, parts: list[Any]) -> Any:
    """A list of batches, or `[x, y]` where the model has one input."""
    arrays = [hasattr(part, "shape") for part in parts]
    single = len(model.inputs) == 1
    if not any(arrays) and all(isinstance(part, tuple) for part in parts):
        return parts  # batches
    if single and parts and all(arrays) and len(parts) in (2, 3):
        return _numpy(tuple(parts))
    if single and parts and all(isinstance(p, (tuple, list)) and _pair(p) for p in parts):
        return parts
    raise ValueError(
        "A list may be several inputs, inputs and labels, or batches: it does not tell which. "
        f"{_HOW}"
    )


def _pair(batch: Any) -> bool:
    """Whether this is `(x, y)` or `(x, y, sample_weight)` of arrays."""
    return len(batch) in (2, 3) and all(hasattr(part, "shape") for part in batch)


def _is_iterator(x: Any) -> bool:
    return hasattr(x, "__next__") and not hasattr(x, "shape")


def _numpy(data: Any) -> Any:
    """Data frames and series as arrays."""
    return tf.nest.map_structure(lambda a: a.to_numpy() if hasattr(a, "to_numpy") else a, data)


def _check_batched(model: Learner, spec: Any) -> None:
    """Raise `ValueError` if a dataset with these elements gives examples one by one."""
    x, y, _ = keras.utils.unpack_x_y_sample_weight(spec)
    shapes = [getattr(part, "shape", tf.TensorShape(None)) for part in tf.nest.flatten((x, y))]
    inputs = [getattr(part, "shape", tf.TensorShape(None)) for part in tf.nest.flatten(x)]
    expected = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    alike = sorted(map(str, expected)) == sorted(
        str(tuple(shape)) if shape.rank is not None else "" for shape in inputs
    )
    known = all(None not in shape for shape in expected)
    if any(shape.rank == 0 for shape in shapes) or (alike and known and any(expected)):
        raise ValueError("The dataset gives examples one by one: batch it with `.batch(32)` first.")


def verbosity(verbose: Any) -> int:
    """The argument `verbose` as a number, as Keras has it.

    Raises:
        ValueError: If it is not 0, 1, 2, `"auto"` or a boolean.
    """
    if verbose == "auto":
        return int(keras.config.is_interactive_logging_enabled())
    if verbose not in (0, 1, 2):
        raise ValueError(f"`verbose` must be 'auto', 0, 1 or 2. Received: {verbose!r}")
    return int(verbose)


def batch_size_of(*arguments: Any) -> Any:
    """The integer among arguments by position, which is a batch size, or `None`."""
    numbers = [g for g in arguments if isinstance(g, (int, np.integer)) and not isinstance(g, bool)]
    return numbers[0] if numbers else None
