"""Writing a model for inference, as a whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

SAVED_MODEL = "tf_saved_model"

# What a SavedModel may consist of.
_PARTS = {"assets", "assets.extra", "fingerprint.pb", "saved_model.pb", "variables"}


def export(
    model: keras.Model,
    filepath: str | os.PathLike[str],
    format: str = SAVED_MODEL,
    verbose: bool | None = None,
    input_signature: Any = None,
    **kwargs: Any,
) -> None:
    """Write a functional model, see `DWDModel.export`."""
    signature = None if input_signature is None else _signature(model, input_signature)
    if format == SAVED_MODEL and kwargs:
        raise ValueError(
            f"`export` takes no other arguments for a SavedModel. Received: {sorted(kwargs)}"
        )
    with _whole(os.fspath(filepath), format) as made:
        if format == SAVED_MODEL:
            archive = _archive(model, signature or _signature(model, model.input))
            archive.write_out(made, verbose=False)
        else:
            keras.Model.export(model, made, format, False, signature, **kwargs)
    if verbose or verbose is None:
        print(f"Saved artifact at '{filepath}'.")


@contextmanager
def _whole(filepath: str, format: str) -> Iterator[str]:
    """Where to write what is to be at `filepath`, and is once all of it is written."""
    if "://" in filepath:  # not a file system that can rename a folder
        yield filepath
        return
    path = Path(os.path.realpath(filepath))
    _check(path, format)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield os.path.join(folder, path.name)
        for made in list(Path(folder).iterdir()):
            _replace(made, path.with_name(made.name))


def _check(path: Path, format: str) -> None:
    if format != SAVED_MODEL:
        if path.is_dir():
            raise ValueError(
                f"`filepath` must be a file for format={format!r}. Received a folder: {str(path)!r}"
            )
        return
    # A folder is replaced as a whole: nothing of the user's may be in it.
    others = {p.name for p in path.iterdir()} - _PARTS if path.is_dir() else set()
    if others or (path.exists() and not path.is_dir()):
        found = f"a folder with {sorted(others)} in it" if others else "a file"
        raise ValueError(
            "`filepath` must be a new or empty folder, or one of a SavedModel, which is then "
            f"replaced. Received {found}: {str(path)!r}"
        )


def _signature(model: keras.Model, given: Any) -> list[Any]:
    """What is `given` for each input, in the structure of the model's inputs and by their names."""
    specs = keras.tree.flatten(given)
    fits = len(specs) == len(model.inputs) and all(
        hasattr(spec, "dtype") and tf.TensorShape(tensor.shape).is_compatible_with(spec.shape)
        for spec, tensor in zip(specs, model.inputs, strict=True)
    )
    if not fits:
        wanted = ", ".join(f"{tensor.name!r} {tuple(tensor.shape)}" for tensor in model.inputs)
        raise ValueError(
            "`input_signature` must have one `keras.InputSpec` or tensor for each input of the "
            f"model: {wanted}. Received: {given}"
        )
    named = []
    for spec, tensor in zip(specs, model.inputs, strict=True):
        exact = isinstance(spec, (keras.InputSpec, tf.TensorSpec))
        shape = spec.shape if exact else (None, *spec.shape[1:])  # of a tensor: any batch size
        name = spec.name if exact and spec.name else tensor.name
        named.append(tf.TensorSpec(shape, spec.dtype, name))
    return [keras.tree.pack_sequence_as(model.input, named)]


def _archive(model: keras.Model, signature: list[Any]) -> keras.export.ExportArchive:
    """The endpoint `serve` and what it needs, nothing of it on the disk yet."""
    archive = keras.export.ExportArchive()
    # Variables follow from the endpoint; tracking the model would write them twice
    # (keras-team/keras#23553). Lookup tables have to be named.
    for each in tf.train.TrackableView(model).descendants():
        if isinstance(each, tf.saved_model.experimental.TrackableResource):
            archive.track(each)
    archive.add_endpoint("serve", lambda inputs: model(inputs, training=False), signature)
    return archive


def _replace(made: Path, path: Path) -> None:
    """Move a file or folder to where another may be, which is kept until the last moment."""
    if not path.is_dir():
        os.replace(made, path)
        return
    old = made.with_name(f"{made.name}.replaced")  # goes with the temporary folder
    path.rename(old)
    try:
        made.rename(path)
    except BaseException:
        old.rename(path)
        raise
