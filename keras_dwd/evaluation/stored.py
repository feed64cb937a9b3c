"""Reads and checks files of results, as `keras-dwd run --out` writes them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_dwd.checks import number
from keras_dwd.evaluation.methods import strength_of
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
        for method in results["methods"].values():
            strength_of(method["settings"])
            for metric in method["metrics"].values():
                values = [metric["mean"], metric["std"], *metric["per_seed"]]
                for value in values:
                    number("metric", value, -np.inf)
            if matrices_of(method).shape[1:] != (tasks, tasks):
                raise ValueError("a matrix that is not of the tasks")
        for tried in tuned_of(results).values():
            if not all(s >= 0 and np.isfinite(a) for s, a in tried.items()):
                raise ValueError("tuning")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError(
            f"{name} is no file of results, as `keras-dwd run --out` writes: {error!r}"
        ) from None
    return results


def matrices_of(method: Mapping[str, Any]) -> np.ndarray:
    """The matrices of a method, `(seeds, tasks, tasks)`, with NaN where nothing was measured."""
    return np.asarray(method["accuracy_matrices"], "float64")


def tuned_of(results: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    """The validation accuracy of each λ that was tried, by method."""
    tried = results.get("tuning", {}).get("validation_accuracy", {})
    return {
        name: {float(s): float(a) for s, a in of_method.items()}
        for name, of_method in tried.items()
        if of_method
    }
