"""What all tests share."""

import os
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from threadpoolctl import threadpool_limits

from keras_dwd import DWDModel

tf.config.threading.set_inter_op_parallelism_threads(2)
if os.environ.get("PYTEST_XDIST_WORKER"):  # one of several: a core each
    tf.config.threading.set_intra_op_parallelism_threads(1)
    threadpool_limits(1)


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)
    yield
    keras.utils.clear_session(free_memory=False)  # collecting garbage took a third of the time


@pytest.fixture
def data_dir():
    """A folder of prepared tfds data sets."""
    folder = os.environ.get("TFDS_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TFDS_DATA_DIR names no folder of prepared data sets")
    return Path(folder)


def blobs(count=64, features=6, classes=3, seed=0):
    """Points around one centre per class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, count).astype("int32")
    centres = rng.normal(size=(classes, features))
    return (centres[y] + 0.3 * rng.normal(size=(count, features))).astype("float32"), y


def mlp(features=6, classes=3, **dense):
    """A small network on `blobs`."""
    return keras.Sequential(
        [
            keras.Input((features,)),
            keras.layers.Dense(8, activation="tanh", name="hidden", **dense),
            keras.layers.Dense(classes, name="head"),
        ]
    )


def compiled(model=None, optimizer="sgd", compile_settings=None, **settings):
    """A `DWDModel` ready for `fit` on `blobs`."""
    made = DWDModel.from_model(mlp() if model is None else model, **settings)
    made.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **(compile_settings or {}),
    )
    return made


def weights(model):
    return [np.array(w) for w in model.weights]
