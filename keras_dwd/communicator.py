"""The interface for communication between workers, for one worker or several."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import tensorflow as tf
from safetensors.numpy import load, save

from keras_dwd.variables import Arrays

INSTALL = (
    "Several workers need Horovod, which is not installed: `python scripts/build_horovod.py` of "
    "the repository builds and installs it."
)


class Communicator:
    """The interface for communication between workers; this base class is for a single worker.

    All workers must make the same calls, in the same order and with the same names.

    Attributes:
        rank: Rank of this worker, from 0.
        size: Number of workers.

    Example:

    ```python
    class Logged(Communicator):  # a single worker that tells what it would send
        def mean(self, tensors, name):
            print(name, len(tensors))
            return super().mean(tensors, name)

    model.compile("adam", loss, communicator=Logged())
    ```
    """

    rank: int = 0
    size: int = 1

    # Can be called inside the graph of a training step.

    def mean(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """The mean over the workers of each tensor; shapes must be the same on all workers."""
        return list(tensors)

    def gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The tensors of all workers, concatenated by rank along the first axis."""
        return tensor

    # Must be called outside of graphs.

    def messages(self, mine: bytes, name: str) -> list[bytes]:
        """The messages of all workers, by rank; `mine` is the message of this worker."""
        return [mine]

    def total(self, arrays: Sequence[np.ndarray], name: str) -> list[np.ndarray]:
        """The sum over the workers of each array, in float64."""
        return [np.asarray(array, "float64") for array in arrays]

    # Implemented by the methods above.

    def broadcast(self, arrays: Mapping[str, np.ndarray] | None, name: str) -> Arrays:
        """The arrays of rank 0, on all workers."""
        if self.size == 1:
            return dict(arrays or {})
        mine = _packed(arrays or {}) if self.rank == 0 else b""
        return load(self.messages(mine, name)[0])

    def gather_dicts(self, arrays: Mapping[str, np.ndarray], name: str) -> Arrays:
        """The union of the workers' arrays, whose names must differ."""
        gathered: Arrays = {}
        for message in self.messages(_packed(arrays), name):
            gathered |= load(message)
        return gathered

    @contextmanager
    def fail_together(self, name: str) -> Iterator[None]:
        """Context manager: an error on one worker ends the block with an error on all of them.

        Without it the other workers would wait forever for the one that failed. The block must not
        call other methods of this class.

        Raises:
            RuntimeError: On workers without an error of their own; names the rank and the error of
                one that failed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as failed:
            error = failed
        mine = b"" if error is None else f"{type(error).__name__}: {error}".encode()
        messages = self.messages(mine, name)
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message:
                raise RuntimeError(f"Worker {rank} failed with {message.decode()}")


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})
