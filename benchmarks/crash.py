"""A run of three tasks killed at random moments, gone on with, and compared with one that was not.

Each run is a process of its own that is ended by SIGKILL somewhere between its start and its end,
then started again. What it ends with is compared bit by bit with a run that nothing happened to:
weights, optimizer, Fisher information, factors, groups, task graph, random generators, results.

Usage: python benchmarks/crash.py [--kills 50] [--processes N]
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

METHODS = (
    "dwd-online",
    "dwd-online/ema",  # the optimizer keeps averages of the weights
    "dwd-online+graph",
    "dwd-online+policy",
    "dwd-online+decoupled",
    "dwd:sampled",
    "ewc",
)
TASKS, EPOCHS = 3, 4
# Of a run: what the clock says.
_OF_THE_CLOCK = {"progress/train_seconds", "progress/boundary_seconds", "progress/spent"}


def sequence(method, folder, moment):
    """The run itself, with dropout, which draws at random.

    Args:
        method: Name of a method, `/ema` for an optimizer that keeps averages.
        folder: Of its checkpoints.
        moment: Kill it just before (even) or after (odd) the n-th file that it puts in place, n
            the half of this; or never, if negative.
    """
    import keras

    from keras_dwd import files, run_sequence
    from keras_dwd.tasks import datasets
    from keras_dwd.tasks.scenario import permuted

    def build(scenario):
        return keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Flatten(),
                keras.layers.Dense(64, "relu"),
                keras.layers.Dropout(0.2),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(10),
            ]
        )

    put, count = os.replace, itertools.count()

    def put_and_die(source, target):
        now = 2 * next(count)
        if now == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        put(source, target)
        if now + 1 == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.replace = put_and_die
    method, _, ema = method.partition("/")
    adam = {"optimizer": keras.optimizers.Adam(use_ema=True)} if ema else {}
    scenario = permuted(datasets.load("digits"), TASKS)
    run_sequence(
        build, scenario, method, epochs=EPOCHS, checkpoint_dir=folder, compile_settings=adam
    )


def ended_with(folder):
    """A digest of each array of the last checkpoint, and of the files of the task graph."""
    from keras_dwd.files import read_arrays

    found = {}
    for path in (max(folder.glob("checkpoint-*")), *(folder / "graph").glob("*.safetensors")):
        prefix = "" if path.parent == folder else f"{path.name}: "
        for name, array in read_arrays(path)[0].items():
            if name not in _OF_THE_CLOCK:
                found[prefix + name] = hashlib.sha256(array.tobytes()).hexdigest()
    for path in (folder / "graph").glob("*.json"):
        found[path.name] = path.read_text()
    return found


def run(method, folder, killed_after=None, moment=-1):
    """Start the run, wait for its end or end it; whether it ended by itself."""
    command = [sys.executable, __file__, "--child", method, str(folder), str(moment)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=killed_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode == -signal.SIGKILL and moment >= 0:
        return False
    if process.returncode:
        raise RuntimeError(f"{method} failed:\n{errors.decode()[-3000:]}")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/crash.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return sequence(options.child[0], Path(options.child[1]), int(options.child[2]))

    from keras_dwd.evaluation.experiment import versions
    from keras_dwd.files import write_json

    rng = random.Random(options.seed)
    methods = options.methods
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(options.processes) as pool:

        def whole(method):
            started = time.monotonic()
            run(method, Path(made) / method.replace("/", "-"))
            return ended_with(Path(made) / method.replace("/", "-")), time.monotonic() - started

        whole_runs = dict(zip(methods, pool.map(whole, methods), strict=True))

        def killed(index, share):
            method = methods[index % len(methods)]
            expected, seconds = whole_runs[method]
            folder = Path(made) / f"killed {index}"
            # Every other one where the windows are narrow: as a file is put in place.
            by_clock = (index // len(methods)) % 2 == 0
            moment = -1 if by_clock else int(share * 2 * TASKS * EPOCHS)
            started = time.monotonic()
            while run(method, folder, share * seconds if by_clock else None, moment):
                seconds = time.monotonic() - started  # it was faster this time
                shutil.rmtree(folder)
                started = time.monotonic()
            checkpoints = len(list(folder.glob("checkpoint-*"))) if folder.exists() else 0
            run(method, folder)
            differing = [n for n, d in ended_with(folder).items() if expected.get(n) != d]
            missing = sorted(set(expected) - set(ended_with(folder)))
            row = {
                "method": method,
                **({"after_share_of_time": share} if by_clock else {"at_file": moment / 2}),
                "checkpoints_then": checkpoints,
                "differing": differing + missing,
            }
            print(json.dumps(row), flush=True)
            return row

        # From the first moment on: what comes before the first checkpoint starts anew.
        shares = [rng.uniform(0.2, 0.95) for _ in range(options.kills)]
        rows = list(pool.map(killed, range(options.kills), shares))
    identical = sum(not row["differing"] for row in rows)
    print(f"{identical} of {options.kills} ended bit-identical to the undisturbed run")
    write_json(
        options.out,
        {
            "protocol": f"permuted digits, {TASKS} tasks of {EPOCHS} epochs, a network with dropout"
            " and batch normalization; SIGKILL at a random moment by the clock, or just before or"
            " after a random file is put in place, then started again",
            "versions": versions(),
            "identical": identical,
            "kills": rows,
        },
    )


if __name__ == "__main__":
    main()
