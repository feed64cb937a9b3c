"""How importances are distributed: histograms over powers of ten, in all and by group."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from keras_dwd.groupings.assignment import Responsibilities, assignment_of
from keras_dwd.precision.block import Block
from keras_dwd.variables import Arrays

PER_DECADE = 4
"""Bins of a histogram per power of ten."""

# Bins per power of ten by which the share of directions is found, and the range of powers.
_FINE, _LOWEST, _HIGHEST = 100, -46, 40
_BINS = (_HIGHEST - _LOWEST) * _FINE


def histograms(blocks: Mapping[str, Block], assignments: Arrays) -> dict[str, Any]:
    """Histograms of the importances of a task by group.

    Args:
        blocks: The Fisher information of the task, by block.
        assignments: The group of each importance, by block; blocks without one are left out.

    Returns:
        `per_decade`, the bins per power of ten; `first`, the number of the first bin, where bin i
        begins at `10 ** (i / per_decade)`; and `counts`, by the number of each group as text.
    """
    counts: dict[int, np.ndarray] = {}
    for key in assignments.keys() & blocks.keys():
        assignment = assignment_of(assignments[key])
        importances = np.asarray(blocks[key].importances())
        groups = assignment.over(importances.shape)
        bins = _bins(importances) // (_FINE // PER_DECADE)
        for group in range(assignment.count):
            if isinstance(assignment, Responsibilities):
                members = groups[..., group] / 255
            else:
                members = groups == group
            weights = np.where(importances > 0, members, 0).ravel()
            if weights.any():
                bin_counts = np.bincount(bins.ravel(), weights, _BINS * PER_DECADE // _FINE)
                counts[group] = counts.get(group, 0) + bin_counts
    used = np.flatnonzero(sum(counts.values())) if counts else np.zeros(0, int)
    if not len(used):
        return {"per_decade": PER_DECADE, "first": 0, "counts": {}}
    span = slice(used[0], used[-1] + 1)
    return {
        "per_decade": PER_DECADE,
        "first": int(used[0]) + _LOWEST * PER_DECADE,
        "counts": {
            str(group): [round(float(n), 2) for n in counts[group][span]]
            for group in sorted(counts)
        },
    }


def concentration(importances: Iterable[np.ndarray], share: float = 0.9) -> float:
    """The smallest share of directions that have `share` of the sum of all importances.

    It is found to about a hundredth of itself, without sorting the directions.
    """
    counts, sums, directions = np.zeros(_BINS), np.zeros(_BINS), 0
    for array in importances:
        values = np.asarray(array, "float64").ravel()
        bins = _bins(values)
        directions += values.size
        counts += np.bincount(bins, values > 0, _BINS)
        sums += np.bincount(bins, np.maximum(values, 0), _BINS)
    if not sums.any():
        return 0.0
    counts, sums = counts[::-1], sums[::-1]  # the most important first
    reached = np.cumsum(sums)
    last = int(np.searchsorted(reached, share * reached[-1]))
    missing = share * reached[-1] - (reached[last] - sums[last])
    within = counts[last] * missing / sums[last] if sums[last] else 0.0
    return float((counts[:last].sum() + within) / directions)


def _bins(importances: np.ndarray) -> np.ndarray:
    """The number of the fine bin of each importance."""
    values = np.maximum(np.asarray(importances, "float64"), 10.0**_LOWEST)
    indices = np.floor((np.log10(values) - _LOWEST) * _FINE)
    return np.clip(indices, 0, _BINS - 1).astype("int64")
