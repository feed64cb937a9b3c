"""One pass over a stream of permuted MNIST with blurry boundaries, which nobody tells.

Around each boundary the examples of the next task become more frequent, from none to all, over a
quarter of a task. Compared are fine-tuning, boundaries that are told (in the middle of each blur),
boundaries that `ConsolidateOnDrift` finds with its defaults, boundaries after a fixed number of
steps, and the same examples in random order.

Usage: python benchmarks/streams.py [--seeds N] [--out FILE]
"""

import argparse
from pathlib import Path

import keras
import numpy as np

from keras_dwd import DWDModel
from keras_dwd.callbacks import ConsolidateEvery, ConsolidateOnDrift
from keras_dwd.evaluation import datasets
from keras_dwd.evaluation.experiment import versions
from keras_dwd.evaluation.profiles import mlp
from keras_dwd.evaluation.scenario import permuted
from keras_dwd.files import write_json

TASKS, EXAMPLES, BATCH, BLUR = 4, 3200, 16, 0.25
STEPS = EXAMPLES // BATCH
PROTOCOL = (
    f"permuted MNIST, {TASKS} tasks, one pass over {EXAMPLES:,} examples of each in batches of "
    f"{BATCH}, blurred over {BLUR:.0%} of a task; MLP 100-100, Adam 0.001, DWDModel with its "
    "defaults and the online estimate; accuracy on the test data of all tasks at the end, seeds "
    "0–{last}, mean ± std"
)
WAYS = {
    "fine-tuning": list,
    "boundaries told": lambda: [ConsolidateEvery(STEPS)],
    "found by ConsolidateOnDrift": lambda: [ConsolidateOnDrift()],
    "every 100 steps": lambda: [ConsolidateEvery(100)],
    "in random order": list,
}


def stream(tasks, rng):
    """The task of each example of the stream, and all examples in its order."""
    position = (np.arange(TASKS * EXAMPLES) + 0.5) / EXAMPLES
    blurred = position + BLUR * (rng.random(len(position)) - 0.5)
    task = np.clip(blurred.astype(int), 0, TASKS - 1)
    x = np.empty((len(task), *tasks[0].train[0].shape[1:]), "float32")
    y = np.empty(len(task), "int32")
    for t, each in enumerate(tasks):
        places = np.flatnonzero(task == t)
        drawn = rng.permutation(len(each.train[1]))[: len(places)]
        x[places], y[places] = each.train[0][drawn], each.train[1][drawn]
    return x, y


def run(way, scenario, seed):
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    x, y = stream(scenario.tasks, rng)
    if way == "in random order":
        order = rng.permutation(len(y))
        x, y = x[order], y[order]
    strength = 0.0 if not WAYS[way]() else None
    model = DWDModel.from_model(mlp(scenario), strength=strength)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    callbacks = WAYS[way]()
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=callbacks)
    found = [task.test for task in scenario.tasks]
    accuracies = [model.evaluate(*test, batch_size=500, verbose=0)[1] for test in found]
    return float(np.mean(accuracies)), callbacks[0].boundaries if callbacks else []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/streams.json")
    options = parser.parse_args()
    scenario = permuted(datasets.load("mnist"), TASKS)
    rows = {}
    for way in WAYS:
        runs = [run(way, scenario, seed) for seed in range(options.seeds)]
        values = [accuracy for accuracy, _ in runs]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        accuracy = {"mean": float(np.mean(values)), "std": std, "per_seed": values}
        rows[way] = {"accuracy": accuracy, "boundaries": [boundaries for _, boundaries in runs]}
        print(f"{way}: {values} {rows[way]['boundaries']}", flush=True)
        protocol = PROTOCOL.format(last=options.seeds - 1)
        content = {"protocol": protocol, "steps_per_task": STEPS, "versions": versions()}
        write_json(options.out, content | {"ways": rows})


if __name__ == "__main__":
    main()
