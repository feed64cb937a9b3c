"""Compares two files of results, method by method."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from keras_dwd.evaluation.metric import primary


@dataclass(frozen=True)
class Comparison:
    """A method in two files of results.

    Attributes:
        method: Name of the method.
        metric: Name of the metric.
        a: Mean of the metric in the first file.
        b: Mean of the metric in the second file.
        difference: b − a.
        p: Two-sided p of a t-test, paired by seed or Welch's; `None` for a single seed.
        paired: Whether it was paired.
    """

    method: str
    metric: str
    a: float
    b: float
    difference: float
    p: float | None
    paired: bool


def compared(
    a: Mapping[str, Any], b: Mapping[str, Any], metric: str | None = None
) -> list[Comparison]:
    """Compare the methods that two results have in common.

    Args:
        a: Results of `Experiment.compare`.
        b: Other results; if their protocol is the same, runs are paired by their seeds.
        metric: Name of the metric; by default the average of the first one.

    Raises:
        ValueError: If they have no method in common, or not the metric.
    """
    common = [name for name in a["methods"] if name in b["methods"]]
    if not common:
        raise ValueError(
            f"The results have no method in common: {', '.join(a['methods'])} and "
            f"{', '.join(b['methods'])}."
        )
    metric = metric or f"average_{primary(a['protocol']).name}"
    same = not differing(a, b)
    comparisons = []
    for name in common:
        rows = [results["methods"][name]["metrics"] for results in (a, b)]
        if not all(metric in row for row in rows):
            known = ", ".join(sorted(set(rows[0]) & set(rows[1])))
            raise ValueError(f"`metric` must be one of {known}. Received: {metric!r}")
        one, other = (np.asarray(row[metric]["per_seed"], "float64") for row in rows)
        paired = same and len(one) == len(other)
        comparisons.append(
            Comparison(
                name,
                metric,
                float(one.mean()),
                float(other.mean()),
                float(other.mean() - one.mean()),
                _p(one, other, paired),
                paired,
            )
        )
    return comparisons


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two protocols, by name; titles and texts say the same again."""
    one, other = a["protocol"], b["protocol"]
    names = [name for name in {**one, **other} if name not in ("title", "text")]
    return {
        name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)
    }


def comparison_table(comparisons: list[Comparison], factor: int = 1) -> Table:
    """A table of comparisons for the terminal.

    Args:
        comparisons: The comparisons.
        factor: What values are multiplied by: 100 for percent.
    """
    digits = 1 if factor == 100 else 3
    table = Table(title=f"{comparisons[0].metric.replace('_', ' ')}{' %' if factor == 100 else ''}")
    table.add_column("method", overflow="fold")
    for heading in ("a", "b", "b − a", "p", "test"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in comparisons:
        test = "" if each.p is None else "paired" if each.paired else "Welch"
        p = "" if each.p is None else f"{each.p:.3f}"
        values = [f"{factor * v:.{digits}f}" for v in (each.a, each.b)]
        table.add_row(each.method, *values, f"{factor * each.difference:+.{digits}f}", p, test)
    return table


def _p(one: np.ndarray, other: np.ndarray, paired: bool) -> float | None:
    if min(len(one), len(other)) < 2:
        return None
    if paired and np.ptp(other - one) == 0:  # the same difference for each seed
        return 1.0 if (one == other).all() else 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values that hardly differ
        test = (
            stats.ttest_rel(other, one) if paired else stats.ttest_ind(other, one, equal_var=False)
        )
    return float(test.pvalue) if np.isfinite(test.pvalue) else 1.0
