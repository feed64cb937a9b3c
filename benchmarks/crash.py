"""Kills a run of three tasks at random moments, resumes it, and compares it with one not killed.

Each run is a separate process that is ended by SIGKILL at some moment and then started again. Its
final state is compared bit by bit with that of an undisturbed run: weights, optimizer, Fisher
information, factors, groups, task graph, random generators and results.

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
    "dwd-online/ema",  # with an optimizer that averages the weights
    "dwd-online+graph",
    "dwd-online+policy",
    "dwd-online+decoupled",
    "dwd:sampled",
    "ewc",
)
TASKS, EPOCHS = 3, 4
# Arrays of a checkpoint that hold measured times, which differ from run to run.
_TIMES = {"progress/train_seconds", "progress/boundary_seconds", "progress/spent"}


def sequence(method, folder, moment):
    """The run itself; its network has dropout, so the random generator must be restored too.

    Args:
        method: Name of a method, followed by `/ema` for an optimizer that averages the weights.
        folder: Folder of the checkpoints.
        moment: Kill the process just before (if even) or after (if odd) it renames file number
            `moment // 2` into place; never if negative.
    """
    import keras

    from keras_dwd import files
    from keras_dwd.evaluation import datasets, run_sequence
    from keras_dwd.evaluation.scenario import permuted

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

    replace, count = os.replace, itertools.count()

    def replace_and_die(source, target):
        now = 2 * next(count)
        if now == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if now + 1 == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.replace = replace_and_die
    method, _, ema = method.partition("/")
    adam = {"optimizer": keras.optimizers.Adam(use_ema=True)} if ema else {}
    scenario = permuted(datasets.load("digits"), TASKS)
    run_sequence(
        build, scenario, method, epochs=EPOCHS, checkpoint_dir=folder, compile_settings=adam
    )


def final_state(folder):
    """A digest of each array in the last checkpoint and in the files of the task graph."""
    from keras_dwd.files import read_arrays

    digests = {}
    for path in (max(folder.glob("checkpoint-*")), *(folder / "graph").glob("*.safetensors")):
        prefix = "" if path.parent == folder else f"{path.name}: "
        for name, array in read_arrays(path)[0].items():
            if name not in _TIMES:
                digests[prefix + name] = hashlib.sha256(array.tobytes()).hexdigest()
    for path in (folder / "graph").glob("*.json"):
        digests[path.name] = path.read_text()
    return digests


def run(method, folder, killed_after=None, moment=-1):
    """Run the sequence in a process, which may be killed; returns whether it ended by itself."""
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
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(options.processes) as pool:

        def undisturbed(method):
            started = time.monotonic()
            run(method, Path(root) / method.replace("/", "-"))
            return final_state(Path(root) / method.replace("/", "-")), time.monotonic() - started

        undisturbed_runs = dict(zip(methods, pool.map(undisturbed, methods), strict=True))

        def killed(index, share):
            method = methods[index % len(methods)]
            expected, seconds = undisturbed_runs[method]
            folder = Path(root) / f"killed {index}"
            # Half of the runs are killed when they rename a file, a moment that is rarely hit by
            # the clock.
            by_clock = (index // len(methods)) % 2 == 0
            moment = -1 if by_clock else int(share * 2 * TASKS * EPOCHS)
            started = time.monotonic()
            while run(method, folder, share * seconds if by_clock else None, moment):
                seconds = time.monotonic() - started  # it ended before it was killed: try earlier
                shutil.rmtree(folder)
                started = time.monotonic()
            checkpoints = len(list(folder.glob("checkpoint-*"))) if folder.exists() else 0
            run(method, folder)
            differing = [n for n, d in final_state(folder).items() if expected.get(n) != d]
            missing = sorted(set(expected) - set(final_state(folder)))
            row = {
                "method": method,
                **({"after_share_of_time": share} if by_clock else {"at_file": moment / 2}),
                "checkpoints_then": checkpoints,
                "differing": differing + missing,
            }
            print(json.dumps(row), flush=True)
            return row

        # Some runs are killed before their first checkpoint and start from the beginning.
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
