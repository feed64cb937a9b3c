"""Learns from images and a second input, with two outputs, from one camera and then another.

Usage: python examples/multi_input.py
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_dwd import DWDModel

EPOCHS = 15


def network():
    """Tells digits from their pixels, and from their brightness how much of them is drawn."""
    pixels, scale = keras.Input((64,), name="pixels"), keras.Input((1,), name="scale")
    hidden = keras.layers.Dense(100, "relu")(keras.layers.Concatenate()([pixels, scale]))
    outputs = {
        "digit": keras.layers.Dense(10, name="digit")(hidden),
        "ink": keras.layers.Dense(1, name="ink")(hidden),
    }
    return keras.Model({"pixels": pixels, "scale": scale}, outputs)


def camera(pixels, labels, scale):
    """The images as a camera of this contrast sees them."""
    x = {"pixels": scale * pixels, "scale": np.full((len(pixels), 1), scale, "float32")}
    return x, {"digit": labels, "ink": pixels.mean(1, keepdims=True)}


def main():
    keras.utils.set_random_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype("float32")
    first, second = camera(pixels, labels, 1.0), camera(pixels[:, ::-1], labels, 0.5)
    model = DWDModel.from_model(network())
    losses = {
        "digit": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "ink": "mse",
    }
    model.compile("adam", losses, metrics={"digit": "accuracy"})
    for x, y in (first, second):
        model.fit(x, y, epochs=EPOCHS, verbose=0)
        model.consolidate(x, y, verbose=0)
    for name, (x, y) in (("first", first), ("second", second)):
        logs = model.evaluate(x, y, verbose=0, return_dict=True)
        print(f"{name} camera: accuracy {logs['digit_accuracy']:.3f}, all logs {sorted(logs)}")


if __name__ == "__main__":
    main()
