"""Runs models as someone does who has no keras_dwd, in a process of its own.

Usage: python tests/serving.py FOLDER...

Of each folder the model, `saved` or `model.keras`, is given `inputs.npz`; `outputs.npz` is what it
makes of them.
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
            import keras  # of no use to a SavedModel

            (x,) = inputs.values()
            outputs = {"output_0": keras.models.load_model(folder / "model.keras")(x)}
        np.savez(folder / "outputs.npz", **outputs)


main()
