"""Measures what happens when `consolidate` is left out or misused, and how many examples it needs.

A network that has learned scikit-learn's digits goes on with the same digits turned by 90 degrees.
Each case differs in when `consolidate` is called and on what; the accuracy on the test data of both
is measured at the end.

What the results file has already, under the same protocol, is not run again.

Usage: python benchmarks/misuse.py [--seeds N] [--out FILE]
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_dwd import DWDModel
from keras_dwd.evaluation.experiment import versions
from keras_dwd.files import read_json, write_json

OUT = Path(__file__).parent / "results" / "misuse.json"
EPOCHS = 10
SAMPLE = 200
COUNTS = (16, 50, 100, 200, 500, 1347)
PROTOCOL = (
    "scikit-learn's digits, then the same turned by 90 degrees: a quarter of the images held back "
    "for the test; MLP 100-100, Adam 0.001, batch 32, {epochs} epochs on each; DWDModel with its "
    "defaults; the sample for `consolidate` is {sample} training images of the first data, without "
    "labels, where nothing else is said; seeds 0–{last}, mean ± std"
)


def data():
    """Training and test data of the upright digits and of those turned by 90 degrees."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32") / 16
    turned = np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    split = train_test_split(
        images, turned, labels, test_size=0.25, stratify=labels, random_state=0
    )
    x, x_test, new, new_test, y, y_test = split
    return {"old": (x, y), "new": (new, y)}, {"old": (x_test, y_test), "new": (new_test, y_test)}


def network():
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(100, "relu"),
            keras.layers.Dense(100, "relu"),
            keras.layers.Dense(10),
        ]
    )


class Case:
    """One trained network, wrapped, and the two data sets."""

    def __init__(self, train, weights, seed):
        self.old, self.new = train["old"], train["new"]
        self.random = np.random.default_rng(seed)
        keras.utils.set_random_seed(seed)
        plain = network()
        if weights is not None:
            plain.set_weights(weights)
        self.model = DWDModel.from_model(plain)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile("adam", loss, metrics=["accuracy"])

    def learn(self, which, **settings):
        """Train on the data named `which`."""
        self.model.fit(*getattr(self, which), epochs=EPOCHS, verbose=0, **settings)

    def sample(self, count=SAMPLE):
        """Some of the old training images, and their labels."""
        x, y = self.old
        chosen = self.random.permutation(len(x))[:count]
        return x[chosen], y[chosen]

    def accuracies(self, test):
        """Accuracy on the test data of both."""
        return {
            name: float(np.mean(np.argmax(self.model(x), axis=-1) == y))
            for name, (x, y) in test.items()
        }


class ConsolidateEachEpoch(keras.callbacks.Callback):
    """Calls `consolidate` at the end of each epoch: a misuse."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.consolidate()


def as_meant(case):
    case.model.consolidate(case.sample()[0])
    case.learn("new")


def with_labels(case):
    case.model.consolidate(*case.sample())
    case.learn("new")


def never(case):
    case.learn("new")


def too_late(case):
    case.learn("new")
    case.model.consolidate(case.sample()[0])


def each_epoch(case):
    case.model.consolidate(case.sample()[0])
    case.learn("new", callbacks=[ConsolidateEachEpoch()])


def on_new_data(case):
    case.model.consolidate(case.new[0][:SAMPLE])
    case.learn("new")


def on_noise(case):
    case.model.consolidate(case.random.uniform(size=(SAMPLE, 64)).astype("float32"))
    case.learn("new")


def not_scaled(case):
    case.model.consolidate(case.sample()[0] * 16)
    case.learn("new")


def same_task_again(case):
    case.model.consolidate(case.sample()[0])
    case.learn("old")
    case.model.consolidate()
    case.learn("new")


def same_data_as_it_came(case):
    case.model.consolidate(case.sample()[0])
    case.learn("old")
    case.learn("new")


def before_training(case):
    case.model.consolidate(case.sample()[0])
    case.learn("old")
    case.learn("new")


# What is done, by how it is called in the table. The last starts with a network that has not
# been trained.
CASES = {
    "as meant: once, before the new data": as_meant,
    "the same, with labels": with_labels,
    "never: fine-tuning": never,
    "only after the new data": too_late,
    "after every epoch on the new data as well": each_epoch,
    "on the new data in place of the old": on_new_data,
    "on noise": on_noise,
    "on old data that are not scaled as in training (0–16, not 0–1)": not_scaled,
    "more training on the old data, `consolidate` again": same_task_again,
    "more training on the old data, not again": same_data_as_it_came,
    "before any training, not after the old data": before_training,
}
UNTRAINED = before_training


def pretrained(train, seed):
    """The weights of a plain network that has learned the old data."""
    keras.utils.set_random_seed(seed)
    plain = network()
    plain.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    plain.fit(*train["old"], epochs=EPOCHS, verbose=0)
    return plain.get_weights()


def with_count(count, labels):
    """A case that consolidates `count` examples."""

    def run(case):
        x, y = case.sample(count)
        case.model.consolidate(*((x, y) if labels else (x,)))
        case.learn("new")

    return run


def measured(runs):
    """Mean and standard deviation over the seeds of each accuracy."""
    return {
        name: {
            "mean": float(np.mean([run[name] for run in runs])),
            "std": float(np.std([run[name] for run in runs], ddof=1)) if len(runs) > 1 else 0.0,
            "per_seed": [run[name] for run in runs],
        }
        for name in runs[0]
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    train, test = data()
    results = {
        "protocol": PROTOCOL.format(epochs=EPOCHS, sample=SAMPLE, last=options.seeds - 1),
        "versions": versions(),
        "misuse": {},
        "examples": {str(count): {} for count in COUNTS},
    }
    earlier = read_json(options.out) if options.out.exists() else {}
    if earlier.get("protocol") == results["protocol"]:
        results = earlier
    weights = [pretrained(train, seed) for seed in range(options.seeds)]

    def fill(rows, label, run):
        if label in rows:
            return
        runs = []
        for seed in range(options.seeds):
            case = Case(train, None if run is UNTRAINED else weights[seed], seed)
            run(case)
            runs.append(case.accuracies(test))
            keras.utils.clear_session(free_memory=False)
        rows[label] = measured(runs)
        print(label, {name: round(row["mean"], 3) for name, row in rows[label].items()}, flush=True)
        write_json(options.out, results)

    for name, labels in (("inputs", False), ("labelled", True)):
        for count in COUNTS:
            fill(results["examples"][str(count)], name, with_count(count, labels))
    for label, run in sorted(CASES.items(), key=lambda case: case[1] is each_epoch):  # slow: last
        fill(results["misuse"], label, run)


if __name__ == "__main__":
    main()
