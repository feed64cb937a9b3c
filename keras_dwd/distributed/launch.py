"""Starts several workers on this machine and waits for them."""

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
from typing import Any

from keras_dwd.checks import integer
from keras_dwd.communicator import INSTALL

# Seconds that the other workers have, after one has failed, to report and exit.
_GRACE = 10.0


# Number of bytes shown of the end of a failed worker's output.
_LAST = 2000


# Horovod's message on workers that end because another one has failed.
_ECHO = "Horovod has been shut down"


def is_worker() -> bool:
    """Whether this process is one of several workers."""
    return "HOROVOD_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ


def launch(command: Sequence[str], workers: int, environment: Mapping[str, str] = {}) -> int:
    """Run a command in several worker processes on this machine, and wait for them.

    Only the output of rank 0 is shown. For several machines use `horovodrun`.

    Args:
        command: The command and its arguments.
        workers: Number of workers, ≥ 1.
        environment: Additional environment variables of all workers.

    Returns:
        0 if all workers succeeded, otherwise the exit code of the first that failed (128 + n if it
        was ended by signal n).

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
        outputs = [Path(folder) / str(rank) for rank in range(workers)]
        try:
            for slot in slots:
                own = {**common, **create_slot_env_vars(slot), "PYTHONUNBUFFERED": "1"}
                variables = os.environ | dict(environment) | {k: str(v) for k, v in own.items()}
                with outputs[slot.rank].open("wb") as output:
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
        for other in range(1, workers):  # the output of rank 0 is on the terminal already
            tail = outputs[other].read_bytes()[-_LAST:].decode(errors="replace")
            if processes[other].returncode and (other == rank or _ECHO not in tail):
                print(f"Worker {other} wrote last:\n{tail}", file=sys.stderr)
    return code if code > 0 else 128 - code


@contextmanager
def _ended_with_this() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit`, so that the workers are ended together with this process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(processes: list[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Wait for a worker to fail: its rank and exit code, or `None` when all have succeeded."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank, code
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _end(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for the remaining workers to exit, kill the others and return the ranks of these."""
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
