"""Retention on networks that are neither MLPs nor conv nets, with nothing set.

Two tasks on sequences of tokens. Each token belongs to one of four topics, and most sequences have
more tokens of one topic than of the others. Task 1 asks which of topics 0 and 1 that is, task 2
which of 2 and 3, with the same two outputs: a network can know both, as joint training shows.

Results of an earlier run with the same protocol and versions are reused unless `--fresh` is given.

Usage: python benchmarks/kinds.py [--networks NAME ...] [--seeds N] [--fresh] [--out FILE]
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from keras import layers

from keras_dwd import DWDModel, ewc
from keras_dwd.evaluation.experiment import versions
from keras_dwd.files import read_json, write_json

TOKENS, LENGTH, TOPICS = 96, 24, 4
TRAIN, TEST, EPOCHS, BATCH, RATE, BOUNDARY = 1500, 600, 5, 32, 3e-3, 300
STRENGTHS = (1e2, 1e3, 1e4, 1e5, 1e6)
PROTOCOL = (
    f"two tasks of {TRAIN:,} sequences of up to {LENGTH} of {TOKENS} tokens, {EPOCHS} epochs a "
    f"task, batch {BATCH}, Adam {RATE:g} reset for each task; EWC and `dwd` estimate on the first "
    f"{BOUNDARY} sequences of a task, `dwd-online` while training; accuracy on {TEST} test "
    "sequences of each task after both, seeds {seeds}, mean over seeds"
)


def sequences(topics: tuple[int, int], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences whose tokens are of one of two topics with probability 0.4, else of any topic."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).astype("int32")
    topic = np.array(topics)[labels][:, None]
    shape = (count, LENGTH)
    of_topic = TOPICS * rng.integers(0, TOKENS // TOPICS, shape) + topic
    tokens = np.where(rng.random(shape) < 0.4, of_topic, rng.integers(0, TOKENS, shape)) + 1
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, count)
    return np.where(np.arange(LENGTH) < lengths[:, None], tokens, 0).astype("int32"), labels


class Positions(layers.Layer):
    """Adds a vector for each position."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x):
        return x + self.table


def _tokens(width: int, masked: bool = True):
    inputs = keras.Input((LENGTH,), dtype="int32")
    return inputs, layers.Embedding(TOKENS + 1, width, mask_zero=masked)(inputs)


def bag_of_words() -> keras.Model:
    inputs, h = _tokens(16)
    h = layers.Dense(32, activation="relu")(layers.GlobalAveragePooling1D()(h))
    return keras.Model(inputs, layers.Dense(2)(h))


def gru() -> keras.Model:
    inputs, h = _tokens(16)
    return keras.Model(inputs, layers.Dense(2)(layers.GRU(24)(h)))


def bidirectional_lstm() -> keras.Model:
    inputs, h = _tokens(16)
    return keras.Model(inputs, layers.Dense(2)(layers.Bidirectional(layers.LSTM(16))(h)))


def transformer() -> keras.Model:
    inputs, h = _tokens(24, masked=False)
    h = Positions()(h)
    h = layers.LayerNormalization()(h + layers.MultiHeadAttention(2, 12)(h, h))
    h = layers.LayerNormalization()(h + layers.Dense(24)(layers.Dense(48, "gelu")(h)))
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(h)))


NETWORKS = {
    "bag of words": bag_of_words,
    "GRU": gru,
    "bidirectional LSTM": bidirectional_lstm,
    "transformer": transformer,
}


class Learner:
    """A model that has learned task 1, and then learns task 2 under any number of strengths."""

    def __init__(self, network, seed, train, settings, online=False):
        keras.utils.set_random_seed(seed)
        self.train, self.seed = train, seed
        self.model = DWDModel.from_model(network(), **settings)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(keras.optimizers.Adam(RATE), loss, metrics=["accuracy"])
        self._fit(*train[0])
        self.model.consolidate(None if online else tuple(a[:BOUNDARY] for a in train[0]))
        self.weights = self.model.get_weights()

    def _fit(self, x, y):
        self.model.fit(x, y, epochs=EPOCHS, batch_size=BATCH, verbose=0)

    def accuracies(self, test, strength=None):
        """The accuracies on both tasks after task 2, with this strength or that of the model."""
        self.model.set_weights(self.weights)
        for variable in self.model.optimizer.variables:
            if "learning_rate" not in variable.path:
                variable.assign(np.zeros(variable.shape, variable.dtype))
        if strength is not None:
            self.model.regularizer.strength = strength
        keras.utils.set_random_seed(self.seed + 1000)
        self._fit(*self.train[1])
        return [
            float(self.model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"])
            for x, y in test
        ]


def measured(network, seed: int) -> dict[str, list[float]]:
    """Accuracies on both tasks, by method."""
    train = [sequences(t, TRAIN, 10 * seed + t[0]) for t in ((0, 1), (2, 3))]
    test = [sequences(t, TEST, 10 * seed + t[1]) for t in ((0, 1), (2, 3))]
    found = {}
    learner = Learner(network, seed, train, ewc(STRENGTHS[0]))
    for strength in STRENGTHS:
        found[f"ewc {strength:g}"] = learner.accuracies(test, strength)
    found["finetune"] = learner.accuracies(test, 0.0)
    found["dwd"] = Learner(network, seed, train, {}).accuracies(test)
    found["dwd-online"] = Learner(network, seed, train, {}, online=True).accuracies(test)
    both = [tuple(np.concatenate(parts) for parts in zip(*train, strict=True))] * 2
    found["joint"] = Learner(network, seed, both, {"strength": 0.0}).accuracies(test)
    return found


def summary(runs: list[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Means over seeds of the accuracies, and the best of the strengths of EWC."""
    means = {method: np.mean([run[method] for run in runs], 0) for method in runs[0]}
    of_ewc = [method for method in means if method.startswith("ewc")]
    means["ewc (best)"] = max((means[method] for method in of_ewc), key=np.mean)
    return {
        method: {"task 1": float(a[0]), "task 2": float(a[1]), "mean": float(np.mean(a))}
        for method, a in means.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/kinds.json")
    options = parser.parse_args()
    runs: dict[str, dict[str, dict[str, list[float]]]] = {}
    about = {"protocol": PROTOCOL, "versions": versions()}
    if options.out.exists() and not options.fresh:
        earlier = read_json(options.out)
        if earlier["about"] == about:
            runs = earlier["runs"]
    for seed in range(options.seeds):
        for name in options.networks:
            of_network = runs.setdefault(name, {})
            if str(seed) in of_network:
                continue
            of_network[str(seed)] = measured(NETWORKS[name], seed)
            networks = {n: summary(list(r.values())) for n, r in runs.items() if r}
            seeds = {n: sorted(map(int, r)) for n, r in runs.items() if r}
            write_json(
                options.out,
                {
                    "about": about,
                    "protocol": PROTOCOL.format(seeds=seeds[name]),
                    "seeds": seeds,
                    "networks": networks,
                    "runs": runs,
                },
            )
            for method, accuracy in networks[name].items():
                print(f"{name:20} {method:12} mean {100 * accuracy['mean']:.1f}", flush=True)


if __name__ == "__main__":
    main()
