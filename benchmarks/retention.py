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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
from rich.console import Console

from keras_dwd.cli import table
from keras_dwd.evaluation.experiment import Experiment, summarize, versions
from keras_dwd.evaluation.files import write_json
from keras_dwd.evaluation.methods import METHODS

SCENARIOS = {
    "permuted-digits": {"scenario": "permuted:digits", "tasks": 5},
    "split-digits": {"scenario": "split:digits", "tasks": 5, "setting": "domain"},
    "split-cifar100": {"scenario": "split:cifar100", "tasks": 10},
}
TUNING_SEEDS = {"permuted-digits": (0, 1, 2), "split-digits": (0, 1, 2), "split-cifar100": (0,)}
# Of diagonal and of Kronecker-factored methods: five values over the same range of factors, placed
# where a first look at each scenario has its best values inside.
GRIDS = {
    "permuted-digits": {"diagonal": (10, 30, 100, 300, 1000), "kronecker": (1, 3, 10, 30, 100)},
    # Learned so well that the Fisher information nearly vanishes: a wide grid.
    "split-digits": {"diagonal": (1e2, 1e3, 1e4, 1e5, 1e6), "kronecker": (0.1, 1, 10, 100, 1000)},
    "split-cifar100": {
        "diagonal": (300, 1000, 3000, 10000, 30000),
        "kronecker": (3, 10, 30, 100, 300),
    },
}
TUNED = {
    "ewc": "diagonal",
    "online-ewc": "diagonal",
    "dwd-diagonal": "diagonal",
    "dwd": "kronecker",
    "dwd-online": "kronecker",
}
VALIDATION = 0.2


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


def tune(pool, name, settings, grids, known):
    """Validation accuracies per method and λ, and the best λ per method."""
    settings = settings | {"validation": VALIDATION}
    pending = {
        (method, strength): [
            pool.submit(one_run, settings, method, seed, strength) for seed in TUNING_SEEDS[name]
        ]
        for method, grid in grids.items()
        for strength in grid
        if strength not in known.get(method, {})
    }
    tried = {method: dict(known.get(method, {})) for method in grids}
    for (method, strength), runs in pending.items():
        accuracies = [run.result().matrix.average_accuracy for run in runs]
        tried[method][strength] = float(np.mean(accuracies))
    best = {method: max(grid, key=grid.get) for method, grid in tried.items()}
    for method, strength in best.items():
        end = strength in (min(tried[method]), max(tried[method]))
        print(f"{name}: best λ of {method}: {strength}{', an end of its grid' if end else ''}")
    return tried, best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    parser.add_argument("--methods", choices=TUNED, nargs="+", default=list(TUNED))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, context, initializer=one_thread) as pool:
        for name in options.scenario:
            settings = SCENARIOS[name] | {"data_dir": options.data_dir}
            path = options.out / f"retention_{name}.json"
            protocol = Experiment(**settings).describe(options.seeds)
            earlier = {} if options.fresh or not path.exists() else json.loads(path.read_text())
            if earlier and (earlier["protocol"], earlier["versions"]) != (protocol, versions()):
                earlier = {}
            known = earlier["tuning"]["validation_accuracy"] if earlier else {}
            known = {m: {float(s): a for s, a in tried.items()} for m, tried in known.items()}
            wanted = [m for m in TUNED if m in options.methods or m in known]
            grids = {m: GRIDS[name][TUNED[m]] for m in wanted}
            tried, best = tune(pool, name, settings, grids, known)
            names = ("finetune", *wanted, "joint")
            chosen = {m: METHODS[m].configuration(best.get(m, 0.0)) for m in names}
            methods = {
                method: earlier["methods"][method]
                for method in (names if earlier else ())
                if earlier["methods"].get(method, {}).get("settings") == chosen[method]
            }
            pending = {
                method: [
                    pool.submit(one_run, settings, method, seed, best.get(method, 0.0))
                    for seed in range(options.seeds)
                ]
                for method in names
                if method not in methods
            }
            for method, runs in pending.items():
                summary = summarize([run.result() for run in runs])
                methods[method] = {"settings": chosen[method], **summary}
            results = {
                "protocol": protocol,
                "versions": versions(),
                "methods": {method: methods[method] for method in names},
                "tuning": {
                    "validation_fraction": VALIDATION,
                    "seeds": list(TUNING_SEEDS[name]),
                    "validation_accuracy": tried,
                },
            }
            write_json(path, results)
            Console().print(table(results))


if __name__ == "__main__":
    main()
