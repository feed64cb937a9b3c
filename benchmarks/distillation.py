"""Distillation on and off, with several λ, where tasks have own heads, classes or inputs.

No value is chosen here, so all runs are on the test data. The file is written after each run, and
a later call goes on from it.

Usage: python benchmarks/distillation.py [--scenario NAME ...] [--methods NAME ...]
    [--strengths N ...] [--seeds N] [--epochs N] [--processes N] [--out FILE]
"""

import argparse
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_dwd.evaluation.experiment import Experiment, versions
from keras_dwd.files import write_json

SCENARIOS = {
    "task": {"scenario": "split:digits", "setting": "task"},
    "class": {"scenario": "split:digits", "setting": "class"},
    "domain": {"scenario": "permuted:digits"},
}
METHODS = ("dwd-online", "dwd-online+distill", "dwd", "dwd+distill")


def measure(job):
    """Run one method with one λ and seed; returns the job and its metrics."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    name, method, strength, seed, epochs = job
    result = Experiment(**SCENARIOS[name], tasks=5, epochs=epochs).run(method, seed, strength)
    shown = ("average_accuracy", "forgetting", "learning_accuracy")
    return job, {key: float(result.metrics()[key]) for key in shown}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS[:2]))
    parser.add_argument("--strengths", type=float, nargs="+", default=[1, 5, 20, 60, 200])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    default = Path(__file__).parent / "results/distillation.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    protocols = {
        name: Experiment(**SCENARIOS[name], tasks=5, epochs=options.epochs).describe(options.seeds)
        for name in options.scenario
    }
    content = json.loads(options.out.read_text()) if options.out.exists() else {}
    content = {"versions": versions(), "scenarios": content.get("scenarios", {})}
    jobs = []
    for name in options.scenario:
        known = content["scenarios"].setdefault(name, {"protocol": protocols[name], "runs": {}})
        if known["protocol"] != protocols[name]:
            known |= {"protocol": protocols[name], "runs": {}}
        for method in options.methods:
            for strength in options.strengths:
                runs = known["runs"].setdefault(method, {}).setdefault(f"{strength:g}", {})
                jobs += [
                    (name, method, strength, seed, options.epochs)
                    for seed in range(options.seeds)
                    if str(seed) not in runs
                ]
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        for (name, method, strength, seed, _), metrics in pool.imap_unordered(measure, jobs):
            runs = content["scenarios"][name]["runs"][method][f"{strength:g}"]
            runs[str(seed)] = metrics
            write_json(options.out, content)
            print(f"{name}: {method}, λ={strength:g}, seed {seed}: {metrics}", flush=True)
    for name, scenario in content["scenarios"].items():
        for method, by_strength in scenario["runs"].items():
            for strength, runs in by_strength.items():
                values = [run["average_accuracy"] for run in runs.values()]
                print(f"{name}: {method}, λ={strength}: {100 * np.mean(values):.1f}")


if __name__ == "__main__":
    main()
