"""Start workers on this machine, and end all of them when one fails."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_dwd.checks import integer
from keras_dwd.distributed.communicator import INSTALL

# The others have so many seconds to say what they know and end by themselves.
_GRACE = 10.0
# As much of what a failed worker wrote is shown, in bytes.
_LAST = 2000
# What Horovod says where another worker has failed.
_ECHO = "Horovod has been shut down"


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
    with tempfile.TemporaryDirectory(prefix="keras_dwd_") as folder:
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
