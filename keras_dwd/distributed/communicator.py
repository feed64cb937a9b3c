"""What workers tell each other: one interface, for one worker or for several."""

import os
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
    """The interface; by itself one worker that is alone.

    Each call is made by all workers, in the same order and with the same name.

    Attributes:
        rank: Which worker this is, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    # In the graph of a training step.

    def mean(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """The mean over the workers of each tensor, of the same shapes on all of them."""
        return list(tensors)

    def gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The tensors of all workers, by rank, along the first axis."""
        return tensor

    # Outside of it.

    def messages(self, mine: bytes, name: str) -> list[bytes]:
        """What each worker has to say, by rank."""
        return [mine]

    def total(self, arrays: Sequence[np.ndarray], name: str) -> list[np.ndarray]:
        """The sum over the workers of each array, in float64."""
        return [np.asarray(array, "float64") for array in arrays]

    # What follows from these.

    def from_first(self, arrays: Mapping[str, np.ndarray] | None, name: str) -> Arrays:
        """The arrays of rank 0, whatever the others have."""
        if self.size == 1:
            return dict(arrays or {})
        mine = _packed(arrays or {}) if self.rank == 0 else b""
        return load(self.messages(mine, name)[0])

    def of_all(self, arrays: Mapping[str, np.ndarray], name: str) -> Arrays:
        """The arrays of all workers, each of which has others."""
        found: Arrays = {}
        for message in self.messages(_packed(arrays), name):
            found |= load(message)
        return found

    @contextmanager
    def together(self, name: str) -> Iterator[None]:
        """What fails on one worker within this fails on all: none waits for it forever.

        There must be no other call of this class within.

        Raises:
            RuntimeError: On workers where nothing failed, with the rank and the error of one that
                did.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as failed:
            error = failed
        said = b"" if error is None else f"{type(error).__name__}: {error}".encode()
        every = self.messages(said, name)
        if error is not None:
            raise error
        for rank, message in enumerate(every):
            if message:
                raise RuntimeError(f"Worker {rank} failed with {message.decode()}")


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def here() -> Communicator:
    """That of the environment: `horovodrun` and `mpirun` say that there are other workers."""
    sizes = (os.environ.get(name, "1") for name in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if any(size.isdigit() and int(size) > 1 for size in sizes):
        from keras_dwd.distributed.horovod import HorovodCommunicator

        return HorovodCommunicator()
    return Communicator()
