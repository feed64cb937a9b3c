"""Communication by Horovod; `launch.py` is the only other module that imports it."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from keras_dwd.communicator import INSTALL, Communicator

# Seconds after which Horovod warns of a stalled worker, ends the job, and gives up connecting.
_DEFAULTS = {
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "15",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "40",
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "40",
}
_NAMESPACE = "keras_dwd"


class HorovodCommunicator(Communicator):
    """Communication of the workers that `horovodrun`, `mpirun` or `keras-dwd run` started.

    Each collective operation has a name, so that Horovod detects one in which not all workers take
    part. By default Horovod warns of a stalled worker after 15 seconds and ends the job after 40.
    Set the environment variables `HOROVOD_STALL_CHECK_TIME_SECONDS` and
    `HOROVOD_STALL_SHUTDOWN_TIME_SECONDS` to longer times if a worker may write files for longer
    while the others wait.

    Args:
        compression: `"fp16"` sends gradients and Fisher information in half precision. This halves
            the bytes sent; results differ from those of one worker in the third digit.

    Raises:
        ModuleNotFoundError: If Horovod is not installed.

    Example:

    ```python
    model.compile("adam", loss, communicator=HorovodCommunicator("fp16"))
    ```
    """

    def __init__(self, compression: Literal["fp16"] | None = None):
        if compression not in (None, "fp16"):
            raise ValueError(f"`compression` must be 'fp16' or None. Received: {compression!r}")
        try:
            import horovod.tensorflow as hvd
        except ImportError as error:
            raise ModuleNotFoundError(INSTALL) from error
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        hvd.init()
        self._hvd: Any = hvd
        self.compression = compression
        self.rank = hvd.rank()
        self.size = hvd.size()
        self._graphs: dict[str, Any] = {}

    def mean(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """The mean over the workers of each tensor, by one fused allreduce."""
        if not tensors:
            return []
        supported = [tf.cast(t, "float32") if t.dtype == tf.bfloat16 else t for t in tensors]
        kind = self._hvd.Compression.fp16 if self.compression else self._hvd.Compression.none
        average = {"op": self._hvd.Average, "compression": kind}
        means = self._named(self._hvd.grouped_allreduce, name, **average)(supported)
        return [tf.cast(mean, t.dtype) for mean, t in zip(means, tensors, strict=True)]

    def gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The tensors of all workers, concatenated by rank along the first axis."""
        return self._named(self._hvd.allgather, name)(tensor)

    def _named(self, collective: Any, name: str, **settings: Any) -> Any:
        """A collective operation with a name; wrapped in a graph, as eager operations have none."""

        def call(tensors: Any) -> Any:
            full = f"{_NAMESPACE}.{name}"
            return collective(tensors, name=full, ignore_name_scope=True, **settings)

        if not tf.executing_eagerly():
            return call
        if name not in self._graphs:
            self._graphs[name] = tf.function(call, reduce_retracing=True, autograph=False)
        return self._graphs[name]

    def messages(self, mine: bytes, name: str) -> list[bytes]:
        """The messages of all workers, by rank."""
        lengths = np.asarray(self.gather(tf.constant([len(mine)], "int64"), f"{name}.lengths"))
        if not lengths.any():
            return [b""] * self.size
        sent = tf.constant(np.frombuffer(mine, "uint8"))
        gathered = np.asarray(self.gather(sent, name)).tobytes()
        ends = np.cumsum(lengths)
        return [gathered[end - n : end] for end, n in zip(ends, lengths, strict=True)]

    def total(self, arrays: Sequence[np.ndarray], name: str) -> list[np.ndarray]:
        """The sum over the workers of each array, in float64."""
        if not arrays:
            return []
        sent = [tf.constant(np.asarray(array, "float64")) for array in arrays]
        sums = self._named(self._hvd.grouped_allreduce, name, op=self._hvd.Sum)(sent)
        return [np.asarray(array_sum) for array_sum in sums]


def detect_communicator() -> Communicator:
    """The communicator of this process: Horovod if it is one of several workers, else local."""
    sizes = (os.environ.get(name, "1") for name in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if any(size.isdigit() and int(size) > 1 for size in sizes):
        return HorovodCommunicator()
    return Communicator()
