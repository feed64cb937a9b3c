"""Learns a stream of digits, whose pixels are rearranged at times that nobody tells.

Usage: python examples/stream.py
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_dwd import DWDModel
from keras_dwd.callbacks import ConsolidateEvery, ConsolidateOnDrift

EPOCHS = 5  # how often the stream shows each image before the pixels are rearranged


def main():
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype("float32"), y.astype("int32")
    rng = np.random.default_rng(0)
    orders = [np.arange(64), rng.permutation(64), rng.permutation(64)]
    shown = [np.concatenate([rng.permutation(len(y)) for _ in range(EPOCHS)]) for _ in orders]
    stream = np.concatenate([x[s][:, o] for s, o in zip(shown, orders, strict=True)])
    labels = np.concatenate([y[s] for s in shown])
    print("the tasks end at the steps", [len(shown[0]) * t // 16 for t in (1, 2)])
    for callbacks in ([], [ConsolidateEvery(300)], [ConsolidateOnDrift()]):
        keras.utils.set_random_seed(0)
        network = keras.Sequential(
            [keras.Input((64,)), keras.layers.Dense(100, "relu"), keras.layers.Dense(10)]
        )
        model = DWDModel.from_model(network)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, metrics=["accuracy"])
        model.fit(stream, labels, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks)
        found = [model.evaluate(x[:, order], y, verbose=0)[1] for order in orders]
        how = type(callbacks[0]).__name__ if callbacks else "no boundary"
        print(f"{how}: accuracy {np.round(found, 3)}", *[c.boundaries for c in callbacks])


if __name__ == "__main__":
    main()
