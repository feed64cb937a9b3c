"""Rebuilds precision matrices from the arrays of a file and checks that the arrays fit."""

import numpy as np

from keras_dwd.precision.block import Block, Place
from keras_dwd.precision.diagonal import Diagonal
from keras_dwd.precision.factor import Factor
from keras_dwd.precision.kronecker import SIDES, Kronecker
from keras_dwd.precision.low_rank import LowRank
from keras_dwd.precision.row_kronecker import RowKronecker
from keras_dwd.variables import Arrays

NAMES = {
    "precision",
    "correction",
    *(f"{side}_{part}" for side in SIDES for part in ("vectors", "values", "rest", "rows")),
}
"""The names of the arrays that blocks consist of."""


def block_from(arrays: Arrays, place: Place, rank: int, correction: int) -> Block:
    """The block that consists of these arrays; the inverse of `Block.arrays`.

    Args:
        arrays: The arrays by name, with names from `NAMES`.
        place: The variables that the block covers.
        rank: The largest number of directions to keep per Kronecker factor.
        correction: The largest number of columns to keep in a low-rank correction.

    Raises:
        ValueError: If the arrays do not form a block over these variables.
    """
    shape = place.shapes[0]
    if "precision" in arrays:
        if arrays["precision"].shape != shape or set(arrays) - {"precision", "correction"}:
            raise ValueError("Other arrays are expected of a diagonal.")
        if "correction" not in arrays:
            return Diagonal(place.paths[0], arrays["precision"])
        template = LowRank(place.paths[0], np.zeros(shape), np.zeros((1, 1)), correction)
        return template.with_arrays(arrays)
    if "input_values" in arrays and "input_vectors" not in arrays:
        columns = arrays["output_vectors"].shape[:1] if "output_vectors" in arrays else ()
        if arrays["input_values"].shape + columns != shape:
            raise ValueError(f"Factors of other sizes than {shape}.")
        nothing = Factor(np.zeros((1, 1)), np.zeros(1), np.zeros(()))
        return RowKronecker(place.paths[0], np.zeros(1), nothing, rank).with_arrays(arrays)
    if place.form is None:
        raise ValueError(f"{place.paths[0]!r} is no matrix.")
    for side, size in zip(SIDES, (place.form.rows, place.form.shape[1]), strict=True):
        rows = np.asarray(arrays.get(f"{side}_rows", [0]))
        in_range = rows.ndim == 1 and rows.size and rows[0] >= 0 and rows[-1] < size
        if not in_range or np.any(np.diff(rows) < 1) or np.any(rows != np.floor(rows)):
            raise ValueError(f"The {side}_rows are no rising indices below {size}.")
    empty = Factor(np.zeros((1, 1)), np.zeros(1), np.zeros(()))
    return Kronecker(place.paths, place.form, empty, empty, rank).with_arrays(arrays)


def arrays_by_path(arrays: Arrays) -> dict[str, Arrays]:
    """Arrays with keys `NAME/PATH`, grouped by path and then keyed by name."""
    grouped: dict[str, Arrays] = {}
    for key, array in arrays.items():
        name, _, path = key.partition("/")
        grouped.setdefault(path, {})[name] = array
    return grouped
