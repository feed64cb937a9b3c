"""Files that are there as a whole, or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced(path: Path, mode: str = "w") -> Iterator[Any]:
    """A file to write, which takes the place of `path` once all of it is on the disk."""
    encoding = None if "b" in mode else "utf-8"
    with tempfile.NamedTemporaryFile(
        mode,
        dir=path.parent,
        prefix=f".{path.name}.",
        suffix=".tmp",
        delete=False,
        encoding=encoding,
    ) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half of one."""
    with replaced(path) as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")
