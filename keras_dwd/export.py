"""Atomic export of a model for inference."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_dwd.keras_private import layers_within

SAVED_MODEL = "tf_saved_model"

# The files and folders of a SavedModel.
_PARTS = {"assets", "assets.extra", "fingerprint.pb", "saved_model.pb", "variables"}


def export(
    model: keras.Model,
    filepath: str | os.PathLike[str],
    format: str = SAVED_MODEL,
    verbose: bool | None = None,
    input_signature: Any = None,
    **kwargs: Any,
) -> None:
    """Export a functional model; see `DWDModel.export` for the arguments."""
    signature = None if input_signature is None else _signature(model, input_signature)
    if format == SAVED_MODEL and kwargs:
        raise ValueError(
            f"`export` takes no other arguments for a SavedModel. Received: {sorted(kwargs)}"
        )
    with _replaced(os.fspath(filepath), format) as target:
        if format == SAVED_MODEL:
            archive = _archive(model, signature or _signature(model, model.input))
            archive.write_out(target, verbose=False)
        else:
            # Without a signature Keras would export no model that has not been called yet.
            signature = signature or [keras.tree.map_structure(_spec, model.input)]
            keras.Model.export(model, target, format, False, signature, **kwargs)
    if verbose or verbose is None:
        print(f"Saved artifact at '{filepath}'.")


@contextmanager
def _replaced(filepath: str, format: str) -> Iterator[str]:
    """A temporary path to write to; on exit the file or folder replaces `filepath`."""
    if "://" in filepath:  # not a file system that can rename a folder
        yield filepath
        return
    path = Path(os.path.realpath(filepath))
    _check(path, format)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield os.path.join(folder, path.name)
        for written in list(Path(folder).iterdir()):
            _replace(written, path.with_name(written.name))


def _check(path: Path, format: str) -> None:
    """Raise `ValueError` if what is at `path` must not be replaced."""
    if format != SAVED_MODEL:
        if path.is_dir():
            raise ValueError(
                f"`filepath` must be a file for format={format!r}. Received a folder: {str(path)!r}"
            )
        return
    # The whole folder is replaced, so it must not hold any other files of the user.
    others = {p.name for p in path.iterdir()} - _PARTS if path.is_dir() else set()
    if others or (path.exists() and not path.is_dir()):
        content = f"a folder with {sorted(others)} in it" if others else "a file"
        raise ValueError(
            "`filepath` must be a new or empty folder, or one of a SavedModel, which is then "
            f"replaced. Received {content}: {str(path)!r}"
        )


def _spec(tensor: keras.KerasTensor) -> keras.InputSpec:
    return keras.InputSpec(dtype=tensor.dtype, shape=(None, *tensor.shape[1:]), name=tensor.name)


def _signature(model: keras.Model, input_signature: Any) -> list[Any]:
    """Named `TensorSpec`s from `input_signature`, in the structure of the model's inputs."""
    specs = keras.tree.flatten(input_signature)
    fits = len(specs) == len(model.inputs) and all(
        hasattr(spec, "dtype") and tf.TensorShape(tensor.shape).is_compatible_with(spec.shape)
        for spec, tensor in zip(specs, model.inputs, strict=True)
    )
    if not fits:
        wanted = ", ".join(f"{tensor.name!r} {tuple(tensor.shape)}" for tensor in model.inputs)
        raise ValueError(
            "`input_signature` must have one `keras.InputSpec` or tensor for each input of the "
            f"model: {wanted}. Received: {input_signature}"
        )
    named = []
    for spec, tensor in zip(specs, model.inputs, strict=True):
        exact = isinstance(spec, (keras.InputSpec, tf.TensorSpec))
        shape = spec.shape if exact else (None, *spec.shape[1:])  # a tensor: any batch size
        name = spec.name if exact and spec.name else tensor.name
        named.append(tf.TensorSpec(shape, spec.dtype, name))
    return [keras.tree.pack_sequence_as(model.input, named)]


def _archive(model: keras.Model, signature: list[Any]) -> keras.export.ExportArchive:
    """An archive with the endpoint `serve` and the resources it needs, not written yet."""
    archive = keras.export.ExportArchive()
    # The endpoint tracks its variables itself; tracking the model would write them twice
    # (keras-team/keras#23553). Lookup tables must be tracked explicitly, those of layers in lists
    # too, which TensorFlow does not see.
    resources = {
        id(trackable): trackable
        for layer in (model, *layers_within(model))
        for trackable in tf.train.TrackableView(layer).descendants()
        if isinstance(trackable, tf.saved_model.experimental.TrackableResource)
    }
    for resource in resources.values():
        archive.track(resource)
    archive.add_endpoint("serve", lambda inputs: model(inputs, training=False), signature)
    return archive


def _replace(new: Path, path: Path) -> None:
    """Move a file or folder to `path`; what is there is restored if that fails."""
    if not path.is_dir():
        os.replace(new, path)
        return
    old = new.with_name(f"{new.name}.replaced")  # removed with the temporary folder
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
