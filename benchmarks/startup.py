"""What a user waits for: import, first step, first boundary, first step after it, loading a file.

Each round starts two processes per network, one after another: plain Keras, and a `DWDModel` with
its defaults. Figures are CPU seconds, which other programs on the machine change least, as medians
over the rounds.

Usage: python benchmarks/startup.py [--rounds N] [--networks NAME ...] [--out FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROTOCOL = (
    "CPU seconds of a process of its own, median over {rounds} rounds of plain Keras and DWDModel "
    "with its defaults in turn; 100 random examples, batch 32 (the last one smaller), one epoch "
    "each; the boundary is `consolidate(x, y)`"
)
PHASES = ("import", "first epoch", "boundary", "first epoch after it", "loading a file")


def conv(keras):
    """The convolutional network of Keras' example on MNIST."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def lstm(keras):
    """Two bidirectional LSTMs on sequences of vectors, as in Keras' example on IMDB."""
    return keras.Sequential(
        [
            keras.Input((20, 32)),
            keras.layers.Bidirectional(keras.layers.LSTM(32, return_sequences=True)),
            keras.layers.Bidirectional(keras.layers.LSTM(32)),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


NETWORKS = {"conv net": conv, "bidirectional LSTM": lstm}


def phases(network, package):
    """The CPU seconds of each phase in this process."""
    times = [0.0]  # the start of the process

    def lap():
        times.append(time.process_time())

    import keras
    import tensorflow  # noqa: F401

    if package:
        import keras_dwd
    lap()
    import numpy as np

    model = NETWORKS[network](keras)
    if package:
        model = keras_dwd.DWDModel.from_model(model)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, *model.input_shape[1:])).astype("float32")
    y = rng.integers(0, 10, 100)
    model.fit(x, y, verbose=0)
    lap()
    if package:
        model.consolidate(x, y, verbose=0)
    lap()
    model.fit(x, y, verbose=0)
    lap()
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        times[-1], before = time.process_time(), times[-1]
        keras.models.load_model(f"{folder}/model.keras")
        lap()
    saving = times[-2] - before  # is nobody's phase
    seconds = np.diff(times)
    seconds[-2] -= saving
    return dict(zip(PHASES, map(float, seconds), strict=True))


def measured(network, package):
    command = [sys.executable, __file__, "--measure", network, *(["--package"] if package else [])]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/startup.json")
    parser.add_argument("--measure", choices=NETWORKS, help=argparse.SUPPRESS)
    parser.add_argument("--package", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(phases(options.measure, options.package)))
        return
    from keras_dwd.evaluation.experiment import versions
    from keras_dwd.files import write_json

    protocol = PROTOCOL.format(rounds=options.rounds)
    startup = {}
    for network in options.networks:
        found = [
            {kind: measured(network, kind == "DWD") for kind in ("Keras", "DWD")}
            for _ in range(options.rounds)
        ]
        startup[network] = {
            kind: {p: statistics.median(one[kind][p] for one in found) for p in PHASES}
            for kind in ("Keras", "DWD")
        }
        print(network, startup[network], flush=True)
        write_json(options.out, {"protocol": protocol, "versions": versions(), "startup": startup})


if __name__ == "__main__":
    main()
