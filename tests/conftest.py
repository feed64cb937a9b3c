"""Settings and fixtures for all tests."""

import gc
import os
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from threadpoolctl import threadpool_limits

from keras_dwd.evaluation import datasets

# What is imported stays, and need not be looked through at each collection.
gc.collect()
gc.freeze()
gc.set_threshold(100_000, 20, 50)
tf.config.threading.set_inter_op_parallelism_threads(2)
if os.environ.get("PYTEST_XDIST_WORKER"):  # several test processes: one core each
    tf.config.threading.set_intra_op_parallelism_threads(1)
    threadpool_limits(1)


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)
    yield
    keras.utils.clear_session(free_memory=False)  # garbage collection takes a third of the time


@pytest.fixture
def whole_data_dir():
    """A folder of prepared tfds data sets."""
    folder = os.environ.get("TFDS_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TFDS_DATA_DIR names no folder of prepared data sets")
    datasets._tfds.cache_clear()
    yield Path(folder)
    datasets._tfds.cache_clear()


@pytest.fixture
def data_dir(whole_data_dir, monkeypatch):
    """The same, of which the first tenth of each split is read: decoding images takes long."""
    builder = pytest.importorskip("tensorflow_datasets").core.DatasetBuilder
    read = builder.as_dataset
    monkeypatch.setattr(
        builder,
        "as_dataset",
        lambda self, split, **settings: read(self, split=f"{split}[:10%]", **settings),
    )
    return whole_data_dir
