"""Runs programs that a model wrote with the tests of their task, with limits.

This keeps mistakes from doing harm. It is no defence against code that is meant to do harm.
"""

import contextlib
import ctypes
import resource
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from keras_dwd.evaluation.text.tasks import Row

SECONDS = 5
"""Of processor time for each program."""

_MEMORY = 2**29
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000

# Refuses network, other processes and native code. A hook cannot be removed once it is there.
_GUARD = """
import sys
def _refuse(event, arguments, _refused=(
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
    "os.kill", "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.chown", "shutil.", "ctypes.",
    "pty.", "urllib.", "http.", "ftplib.", "smtplib.", "telnetlib.", "webbrowser.",
)):
    if event.startswith(_refused):
        raise PermissionError(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise PermissionError("open to write")
sys.addaudithook(_refuse)
"""


def passed(texts: Sequence[str], rows: Sequence[Row]) -> float:
    """pass@1: the share of programs that pass the tests of their row; rows without tests do not.

    Each is run in a process of its own, in an empty folder, with little time and memory, and
    without network.

    Reference:
        [Chen et al., 2021](https://arxiv.org/abs/2107.03374), section 2.1.
    """
    ran = [_passes(text, row) for text, row in zip(texts, rows, strict=True)]
    return sum(ran) / len(ran) if ran else 0.0


def _passes(text: str, row: Row) -> bool:
    if not row.tests:
        return False
    # Said after all tests, so that a program cannot pass by ending before them.
    word = secrets.token_hex()
    program = f"{_GUARD}\n{row.program}{text}\n{row.tests}\n"
    source = f"exec(compile({program!r}, 'program', 'exec'), {{'__name__': 'program'}})"
    source += f"\nprint({word!r})"
    with tempfile.TemporaryDirectory(prefix="keras_dwd_program_") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", source],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=3 * SECONDS,
                preexec_fn=_limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.split()[-1:] == [word.encode()]


def _limit() -> None:
    """Limit the process that is about to run the program."""
    for kind, limit in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_FSIZE, 2**20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    with contextlib.suppress(OSError, AttributeError):  # where the kernel allows it
        ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK)
