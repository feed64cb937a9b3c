"""The Horovod that `scripts/build_horovod.py` builds works in real processes."""

import os
import sys

import cloudpickle
import numpy as np
import pytest

if not os.environ.get("KERAS_DWD_REQUIRE_HOROVOD"):  # `make test` requires Horovod
    pytest.importorskip("horovod", reason="Horovod is not installed")


def worker():
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()

    @tf.function
    def reduced(value):
        return hvd.allreduce(value, op=hvd.Sum, name="sum")

    value = tf.constant([1.0, 2.0]) * (hvd.rank() + 1)
    return hvd.rank(), hvd.size(), reduced(value).numpy().tolist()


@pytest.mark.long
def test_two_processes_sum_their_tensors():
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    import horovod

    results = horovod.run(worker, np=2, use_gloo=True)
    assert sorted(r[:2] for r in results) == [(0, 2), (1, 2)]
    for _, _, total in results:
        np.testing.assert_array_equal(total, [3.0, 6.0])
