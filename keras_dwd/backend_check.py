"""Checks, before anything else is imported, that Keras runs on the TensorFlow backend."""

import os

_MESSAGE = (
    "keras_dwd needs Keras on the TensorFlow backend, but the backend is {backend!r}. "
    "Set the environment variable KERAS_BACKEND=tensorflow before importing Keras."
)


def require_tensorflow_backend() -> None:
    """Raise unless Keras runs on TensorFlow.

    Raises:
        ImportError: With any other backend. The environment variable is checked first, because
            importing Keras fails with an unrelated message if the backend is not installed.
    """
    requested = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if requested != "tensorflow":
        raise ImportError(_MESSAGE.format(backend=requested))
    try:
        import keras
    except ModuleNotFoundError as error:  # the backend named in `keras.json` is not installed
        if error.name not in ("jax", "torch", "openvino"):
            raise
        raise ImportError(_MESSAGE.format(backend=error.name)) from error

    if keras.config.backend() != "tensorflow":
        raise ImportError(_MESSAGE.format(backend=keras.config.backend()))


require_tensorflow_backend()
