"""Tunes λ of each method on validation data, with an equal budget and runs in parallel."""

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
from keras_dwd.evaluation.methods import method_named, same_settings, strength_of
from keras_dwd.evaluation.metric import ACCURACY, TaskMetric, primary
from keras_dwd.files import FileError, read_json, write_json

VALIDATION = 0.2
"""Share of the training data that is held back as validation data."""

UNTOUCHED = ", λ untouched"
"""Suffix of a method's name: use its default λ instead of tuning it."""

_DECADES = 3.0


def grid_around(strength: float, points: int) -> tuple[float, ...]:
    """Log-spaced values of λ from three decades below the default `strength` to three above."""
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
    """Tune λ of each method on validation data, then measure the method on the test data.

    The best λ is that with the best average of the first metric, which is accuracy unless the
    settings have others.

    All methods are tuned with the same seeds and epochs. λ is chosen by training data alone, a part
    of which is held back as validation data. Runs are executed in parallel, each in a process with
    one thread (and on the GPU if there is one): steps/s are those of one such process.

    Args:
        settings: The arguments of `Experiment`.
        methods: Names of methods, see `method_named`; `NAME, λ untouched` uses the default λ.
        grid: Function that returns the values of λ to try for a method.
        seeds: Number of seeds on the test data: 0 to `seeds − 1`.
        tuning_seeds: Seeds on the validation data.
        out: JSON file for the results, updated whenever a run is complete. Results and tuning that
            it already has are not run again. A file of another protocol or other versions is
            refused.
        processes: Number of parallel runs; one per core by default.
        fresh: Whether to ignore results that the file already has.
        say: Function that is called with a message about each run.

    Returns:
        The dictionary of `Experiment.compare`, with the validation accuracy of each λ in `tuning`;
        or the average of the first metric, if it is another one.
    """
    for method in methods:  # raises for unknown names before anything runs
        # Here and not first in threads: the first model of a class has Keras change the class.
        method_named(_base(method)).configuration(1.0)
    experiment = Experiment(**settings)
    metric = experiment.measured[0]
    results: dict[str, Any] = {
        "protocol": experiment.describe(seeds),
        "versions": versions(),
        "methods": {},
        "tuning": {
            "validation_fraction": VALIDATION,
            "seeds": list(tuning_seeds),
            f"validation_{metric.name}": {},
        },
    }
    rows: dict[str, Any] = {}
    tuned: dict[str, Any] = {}
    tuning = results["tuning"]
    if out is not None and out.exists() and not fresh:
        rows, tuned = _earlier(out, results)
    order = list(dict.fromkeys([*rows, *methods]))
    order.sort(key=_is_reference)  # joint training comes last
    writing = threading.Lock()

    def keep(name: str, tried: dict[float, float], row: dict[str, Any] | None = None) -> None:
        """Write the results so far, so that an interruption loses little."""
        with writing:
            if tried:
                tuned[name] = tried
            if row is not None:
                rows[name] = row
            results["methods"] = {m: rows[m] for m in order if m in rows}
            tuning[f"validation_{metric.name}"] = {m: tuned[m] for m in order if m in tuned}
            if out is not None:
                write_json(out, results)

    context = multiprocessing.get_context("spawn")
    failed: Exception | None = None
    processes = processes or os.cpu_count() or 1
    # Several methods at a time, so that the processes stay busy while one waits for its last run.
    with (
        ProcessPoolExecutor(processes, context, initializer=_one_of_several) as pool,
        ThreadPoolExecutor(1 + -(-processes // 3)) as threads,
    ):
        bench = _Bench(pool, settings, metric, seeds, tuning_seeds, say, keep)
        jobs = [
            threads.submit(bench.measure, name, grid, rows.get(name, {}), tuned.get(name, {}))
            for name in order
            if name in methods
        ]
        try:
            for job in as_completed(jobs):
                error = job.exception()
                if isinstance(error, Exception):  # the other methods continue
                    say(f"failed: {error}")
                    failed = failed or error
        except BaseException:  # interrupted: let current runs end and cancel the waiting ones
            threads.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed is not None:
        raise failed
    return results


def _earlier(out: Path, results: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results to reuse from a file: rows by method, and validation results by method and λ.

    Raises:
        FileError: If it is not a file of results, or one of another protocol or other versions.
    """
    saved = read_json(out)
    for key in ("protocol", "versions"):
        if _values(saved.get(key)) != _values(results[key]):
            raise FileError(
                f"`out` {str(out)!r} holds results of other {key}: name another file, or remove it."
            )
    try:
        rows = {name: row for name, row in saved["methods"].items() if row["metrics"].values()}
        for row in rows.values():
            strength_of(row["settings"])
            for metric in row["metrics"].values():
                values = [metric["mean"], metric["std"], *metric["per_seed"]]
                if not all(isinstance(value, (int, float)) for value in values):
                    raise TypeError
        metric = primary(saved["protocol"]).name
        limits = (0, 1) if metric == ACCURACY else (-np.inf, np.inf)
        tuned = {
            name: {float(s): number(metric, a, *limits) for s, a in tried.items()}
            for name, tried in saved["tuning"][f"validation_{metric}"].items()
        }
        seeds = saved["tuning"]["seeds"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError(f"`out` {str(out)!r} is no file of results: {error!r}") from None
    if seeds != results["tuning"]["seeds"]:
        return {name: row for name, row in rows.items() if name not in tuned}, {}
    return rows, tuned


def _values(about: Any) -> Any:
    """A protocol without the text, which only says in words what its values are."""
    return {k: v for k, v in about.items() if k != "text"} if isinstance(about, dict) else about


@dataclasses.dataclass(frozen=True)
class _Bench:
    """Submits the runs of one experiment to a pool of processes."""

    pool: ProcessPoolExecutor
    settings: dict[str, Any]
    metric: TaskMetric
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
        """Tune a method and measure it at its best λ; passes the results to `keep`.

        Args:
            name: Name of the method.
            grid: Function that returns the values of λ to try.
            result: The method's row of an earlier run, reused if its settings are the same.
            known: Validation results by λ of an earlier run.
        """
        method = method_named(_base(name))
        tried: dict[float, float] = {}
        strength = method.strength
        if not name.endswith(UNTOUCHED) and method.strength > 0:
            earlier = result.get("settings")
            if earlier and not same_settings(earlier, method.configuration(strength_of(earlier))):
                known = {}  # the method has changed since
            tried = self._tune(name, tuple(grid(name)), {float(s): a for s, a in known.items()})
            strength = self.metric.best(tried)
            end = strength in (min(tried), max(tried)) and len(tried) > 1
            self.say(f"best λ of {name}: {strength}{', an end of its grid' if end else ''}")
        chosen = method.configuration(strength)
        if not same_settings(result.get("settings"), chosen):
            runs = [
                self.pool.submit(_run, self.settings, _base(name), seed, strength)
                for seed in range(self.seeds)
            ]
            results = [run.result() for run in runs]
            mean = np.mean([r.matrix.average for r in results])
            self.say(f"{name}, λ={strength}: {mean:.4f}")
            result = {"settings": chosen, **summarize(results)}
        self.keep(name, tried, result)

    def _tune(
        self, name: str, grid: tuple[float, ...], known: dict[float, float]
    ) -> dict[float, float]:
        """The mean of the first metric on the validation data, for each λ of the grid."""
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
            results = [run.result().matrix.average for run in runs]
            tried[strength] = float(np.mean(results))
            self.say(f"{name}, λ={strength}, validation: {tried[strength]:.4f}")
            self.keep(name, dict(tried))
        return {strength: tried[strength] for strength in grid}


def _base(name: str) -> str:
    return name.removesuffix(UNTOUCHED)


def _is_reference(name: str) -> bool:
    try:
        return method_named(_base(name)).joint
    except ValueError:  # a name from a results file that no longer exists
        return False


def _one_of_several() -> None:
    """Limit a process to one thread, and to the GPU memory it needs."""
    threadpool_limits(1)
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _run(settings: dict[str, Any], method: str, seed: int, strength: float) -> Any:
    """Run a method in a process of the pool; returns the result without the model."""
    result = Experiment(**settings).run(method, seed, strength)
    return dataclasses.replace(result, model=None)  # type: ignore[arg-type]
