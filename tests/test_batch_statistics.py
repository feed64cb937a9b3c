"""One graph of the statistics of a batch, for the training step and the pass."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, mlp, pass_statistics, state_of

from keras_dwd import DiagonalFisher, DWDModel
from keras_dwd.curvature.fisher import Fisher

ONLINE = {"fisher": DiagonalFisher("empirical"), "grouping": None}


@pytest.fixture
def traces(monkeypatch):
    """A list that gets longer each time the statistics of a batch are traced."""
    found, original = [], Fisher.batch_statistics

    def noted(self, *arguments):
        found.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(Fisher, "batch_statistics", noted)
    return found


def test_steps_passes_and_batches_of_all_sizes_share_the_trace_of_a_step(traces):
    model = compiled(**ONLINE)
    for task in range(3):
        model.fit(*blobs(50, seed=task), verbose=0)
        model.consolidate(*blobs(50 + task, seed=task), batch_size=16)
        assert len(traces) == (1 if task == 0 else 2)  # the step is traced again after a boundary
    model.train_on_batch(*blobs(8))
    assert len(traces) == 2


@pytest.mark.parametrize("force", [False, True])
def test_what_is_assigned_to_a_layer_counts_where_the_step_sees_it(force):
    x, y = blobs()
    model = compiled(**ONLINE)
    model.fit(x, y, verbose=0)
    if not force:
        model.consolidate(x, y)  # after which the step is traced again
    model.get_layer("hidden").activation = keras.activations.relu
    if force:
        model.make_train_function(force=True)
    model.fit(x, -y % 3, verbose=0)
    other = compiled(mlp(), **ONLINE)
    other.get_layer("hidden").activation = keras.activations.relu
    other.set_weights(model.get_weights())
    found, expected = (pass_statistics(m, (x, y), 32) for m in (model, other))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-7)


def test_a_new_loss_is_traced_anew(traces):
    model = compiled(**ONLINE)
    x, y = blobs()
    before = pass_statistics(model, (x, y), 32)
    model.compile("sgd", keras.losses.MeanSquaredError())
    after = pass_statistics(model, (x, np.eye(3)[y]), 32)
    assert any(not np.allclose(before[name], after[name]) for name in before)


@pytest.mark.filterwarnings("ignore:The model cannot be run on a batch")
def test_a_model_run_eagerly_is_estimated_eagerly():
    class Eager(keras.layers.Layer):
        def call(self, x):
            assert float(tf.reduce_max(x)) < 100  # which a graph cannot know
            return x

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, x.dtype)

    def trained(layer, eager):
        keras.utils.set_random_seed(0)
        base = mlp()
        base = keras.Model(base.inputs, layer(base.outputs[0]))
        model = compiled(base, compile_settings={"run_eagerly": eager}, **ONLINE)
        model.fit(*blobs(), shuffle=False, verbose=0)
        model.consolidate(*blobs(), batch_size=32)
        return state_of(model)

    eager, traced = trained(Eager(), True), trained(keras.layers.Identity(), False)
    assert eager.keys() == traced.keys()
    for name, array in traced.items():
        if "/" in name:
            np.testing.assert_allclose(eager[name], array, rtol=1e-4, atol=1e-6)


def test_a_loss_with_tensors_of_its_step_is_estimated_in_each_step():
    class Weighted(DWDModel):
        def train_step(self, data):
            self.factor = 1.0 + tf.cast(self.optimizer.iterations, "float32")
            return super().train_step(data)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return self.factor * super().compute_loss(x, y, y_pred, sample_weight, training)

    base = mlp()
    model = Weighted(base.inputs, base.outputs, **ONLINE)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for task in range(2):
        model.fit(*blobs(seed=task), verbose=0)
        model.consolidate()
    assert model.tasks_learned == 2


def test_a_loss_that_must_know_the_size_of_a_batch_is_traced_for_it():
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")

    def mean(y, y_pred):
        return keras.ops.sum(cross_entropy(y, y_pred)) / y.shape[0]  # not `None`

    found = []
    for loss in (mean, keras.losses.SparseCategoricalCrossentropy(from_logits=True)):
        keras.utils.set_random_seed(0)
        model = compiled(**ONLINE)
        model.compile("sgd", loss)
        data = tf.data.Dataset.from_tensor_slices(blobs(32)).batch(16, drop_remainder=True)
        for _ in range(2):
            model.fit(data, shuffle=False, verbose=0)
            model.consolidate(data)
        found.append(state_of(model))
    for name in model.regularizer.slots():
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-7)
