"""Learns two regions of a function of two variables one after another.

Usage: python examples/regression.py
"""

import keras
import numpy as np

from keras_dwd import DWDModel

EPOCHS = 60


def region(low, high, seed):
    """Points of a strip of the plane, and the values of the function there."""
    x = np.random.default_rng(seed).uniform((low, -1), (high, 1), (400, 2)).astype("float32")
    return x, np.sin(3 * x[:, :1]) * x[:, 1:]


def main():
    left, right = region(-1, 0, seed=0), region(0, 1, seed=1)
    for strength in (0.0, 200.0):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(64, "tanh"), keras.layers.Dense(64, "tanh")]
        network = keras.Sequential([keras.Input((2,)), *layers, keras.layers.Dense(1)])
        model = DWDModel.from_model(network, strength=strength)
        model.compile(keras.optimizers.Adam(0.003), "mse")
        for x, y in (left, right):
            model.fit(x, y, epochs=EPOCHS, verbose=0)
            model.consolidate(x, y, verbose=0)
        errors = [model.evaluate(x, y, verbose=0) for x, y in (left, right)]
        print(f"strength {strength:g}: squared error left and right", np.round(errors, 4))


if __name__ == "__main__":
    main()
