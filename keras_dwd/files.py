"""Files that are written atomically and verified by checksums when they are read."""

import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from keras_dwd.variables import Arrays


class FileError(ValueError):
    """A file is damaged or has unexpected content. Nothing was changed.

    Example:

    ```python
    try:
        model.load_weights("model.weights.h5")
    except FileError as error:
        print(error)  # names the file and what is wrong with it; the model is as before
    ```
    """


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path to write to; on exit the file replaces `path` atomically.

    Raises:
        OSError: If the file cannot be written; a previous file at `path` is left unchanged.
    """
    number, name = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
    os.close(number)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # otherwise the renaming may be lost in a crash
    finally:
        os.close(folder)


def remove_unfinished(folder: Path, pattern: str) -> None:
    """Remove temporary files of `replaced` whose process was killed while it was writing."""
    for path in folder.glob(f".{pattern}.*.tmp"):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically: a reader sees the old file or the new one, never a part."""
    with replaced(path) as target:
        target.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileError: If the file does not hold a JSON object.
        OSError: If the file cannot be read.
    """
    try:
        content = json.loads(path.read_bytes().decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{str(path)!r} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise FileError(f"{str(path)!r} must hold a JSON object. It has {type(content).__name__}.")
    return content


def write_arrays(path: Path, arrays: Arrays, about: Any) -> None:
    """Write a `safetensors` file with arrays, the JSON-serializable `about`, and checksums."""
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    checksums = {name: checksum(array) for name, array in arrays.items()}
    metadata = {"about": json.dumps(about), "checksums": json.dumps(checksums)}
    metadata["checksum"] = _metadata_checksum(metadata)
    try:
        with replaced(path) as target:
            save_file(arrays, target, metadata)
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} cannot be written: {error}") from error


class ArrayFile:
    """A file from `write_arrays`, mapped to memory: `file[name]` reads one array.

    Args:
        path: Path of the file.

    Attributes:
        names: Names of the arrays.
        about: The argument `about` of `write_arrays`.

    Raises:
        FileError: If the file is damaged or of another kind; for an array, when it is read.
        OSError: If the file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, "numpy")
            metadata = self._file.metadata()
            intact = metadata["checksum"] == _metadata_checksum(metadata)
            self.about = json.loads(metadata["about"])
            self._checksums = json.loads(metadata["checksums"])
            self.names = list(self._file.keys())
            intact = intact and self._checksums.keys() == set(self.names)
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise FileError(f"{str(path)!r} is damaged, or no file of arrays: {error}") from None
        if not intact:
            raise self._damaged("its header")

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._checksums:
            raise FileError(f"{str(self.path)!r} has no array {name!r}.")
        array = self._file.get_tensor(name)
        if self._checksums[name] != checksum(array):
            raise self._damaged(repr(name))
        return array

    def _damaged(self, part: str) -> FileError:
        return FileError(f"{str(self.path)!r} is damaged: the checksum of {part} is another one.")


def read_arrays(path: Path) -> tuple[Arrays, Any]:
    """All arrays of a file from `write_arrays`, and its `about`; raises as `ArrayFile` does."""
    file = ArrayFile(path)
    return {name: file[name] for name in file.names}, file.about


def checksum(array: np.ndarray, before: int = 0) -> int:
    """CRC-32 of a contiguous array, including its shape and dtype.

    Args:
        array: The array.
        before: Checksum of the arrays before it, to get one checksum of several arrays.
    """
    crc = zlib.crc32(f"{array.dtype} {array.shape}".encode(), before)
    return zlib.crc32(array.reshape(-1).view("uint8").data, crc)


def _metadata_checksum(metadata: dict[str, str]) -> str:
    return f"{zlib.crc32((metadata['about'] + metadata['checksums']).encode()):08x}"


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON.")
