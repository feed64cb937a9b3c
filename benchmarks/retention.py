"""What is retained: λ tuned for each method on held-back training data, then test accuracy.

Each method that has a λ gets the same number of values, half a decade apart, the same seeds and
the same epochs. The value with the highest validation accuracy is run on the test data with
three seeds. The grids lie at different places because the methods' Fisher information has
different scales; where the best value is at the end of a grid, the output says so.

Usage: python benchmarks/retention.py [--scenario NAME ...] [--data-dir DIR]
"""

import argparse
from pathlib import Path

import numpy as np

from keras_dwd.cli import table
from keras_dwd.evaluation.experiment import Experiment
from keras_dwd.evaluation.files import write_json
from rich.console import Console

SCENARIOS = {
    "permuted-digits": {"scenario": "permuted:digits", "tasks": 5},
    "split-digits": {"scenario": "split:digits", "tasks": 5, "setting": "domain"},
    "split-cifar100": {"scenario": "split:cifar100", "tasks": 10},
}
TUNING_SEEDS = {"permuted-digits": (0, 1, 2), "split-digits": (0, 1, 2), "split-cifar100": (0,)}
GRIDS = {
    "permuted-digits": {m: (10, 30, 100, 300, 1000) for m in ("ewc", "online-ewc", "dwd")},
    "split-digits": {m: (10, 30, 100, 300, 1000) for m in ("ewc", "online-ewc", "dwd")},
    "split-cifar100": {m: (300, 1000, 3000, 10000) for m in ("ewc", "dwd")},
}
VALIDATION = 0.2


def tune(name, data_dir):
    """Validation accuracies per method and λ, and the best λ per method."""
    experiment = Experiment(**SCENARIOS[name], data_dir=data_dir, validation=VALIDATION)
    tried, best = {}, {}
    for method, grid in GRIDS[name].items():
        tried[method] = {}
        for strength in grid:
            runs = [
                experiment.run(method, seed, strength).matrix.average_accuracy
                for seed in TUNING_SEEDS[name]
            ]
            tried[method][str(strength)] = float(np.mean(runs))
            print(f"{name}: {method} λ={strength}: {np.mean(runs):.4f}", flush=True)
        best[method] = max(grid, key=lambda s, m=method: tried[m][str(s)])
        if best[method] in (grid[0], grid[-1]):
            print(f"{name}: the best λ of {method} is at the end of its grid", flush=True)
    return tried, best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    for name in options.scenario:
        tried, best = tune(name, options.data_dir)
        methods = ["finetune", *GRIDS[name], "joint"]
        experiment = Experiment(**SCENARIOS[name], data_dir=options.data_dir)
        results = experiment.compare(methods, options.seeds, strengths=best)
        results["tuning"] = {
            "validation_fraction": VALIDATION,
            "seeds": list(TUNING_SEEDS[name]),
            "validation_accuracy": tried,
        }
        write_json(options.out / f"retention_{name}.json", results)
        Console().print(table(results))


if __name__ == "__main__":
    main()
