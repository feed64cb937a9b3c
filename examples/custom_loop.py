"""Trains two permuted tasks in a loop of its own, with gradients that are clipped by hand.

Usage: python examples/custom_loop.py
"""

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from keras_dwd import DWDModel

EPOCHS = 10


def step_of(model):
    """A compiled step. After each `consolidate` a new one is needed; an old one raises an error."""

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        clipped, _ = tf.clip_by_global_norm(gradients, 1.0)
        model.apply_gradients(clipped)  # with the pull towards what earlier tasks need
        return loss

    return step


def main():
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype("float32"), y.astype("int32")
    orders = [np.arange(64), np.random.default_rng(0).permutation(64)]
    network = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(100, "relu"), keras.layers.Dense(10)]
    )
    model = DWDModel.from_model(network)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    for order in orders:
        data = tf.data.Dataset.from_tensor_slices((x[:, order], y)).shuffle(2000).batch(32)
        step = step_of(model)
        for _ in range(EPOCHS):
            for batch in data:
                last = step(*batch)
        print(f"loss {float(last):.3f}")
        model.consolidate(x[:500, order], y[:500], verbose=0)
    for order in orders:
        print("accuracy", round(model.evaluate(x[:, order], y, verbose=0)[1], 3))


if __name__ == "__main__":
    main()
