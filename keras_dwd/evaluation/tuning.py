"""λ chosen for each method on validation data, with the same budget; runs side by side."""

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from threadpoolctl import threadpool_limits

from keras_dwd.checks import number
from keras_dwd.evaluation.experiment import Experiment, summarize, versions
from keras_dwd.evaluation.methods import method_named
from keras_dwd.files import FileError, read_json, write_json

VALIDATION = 0.2
"""The share of the training data that is held back to tune on."""

UNTOUCHED = ", λ untouched"
"""At the end of a method's name: with its default λ, none is chosen for it."""

_DECADES = 3.0


def grid_around(strength: float, points: int) -> tuple[float, ...]:
    """Values of λ, as many for each method, three decades to either side of its default."""
    exponents = np.linspace(-_DECADES, _DECADES, points) if points > 1 else np.zeros(1)
    return tuple(float(f"{strength * 10**e:.3g}") for e in exponents)


def tune(
    settings: dict[str, Any],
    methods: Sequence[str],
    *,
    grid: Callable[[str], Iterable[float]],
    seeds: int = 3,
    tuning_seeds: Sequence[int] = (0,),
    out: Path | None = None,
    processes: int | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Choose λ for each method by validation accuracy and measure it on the test data.

    Each method that has a λ gets as many values of it as `grid` gives, the same seeds and the same
    epochs; only training data, a part of it held back, decides. Runs go on side by side, one
    process with one thread per core (and, where there is a GPU, all on it): steps/s are of one.

    Args:
        settings: The arguments of `Experiment`.
        methods: Names, see `method_named`; `NAME, λ untouched` is measured at its default.
        grid: The values of λ for a method.
        seeds: On the test data: 0 to `seeds − 1`.
        tuning_seeds: On the validation data.
        out: A JSON file, written each time a method is done. What it has already from a run under
            the same protocol and versions is not run again: neither tuning nor results.
            One of another protocol or version is refused.
        processes: How many runs at a time; one per core by default.
        fresh: Ignore what the file has.
        say: Told of each run.

    Returns:
        As of `Experiment.compare`, and in `tuning` the validation accuracy of each λ.
    """
    for method in methods:  # before anything runs
        method_named(_base(method))
    results: dict[str, Any] = {
        "protocol": Experiment(**settings).describe(seeds),
        "versions": versions(),
        "methods": {},
        "tuning": {
            "validation_fraction": VALIDATION,
            "seeds": list(tuning_seeds),
            "validation_accuracy": {},
        },
    }
    rows: dict[str, Any] = {}
    tuned: dict[str, Any] = {}
    tuning = results["tuning"]
    if out is not None and out.exists() and not fresh:
        rows, tuned = _earlier(out, results)
    order = list(dict.fromkeys([*rows, *methods]))
    order.sort(key=_is_reference)  # the upper reference comes last
    writing = threading.Lock()

    def keep(name: str, tried: dict[float, float], row: dict[str, Any] | None = None) -> None:
        """Write what is known by now: this may take hours."""
        with writing:
            if tried:
                tuned[name] = tried
            if row is not None:
                rows[name] = row
            results["methods"] = {m: rows[m] for m in order if m in rows}
            tuning["validation_accuracy"] = {m: tuned[m] for m in order if m in tuned}
            if out is not None:
                write_json(out, results)

    context = multiprocessing.get_context("spawn")
    failed: Exception | None = None
    processes = processes or os.cpu_count() or 1
    # More than one method at a time: while one waits for its last run others keep processes busy.
    with (
        ProcessPoolExecutor(processes, context, initializer=_one_of_several) as pool,
        ThreadPoolExecutor(1 + -(-processes // 3)) as threads,
    ):
        bench = _Bench(pool, settings, seeds, tuning_seeds, say, keep)
        jobs = [
            threads.submit(bench.measure, name, grid, rows.get(name, {}), tuned.get(name, {}))
            for name in order
            if name in methods
        ]
        try:
            for job in as_completed(jobs):
                error = job.exception()
                if isinstance(error, Exception):  # the others go on
                    say(f"failed: {error}")
                    failed = failed or error
        except BaseException:  # interrupted: what runs ends, what waits is not begun
            threads.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed is not None:
        raise failed
    return results


def _earlier(out: Path, results: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a file of results what can be taken over: rows, and validation accuracies by λ.

    Raises:
        FileError: If it is no such file, or one of another protocol or other versions.
    """
    found = read_json(out)
    for key in ("protocol", "versions"):
        if found.get(key) != results[key]:
            raise FileError(
                f"`out` {str(out)!r} holds results of other {key}: name another file, or remove it."
            )
    try:
        rows = {name: row for name, row in found["methods"].items() if row["metrics"].values()}
        for row in rows.values():
            number("strength", row["settings"]["regularizer"]["strength"], 0)
            for metric in row["metrics"].values():
                values = [metric["mean"], metric["std"], *metric["per_seed"]]
                if not all(isinstance(value, (int, float)) for value in values):
                    raise TypeError
        tuned = {
            name: {float(s): number("accuracy", a, 0, 1) for s, a in tried.items()}
            for name, tried in found["tuning"]["validation_accuracy"].items()
        }
        seeds = found["tuning"]["seeds"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError(f"`out` {str(out)!r} is no file of results: {error!r}") from None
    if seeds != results["tuning"]["seeds"]:
        return {name: row for name, row in rows.items() if name not in tuned}, {}
    return rows, tuned


@dataclasses.dataclass(frozen=True)
class _Bench:
    """Where runs of one experiment are made."""

    pool: ProcessPoolExecutor
    settings: dict[str, Any]
    seeds: int
    tuning_seeds: Sequence[int]
    say: Callable[[str], None]
    keep: Callable[..., None]

    def measure(
        self,
        name: str,
        grid: Callable[[str], Iterable[float]],
        result: dict[str, Any],
        known: dict[str, float],
    ) -> None:
        """Find what the file says of a method: its results at its best λ, and how it was found."""
        method = method_named(_base(name))
        tried: dict[float, float] = {}
        strength = method.strength
        if not name.endswith(UNTOUCHED) and method.strength > 0:
            then = result.get("settings")
            if then and then != method.configuration(then["regularizer"]["strength"]):
                known = {}  # of the method as it was
            tried = self._tune(name, tuple(grid(name)), {float(s): a for s, a in known.items()})
            strength = max(tried, key=lambda s: tried[s])
            end = strength in (min(tried), max(tried)) and len(tried) > 1
            self.say(f"best λ of {name}: {strength}{', an end of its grid' if end else ''}")
        chosen = method.configuration(strength)
        if result.get("settings") != chosen:
            runs = [
                self.pool.submit(_run, self.settings, _base(name), seed, strength)
                for seed in range(self.seeds)
            ]
            results = [run.result() for run in runs]
            mean = np.mean([r.matrix.average_accuracy for r in results])
            self.say(f"{name}, λ={strength}: {mean:.4f}")
            result = {"settings": chosen, **summarize(results)}
        self.keep(name, tried, result)

    def _tune(
        self, name: str, grid: tuple[float, ...], known: dict[float, float]
    ) -> dict[float, float]:
        """The validation accuracy of each λ."""
        held_back = self.settings | {"validation": VALIDATION}
        tried = {strength: known[strength] for strength in grid if strength in known}
        pending = {
            strength: [
                self.pool.submit(_run, held_back, name, seed, strength)
                for seed in self.tuning_seeds
            ]
            for strength in grid
            if strength not in tried
        }
        for strength, runs in pending.items():
            results = [run.result().matrix.average_accuracy for run in runs]
            tried[strength] = float(np.mean(results))
            self.say(f"{name}, λ={strength}, validation: {tried[strength]:.4f}")
            self.keep(name, dict(tried))
        return {strength: tried[strength] for strength in grid}


def _base(name: str) -> str:
    return name.removesuffix(UNTOUCHED)


def _is_reference(name: str) -> bool:
    try:
        return method_named(_base(name)).joint
    except ValueError:  # of a file that is older than the name
        return False


def _one_of_several() -> None:
    """One thread, that of linear algebra included, and no more of a GPU's memory than it takes."""
    threadpool_limits(1)
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _run(settings: dict[str, Any], method: str, seed: int, strength: float) -> Any:
    """In a process of its own: what it gave, without the model."""
    result = Experiment(**settings).run(method, seed, strength)
    return dataclasses.replace(result, model=None)  # type: ignore[arg-type]
