"""Workers that Horovod connects; nothing else in the package imports it."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from keras_dwd.distributed.communicator import INSTALL, Communicator

# A worker that others wait for is named after so many seconds, and the job ended after so many.
_DEFAULTS = {
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "15",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "40",
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "40",
}
_NAMESPACE = "keras_dwd"


class HorovodCommunicator(Communicator):
    """The workers of a job that `horovodrun`, `mpirun` or `keras-dwd run --workers` started.

    Every collective has a name of its own, so that one that not all workers take part in is
    recognised. Unless the environment says otherwise
    (`HOROVOD_STALL_CHECK_TIME_SECONDS`, `HOROVOD_STALL_SHUTDOWN_TIME_SECONDS`), workers
    that are waited for are named after 15 seconds, and the job ends after 40: set more where one
    of them may write a file for longer while the others wait.

    Args:
        compression: `"fp16"` sends gradients and Fisher information in half precision: half the
            bytes, and results that differ from those of one worker in the third digit.

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

    def mean(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """One fused allreduce of all of them."""
        if not tensors:
            return []
        known = [tf.cast(t, "float32") if t.dtype == tf.bfloat16 else t for t in tensors]
        kind = self._hvd.Compression.fp16 if self.compression else self._hvd.Compression.none
        means = self._hvd.grouped_allreduce(
            known,
            op=self._hvd.Average,
            compression=kind,
            name=f"{_NAMESPACE}.{name}",
            ignore_name_scope=True,
        )
        return [tf.cast(mean, t.dtype) for mean, t in zip(means, tensors, strict=True)]

    def gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The tensors of all workers, by rank, along the first axis."""
        return self._hvd.allgather(tensor, name=f"{_NAMESPACE}.{name}", ignore_name_scope=True)

    def messages(self, mine: bytes, name: str) -> list[bytes]:
        """What each worker has to say, by rank."""
        lengths = np.asarray(self.gather(tf.constant([len(mine)], "int64"), f"{name}.lengths"))
        if not lengths.any():
            return [b""] * self.size
        sent = tf.constant(np.frombuffer(mine, "uint8"))
        together = np.asarray(self.gather(sent, name)).tobytes()
        ends = np.cumsum(lengths)
        return [together[end - n : end] for end, n in zip(ends, lengths, strict=True)]

    def total(self, arrays: Sequence[np.ndarray], name: str) -> list[np.ndarray]:
        """The sum over the workers of each array, in float64."""
        if not arrays:
            return []
        sums = self._hvd.grouped_allreduce(
            [tf.constant(np.asarray(array, "float64")) for array in arrays],
            op=self._hvd.Sum,
            name=f"{_NAMESPACE}.{name}",
        )
        return [np.asarray(each) for each in sums]
