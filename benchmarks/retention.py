"""What is retained: λ tuned for each method on held-back training data, then test accuracy.

Each method that has a λ gets as many values of it, the same seeds and the same epochs. The value
with the highest validation accuracy is run on the test data with three seeds; where it is at the
end of the grid, the output says so. What an earlier run under the same protocol and versions has
found, methods left out this time included, is taken from its file: `--fresh` ignores it.

Runs go on side by side, one process per core with one thread for each operation: steps/s are of
one core.

Usage: python benchmarks/retention.py [--scenario NAME ...] [--methods NAME ...] [--data-dir DIR]
    [--processes N]
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import tensorflow as tf
from rich.console import Console

from keras_dwd.cli import table
from keras_dwd.evaluation.experiment import Experiment, summarize, versions
from keras_dwd.evaluation.files import write_json
from keras_dwd.evaluation.methods import method_named

SCENARIOS = {
    "permuted-digits": {"scenario": "permuted:digits", "tasks": 5},
    "split-digits": {"scenario": "split:digits", "tasks": 5, "setting": "domain"},
    "split-digits-task": {"scenario": "split:digits", "tasks": 5},
    "split-mnist": {"scenario": "split:mnist", "tasks": 5},
    "permuted-mnist": {
        "scenario": "permuted:mnist",
        "tasks": 10,
        "profile": "full",
        "epochs": 1,
    },
    "split-cifar100": {"scenario": "split:cifar100", "tasks": 10},
}
TUNING_SEEDS = {
    "permuted-digits": (0, 1, 2),
    "split-digits": (0, 1, 2),
    "split-digits-task": (0, 1, 2),
    "split-mnist": (0, 1, 2),
    "permuted-mnist": (0,),
    "split-cifar100": (0,),
}
# As many values per method over the same range of factors, placed where a first look at each
# scenario has its best values inside. What differs is the scale of the Fisher information: that of
# diagonal methods falls with the loss, but where it is normalised or taken at negated logits.
GRIDS = {
    "permuted-digits": {
        "diagonal": (10, 30, 100, 300, 1000),
        "influence": (1, 3, 10, 30, 100),
        "negated": (1, 3, 10, 30, 100),
        "kronecker": (1, 3, 10, 30, 100),
    },
    "permuted-mnist": {
        "diagonal": (1, 3, 10, 30, 100, 300, 1000),
        "influence": (0.1, 0.3, 1, 3, 10, 30, 100),
        "negated": (0.1, 0.3, 1, 3, 10, 30, 100),
        "kronecker": (0.1, 0.3, 1, 3, 10, 30, 100),
    },
    # Learned so well that the Fisher information nearly vanishes: a wide grid.
    "split-digits": {
        "diagonal": (1e2, 1e3, 1e4, 1e5, 1e6),
        "influence": (1, 10, 100, 1e3, 1e4),
        "negated": (1, 10, 100, 1e3, 1e4),
        "kronecker": (0.1, 1, 10, 100, 1000),
    },
    "split-cifar100": {
        "diagonal": (100, 300, 1000, 3000, 10000, 30000),
        "influence": (30, 100, 300, 1000, 3000, 10000),
        "negated": (10, 30, 100, 300, 1000, 3000),
        "kronecker": (1, 3, 10, 30, 100, 300),
    },
}
GRIDS["split-mnist"] = GRIDS["split-digits-task"] = GRIDS["split-digits"]
DIAGONAL = ("ewc", "online-ewc", "dwd-diagonal")
METHODS = (
    *("ewc", "ewc:batch", "ewc:sampled", "ewc:influence", "ewc:negated", "online-ewc"),
    *("dwd-diagonal", "dwd", "dwd:exact", "dwd:sampled", "dwd:negated", "dwd-online"),
)
REFERENCES = ("finetune", "joint")
# What a user has who sets nothing: no λ is chosen for it.
UNTOUCHED = "dwd-online, λ untouched"
VALIDATION = 0.2


def grid_of(method):
    """Which of the grids is that of a method."""
    base, _, estimator = method.partition(":")
    if base not in DIAGONAL:
        return "kronecker"
    return estimator if estimator in ("influence", "negated") else "diagonal"


def one_thread():
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def one_run(settings, method, seed, strength):
    """In a process of its own: what it gave, without the model."""
    result = Experiment(**settings).run(method, seed, strength)
    print(
        f"{settings['scenario']}{' validation' if settings.get('validation') else ''}: {method} "
        f"λ={strength} seed {seed}: {result.matrix.average_accuracy:.4f}",
        flush=True,
    )
    return dataclasses.replace(result, model=None)


def tune(pool, name, settings, method, known):
    """The validation accuracy of each λ."""
    grid = GRIDS[name][grid_of(method)]
    tried = {strength: known[strength] for strength in grid if strength in known}
    pending = {
        strength: [
            pool.submit(one_run, settings | {"validation": VALIDATION}, method, seed, strength)
            for seed in TUNING_SEEDS[name]
        ]
        for strength in grid
        if strength not in tried
    }
    for strength, runs in pending.items():
        tried[strength] = float(np.mean([run.result().matrix.average_accuracy for run in runs]))
    return tried


def measure(pool, name, settings, method, seeds, earlier):
    """What the file says of a method: its results at its best λ, and how that was found."""
    label, method = method, method.partition(",")[0]
    tried, strength = {}, method_named(method).strength
    result = earlier.get("methods", {}).get(label, {})
    if label not in (*REFERENCES, UNTOUCHED):
        known = earlier.get("tuning", {}).get("validation_accuracy", {}).get(method, {})
        then = result.get("settings")
        if then and then != method_named(method).configuration(then["regularizer"]["strength"]):
            known = {}  # of the method as it was
        tried = tune(pool, name, settings, method, {float(s): a for s, a in known.items()})
        strength = max(tried, key=tried.get)
        end = strength in (min(tried), max(tried))
        print(f"{name}: best λ of {method}: {strength}{', an end of its grid' if end else ''}")
    chosen = method_named(method).configuration(strength)
    if result.get("settings") != chosen:
        runs = [pool.submit(one_run, settings, method, seed, strength) for seed in range(seeds)]
        result = {"settings": chosen, **summarize([run.result() for run in runs])}
    return label, result, tried


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    # Two methods at a time: while one waits for its last run the other keeps the processes busy.
    with (
        ProcessPoolExecutor(options.processes, context, initializer=one_thread) as pool,
        ThreadPoolExecutor(2) as threads,
    ):
        for name in options.scenario:
            settings = SCENARIOS[name] | {"data_dir": options.data_dir}
            path = options.out / f"retention_{name}.json"
            results = {
                "protocol": Experiment(**settings).describe(options.seeds),
                "versions": versions(),
                "methods": {},
                "tuning": {
                    "validation_fraction": VALIDATION,
                    "seeds": list(TUNING_SEEDS[name]),
                    "validation_accuracy": {},
                },
            }
            earlier = {} if options.fresh or not path.exists() else json.loads(path.read_text())
            if any(earlier.get(key) != results[key] for key in ("protocol", "versions")):
                earlier = {}
            known = [*earlier.get("methods", {}), *METHODS, *options.methods]
            order = [m for m in dict.fromkeys(known) if m not in (*REFERENCES, UNTOUCHED)]
            order = [REFERENCES[0], *order, UNTOUCHED, REFERENCES[1]]
            wanted = {*options.methods, *earlier.get("methods", {}), UNTOUCHED, *REFERENCES}
            jobs = [
                threads.submit(measure, pool, name, settings, method, options.seeds, earlier)
                for method in order
                if method in wanted
            ]
            rows = earlier.get("methods", {})
            tuned = earlier.get("tuning", {}).get("validation_accuracy", {})
            found = {method: (rows[method], tuned.get(method, {})) for method in rows}
            for job in as_completed(jobs):  # written as soon as it is there: this takes hours
                method, result, tried = job.result()
                found[method] = (result, tried)
                results["methods"] = {m: found[m][0] for m in order if m in found}
                results["tuning"]["validation_accuracy"] = {
                    m: found[m][1] for m in order if m in found and found[m][1]
                }
                write_json(path, results)
            Console().print(table(results))


if __name__ == "__main__":
    main()
