"""What DWD costs: step time relative to fine-tuning, and its growth with the number of tasks.

All models that are compared live in one process and are timed in turn; the median over many short
rounds of the ratio within a round is reported, so that a machine whose speed drifts does not decide
it.

Usage: python benchmarks/step_cost.py [--rounds N] [--data-dir DIR] [--out FILE]
"""

import argparse
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_dwd import DiagonalFisher, DWDModel, KroneckerFisher
from keras_dwd.evaluation.experiment import Experiment, versions
from keras_dwd.evaluation.files import write_json
from keras_dwd.evaluation.profiles import conv_net, resnet18_like
from keras_dwd.state import state_of

BATCH = 32
# Steps per round: several updates of the online factors, of which there is one in 20 steps.
NETWORKS = {"conv": (conv_net, 60), "resnet18_like": (resnet18_like, 20)}
# A step of the larger network takes forty times as long, and its times scatter less.
FEWER_ROUNDS = {"conv": 1, "resnet18_like": 3}
# Steps that a task is learned for before its importance is taken.
LEARNING = {"conv": 32, "resnet18_like": 3}
PROTOCOL = (
    f"train_step in a tf.function, batch {BATCH}, Adam, Split-CIFAR-100 of 20 tasks, importance "
    "from 128 images of each, DWDModel with pull and online Fisher (diagonal: each fifth step, "
    "Kronecker: each 20th) against strength=0, in turn in one process, median ratio over rounds; "
    "state in bytes per parameter in task 2"
)
FISHERS = {DiagonalFisher: "diagonal", KroneckerFisher: "Kronecker"}


def batches(task, size, count):
    """Batches of a task, over and over."""
    (x, ids), y = task.train
    for i in range(count):
        chosen = np.arange(i * size, (i + 1) * size) % len(y)
        yield (tf.constant(x[chosen]), tf.constant(ids[chosen])), tf.constant(y[chosen])


class Trainer:
    """A compiled model and the function that makes some of its training steps."""

    def __init__(self, build, scenario, **settings):
        keras.utils.set_random_seed(0)
        self.tasks = scenario.tasks
        self.model = DWDModel.from_model(build(scenario), **settings)
        self.model.compile(
            keras.optimizers.Adam(1e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        self.model.make_train_function()
        self.step = None

    def learn_tasks(self, count, steps):
        while self.model.tasks_learned < count:
            task = self.tasks[self.model.tasks_learned]
            for batch in batches(task, BATCH, steps):
                self.model.train_on_batch(*batch)
            self.model.consolidate(batches(task, BATCH, 4))

    def seconds(self, steps):
        step = self.step = self.step or tf.function(self.model.train_step)
        (data,) = batches(self.tasks[self.model.tasks_learned], BATCH, 1)
        started = time.perf_counter()
        for _ in range(steps):
            loss = step(data)["loss"]
        float(loss)  # wait for it
        return (time.perf_counter() - started) / steps


def timed(trainers, steps, rounds):
    """Milliseconds of a step for each trainer in each round, `(rounds, trainers)`."""
    for trainer in trainers:
        trainer.seconds(5)  # trace and warm up
    times = np.zeros((rounds, len(trainers)))
    for r in range(rounds):
        for i in np.roll(np.arange(len(trainers)), r):  # each comes first as often as the others
            times[r, i] = 1000 * trainers[i].seconds(steps)
    return times


def ratio(above, below):
    """Median over rounds of the ratio within a round, its quartiles, and the median times."""
    low, median, high = np.quantile(above / below, (0.25, 0.5, 0.75))
    return {
        "ratio": median,
        "ratio_quartiles": [low, high],
        "milliseconds": [float(np.median(above)), float(np.median(below))],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "step_cost.json"
    )
    options = parser.parse_args()
    scenario = Experiment("split:cifar100", tasks=20, data_dir=options.data_dir).built
    results = {}
    for name, (build, steps) in NETWORKS.items():
        rounds = max(3, options.rounds // FEWER_ROUNDS[name])
        finetune = Trainer(build, scenario, strength=0.0)
        for fisher in (DiagonalFisher(), KroneckerFisher()):
            # Grouping is boundary work: the step sees a precision, whatever it was made from.
            settings = {"fisher": fisher, "grouping": None}
            early, late = (Trainer(build, scenario, **settings) for _ in range(2))
            early.learn_tasks(1, LEARNING[name])
            late.learn_tasks(19, LEARNING[name])
            parameters = early.model.count_params()
            state = sum(a.nbytes for a in state_of(early.model).values())
            times = timed([finetune, early, late], steps, rounds)
            row = results[f"{name}, {FISHERS[type(fisher)]}"] = {
                "parameters": parameters,
                "state_bytes_per_parameter": state / parameters,
                "dwd_to_finetune": ratio(times[:, 1], times[:, 0]),
                "task_20_to_task_2": ratio(times[:, 2], times[:, 1]),
                "rounds": rounds,
                "steps_per_round": steps,
            }
            for key in ("dwd_to_finetune", "task_20_to_task_2"):
                print(f"{name}, {FISHERS[type(fisher)]}: {key} {row[key]['ratio']:.3f}", flush=True)
            write_json(
                options.out, {"protocol": PROTOCOL, "versions": versions(), "networks": results}
            )


if __name__ == "__main__":
    main()
