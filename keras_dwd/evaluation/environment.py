"""What the package finds on this machine, for `keras-dwd info`."""

import importlib.util
import os
import sys
from typing import Any

import tensorflow as tf

from keras_dwd.evaluation.experiment import versions

# The extras of `pyproject.toml` and a module of each.
_EXTRAS = {
    "experiments": "tensorflow_datasets",
    "export": "tf2onnx",
    "horovod": "horovod",
    "plots": "matplotlib",
    "text": "keras_hub",
}


def environment() -> dict[str, Any]:
    """Versions, devices, Horovod and optional packages, as values of JSON."""
    return {
        **versions(),
        "python executable": sys.executable,
        "cores": os.cpu_count(),
        "devices": [device.name for device in tf.config.list_logical_devices()],
        "horovod": _horovod(),
        "data sets": os.environ.get("TFDS_DATA_DIR", "TFDS_DATA_DIR is not set"),
        "extras missing": [
            extra for extra, module in _EXTRAS.items() if importlib.util.find_spec(module) is None
        ],
    }


def _horovod() -> str:
    """Whether Horovod can be used, in words."""
    if importlib.util.find_spec("horovod") is None:
        return "not installed"
    try:
        import horovod
        import horovod.tensorflow as hvd
    except Exception as error:  # built for other versions, a library that is missing, …
        return f"installed, but does not work: {error}"
    built = [name for name in ("gloo", "mpi", "nccl") if getattr(hvd, f"{name}_built")()]
    return f"{horovod.__version__} with {', '.join(built) or 'nothing'}"
