"""Writes accuracy on earlier tasks, penalty and drift to TensorBoard while a model is trained.

Usage: python examples/tensorboard.py [FOLDER]
Then: tensorboard --logdir FOLDER
"""

import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_dwd import DWDModel
from keras_dwd.callbacks import EvaluatePastTasks, PenaltyLogger

EPOCHS = 10


def main(folder=None):
    folder = Path(folder or tempfile.mkdtemp(prefix="logs_"))
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype("float32"), y.astype("int32")
    rng = np.random.default_rng(0)
    tasks = {"upright": x, "shuffled": x[:, rng.permutation(64)], "mirrored": x[:, ::-1]}
    network = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(100, "relu"), keras.layers.Dense(10)]
    )
    model = DWDModel.from_model(network)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    past = {}
    for name, images in tasks.items():
        callbacks = [PenaltyLogger(), keras.callbacks.TensorBoard(folder / name)]
        if past:  # what adds to the logs comes before what writes them
            callbacks.insert(0, EvaluatePastTasks(past))
        logs = model.fit(images, y, epochs=EPOCHS, verbose=0, callbacks=callbacks).history
        model.consolidate(images[:500], y[:500], verbose=0)
        past[name] = (images, y)
        print(name, {key: round(values[-1], 3) for key, values in logs.items()})
    print(f"tensorboard --logdir {folder}")
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
