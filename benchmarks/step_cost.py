"""Measures the step time of DWD relative to fine-tuning, and its growth with the number of tasks.

The compared models are in one process and are timed in turn over many short rounds, so that a
machine whose speed drifts does not distort the result. They are built several times, as the speed
of the same model differs by some percent from build to build. Reported is the median over builds of
the median over rounds of the ratio within a round. The steps of task 2 and task 20 are those of two
models, which have learned 1 and 19 tasks.

Usage: python benchmarks/step_cost.py [--rounds N] [--builds N] [--networks NAME ...]
    [--data-dir DIR] [--out FILE]
"""

import argparse
import json
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_dwd import DiagonalFisher, Distillation, DWDModel, KroneckerFisher
from keras_dwd.evaluation.experiment import Experiment, versions
from keras_dwd.evaluation.profiles import conv_net, resnet18_like
from keras_dwd.files import write_json
from keras_dwd.layers import KWinners, TaskHeads

BATCH = 32


def winners(scenario):
    """Two hidden layers of 1,000 units, of which 50 are active for each example."""
    images, task = keras.Input(scenario.input_shape), keras.Input((), dtype="int32")
    x = keras.layers.Flatten()(images)
    for name in ("first", "second"):
        x = KWinners(0.05)(keras.layers.Dense(1000, "relu", name=name)(x))
    heads = TaskHeads(len(scenario.tasks), scenario.outputs, name="heads")
    return keras.Model([images, task], heads(x, task))


# Function that builds the network, and steps per round: at least one update of the online factors,
# which happens every 20 steps.
NETWORKS = {
    "conv": (conv_net, 60),
    "resnet18_like": (resnet18_like, 20),
    "winners": (winners, 60),
}
# Divisor of the numbers of rounds and builds. A step of the larger network takes forty times as
# long, and its times vary less.
FEWER = {"conv": 1, "resnet18_like": 3, "winners": 3}
# Training steps per task before `consolidate`. For the large network 0: its weights are changed at
# random instead, as the cost of a step does not depend on them, and retracing the step for each of
# 19 tasks takes a quarter of an hour.
LEARNING = {"conv": 32, "resnet18_like": 0, "winners": 32}
PROTOCOL = (
    f"train_step in a tf.function, batch {BATCH}, Adam, Split-CIFAR-100 of 20 tasks, importance "
    "from 128 images of each (the ResNet's weights moved at random in place of training), "
    "DWDModel with pull and online Fisher (diagonal: each fifth step, "
    "Kronecker: each 20th) against strength=0, the same with distillation against without, and a "
    "model in task 20 against one in task 2, in turn in one process, median over builds of the "
    "models (and their range) of the median ratio over rounds; state in bytes per parameter in "
    "task 2 and in task 20"
)
# Numerator and denominator of each ratio.
RATIOS = {
    "dwd_to_finetune": ("task 2", "finetune"),
    "distillation_to_dwd": ("distillation", "task 2"),
    "task_20_to_task_2": ("task 20", "task 2"),
}
FISHERS = {
    "diagonal": DiagonalFisher(),
    "Kronecker": KroneckerFisher(),
    "Kronecker, sparsity": KroneckerFisher(sparsity=True),
}


def batches(task, size, count):
    """`count` batches of a task, repeating its examples where necessary."""
    (x, ids), y = task.train
    for i in range(count):
        chosen = np.arange(i * size, (i + 1) * size) % len(y)
        yield (tf.constant(x[chosen]), tf.constant(ids[chosen])), tf.constant(y[chosen])


class Trainer:
    """A compiled model that learns tasks and whose training steps can be timed."""

    def __init__(self, build, scenario, **settings):
        keras.utils.set_random_seed(0)
        self.tasks = scenario.tasks
        self.model = DWDModel.from_model(build(scenario), **settings)
        self.model.compile(
            keras.optimizers.Adam(1e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        self.model.make_train_function()

    def learn_tasks(self, count, steps):
        while self.model.tasks_learned < count:
            task = self.tasks[self.model.tasks_learned]
            for batch in batches(task, BATCH, steps):
                self.model.train_on_batch(*batch)
            if not steps:
                for variable in self.model.trainable_variables:
                    variable.assign_add(1e-3 * keras.random.normal(variable.shape))
            self.model.consolidate(batches(task, BATCH, 4))

    def state_bytes(self):
        """The size of the consolidation state."""
        return sum(a.nbytes for a in self.model._consolidation.state(self.model).values())

    def timer(self):
        """A function that times the step."""
        # As in `fit`, XLA compiles the step if there is a GPU.
        step = tf.function(self.model.train_step, jit_compile=self.model.jit_compile)
        (data,) = batches(self.tasks[self.model.tasks_learned], BATCH, 1)

        def seconds(steps):
            started = time.perf_counter()
            for _ in range(steps):
                loss = step(data)["loss"]
            float(loss)  # waits for the last step
            return (time.perf_counter() - started) / steps

        seconds(5)  # trace and warm up
        return seconds


def timed(timers, steps, rounds):
    """Milliseconds per step of each timer in each round, `(rounds, timers)`."""
    times = np.zeros((rounds, len(timers)))
    for r in range(rounds):
        for i in np.roll(np.arange(len(timers)), r):  # rotate the order
            times[r, i] = 1000 * timers[i](steps)
    return times


def ratio(pairs):
    """Median and range over builds of the median ratio within a round, and the median times."""
    medians = [float(np.median(above / below)) for above, below in pairs]
    return {
        "ratio": float(np.median(medians)),
        "range": [min(medians), max(medians)],
        "milliseconds": [
            float(np.median(np.concatenate(side))) for side in zip(*pairs, strict=True)
        ],
    }


def measured(build, scenario, fisher, learning, steps, rounds, builds):
    """The measurements of a network with a Fisher estimate."""
    times, size, state = [], 0, [0, 0]
    for _ in range(builds):
        # Without grouping, which is done at the boundary and does not affect the step.
        settings = {"fisher": fisher, "grouping": None}
        trainers = {
            "finetune": Trainer(build, scenario, strength=0.0),
            "task 2": Trainer(build, scenario, **settings),
            "distillation": Trainer(build, scenario, distillation=Distillation(), **settings),
            "task 20": Trainer(build, scenario, **settings),
        }
        for name, tasks in (("task 2", 1), ("distillation", 1), ("task 20", 19)):
            trainers[name].learn_tasks(tasks, learning)
        size = trainers["task 2"].model.count_params()
        state = [trainers[name].state_bytes() for name in ("task 2", "task 20")]
        found = timed([trainer.timer() for trainer in trainers.values()], steps, rounds)
        times.append(dict(zip(trainers, found.T, strict=True)))
        keras.utils.clear_session()
    return {
        "parameters": size,
        "state_bytes_per_parameter": [nbytes / size for nbytes in state],
        **{
            name: ratio([(build_times[above], build_times[below]) for build_times in times])
            for name, (above, below) in RATIOS.items()
        },
        "rounds": rounds,
        "builds": builds,
        "steps_per_round": steps,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--builds", type=int, default=9)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "step_cost.json"
    )
    options = parser.parse_args()
    scenario = Experiment("split:cifar100", tasks=20, data_dir=options.data_dir).built
    content = {"protocol": PROTOCOL, "versions": versions(), "networks": {}}
    earlier = json.loads(options.out.read_text()) if options.out.exists() else {}
    if all(earlier.get(key) == content[key] for key in ("protocol", "versions")):
        content["networks"] = earlier["networks"]  # keep networks that are left out this time
    for name in options.networks:
        build, steps = NETWORKS[name]
        fewer = FEWER[name]
        rounds, builds = max(3, options.rounds // fewer), max(1, options.builds // fewer)
        for kind, fisher in FISHERS.items():
            if ("sparsity" in kind) > (name == "winners"):
                continue  # only the network with `KWinners` has inactive units to leave out
            label = f"{name}, {kind}"
            row = measured(build, scenario, fisher, LEARNING[name], steps, rounds, builds)
            content["networks"][label] = row
            for key in RATIOS:
                low, high = row[key]["range"]
                print(f"{label}: {key} {row[key]['ratio']:.3f} ({low:.3f}–{high:.3f})", flush=True)
            write_json(options.out, content)


if __name__ == "__main__":
    main()
