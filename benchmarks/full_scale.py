"""Split-CIFAR-100 with ResNet-32 and all images: the `full` profile, several runs at a time.

Each run, of a method and a seed, is a process of its own and goes on from its newest checkpoint.
When the time is up, runs that are not over are ended; the same command goes on with them later.

    python benchmarks/full_scale.py --data-dir DIR --checkpoints DIR --seconds 420

Rehearsed on a CPU by `--epochs 1 --images-per-class 20 --processes 1`. What is over is in
`results/full_scale.json`, with the steps per second of each run beside the others.
"""

import argparse
import multiprocessing
import time
from pathlib import Path
from typing import Any

# λ by method; `None` for its default. Those of EWC and with distillation are the best of few values
# in trials of this protocol with another implementation, and are not tuned here.
RUNS: dict[str, float | None] = {
    "dwd-online+distill": 5.0,
    "dwd-online": None,
    "dwd-online+task-norm": None,
    "lwf": None,
    "ewc": 100.0,
    "finetune": None,
    "joint": None,
}


def main() -> None:
    """Start the runs, as many at a time as there are processes, and write what is over."""
    from keras_dwd.evaluation.experiment import Experiment, summarize, versions
    from keras_dwd.evaluation.methods import method_named
    from keras_dwd.files import write_json

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/full_scale.json"
    )
    parser.add_argument("--methods", default=",".join(RUNS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images-per-class", type=int)
    given = parser.parse_args()
    settings = {
        "scenario": "split:cifar100",
        "tasks": 10,
        "profile": "full",
        "epochs": given.epochs,
        "images_per_class": given.images_per_class,
        "data_dir": given.data_dir,
    }
    names = given.methods.split(",")
    strengths = {name: RUNS.get(name) or method_named(name).strength for name in names}
    waiting = [(name, seed) for seed in range(given.seeds) for name in names]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    running: dict[Any, tuple[str, int]] = {}
    done: dict[str, dict[int, Any]] = {}
    ended = time.monotonic() + given.seconds
    described = Experiment(**settings).describe(given.seeds)
    while (waiting or running) and time.monotonic() < ended:
        while waiting and len(running) < given.processes:
            name, seed = waiting.pop(0)
            folder = given.checkpoints / name / f"seed_{seed}"
            arguments = (settings, name, seed, strengths[name], folder, results)
            process = context.Process(target=_run, args=arguments)
            process.start()
            running[process] = name, seed
        while not results.empty():
            name, seed, result = results.get()
            done.setdefault(name, {})[seed] = result
            print(f"{name}, seed {seed}: {result.matrix.average_accuracy:.4f}", flush=True)
            methods = {
                method: {
                    "settings": method_named(method).configuration(strengths[method]),
                    "seeds": sorted(of_seeds),
                    **summarize([of_seeds[s] for s in sorted(of_seeds)]),
                }
                for method, of_seeds in done.items()
            }
            content = {"protocol": described, "versions": versions(), "methods": methods}
            write_json(given.out, content)
        running = {p: run for p, run in running.items() if p.is_alive() or _failed(p, run)}
        time.sleep(0.5)
    for process, (name, seed) in running.items():
        print(f"{name}, seed {seed}: not over", flush=True)
        process.terminate()
    for name, seed in waiting:
        print(f"{name}, seed {seed}: not begun", flush=True)


def _failed(process: Any, run: tuple[str, int]) -> bool:
    if process.exitcode:
        print(f"{run[0]}, seed {run[1]}: failed with code {process.exitcode}", flush=True)
    return False


def _run(
    settings: dict[str, Any], name: str, seed: int, strength: float, folder: Path, results: Any
) -> None:
    import dataclasses

    import tensorflow as tf

    from keras_dwd.evaluation.experiment import Experiment

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    result = Experiment(**settings).run(name, seed, strength, checkpoint_dir=folder)
    results.put((name, seed, dataclasses.replace(result, model=None)))
    results.close()
    results.join_thread()


if __name__ == "__main__":
    main()
