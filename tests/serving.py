"""Runs models in a separate process in which keras_dwd cannot be imported.

Usage: python tests/serving.py FOLDER...

In each folder the model `saved` or `model.keras` is called on the inputs in `inputs.npz`; its
outputs are written to `outputs.npz`.
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf


def main() -> None:
    sys.modules["keras_dwd"] = None  # importing it raises ImportError
    for folder in map(Path, sys.argv[1:]):
        inputs = {name: tf.constant(a) for name, a in np.load(folder / "inputs.npz").items()}
        if (folder / "saved").exists():
            outputs = tf.saved_model.load(folder / "saved").signatures["serving_default"](**inputs)
        else:
            import keras  # not needed for a SavedModel

            (x,) = inputs.values()
            outputs = {"output_0": keras.models.load_model(folder / "model.keras")(x)}
        np.savez(folder / "outputs.npz", **outputs)


main()
