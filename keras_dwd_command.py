"""The command `keras-dwd`, which hides the start-up messages of TensorFlow."""

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


def main() -> None:
    """Entry point of the command `keras-dwd`."""
    with without_noise():
        import tensorflow as tf

        tf.config.list_physical_devices()
        try:
            from keras_dwd.cli import main as run
        except ModuleNotFoundError as error:
            if error.name not in ("typer", "rich", "tensorflow_datasets"):
                raise
            sys.exit(
                f"keras-dwd: {error}. The command needs what experiments need: "
                'pip install "keras_dwd[experiments]"'
            )
    run()


if __name__ == "__main__":
    main()
