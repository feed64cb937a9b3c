"""Files that are there as a whole or not at all, and are believed only after a look at them."""

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
    """A file that is damaged, or holds something else than it should. Nothing was changed."""


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` once all of it is on the disk.

    Raises:
        OSError: If it cannot be: what was there before is there still.
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
        os.fsync(folder)  # or the name may be lost in a crash
    finally:
        os.close(folder)


def remove_unfinished(folder: Path, pattern: str) -> None:
    """Remove what a process left that was killed while it wrote such a file."""
    for path in folder.glob(f".{pattern}.*.tmp"):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half of one."""
    with replaced(path) as made:
        made.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileError: If there is none in it.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes().decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{str(path)!r} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise FileError(f"{str(path)!r} must hold a JSON object. It has {type(content).__name__}.")
    return content


def write_arrays(path: Path, arrays: Arrays, about: Any) -> None:
    """Write arrays, and what JSON can say about them, with checksums: a `safetensors` file."""
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    checksums = {name: checksum(array) for name, array in arrays.items()}
    said = {"about": json.dumps(about), "checksums": json.dumps(checksums)}
    said["checksum"] = _checksum_of(said)
    try:
        with replaced(path) as made:
            save_file(arrays, made, said)
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} cannot be written: {error}") from error


class ArrayFile:
    """What `write_arrays` wrote, mapped to memory: arrays are read when they are asked for.

    Args:
        path: Of the file.

    Attributes:
        names: Of the arrays.
        about: What is said about them.

    Raises:
        FileError: If it is another file, or not as it was written; of an array, when that is read.
        OSError: If it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, "numpy")
            said = self._file.metadata()
            whole = said["checksum"] == _checksum_of(said)
            self.about, self._checksums = json.loads(said["about"]), json.loads(said["checksums"])
            self.names = list(self._file.keys())
            whole = whole and self._checksums.keys() == set(self.names)
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise FileError(f"{str(path)!r} is damaged, or no file of arrays: {error}") from None
        if not whole:
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
    """All arrays of such a file, and what is said about them; see `ArrayFile`."""
    file = ArrayFile(path)
    return {name: file[name] for name in file.names}, file.about


def checksum(array: np.ndarray, before: int = 0) -> int:
    """A CRC-32 of a contiguous array, its shape and kind included.

    Args:
        array: The array.
        before: That of what comes before it.
    """
    found = zlib.crc32(f"{array.dtype} {array.shape}".encode(), before)
    return zlib.crc32(array.reshape(-1).view("uint8").data, found)


def _checksum_of(said: dict[str, str]) -> str:
    return f"{zlib.crc32((said['about'] + said['checksums']).encode()):08x}"


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON.")
