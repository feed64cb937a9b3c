"""Measures the time of an exact Fisher pass against a gradient pass and a loop over examples.

All of them process the same 1,000 examples, alternating in one process. Reported are the medians
over rounds of the ratio to the gradient pass.

Usage: python benchmarks/fisher_cost.py [--rounds N] [--out FILE]
"""

import argparse
import statistics
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_dwd import DiagonalFisher, DWDModel, KroneckerFisher
from keras_dwd.evaluation.experiment import versions
from keras_dwd.files import write_json
from keras_dwd.learner import data_loss

EXAMPLES, BATCH, CLASSES = 1000, 50, 10


def mlp(rng):
    inputs = keras.Input((784,))
    x = layers.Dense(256, "relu")(inputs)
    x = layers.Dense(256, "relu")(x)
    data = rng.normal(size=(EXAMPLES, 784)).astype("float32")
    return keras.Model(inputs, layers.Dense(CLASSES)(x)), data


def conv_net(rng):
    inputs = keras.Input((32, 32, 3))
    x = inputs
    for filters, stride in ((32, 1), (32, 2), (64, 1), (64, 2)):
        x = layers.Conv2D(filters, 3, stride, padding="same", activation="relu")(x)
    x = layers.Dense(128, "relu")(layers.Flatten()(layers.MaxPooling2D()(x)))
    data = rng.normal(size=(EXAMPLES, 32, 32, 3)).astype("float32")
    return keras.Model(inputs, layers.Dense(CLASSES)(x)), data


def transformer(rng):
    """Two transformer blocks with 4 heads and width 64, for 32 tokens of 1,000 different ones."""
    inputs = keras.Input((32,), dtype="int32")
    x = layers.Embedding(1000, 64)(inputs)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 16)(y, y)])
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.Dense(64)(layers.Dense(256, "gelu")(y))])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    data = rng.integers(0, 1000, (EXAMPLES, 32)).astype("int32")
    return keras.Model(inputs, layers.Dense(CLASSES)(x)), data


NETWORKS = {"MLP": mlp, "conv net": conv_net, "transformer": transformer}


def passes(build):
    """The number of parameters, and the passes to compare as functions without arguments."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    network, x = build(rng)
    y = rng.integers(0, CLASSES, EXAMPLES).astype("int32")
    compared = {}

    def model_with(fisher):
        model = DWDModel.from_model(network, fisher=fisher, grouping=None)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
        return model

    for name, fisher in (
        ("exact diagonal", DiagonalFisher("empirical", None)),
        ("Kronecker", KroneckerFisher("empirical", None)),
    ):
        model = model_with(fisher)
        compared[name] = lambda model=model: model._consolidation.pass_statistics(
            model, (x, y), BATCH
        )

    plain = model_with(DiagonalFisher("empirical", None))
    values = [v.value for v in plain.trainable_variables]
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)

    @tf.function
    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = data_loss(plain, x, y, plain(x, training=False))
        return [tf.convert_to_tensor(g) for g in tape.gradient(loss, values)]

    @tf.function
    def squares(x, y):
        return [tf.square(g) for g in gradients(x, y)]

    def over(function, data):
        sums = None
        for x, y in data:
            batch = function(x, y)
            sums = batch if sums is None else [a + b for a, b in zip(sums, batch, strict=True)]
        return [np.asarray(s) for s in sums]

    compared["gradient pass"] = lambda: over(gradients, batches)
    compared["loop over examples"] = lambda: over(squares, batches.unbatch().batch(1))
    return network.count_params(), compared


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "fisher_cost.json"
    )
    options = parser.parse_args()
    results = {}
    for name, build in NETWORKS.items():
        parameters, compared = passes(build)
        loop = np.concatenate([s.ravel() for s in compared["loop over examples"]()]) / EXAMPLES
        fast = compared["exact diagonal"]()
        fast = np.concatenate([fast[key].ravel() for key in fast])
        np.testing.assert_allclose(np.sort(fast), np.sort(loop), rtol=1e-2, atol=1e-6)
        seconds = {key: [] for key in compared}
        for function in compared.values():
            function()  # trace
        for _ in range(options.rounds):
            for key, function in compared.items():
                started = time.perf_counter()
                function()
                seconds[key].append(time.perf_counter() - started)
        plain = seconds["gradient pass"]
        row = results[name] = {
            "parameters": parameters,
            "seconds_gradient_pass": statistics.median(plain),
        }
        for key in compared:
            ratios = sorted(s / p for s, p in zip(seconds[key], plain, strict=True))
            if key != "gradient pass":
                quartiles = [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]]
                row[key] = {"ratio": statistics.median(ratios), "ratio_quartiles": quartiles}
                print(f"{name}: {key} / gradient pass {row[key]['ratio']:.2f}", flush=True)
    write_json(
        options.out,
        {
            "protocol": f"{EXAMPLES:,} examples in batches of {BATCH}, seconds of a pass over "
            "those of a plain pass of mean gradients, alternating in one process, median of "
            f"{options.rounds} rounds; the loop takes one example at a time in a tf.function",
            "versions": versions(),
            "passes": results,
        },
    )


if __name__ == "__main__":
    main()
