"""Tunes λ of each method on held-back training data, then measures accuracy and forgetting.

All methods are tuned with the same number of values of λ, the same seeds and the same epochs. The
value with the highest validation accuracy is run on the test data with three seeds; a value at the
end of its grid is reported. Results that a file of an earlier run with the same protocol and
versions has, also of methods that are left out this time, are reused unless `--fresh` is given.

With `--parts` the ablation of DWD is run too, as by `keras-dwd ablate`: one part is changed at a
time, with the default λ. Words after `--parts` select the parts whose names contain one of them.

Usage: python benchmarks/retention.py [--scenario NAME ...] [--methods NAME ...]
    [--parts [WORD ...]] [--data-dir DIR] [--processes N]
"""

import argparse
import os
from functools import partial
from pathlib import Path

from rich.console import Console

from keras_dwd.evaluation.ablation import parts
from keras_dwd.evaluation.methods import BEST_EWC, method_named
from keras_dwd.evaluation.methods import METHODS as METHODS_OF_PACKAGE
from keras_dwd.evaluation.report import table
from keras_dwd.evaluation.tuning import UNTOUCHED, grid_around, tune

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
# Class-incremental: one head with an output for every class, no task ids.
CLASS_SCENARIOS = {
    "split-digits-class": {"scenario": "split:digits", "tasks": 5, "setting": "class"},
    "split-mnist-class": {"scenario": "split:mnist", "tasks": 5, "setting": "class"},
    "split-cifar100-class": {"scenario": "split:cifar100", "tasks": 10, "setting": "class"},
}
# The forms of EWC: what is gained by the anchor, and by an optimizer that is not reset.
EWC_SCENARIOS = {
    "permuted-mnist-ewc": {
        "scenario": "permuted:mnist",
        "tasks": 5,
        "epochs": 1,
        "images_per_class": 1000,
    },
}
TUNING_SEEDS = {
    "permuted-digits": (0, 1, 2),
    "split-digits": (0, 1, 2),
    "split-digits-task": (0, 1, 2),
    "split-mnist": (0, 1, 2),
    "permuted-mnist": (0,),
    "split-cifar100": (0,),
    "split-digits-class": (0,),
    "split-mnist-class": (0,),
    "split-cifar100-class": (0,),
    "permuted-mnist-ewc": (0,),
}
# All grids of a scenario have the same number of values over the same range of factors, placed so
# that preliminary runs had their best values inside. The positions depend on the scale of the
# Fisher information: for diagonal methods it falls with the loss, except when it is normalised
# (`influence`) or taken at negated logits; for DWD's `influence` it is relative to the margins.
GRIDS = {
    "permuted-digits": {
        "diagonal": (10, 30, 100, 300, 1000),
        "influence": (10, 30, 100, 300, 1000),
        "negated": (1, 3, 10, 30, 100),
        "kronecker": (1, 3, 10, 30, 100),
        "relative": (10, 30, 100, 300, 1000),
    },
    "permuted-mnist": {
        "diagonal": (1, 3, 10, 30, 100, 300, 1000),
        "influence": (1, 3, 10, 30, 100, 300, 1000),
        "negated": (0.1, 0.3, 1, 3, 10, 30, 100),
        "kronecker": (0.1, 0.3, 1, 3, 10, 30, 100),
        "relative": (3, 10, 30, 100, 300, 1000, 3000),
    },
    # Learned so well that the Fisher information nearly vanishes, so the grid is wide.
    "split-digits": {
        "diagonal": (1e2, 1e3, 1e4, 1e5, 1e6),
        "influence": (10, 100, 1e3, 1e4, 1e5),
        "negated": (1, 10, 100, 1e3, 1e4),
        "kronecker": (0.1, 1, 10, 100, 1000),
        "relative": (1, 10, 100, 1e3, 1e4),
    },
    "split-cifar100": {
        "diagonal": (100, 300, 1000, 3000, 10000, 30000),
        "influence": (100, 300, 1000, 3000, 10000, 30000),
        "negated": (10, 30, 100, 300, 1000, 3000),
        "kronecker": (1, 3, 10, 30, 100, 300),
        "relative": (10, 30, 100, 300, 1000, 3000),
    },
}
GRIDS["split-mnist"] = GRIDS["split-digits-task"] = GRIDS["split-digits"]
GRIDS["split-digits-class"] = GRIDS["split-mnist-class"] = GRIDS["split-digits"]
GRIDS["permuted-mnist-ewc"] = GRIDS["permuted-mnist"]
GRIDS["split-cifar100-class"] = GRIDS["split-cifar100"]
METHODS = (
    *("ewc", "ewc:batch", "ewc:sampled", "ewc:influence", "ewc:negated", "online-ewc"),
    *("ewc+keep-state", BEST_EWC, "dwd-online+keep-state"),
    *("dwd-diagonal", "dwd", "dwd:exact", "dwd:sampled", "dwd:negated", "dwd-online"),
)
CLASS_METHODS = (
    *("ewc", BEST_EWC, "ewc:influence", "dwd", "dwd-online", "lwf", "dwd-online+distill", "er"),
    "dwd-online+er",
)
EWC_METHODS = (
    *("finetune+keep-state", "ewc", "ewc+keep-state", "online-ewc", BEST_EWC),
    *("dwd-online", "dwd-online+keep-state"),
)
# DWD with all its defaults, λ included.
DEFAULT = f"dwd-online{UNTOUCHED}"


def values_of(scenario, method):
    """The values of λ to try for a method; those with a technique of their own have one default."""
    known = METHODS_OF_PACKAGE.get(method)
    if method == "lwf":  # whose strength is the weight of distillation
        return (0.1, 0.3, 1, 3, 10, 30, 100)[: len(GRIDS[scenario]["diagonal"])]
    if "distillation" in method_named(method).configuration(1.0):  # which needs a weaker pull
        return [strength / 10 for strength in GRIDS[scenario][grid_of(method)]]
    if known is not None and known.technique is not None:
        return grid_around(known.strength, len(GRIDS[scenario]["diagonal"]))
    return GRIDS[scenario][grid_of(method)]


def grid_of(method):
    """Name of the grid for a method, by its curvature and estimator."""
    fisher = method_named(method).configuration(1.0)["fisher"]
    estimator = fisher["estimator"]
    if "rank" in fisher:
        return "relative" if estimator == "influence" else "kronecker"
    return estimator if estimator in ("influence", "negated") else "diagonal"


def main():
    known = SCENARIOS | CLASS_SCENARIOS | EWC_SCENARIOS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", choices=known, nargs="+", default=list(known))
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--parts", nargs="*")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.scenario:
        usual = CLASS_METHODS if name in CLASS_SCENARIOS else METHODS
        usual = EWC_METHODS if name in EWC_SCENARIOS else usual
        wanted = usual if options.methods is None else options.methods
        methods = [m for m in usual if m in wanted] + [m for m in wanted if m not in usual]
        if options.parts is not None and name in SCENARIOS:
            methods += [m for m in parts(options.parts).values() if m not in (*methods, DEFAULT)]
        results = tune(
            known[name] | {"data_dir": options.data_dir},
            ["finetune", *methods, DEFAULT, "joint"],
            grid=partial(values_of, name),
            seeds=options.seeds,
            tuning_seeds=TUNING_SEEDS[name],
            out=options.out / f"retention_{name}.json",
            processes=options.processes,
            fresh=options.fresh,
            say=lambda line, name=name: print(f"{name}: {line}", flush=True),
        )
        Console().print(table(results))


if __name__ == "__main__":
    main()
