"""Image classification data sets: scikit-learn's digits and prepared tensorflow-datasets."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_dwd.evaluation import own_data
from keras_dwd.words import nearest


@dataclass(frozen=True)
class Dataset:
    """Images, or other examples, and labels in memory.

    Attributes:
        name: The argument `name` of `load`.
        x_train: Training images, `(n, height, width, channels)`, uint8, or float32 of any shape.
        y_train: Training labels `(n,)`, int32.
        x_test: Test images.
        y_test: Test labels.
        classes: Number of classes.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Load a data set from disk; nothing is downloaded.

    Args:
        name: `digits` (1,797 images of 8 × 8 pixels, part of scikit-learn), the name of a
            classification data set of tensorflow-datasets (tfds) that is prepared in `data_dir`, or
            the path of data of the user's own, see `own_data.read`.
        data_dir: Folder of prepared tfds data sets. Defaults to the environment variable
            `TFDS_DATA_DIR`, else to `~/tensorflow_datasets`.

    Raises:
        FileNotFoundError: If `data_dir` does not exist, or no file or folder of that name.
        ValueError: If the data set is not in `data_dir`, or does not consist of images and labels.
    """
    if name == "digits":
        return _digits()
    if own_data.is_own(name):
        return Dataset(name, *own_data.read(name))
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
    return _tfds(name, Path(folder).expanduser())


def _unknown(name: str, known: list[str]) -> str:
    return (
        f"Unknown data set {name!r}: it is neither prepared here nor a folder, an .npz or a .csv "
        f"file.{nearest(name, known)} Known here: {', '.join(known)}."
    )


@functools.lru_cache(maxsize=1)
def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    x = np.round(bunch.images[..., None] * (255 / 16)).astype("uint8")
    y = bunch.target.astype("int32")
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=0.2, stratify=y, random_state=0
    )
    return Dataset("digits", x_train, y_train, x_test, y_test, 10)


@functools.lru_cache(maxsize=2)
def _tfds(name: str, folder: Path) -> Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{_unknown(name, ['digits'])} Others are prepared in a data directory, but "
            f"{str(folder)!r} does not exist: set `--data-dir` or TFDS_DATA_DIR to a folder of "
            "prepared tensorflow-datasets data."
        )
    # Search the folder first: `tfds.load` tries for minutes to download what it does not find.
    versions: dict[str, list[Path]] = {}
    # NAME/VERSION, or NAME/CONFIG/VERSION.
    for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json"):
        for file in folder.glob(pattern):
            key = str(file.parent.parent.relative_to(folder))
            versions.setdefault(key, []).append(file.parent)
    if name not in versions:
        known = sorted({"digits", *versions})
        raise ValueError(
            f"{_unknown(name, known)} Data directory: {str(folder)!r}. To prepare one "
            "of the tfds catalogue: `tfds build NAME --data_dir=DIR` (with the package "
            "importlib_resources)."
        )
    import tensorflow_datasets as tfds

    numbers = {
        p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")] for p in versions[name]
    }
    newest = max(numbers, key=lambda p: numbers[p])
    builder = tfds.builder_from_directory(str(newest))
    keys = builder.info.supervised_keys
    missing = {"train", "test"} - set(builder.info.splits)
    kinds = () if keys is None else tuple(builder.info.features[key] for key in keys)
    usable = len(kinds) == 2 and not missing
    usable = usable and isinstance(kinds[0], tfds.features.Image) and None not in kinds[0].shape
    if not (usable and isinstance(kinds[1], tfds.features.ClassLabel)):
        raise ValueError(
            f"The data set {name!r} is not one of images of one size and class labels with the "
            f"splits 'train' and 'test'. Received splits {sorted(builder.info.splits)}, features "
            f"{dict(zip(keys or (), kinds, strict=False))}."
        )

    def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
        data: Any = builder.as_dataset(split=split, as_supervised=True)
        x, y = zip(*tfds.as_numpy(data), strict=True)
        return np.stack(x), np.asarray(y, "int32")

    classes = builder.info.features[keys[1]].num_classes
    return Dataset(name, *arrays("train"), *arrays("test"), classes)
