"""The package works on Keras' TensorFlow backend only: say so before anything else fails."""

import os

_MESSAGE = (
    "keras_dwd needs Keras on the TensorFlow backend, but the backend is {backend!r}. "
    "Set the environment variable KERAS_BACKEND=tensorflow before importing Keras."
)


def require_tensorflow_backend() -> None:
    """Raise unless Keras runs on TensorFlow.

    Raises:
        ImportError: Under any other backend. The environment variable is looked at first because
            importing Keras fails with an unrelated message where that backend is not installed.
    """
    requested = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if requested != "tensorflow":
        raise ImportError(_MESSAGE.format(backend=requested))
    try:
        import keras
    except ModuleNotFoundError as error:  # of the backend that `keras.json` names
        if error.name not in ("jax", "torch", "openvino"):
            raise
        raise ImportError(_MESSAGE.format(backend=error.name)) from error

    if keras.config.backend() != "tensorflow":
        raise ImportError(_MESSAGE.format(backend=keras.config.backend()))


require_tensorflow_backend()
