"""Measures the time and memory of grouping at a task boundary, for millions of parameters.

Each size is measured in a separate process. The memory is the rise of the peak resident size over
that before grouping, which includes the Fisher information and the weights.

Usage: python benchmarks/grouping_cost.py [--sizes N ...] [--out FILE]
"""

import argparse
import multiprocessing
import time
from pathlib import Path

import numpy as np
from rich import print

from keras_dwd.evaluation.experiment import versions
from keras_dwd.evaluation.runner import _PeakMemory
from keras_dwd.files import write_json
from keras_dwd.groupings import GaussianMixtureGrouping
from keras_dwd.groupings.grouping import BoundaryContext
from keras_dwd.precision.diagonal import Diagonal

PROTOCOL = (
    "GaussianMixtureGrouping() with its defaults on a diagonal of ten layers of random Fisher "
    "information and weights (log-normal, normal), elements grouped and weighed; seconds are the "
    "median of three runs, memory is the rise of the peak resident size in the first"
)


def measure(size):
    rng = np.random.default_rng(0)
    shape = (size // 10 // 1000, 1000)
    blocks, values = {}, {}
    for i in range(10):
        fisher = rng.standard_normal(shape, "float32")
        fisher *= 2
        fisher -= 5 + i % 3
        blocks[f"layer_{i}"] = Diagonal(f"layer_{i}", np.exp(fisher, out=fisher))
        values[f"layer_{i}"] = 0.05 * rng.standard_normal(shape, "float32")
    context, grouping = BoundaryContext(blocks, values), GaussianMixtureGrouping()
    memory = _PeakMemory()
    before = memory.peak()
    seconds, risen = [], 0
    for run in range(3):
        started = time.perf_counter()
        result = grouping.apply(context)
        seconds.append(time.perf_counter() - started)
        if run == 0:
            risen = memory.peak() - before
        del result
    return {"seconds": float(np.median(seconds)), "extra_gigabytes": risen / 1e9}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[11_000_000, 100_000_000])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "grouping_cost.json"
    )
    options = parser.parse_args()
    rows = {}
    for size in options.sizes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows[f"{size:,}"] = pool.apply(measure, (size,))
        print(size, rows[f"{size:,}"])
        write_json(options.out, {"protocol": PROTOCOL, "versions": versions(), "groupings": rows})


if __name__ == "__main__":
    main()
