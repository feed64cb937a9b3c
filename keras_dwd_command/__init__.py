"""The command `keras-dwd`: its options and help, without TensorFlow until something is run."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# Lines of standard error that contain one of these texts are hidden. Compiled code of TensorFlow
# writes them during import and device detection, regardless of the log level.
_NOISE = (
    "All log messages before absl::InitializeLog()",
    "cudart_stub.cc",
    "cpu_feature_guard.cc",
    "cuda_platform.cc",
    "To enable the following instructions:",
)


@contextmanager
def without_noise() -> Iterator[None]:
    """A context that hides TensorFlow's start-up messages on standard error.

    All other lines are printed when the context ends.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            captured.seek(0)
            for line in captured.read().decode(errors="replace").splitlines():
                if not any(noise in line for noise in _NOISE):
                    print(line, file=sys.stderr)


def needs_experiments(error: ModuleNotFoundError) -> None:
    """Exit with what to install, if a package that experiments need is missing."""
    if error.name not in ("typer", "rich", "tensorflow_datasets"):
        raise error
    sys.exit(
        f"keras-dwd: {error}. The command needs what experiments need: "
        'pip install "keras_dwd[experiments]"'
    )


def main() -> None:
    """Entry point of the command `keras-dwd`."""
    try:
        from keras_dwd_command.app import main as run
    except ModuleNotFoundError as error:
        needs_experiments(error)
    run()
