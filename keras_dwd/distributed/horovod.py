"""Workers that Horovod starts and connects; nothing else in the package imports it."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from keras_dwd.checks import integer
from keras_dwd.distributed.communicator import INSTALL, Communicator

# A worker that others wait for is named after so many seconds, and the job ended after so many.
_DEFAULTS = {
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "15",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "40",
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "40",
}
_NAMESPACE = "keras_dwd"
# The others have so many seconds to say what they know and end by themselves.
_GRACE = 10.0
# As much of what a failed worker wrote is shown, in bytes.
_LAST = 2000
# What Horovod says where another worker has failed.
_ECHO = "Horovod has been shut down"


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
        self._graphs: dict[str, Any] = {}

    def mean(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """One fused allreduce of all of them."""
        if not tensors:
            return []
        known = [tf.cast(t, "float32") if t.dtype == tf.bfloat16 else t for t in tensors]
        kind = self._hvd.Compression.fp16 if self.compression else self._hvd.Compression.none
        average = {"op": self._hvd.Average, "compression": kind}
        means = self._named(self._hvd.grouped_allreduce, name, **average)(known)
        return [tf.cast(mean, t.dtype) for mean, t in zip(means, tensors, strict=True)]

    def gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The tensors of all workers, by rank, along the first axis."""
        return self._named(self._hvd.allgather, name)(tensor)

    def _named(self, collective: Any, name: str, **settings: Any) -> Any:
        """A collective under its name, which outside of a graph an operation does not have."""

        def call(given: Any) -> Any:
            full = f"{_NAMESPACE}.{name}"
            return collective(given, name=full, ignore_name_scope=True, **settings)

        if not tf.executing_eagerly():
            return call
        if name not in self._graphs:
            self._graphs[name] = tf.function(call, reduce_retracing=True)
        return self._graphs[name]

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
        sent = [tf.constant(np.asarray(array, "float64")) for array in arrays]
        sums = self._named(self._hvd.grouped_allreduce, name, op=self._hvd.Sum)(sent)
        return [np.asarray(each) for each in sums]


def is_worker() -> bool:
    """Whether this process is one of several workers."""
    return "HOROVOD_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ


def launch(command: Sequence[str], workers: int, environment: Mapping[str, str] = {}) -> int:
    """Run a command as several workers on this machine, and wait for them.

    Rank 0 has the terminal. For several machines use `horovodrun`.

    Args:
        command: With its arguments.
        workers: How many, 1 or more.
        environment: More variables for all of them.

    Returns:
        0 if all ended well, otherwise the exit code of the first that did not (128 + n where signal
        n ended it).

    Raises:
        ModuleNotFoundError: If Horovod is not installed.
    """
    integer("workers", workers, 1)
    try:
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
        from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer
    except ImportError as error:
        raise ModuleNotFoundError(INSTALL) from error
    slots = get_host_assignments(parse_hosts(f"localhost:{workers}"), workers)
    server = RendezvousHTTPServer(("127.0.0.1", 0), RendezvousHandler, 0)
    server.init(slots)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    common = create_run_env_vars("127.0.0.1", [loopback], server.server_port)
    processes: list[subprocess.Popen[bytes]] = []
    with _ended_with_this(), tempfile.TemporaryDirectory(prefix="keras_dwd_") as folder:
        written = [Path(folder) / str(rank) for rank in range(workers)]
        try:
            for slot in slots:
                own = {**common, **create_slot_env_vars(slot), "PYTHONUNBUFFERED": "1"}
                variables = os.environ | dict(environment) | {k: str(v) for k, v in own.items()}
                with written[slot.rank].open("wb") as output:
                    streams: dict[str, Any] = {"stdout": output, "stderr": output}
                    streams = streams if slot.rank else {}
                    processes.append(subprocess.Popen(list(command), env=variables, **streams))
            failed = _wait(processes)
        finally:
            stalled = _end(processes)
            server.shutdown()
            server.server_close()
        if failed is None:
            return 0
        rank, code = failed
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        print(f"Worker {rank} {how}; all workers have ended.", file=sys.stderr)
        for other in stalled:
            print(f"Worker {other} had stalled and was ended.", file=sys.stderr)
        for other in range(1, workers):  # rank 0 has said it itself
            said = written[other].read_bytes()[-_LAST:].decode(errors="replace")
            if processes[other].returncode and (other == rank or _ECHO not in said):
                print(f"Worker {other} wrote last:\n{said}", file=sys.stderr)
    return code if code > 0 else 128 - code


@contextmanager
def _ended_with_this() -> Iterator[None]:
    """Have the request to end this process end the workers too, rather than leave them alone."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears of it
        return

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(processes: list[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """The rank and exit code of the first that fails; `None` when all have ended well."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank, code
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _end(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for what is still there, then end it; the ranks of those that had to be."""
    deadline = time.monotonic() + _GRACE
    stalled = []
    for rank, process in enumerate(processes):
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            stalled.append(rank)
            process.kill()
            process.wait()
    return stalled
