"""Measures the share of a run's time spent on checkpoints after each epoch and task boundary.

The run is Split-CIFAR-100 with the `cpu` profile. The share is the wall-clock time spent on saving,
to a temporary folder inside `--folder`, divided by the time of the rest of the run.

Usage: python benchmarks/checkpoint_cost.py --data-dir DIR [--folder DIR]
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from keras_dwd.evaluation.checkpoint import Checkpoints
from keras_dwd.evaluation.experiment import Experiment, versions
from keras_dwd.files import write_json

OUT = Path(__file__).parent / "results" / "checkpoint_cost.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    experiment = Experiment("split:cifar100", tasks=10, data_dir=options.data_dir)
    seconds, sizes, save = [], [], Checkpoints.save

    def timed(self, model, progress):
        started = time.perf_counter()
        save(self, model, progress)
        seconds.append(time.perf_counter() - started)
        sizes.append(self.files()[-1].stat().st_size)

    Checkpoints.save = timed
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        started = time.perf_counter()
        experiment.run("dwd-online", checkpoint_dir=Path(folder))
        total = time.perf_counter() - started
    share = sum(seconds) / (total - sum(seconds))
    print(f"{len(seconds)} checkpoints, {np.median(seconds):.4f} s each, {share:.2%} of the run")
    write_json(
        options.out,
        {
            "protocol": f"{experiment.describe(1)['title']}, {experiment.describe(1)['text']}",
            "versions": versions(),
            "checkpoints": len(seconds),
            "median_seconds": float(np.median(seconds)),
            "most_seconds": float(np.max(seconds)),
            "largest_megabytes": max(sizes) / 1e6,
            "seconds_of_run": total,
            "share_of_run": share,
        },
    )


if __name__ == "__main__":
    main()
