"""Reads and checks files of results, as `keras-dwd run --out` writes them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_dwd.checks import number
from keras_dwd.evaluation.methods import strength_of
from keras_dwd.evaluation.metric import primary, recorded
from keras_dwd.files import FileError, read_json

Results = str | os.PathLike[str] | Mapping[str, Any]
"""The path of a JSON file of results, or what is in it."""


def results_of(results: Results) -> Mapping[str, Any]:
    """Results, read from a file if this is a path, and checked.

    Raises:
        FileError: If these are no results.
    """
    name = "`results`"
    if isinstance(results, (str, os.PathLike)):
        name = repr(os.fspath(results))
        if not Path(results).is_file():
            raise FileNotFoundError(f"There is no file {name}.")
        results = read_json(Path(results))
    try:
        protocol = results["protocol"]
        str(protocol["title"]), str(protocol["text"])
        tasks = len(list(protocol["tasks"]))
        if not results["methods"]:
            raise ValueError("no method")
        primary(protocol)
        for name, method in results["methods"].items():
            strength_of(method["settings"])
            for metric in method["metrics"].values():
                values = [metric["mean"], metric["std"], *metric["per_seed"]]
                for value in values:
                    number("metric", value, -np.inf)
            if matrices_of(results, name).shape[1:] != (tasks, tasks):
                raise ValueError("a matrix that is not of the tasks")
        for tried in tuned_of(results).values():
            if not all(s >= 0 and np.isfinite(a) for s, a in tried.items()):
                raise ValueError("tuning")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError(
            f"{name} is no file of results, as `keras-dwd run --out` writes: {error!r}"
        ) from None
    return results


def matrices_of(results: Mapping[str, Any], name: str) -> np.ndarray:
    """The matrices of a method in the first metric, `(seeds, tasks, tasks)`.

    They have NaN where nothing was measured.
    """
    metric = primary(results["protocol"]).name
    return np.asarray(results["methods"][name][f"{metric}_matrices"], "float64")


def factor_of(results: Mapping[str, Any], key: str) -> int:
    """By which the values of this key of `metrics` are multiplied to be shown: 100 for shares."""
    if key.startswith(("steps", "seconds", "peak")):
        return 1
    first, *others = recorded(results["protocol"])
    names = {other.name: other.percent for other in others}
    own = [p for n, p in names.items() if key in (f"average_{n}", f"learning_{n}")]
    own += [p for n, p in names.items() if key.startswith(f"{n}_")]
    percent = own[0] if own else first.percent
    return 100 if percent or "relative" in key else 1


def tuned_of(results: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    """The value on validation data of each λ that was tried, by method."""
    metric = primary(results["protocol"]).name
    tried = results.get("tuning", {}).get(f"validation_{metric}", {})
    return {
        name: {float(s): float(a) for s, a in of_method.items()}
        for name, of_method in tried.items()
        if of_method
    }
