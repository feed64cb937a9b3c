"""What DWD takes in memory: its state, and the peak of a pass over data.

The state is that of a `DWDModel` with its defaults after 1, 2 and 10 tasks. The peaks are those of
processes of their own: how far the largest resident size rises in a training step of plain Keras,
and in `consolidate` with the same batch.

Usage: python benchmarks/memory.py [--out FILE]
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

PROTOCOL = (
    "state: DWDModel with its defaults, with the slots of the online estimate, importance from 64 "
    "random examples of each task, weights moved at random in place of training, in bytes a "
    "parameter; peak: rise of the largest resident size of a process of its own in one training "
    "step (`fit` with Adam) of plain Keras, and in `consolidate` with the same batch, tracing "
    "included"
)


def classifier(keras, shape, *between, **of_input):
    """A network for ten classes."""
    head = keras.layers.Dense(10, activation="softmax")
    return keras.Sequential([keras.Input(shape, **of_input), *between, head])


def dense(keras):
    hidden = (keras.layers.Dense(256, activation="relu") for _ in range(2))
    return classifier(keras, (784,), *hidden)


def conv(keras):
    return classifier(
        keras,
        (16, 16, 3),
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.Conv2D(64, 3, strides=2, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(128, activation="relu"),
    )


def many_positions(keras):
    layers = keras.layers.Conv2D(64, 3, activation="relu"), keras.layers.GlobalAveragePooling2D()
    return classifier(keras, (128, 128, 64), *layers)


def many_tokens(keras):
    layers = keras.layers.Embedding(500, 32), keras.layers.GlobalAveragePooling1D()
    return classifier(keras, (2048,), *layers, dtype="int32")


STATES = {"dense, 784–256–256": dense, "conv, 16 × 16": conv}
PEAKS = {"Conv2D on 128 × 128 × 64": many_positions, "Embedding of 2,048 tokens": many_tokens}
TASKS = (1, 2, 10)
BATCH = 16


def compiled(network, package):
    """A model and the function that makes random data for it."""
    import keras
    import numpy as np

    import keras_dwd

    keras.utils.set_random_seed(0)
    model = network(keras)
    if package:
        model = keras_dwd.DWDModel.from_model(model)
    model.compile("adam", "sparse_categorical_crossentropy")

    def data(count, seed):
        rng = np.random.default_rng(seed)
        shape, labels = (count, *model.input_shape[1:]), rng.integers(0, 10, count)
        if model.inputs[0].dtype == "int32":
            return rng.integers(0, 500, shape), labels
        classes = rng.normal(size=(10, *shape[1:]))  # tasks differ in these
        return (classes[labels] + rng.normal(size=shape)).astype("float32"), labels

    return model, data


def state(network):
    """Parameters of a network, and the bytes of state for each of them after some tasks."""
    import keras

    model, data = compiled(network, package=True)
    model.make_train_function()  # creates the slots of the online estimate
    found = {}
    for task in range(1, TASKS[-1] + 1):
        for variable in model.trainable_variables:
            variable.assign_add(1e-2 * keras.random.normal(variable.shape))
        model.consolidate(*data(64, task), verbose=0)
        if task in TASKS:
            arrays = model._consolidation.state(model).values()
            found[str(task)] = sum(array.nbytes for array in arrays) / model.count_params()
    return {"parameters": model.count_params(), "bytes_per_parameter": found}


def peak(network, package):
    """Megabytes by which the largest resident size of this process rises in a step or a pass."""
    model, data = compiled(network, package)
    x, y = data(BATCH, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if package:
        model.consolidate(x, y, batch_size=BATCH, verbose=0)
    else:
        model.fit(x, y, batch_size=BATCH, verbose=0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def in_process(*arguments):
    """What this file prints as JSON, run in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/memory.json")
    parser.add_argument("--state", choices=STATES, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=PEAKS, help=argparse.SUPPRESS)
    parser.add_argument("--package", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.state:
        print(json.dumps(state(STATES[options.state])))
        return
    if options.peak:
        print(json.dumps(peak(PEAKS[options.peak], options.package)))
        return
    from keras_dwd.evaluation.experiment import versions
    from keras_dwd.files import write_json

    peaks = {
        name: {"step": in_process("--peak", name), "pass": in_process("--peak", name, "--package")}
        for name in PEAKS
    }
    print(peaks, flush=True)
    states = {name: in_process("--state", name) for name in STATES}
    print(states, flush=True)
    content = {"protocol": PROTOCOL, "versions": versions(), "states": states, "peaks": peaks}
    write_json(options.out, content)


if __name__ == "__main__":
    main()
