"""What the default λ does beyond a classifier with much new data: old and new task by λ.

Two small tasks, one after the other. All λ start from the same state after the first task, and the
optimizer goes on as in a user's program. Of values the score is R², of classes the accuracy; of
several outputs it is their mean. Each case writes its row to the file as it ends.

Usage: python benchmarks/strength.py [--cases NAME ...] [--seeds N] [--epochs N] [--out FILE]
"""

import argparse
import json
from pathlib import Path

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_diabetes, load_digits

from keras_dwd import DWDModel
from keras_dwd.evaluation.experiment import versions
from keras_dwd.files import write_json

STRENGTHS = (0, 2, 20, 200, 2000)
CLASSES = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def case(tasks, losses, epochs=(20, 20), width=64, **compiled):
    """A sequence of two tasks, each `(x, [y, …])` for training and for testing."""
    return {"tasks": tasks, "losses": losses, "epochs": epochs, "width": width, "with": compiled}


def cut(x, y, count):
    """The first examples for training, the others for testing."""
    y = [array.astype("float32") for array in y]
    return (x[:count].astype("float32"), [a[:count] for a in y]), (
        x[count:].astype("float32"),
        [a[count:] for a in y],
    )


def regions(seed, loss="mse", outputs=1, new=1000, epochs=(20, 20), **compiled):
    """One function of four inputs, in two regions of the first input."""
    rng = np.random.RandomState(seed)
    w, b, v = 1.2 * rng.randn(4, 6), rng.randn(6), rng.randn(6, outputs) / 1.5
    tasks = []
    for low, count in ((-1, 1000), (0, new)):
        x = rng.uniform(-1, 1, (count + 500, 4))
        x[:, 0] = rng.uniform(low, low + 1, count + 500)
        y = np.sin(x @ w + b) @ v + 0.05 * rng.randn(count + 500, outputs)
        tasks.append(cut(x, [y], count))
    return case(tasks, [loss], epochs, **compiled)


def diabetes(seed):
    """Patients below and above the mean weight: little data, much noise."""
    x, y = load_diabetes(return_X_y=True)
    y, rng = (y - y.mean()) / y.std(), np.random.RandomState(seed)
    tasks = []
    for part in (x[:, 2] < 0, x[:, 2] >= 0):
        chosen = rng.permutation(np.flatnonzero(part))
        tasks.append(cut(20 * x[chosen], [y[chosen, None]], int(0.7 * len(chosen))))
    return case(tasks, ["mse"], width=32)


def digits(seed, outputs=("class",), new=1200, epochs=(10, 10), turned=False):
    """Digits, then with their pixels permuted, or turned by a quarter."""
    x, label = load_digits(return_X_y=True)
    rng = np.random.RandomState(100 + seed)
    order = rng.permutation(len(x))
    x, label = x[order] / 16, label[order]
    centre = (x.reshape(-1, 8, 8) * (np.arange(8) - 3.5)).sum((1, 2)) / x.sum(1)
    of = {"class": label, "high": label >= 5, "centre": (centre / centre.std())[:, None]}
    second = x[:, rng.permutation(64)]
    if turned:
        second = np.rot90(x.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    y = [of[name] for name in outputs]
    tasks = []
    for images, count in ((x, 1200), (second, new)):
        (a, b), (c, d) = cut(images, y, 1200)
        tasks.append(((a[:count], [array[:count] for array in b]), (c, d)))
    losses = ["mse" if name == "centre" else CLASSES for name in outputs]
    return case(tasks, losses, epochs, width=100)


CASES = {
    "values": regions,
    "values, absolute error": lambda seed: regions(seed, "mae"),
    "values, loss weight 0.01": lambda seed: regions(seed, loss_weights=[0.01]),
    "five values": lambda seed: regions(seed, outputs=5),
    "values, 200 new examples, 5 epochs": lambda seed: regions(seed, new=200, epochs=(20, 5)),
    "diabetes": diabetes,
    "digits, class and value": lambda seed: digits(seed, ("class", "centre")),
    "digits, two classes": lambda seed: digits(seed, ("class", "high")),
    "digits": digits,
    "digits, 200 new examples, 5 epochs": lambda seed: digits(
        seed, new=200, epochs=(10, 5), turned=True
    ),
}


def score(model, losses, data):
    x, y = data
    outputs = model(x, training=False)
    found = []
    for output, values, loss in zip(
        outputs if len(losses) > 1 else [outputs], y, losses, strict=True
    ):
        output = keras.ops.convert_to_numpy(output)
        if loss is CLASSES:
            found.append(np.mean(output.argmax(1) == values))
        else:
            error = ((output - values) ** 2).mean() / values.var(0).mean()
            found.append(max(0.0, 1 - error))
    return float(np.mean(found))


def network(settings):
    (x, y), _ = settings["tasks"][0]
    inputs = keras.Input(x.shape[1:])
    hidden = inputs
    for _ in range(2):
        hidden = layers.Dense(settings["width"], activation="relu")(hidden)
    both = zip(settings["losses"], y, strict=True)
    sizes = [10 if loss is CLASSES else values.shape[1] for loss, values in both]
    outputs = [layers.Dense(size)(hidden) for size in sizes]
    return keras.Model(inputs, outputs if len(outputs) > 1 else outputs[0])


def measure(name, seed, epochs):
    """The score after the first task, and of both tasks after the second, by λ."""
    keras.utils.set_random_seed(seed)
    settings = CASES[name](seed)
    (first, tested), (second, tested_too) = settings["tasks"]
    losses = settings["losses"]
    model = DWDModel.from_model(network(settings))
    model.compile("adam", losses if len(losses) > 1 else losses[0], **settings["with"])

    def fit(data, default):
        x, y = data
        model.fit(x, y if len(y) > 1 else y[0], epochs=epochs or default, verbose=0)

    fit(first, settings["epochs"][0])
    learned = score(model, losses, tested)
    model.consolidate()
    variables = [*model.weights, *model.optimizer.variables]
    start = [np.array(keras.ops.convert_to_numpy(v)) for v in variables]
    rows = {}
    for strength in STRENGTHS:
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        model.strength = strength
        keras.utils.set_random_seed(seed + 7)
        fit(second, settings["epochs"][1])
        rows[f"{strength:g}"] = [score(model, losses, data) for data in (tested, tested_too)]
    return {"learned": learned, "old_and_new": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    default = Path(__file__).parent / "results/strength.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {}
    content = {"versions": versions(), "protocol": __doc__, "cases": content.get("cases", {})}
    for name in options.cases:
        row = content["cases"][name] = {}
        for seed in range(options.seeds):
            row[str(seed)] = measure(name, seed, options.epochs)
            write_json(options.out, content)
            print(name, seed, row[str(seed)], flush=True)


if __name__ == "__main__":
    main()
