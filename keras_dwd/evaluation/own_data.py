"""Reads the user's own classification data: a folder of images, an `.npz` or a `.csv` file."""

import csv
import zipfile
import zlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

# Images are made as large as the first one, but no larger than this.
_LARGEST = 96
# The share of the examples to test on, where the data has none; the endings of images that Keras
# reads; the names of a label's column.
_TEST = 0.2
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
_LABELS = ("label", "class", "target")

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]


def is_own(name: str) -> bool:
    """Whether a name of a data set is a path of the user's own data."""
    return name.endswith((".npz", ".csv")) or Path(name).expanduser().is_dir()


def read(name: str) -> Arrays:
    """The user's own data in memory.

    Args:
        name: A path. A folder has a folder of images for each class, or `train` and `test` folders
            of this kind. An `.npz` file has `x` and `y`, or `x_train`, `y_train`, `x_test` and
            `y_test`; bytes are images, other numbers are taken as they are. A `.csv` file has a
            first line of names; its label is the column `label`, `class` or `target`, else the
            last; the other columns are numbers, which are standardised by the training data.

    Returns:
        `x_train`, `y_train`, `x_test`, `y_test` and the number of classes. Where the data has no
        part to test on, a fifth of each class is, drawn at random with a fixed seed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold such data.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    if path.is_dir():
        parts = _of_folder(path)
    else:
        parts = _of_npz(path) if path.suffix == ".npz" else _of_csv(path)
    for (x, y), what in zip(parts, ("training", "test"), strict=False):
        if len(x) != len(y) or not len(y) or y.ndim != 1:
            raise ValueError(
                f"{str(path)!r} must have one label for each example. Received {len(x)} examples "
                f"and labels of shape {y.shape} as {what} data."
            )
    names = np.unique(np.concatenate([y for _, y in parts]))
    (x, y), *rest = [(x, np.searchsorted(names, y).astype("int32")) for x, y in parts]
    ((x_train, y_train), (x_test, y_test)) = [(x, y), *rest] if rest else _divided(x, y)
    if path.suffix == ".csv":
        mean, deviation = x_train.mean(0), x_train.std(0)
        deviation[deviation == 0] = 1
        x_train, x_test = ((a - mean) / deviation for a in (x_train, x_test))
    if x_train.dtype != "uint8":
        x_train, x_test = (np.asarray(a, "float32") for a in (x_train, x_test))
    return x_train, y_train, x_test, y_test, len(names)


def _of_npz(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (AttributeError, EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{str(path)!r} must be a file that `numpy.savez` has written, with arrays of numbers "
            f"or text. It cannot be read as one: {error}"
        ) from None
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        parts = [(arrays[f"x_{p}"], arrays[f"y_{p}"]) for p in ("train", "test")]
    elif {"x", "y"} <= arrays.keys():
        parts = [(arrays["x"], arrays["y"])]
    else:
        raise ValueError(
            f"{str(path)!r} must have the arrays x and y, or x_train, y_train, x_test and y_test. "
            f"Received: {', '.join(sorted(arrays))}"
        )
    for x, _ in parts:
        if x.dtype.kind not in "buif" or x.ndim not in (2, 3, 4):
            raise ValueError(
                f"{str(path)!r} must have vectors or images of numbers. Received: {x.dtype} of "
                f"shape {x.shape}"
            )
    return [(x[..., None] if x.ndim == 3 else x, y) for x, y in parts]


def _of_csv(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        names, *rows = [row for row in csv.reader(file) if row] or [[]]
    lowered = [name.strip().lower() for name in names]
    label = next((lowered.index(name) for name in _LABELS if name in lowered), len(names) - 1)
    if len(names) < 2 or not rows:
        raise ValueError(f"{str(path)!r} must have a line of names, a label and a number in each.")
    values = []
    for number, row in enumerate(rows, start=2):
        try:
            values.append([float(v) for i, v in enumerate(row) if i != label])
            if len(row) != len(names):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"Line {number} of {str(path)!r} must have {len(names) - 1} numbers and a label "
                f"({names[label]!r}). Received: {','.join(row)[:60]!r}"
            ) from None
    return [(np.array(values), np.array([row[label] for row in rows]))]


def _of_folder(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    folders = sorted(p.name for p in path.iterdir() if p.is_dir())
    divided = {"train", "test"} <= set(folders)
    sides = [path / "train", path / "test"] if divided else [path]
    names = sorted(p.name for p in sides[0].iterdir() if p.is_dir())
    if len(names) < 2:
        raise ValueError(f"{str(path)!r} must have a folder of images for each class, two or more.")
    for folder in (side / name for side in sides for name in names):
        if not _images_in(folder):
            raise ValueError(
                f"{str(folder)!r} must hold images of its class, which end in "
                f"{', '.join(_IMAGES)}. It has none."
            )
    size: tuple[int, int] | None = None
    parts = []
    for side in sides:
        settings = {"class_names": names, "shuffle": False, "verbose": False}
        data = keras.utils.image_dataset_from_directory(
            side, image_size=size or _size_of(side, names), batch_size=None, **settings
        )
        try:
            images, labels = zip(*data.as_numpy_iterator(), strict=True)
        except tf.errors.InvalidArgumentError as error:
            _refuse_unreadable(side)
            raise error
        x = np.rint(np.stack(images)).clip(0, 255).astype("uint8")
        size = (x.shape[1], x.shape[2])
        parts.append((x, np.array(names)[np.stack(labels)]))
    return parts


def _size_of(side: Path, names: list[str]) -> tuple[int, int]:
    """The height and width of the first image, limited."""
    height, width = _decoded(_images_in(side / names[0])[0]).shape[:2]
    factor = min(1.0, _LARGEST / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _images_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in _IMAGES)


def _decoded(file: Path) -> tf.Tensor:
    """An image, read as `keras.utils.image_dataset_from_directory` does."""
    try:
        return tf.io.decode_image(file.read_bytes(), 3, expand_animations=False)
    except tf.errors.InvalidArgumentError:
        raise ValueError(
            f"{str(file)!r} must be an image, as its name says, or be removed. It cannot be read "
            "as one."
        ) from None


def _refuse_unreadable(folder: Path) -> None:
    """Raise `ValueError` about the first image in a folder that cannot be read."""
    for file in _images_in(folder):
        _decoded(file)


def _divided(
    x: np.ndarray, y: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Training and test data, with the same share of each class in both."""
    rng = np.random.default_rng(0)
    testing = np.zeros(len(y), bool)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        if len(members) < 2:
            raise ValueError("Each class must have two examples at least, one of them to test on.")
        testing[members[: max(1, round(_TEST * len(members)))]] = True
    return (x[~testing], y[~testing]), (x[testing], y[testing])
