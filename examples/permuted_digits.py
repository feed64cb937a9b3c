"""Learns three permuted tasks of scikit-learn's digits one after another and exports the model.

Usage: python examples/permuted_digits.py
"""

import tempfile

import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_dwd import DWDModel
from keras_dwd.callbacks import PenaltyLogger

EPOCHS = 10


def main():
    x, y = load_digits(return_X_y=True)
    x, y = x.astype("float32") / 16, y.astype("int32")
    train, test = slice(0, 1500), slice(1500, None)
    rng = np.random.default_rng(0)
    orders = [np.arange(64), rng.permutation(64), rng.permutation(64)]

    for strength in (0.0, 200.0):
        keras.utils.set_random_seed(0)
        network = keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(100, activation="relu"),
                keras.layers.Dense(100, activation="relu"),
                keras.layers.Dense(10),
            ]
        )
        model = DWDModel.from_model(network, strength=strength)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        for order in orders:
            model.compile("adam", loss, metrics=["accuracy"])
            model.fit(
                x[train][:, order], y[train], epochs=EPOCHS, verbose=0, callbacks=[PenaltyLogger()]
            )
            model.consolidate()
        accuracies = [
            model.evaluate(x[test][:, order], y[test], verbose=0, return_dict=True)["accuracy"]
            for order in orders
        ]
        print(f"strength {strength:g}: accuracy per task", np.round(accuracies, 3))

    with tempfile.TemporaryDirectory() as folder:
        model.export(folder, verbose=False)  # a SavedModel of the network, without DWD's state


if __name__ == "__main__":
    main()
