"""Tests that the private parts of Keras used by `keras_dwd.keras_private` have not changed.

If a test fails after an update of Keras, fix the function of `keras_private` that the test is named
after.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_dwd
from keras_dwd import keras_private

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.1, beta_2=0.75),
    "adamw": lambda: keras.optimizers.AdamW(0.1, beta_2=0.75),
    "nadam": lambda: keras.optimizers.Nadam(0.1, beta_2=0.75),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.1, rho=0.75),
}


def can_update(kind):
    """Whether an optimizer of Keras can update a matrix."""
    optimizer, variable = kind(0.5), keras.Variable([[1.0, 2.0]])
    optimizer.build([variable])
    try:
        optimizer.apply([tf.ones((1, 2))], [variable])
    except AttributeError:
        return False
    return True


KINDS_OF_OPTIMIZERS = [
    name
    for name, kind in vars(keras.optimizers).items()
    if isinstance(kind, type)
    and issubclass(kind, keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer", "TFOptimizer")
    # Some versions of Keras have one that TensorFlow cannot use.
    and (name != "Muon" or can_update(kind))
]


def network():
    """A model with a nested layer, a frozen layer, and a layer that is called twice."""
    inputs = keras.Input((4,))
    shared = layers.Dense(4, name="shared")
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="inner")], name="block")
    frozen = layers.BatchNormalization(name="frozen", trainable=False)
    return keras.Model(inputs, layers.Dense(3, name="head")(inner(frozen(shared(shared(inputs))))))


def stepped(optimizer, gradients=((2.0, -4.0),)):
    """Applies gradients to two variables and returns the second variable.

    The first variable always gets the gradient 100, the second one gets `gradients` in turn.
    """
    other, variable = keras.Variable([1.0]), keras.Variable([1.0, 1.0])
    optimizer.build([other, variable])
    for gradient in gradients:
        optimizer.apply([tf.constant([100.0]), tf.constant(gradient)], [other, variable])
    return variable


def test_within_hdf5(tmp_path):
    class Noticing(keras.Model):
        def get_config(self):
            seen.append(keras_private.within_hdf5())
            return super().get_config()

    seen = []
    inputs = keras.Input((2,))
    model = Noticing(inputs, layers.Dense(1)(inputs))
    keras.saving.save_model(model, tmp_path / "model.keras")
    assert set(seen) == {False}
    seen.clear()
    keras.saving.save_model(model, tmp_path / "model.h5")
    assert set(seen) == {True}
    assert not keras_private.within_hdf5()


def test_layers_within():
    model = network()
    found = keras_private.layers_within(model)
    assert model not in found
    assert len(found) == len(set(map(id, found)))
    names = [layer.name for layer in found]
    assert {"shared", "frozen", "block", "inner", "head"} <= set(names), (
        f"`_flatten_layers` no longer finds all layers. Found: {names}"
    )
    assert keras_private.layers_within(layers.Dense(1)) == []
    wrapper = layers.TimeDistributed(layers.Dense(1, name="inside"))
    assert [layer.name for layer in keras_private.layers_within(wrapper)] == ["inside"]


def test_own_trainable_variables():
    model = network()
    frozen = model.get_layer("frozen")
    assert not frozen.trainable_variables
    names = [v.name for v in keras_private.own_trainable_variables(frozen)]
    assert names == ["gamma", "beta"], "`_trainable_variables` follows `trainable` now"
    assert keras_private.own_trainable_variables(model.get_layer("block")) == [], (
        "`_trainable_variables` has variables of inner layers now"
    )
    variables = keras_private.own_trainable_variables(frozen)
    variables.clear()
    assert keras_private.own_trainable_variables(frozen), "the list is that of Keras, not a copy"


def test_own_variables():
    model = network()
    names = [v.name for v in keras_private.own_variables(model.get_layer("frozen"))]
    assert names == ["gamma", "beta", "moving_mean", "moving_variance"]
    assert keras_private.own_variables(layers.Dropout(0.5, seed=1)) == [], (
        "states of random generators are among a layer's own variables now"
    )
    within = keras_private.layers_within(model)
    all_own = [id(v) for layer in within for v in keras_private.own_variables(layer)]
    assert sorted(all_own) == sorted(id(v) for v in model.variables), (
        "the variables of a model are no longer those of its layers, each once"
    )


def test_own_metrics():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(inputs))
    model.mean = keras.metrics.Mean(name="mine")
    model.compile("sgd", "mse", metrics=["mae"])
    assert keras_private.own_metrics(model) == [model.mean]
    outer = keras.Model(inputs, model(inputs))
    assert keras_private.own_metrics(outer) == []
    assert model.mean not in outer.metrics  # the reason why the function is needed


def test_set_dtype_policy():
    model = network()
    policies = [layer.dtype_policy.name for layer in model.layers]
    for policy in ("mixed_float16", keras.DTypePolicy("mixed_float16")):
        keras_private.set_dtype_policy(model, policy)
        model.compile("sgd", "mse")
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert [layer.dtype_policy.name for layer in model.layers] == policies


def test_takes_training():
    class Plain(layers.Layer):
        def call(self, x):
            return x

    dropout = layers.Dropout(0.5)
    assert keras_private.takes_training(dropout)
    assert not keras_private.takes_training(Plain())
    dropout.__dict__["call"] = lambda *args, **kwargs: args[0]
    assert keras_private.takes_training(dropout)
    x = tf.ones((2, 3))
    for layer in (layers.Dropout(0.5), layers.BatchNormalization(), layers.GaussianNoise(1.0)):
        layer(x, training=False)


def test_recomputes():
    with keras.RematScope(mode="full"):
        inside = layers.Dense(2)
    assert keras_private.recomputes(inside), (
        "layers no longer tell by `_remat_mode` that they were made in a `RematScope`"
    )
    assert not keras_private.recomputes(layers.Dense(2))


def test_inputs_of_calls():
    model = network()
    calls = keras_private.inputs_of_calls(model.get_layer("shared"))
    assert len(calls) == 2, "`_inbound_nodes` no longer has one node per call of a layer"
    assert calls[0][0] is model.inputs[0]
    a, b = keras.Input((2,)), keras.Input((2,))
    add = layers.Add()
    add([a, b])
    ((first, second),) = keras_private.inputs_of_calls(add)
    assert first is a
    assert second is b


def test_mask_of_and_set_mask():
    embedded = layers.Embedding(5, 2, mask_zero=True)(np.array([[1, 2, 0]]))
    mask = keras_private.mask_of(embedded)
    assert mask is not None, "masks of Keras are no longer in `_keras_mask` of a tensor"
    np.testing.assert_array_equal(mask, [[True, True, False]])
    assert keras_private.mask_of(tf.ones(2)) is None

    y_true, y_pred = tf.zeros((1, 3)), tf.constant([[1.0, 1.0, 7.0]])
    keras_private.set_mask(y_pred, mask)
    assert keras_private.mask_of(y_pred) is mask
    loss = keras.losses.MeanSquaredError()
    unreduced = keras.losses.MeanSquaredError(reduction="sum")
    assert float(unreduced(y_true[..., None], _with_mask(y_pred[..., None], mask))) == 2.0, (
        "losses no longer respect the `_keras_mask` of a tensor"
    )
    keras_private.set_mask(y_pred, None)
    assert keras_private.mask_of(y_pred) is None
    assert float(loss(y_true, y_pred)) == 17.0


def _with_mask(tensor, mask):
    keras_private.set_mask(tensor, mask)
    return tensor


def test_is_output_of_layer():
    inputs = keras.Input((2,))
    assert keras_private.is_output_of_layer(layers.Dense(2)(inputs)), (
        "symbolic outputs of layers no longer have a `_keras_history`"
    )
    assert not keras_private.is_output_of_layer(keras.KerasTensor((None, 2)))
    assert not keras_private.is_output_of_layer(tf.ones(2))


def test_layer_of():
    inputs, dense = keras.Input((2,)), layers.Dense(2)
    assert keras_private.layer_of(dense(inputs)) is dense
    assert keras_private.layer_of(keras.KerasTensor((None, 2))) is None


def test_loss_metric():
    class Own(keras.Model):
        @property
        def metrics(self):
            return []

    inputs = keras.Input((4,))
    model = Own(inputs, layers.Dense(1)(inputs))
    model.compile("sgd", "mse", metrics=[keras.metrics.Mean(name="loss")])
    metric = keras_private.loss_metric(model)
    assert metric.name == "loss"
    assert keras_private.loss_metric(model) is metric
    metric.update_state(3.0, sample_weight=2)
    assert float(metric.result()) == 3.0
    model.compile("sgd", "mse")
    assert keras_private.loss_metric(model) is not metric, (
        "`compile` no longer makes a new metric for the loss"
    )

    plain = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    plain.compile("sgd", "mse", metrics=["mae"])
    x, y = np.ones((8, 4), "float32"), np.zeros((8, 1), "float32")
    reported = plain.fit(x, y, verbose=0).history["loss"][0]
    assert float(keras_private.loss_metric(plain).result()) == pytest.approx(reported), (
        "what `fit` reports as `loss` is another metric now"
    )


def test_loss_metric_of_a_changed_keras():
    with pytest.raises(keras_private.KerasChangedError, match="not that of the loss"):
        keras_private.loss_metric(network())


def test_evaluates_within_fit():
    seen = []

    class Listening(keras.Model):
        def evaluate(self, *args, **kwargs):
            seen.append(keras_private.evaluates_within_fit(kwargs))
            return super().evaluate(*args, **kwargs)

    inputs = keras.Input((4,))
    model = Listening(inputs, layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    x, y = np.ones((8, 4), "float32"), np.zeros((8, 1), "float32")
    model.fit(x, y, validation_data=(x, y), verbose=0)
    model.evaluate(x, y, verbose=0)
    assert seen == [True, False], (
        "`fit` no longer passes `_use_cached_eval_dataset` when it evaluates"
    )


def test_in_stateless_scope():
    assert not keras_private.in_stateless_scope()
    with keras.StatelessScope():
        assert keras_private.in_stateless_scope()


def test_loss_arguments():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=3)
    found = keras_private.loss_arguments(loss)
    assert found["from_logits"] is True
    assert found["ignore_class"] == 3
    smooth = keras.losses.CategoricalCrossentropy(label_smoothing=0.1)
    assert keras_private.loss_arguments(smooth)["label_smoothing"] == 0.1


def test_loss_weights():
    model = network()
    model.compile(loss="mse", loss_weights=0.5)
    assert keras_private.loss_weights(model) == 0.5
    model.compile(loss="mse")
    assert keras_private.loss_weights(model) is None


def test_class_axis():
    assert keras_private.class_axis(keras.losses.SparseCategoricalCrossentropy()) == -1
    other = keras.losses.SparseCategoricalCrossentropy(axis=1)
    assert keras_private.class_axis(other) == 1, (
        "the axis of a sparse categorical cross-entropy is no longer in its `_fn_kwargs`"
    )


def test_has_schedule():
    class Own(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1

    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    for schedule in (decay, Own()):
        assert keras_private.has_schedule(keras.optimizers.SGD(schedule)), (
            "the schedule of an optimizer is no longer its `_learning_rate`"
        )
    assert not keras_private.has_schedule(keras.optimizers.SGD(0.1))


@pytest.mark.parametrize("kind", KINDS_OF_OPTIMIZERS)
def test_around_each_update(kind):
    optimizer = getattr(keras.optimizers, kind)(0.5)
    variable, without = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer.build([variable, without])
    seen = []

    def around(update, gradients, variables, learning_rate):
        before = float(variable.value[0])
        update()
        seen.append((gradients, variables, float(learning_rate), before, float(variable.value[0])))

    gradients = [tf.constant([1.0]), None]
    with (
        pytest.warns(UserWarning, match="Gradients do not exist"),
        keras_private.around_each_update(optimizer, around),
    ):
        optimizer.apply(gradients, [variable, without])
    assert len(seen) == 1, "`_backend_update_step` is no longer called once per update"
    ((given, changed, rate, before, value),) = seen
    assert [float(g[0]) for g in given] == [1.0]
    assert [id(v) for v in changed] == [id(variable)]
    assert rate == 0.5
    assert before == pytest.approx(1.0, abs=0.01), "the update is done before the call now"
    assert value == float(variable.value[0]) != before, "the update is not done by the call now"
    optimizer.apply([tf.constant([1.0]), tf.constant([1.0])], [variable, without])
    assert len(seen) == 1
    assert "_backend_update_step" not in vars(optimizer)


def test_around_each_update_that_is_real():
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)
    variable, count = keras.Variable([1.0]), tf.Variable(0)
    optimizer.build([variable])

    def around(update, *_):
        update()
        count.assign_add(1)

    @tf.function
    def step():
        with keras_private.around_each_update(optimizer, around):
            optimizer.apply([tf.constant([1.0])], [variable])

    step()
    assert int(count) == 0, "gradients that are only accumulated count as an update now"
    step()
    assert int(count) == 1


def test_around_each_update_comes_before_averages():
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.0, ema_overwrite_frequency=1)
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    with keras_private.around_each_update(optimizer, lambda *_: variable.assign([7.0])):
        optimizer.apply([tf.constant([1.0])], [variable])
    assert float(variable.value[0]) == 7.0, "weights are averaged before the call now"


@pytest.mark.parametrize("kind", KINDS_OF_OPTIMIZERS)
def test_shifted_iterates(kind):
    """An optimizer must go on from where a variable was moved to, not from where it had put it."""
    ends = []
    for move in (0.0, 5.0):
        optimizer = getattr(keras.optimizers, kind)(0.01)
        variable = keras.Variable([[1.0, 2.0], [3.0, 4.0]])
        optimizer.build([variable])
        gradient = [tf.constant([[1.0, -1.0], [2.0, 0.5]])]
        optimizer.apply(gradient, [variable])
        with keras_private.shifted_iterates(optimizer, [variable], 0.01):
            variable.assign_sub(tf.fill((2, 2), move))
        optimizer.apply(gradient, [variable])
        ends.append(np.asarray(variable))
    # Some scale the step by the size of the variable.
    tolerance = 0.5 if kind in ("Adafactor", "Lamb", "AdamW", "Muon") else 1e-4
    np.testing.assert_allclose(ends[1] + 5.0, ends[0], atol=tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_second_moment(name):
    optimizer = OPTIMIZERS[name]()
    variable = stepped(optimizer)
    np.testing.assert_allclose(
        keras_private.second_moment(optimizer, variable),
        [0.25 * 4, 0.25 * 16],
        rtol=1e-5,
        err_msg=f"`_velocities` of {name} is no longer the moving mean of squared gradients",
    )


def test_largest_second_moment():
    optimizer = keras.optimizers.Adam(0.1, beta_2=0.75, amsgrad=True)
    variable = stepped(optimizer, [(2.0, -4.0), (0.0, 0.0)])
    found = np.asarray(keras_private.largest_second_moment(optimizer, variable))
    now = np.asarray(keras_private.second_moment(optimizer, variable))
    np.testing.assert_allclose(found, [1.0, 4.0], rtol=1e-5)
    np.testing.assert_allclose(now, [0.75, 3.0], rtol=1e-5)


def test_largest_gradient():
    optimizer = keras.optimizers.Adamax(0.1, beta_2=0.75)
    variable = stepped(optimizer, [(2.0, -4.0), (0.0, 8.0)])
    found = keras_private.largest_gradient(optimizer, variable)
    np.testing.assert_allclose(found, [1.5, 8.0], rtol=1e-5)


def test_mean_gradient():
    optimizer = keras.optimizers.RMSprop(0.1, rho=0.75, centered=True)
    variable = stepped(optimizer)
    found = keras_private.mean_gradient(optimizer, variable)
    np.testing.assert_allclose(found, [0.5, -1.0], rtol=1e-5)


def test_sum_of_squares():
    optimizer = keras.optimizers.Adagrad(0.1, initial_accumulator_value=0.5)
    variable = stepped(optimizer, [(2.0, -4.0), (1.0, 1.0)])
    found = keras_private.sum_of_squares(optimizer, variable)
    np.testing.assert_allclose(found, [5.5, 17.5], rtol=1e-5)


class Talking(keras_private.CloneAware, keras.Model):
    def _prepare_clone(self, outputs):
        self.prepared = outputs


def test_optimizer_wrapper():
    inner = keras.optimizers.Adam(0.5, use_ema=True, gradient_accumulation_steps=2, beta_1=0.25)
    wrapper = keras_private.OptimizerWrapper(inner, "wrapper")
    assert wrapper.name == "wrapper"
    own = len(wrapper.variables) - len(inner.variables)
    variable = keras.Variable(np.ones(2, "float32"))
    for _ in range(2):
        wrapper.apply([tf.ones(2)], [variable])
    assert wrapper.built
    assert len(wrapper.variables) == own + len(inner.variables)
    # What `SwapEMAWeights` reads from an optimizer within a `LossScaleOptimizer`.
    assert wrapper._trainable_variables[0] is variable
    assert wrapper._model_variables_moving_average is inner._model_variables_moving_average
    assert wrapper.use_ema
    assert wrapper.gradient_accumulation_steps == 2
    assert int(wrapper.iterations) == 1
    assert wrapper.beta_1 == 0.25
    wrapper.beta_1 = 0.75
    assert inner.beta_1 == 0.75
    keras.optimizers.LossScaleOptimizer(wrapper)
    assert inner.loss_scale_factor is None
    wrapper.note = "mine"
    assert not hasattr(inner, "note")


def test_clone_aware():
    inputs = keras.Input((4,))
    model = Talking(inputs, {"a": layers.Dense(1)(inputs), "b": layers.Dense(2)(inputs)})
    model(np.ones((2, 4), "float32"))
    layers.Dense(1)(model(keras.Input((4,)))["a"])
    assert not hasattr(model, "prepared"), (
        "a model that is only called runs `_run_through_graph` with outputs of layers now"
    )
    clone = keras.models.clone_model(model)
    assert type(clone) is Talking
    assert hasattr(model, "prepared"), "`clone_model` no longer uses `_run_through_graph`"
    assert [id(t) for t in model.prepared] == [id(t) for t in clone.outputs]


def test_what_is_missing_is_said():
    with pytest.raises(
        keras_private.KerasChangedError,
        match=rf"Keras {re.escape(keras.__version__)} has no `SGD\._velocities`",
    ):
        keras_private.second_moment(keras.optimizers.SGD(), keras.Variable([1.0]))
    with pytest.raises(keras_private.KerasChangedError, match=r"`SimpleNamespace\._fn_kwargs`"):
        keras_private.class_axis(SimpleNamespace())


def test_nothing_of_the_package_is_imported():
    text = Path(keras_private.__file__).read_text()
    assert not re.search(r"^\s*(from|import) keras_dwd", text, re.MULTILINE)
    assert Path(keras_private.__file__).parent == Path(keras_dwd.__file__).parent


def test_higher_is_better():
    expected = {"accuracy": True, "AUC": True, "r2_score": True, "mae": False, "hinge": False}
    for name, higher in expected.items():
        assert keras_private.higher_is_better(keras.metrics.get(name)) is higher
    assert keras_private.higher_is_better(keras.metrics.Mean()) is None
