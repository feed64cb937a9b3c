"""What a `DWDModel` and a `DWDOptimizer` do like the Keras model and optimizer they are around."""

import copy
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, dtype_policy, mlp, sweep, weights
from keras import layers, ops

from keras_dwd import DiagonalFisher, DWDModel, DWDOptimizer, strip_dwd
from keras_dwd.communicator import Communicator
from keras_dwd.variables import by_path

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
GRADIENT = tf.constant([[1.0, 2.0], [3.0, 4.0]])


def cheap():
    return {"fisher": DiagonalFisher("batch"), "grouping": None}


# Optimizers.


def stepped(optimizer, steps=1, name="kernel", value=1.0):
    variable = keras.Variable(np.full((2, 2), value, "float32"), name=name)
    optimizer.build([variable])
    for _ in range(steps):
        optimizer.apply([GRADIENT], [variable])
    return variable


def test_set_weights_sets_all_variables():
    used, fresh = DWDOptimizer("adam"), DWDOptimizer("adam")
    with pytest.raises(ValueError, match="not yet been built"):
        fresh.set_weights(used.variables)
    stepped(used, steps=2)
    variable = stepped(fresh, steps=0)
    before = [np.array(v) for v in fresh.variables]
    for wrong in (used.variables[:-1], [*used.variables[:-1], np.zeros(3)]):
        with pytest.raises(ValueError, match="`weights` must have the number and the shapes"):
            fresh.set_weights(wrong)
    for a, b in zip(before, fresh.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    fresh.set_weights(used.variables)
    for a, b in zip(used.variables, fresh.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(fresh.iterations) == 2
    fresh.apply([GRADIENT], [variable])


def test_excluded_variables_do_not_decay():
    ends = []
    for wrap in (lambda o: o, DWDOptimizer):
        optimizer = wrap(keras.optimizers.AdamW(0.01, weight_decay=0.5))
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        ends.append(np.array(stepped(optimizer, name="bias", value=2.0)))
    np.testing.assert_array_equal(*ends)


SETTINGS = {"clipnorm": 0.5, "clipvalue": 0.1, "weight_decay": 0.1, "loss_scale_factor": 8.0}


@pytest.mark.parametrize("setting", [*SETTINGS, "momentum"])
def test_settings_are_those_of_the_wrapped_optimizer(setting):
    value = SETTINGS.get(setting, 0.7)
    optimizer = DWDOptimizer(keras.optimizers.SGD(0.1, **{setting: value}))
    assert getattr(optimizer, setting) == value
    setattr(optimizer, setting, value / 2)
    plain = keras.optimizers.SGD(0.1, **{setting: value / 2})
    np.testing.assert_array_equal(stepped(optimizer), stepped(plain))
    assert optimizer.get_config()["inner_optimizer"]["config"][setting] == value / 2


def test_an_optimizer_in_use_is_not_built_again():
    inner = keras.optimizers.Adam()
    variable = stepped(inner, steps=2)
    count = len(inner.variables)
    optimizer = DWDOptimizer(inner)
    optimizer.build([variable])
    assert len(inner.variables) == count
    assert int(optimizer.apply_gradients([(GRADIENT, variable)])) == 3


def test_errors_of_an_optimizer_are_those_of_keras():
    with pytest.raises(ValueError, match="must already be built"):
        DWDOptimizer("sgd").apply([GRADIENT])
    with pytest.raises(AttributeError, match="momentun"):
        DWDOptimizer("sgd").momentun  # noqa: B018


def half(optimizer, **fit):
    """A small model in mixed precision after training; the pull is zero."""
    keras.utils.set_random_seed(0)
    with dtype_policy("mixed_float16"):
        model = DWDModel.from_model(mlp(), **cheap())
    model.compile(optimizer, LOSS)
    x, y = blobs(32)
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, **fit)
    return weights(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.1, loss_scale_factor=128),
        lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5),
    ],
)
def test_mixed_precision_reaches_the_wrapped_optimizer(make):
    ends = []
    for optimizer in (make(), DWDOptimizer(make())):
        callbacks = [keras.callbacks.SwapEMAWeights()] if optimizer.use_ema else []
        ends.append(half(optimizer, callbacks=callbacks, validation_data=blobs(16)))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_plain_model_can_be_compiled_alike():
    model = compiled(optimizer=DWDOptimizer("adam"), **cheap())
    plain = mlp()
    plain.compile_from_config(model.get_compile_config())
    assert isinstance(plain.optimizer, DWDOptimizer)
    plain.fit(*blobs(), verbose=0)


def test_saving_elsewhere_does_not_change_how_it_is_compiled(tmp_path):
    model = compiled(optimizer=DWDOptimizer("adam"), **cheap())
    model.get_compile_config().pop("optimizer")
    assert "optimizer" in model.get_compile_config()


# Dtype policies.


@keras.saving.register_keras_serializable("test_like_keras")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(4, "relu", dtype=self.dtype_policy)
        self.head = layers.Dense(3, dtype=self.dtype_policy)

    def call(self, x):
        return self.head(self.hidden(x))


def subclassed(policy):
    model = Subclassed(dtype=policy)
    model(blobs()[0][:1])
    return model


def functional(policy):
    with dtype_policy(policy):
        return mlp()


@pytest.mark.parametrize("make", sweep([subclassed, functional], subclassed))
@pytest.mark.parametrize(
    "policy", sweep(["mixed_float16", "mixed_bfloat16", "float64"], "mixed_float16")
)
def test_the_dtype_policy_is_that_of_the_model(make, policy, tmp_path):
    plain = make(policy)
    plain.compile("sgd", LOSS)
    model = compiled(make(policy), **cheap())
    assert model.dtype_policy.name == policy
    assert type(model.optimizer) is type(plain.optimizer)
    model.fit(*blobs(), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for other in (again, copy.deepcopy(model), keras.models.clone_model(model), strip_dwd(model)):
        assert other.dtype_policy.name == policy
    for other in (again, strip_dwd(model)):
        assert type(other.optimizer) is type(plain.optimizer)


def test_a_dtype_that_is_given_is_used():
    model = DWDModel.from_model(mlp(), dtype="mixed_float16")
    model.compile("sgd", LOSS)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


def test_a_quantized_policy_does_not_break_the_model():
    with dtype_policy("int8_from_float32"):
        plain = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    x, _ = blobs()
    model = DWDModel.from_model(plain)
    assert np.isfinite(model.predict(x, verbose=0)).all()


# Metrics, layers of the same name.


@keras.saving.register_keras_serializable("test_like_keras")
class Twins(keras.Model):
    """Two layers have the same name, and one has two variables of the same name."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(4, "tanh", use_bias=False, name="twin")
        self.second = layers.Dense(4, "tanh", name="twin")
        self.head = layers.Dense(3, name="head")
        self.pair = Pair()
        self.mean = keras.metrics.Sum(name="activity")

    def call(self, x):
        h = self.pair(self.second(self.first(x)))
        self.mean.update_state(ops.sum(ops.square(h)))
        return self.head(h)


@keras.saving.register_keras_serializable("test_like_keras")
class Pair(layers.Layer):
    def build(self, shape):
        self.one = self.add_weight(shape=(), initializer="ones", name="scale")
        self.two = self.add_weight(shape=(), initializer="ones", name="scale")
        self.counter = keras.metrics.Sum(name="calls")

    def call(self, x):
        self.counter.update_state(1.0)
        return self.one * self.two * x


def twins(**settings):
    keras.utils.set_random_seed(1)
    model = Twins(name="twins")
    model(blobs()[0][:1])
    return compiled(model, **(cheap() | settings))


def test_metrics_of_a_subclassed_model_are_reported():
    x, y = blobs()
    keras.utils.set_random_seed(1)
    plain = Twins(name="twins")
    plain(x[:1])
    plain.compile("sgd", LOSS, metrics=["accuracy"])
    model = twins(fisher=DiagonalFisher("empirical"))
    assert model.metrics_names == plain.metrics_names
    expected = plain.fit(x, y, epochs=2, shuffle=False, verbose=0).history
    logs = model.fit(x, y, epochs=2, shuffle=False, verbose=0).history
    assert list(logs) == list(expected)
    for name, values in expected.items():
        assert logs[name] == values, name
    before = float(model.metrics[-1].result())
    model.consolidate((x, y))
    assert float(model.metrics[-1].result()) == before
    expected, logs = (m.evaluate(x, y, verbose=0, return_dict=True) for m in (plain, model))
    assert logs == pytest.approx(expected)


def test_variables_of_the_same_name_are_told_apart(tmp_path):
    x, y = blobs()
    model = twins()
    paths = [
        "twins/twin/kernel",
        "twins/twin_1/kernel",
        "twins/twin_1/bias",
        "twins/head/kernel",
        "twins/head/bias",
        "twins/pair/scale",
        "twins/pair/scale_1",
    ]
    inner = model.get_layer("twins")
    expected = [inner.first.kernel, inner.second.kernel, inner.second.bias]
    found = by_path(model)
    assert [path.replace("pair_1", "pair") for path in found][:5] == paths[:5]
    assert all(a is b for a, b in zip(found.values(), expected, strict=False))
    assert [path.rpartition("/")[2] for path in found][5:] == ["scale", "scale_1"]
    model.fit(x, y, verbose=0)
    model.consolidate((x, y))
    model.fit(x, y, verbose=0)
    penalty = sum(
        0.5 * np.sum(np.asarray(model.regularizer.precisions[path].values, "float64") * moved**2)
        for path, variable in found.items()
        for moved in [np.asarray(variable, "float64") - np.asarray(model.regularizer.anchors[path])]
    )
    assert float(model.penalty()) == pytest.approx(penalty, rel=1e-4)
    assert penalty > 0
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    again, loaded = keras.models.load_model(tmp_path / "model.keras"), twins()
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(tmp_path / "model.weights.h5")
    for other in (again, loaded, copy.deepcopy(model)):
        assert float(other.penalty()) == pytest.approx(penalty, rel=1e-4)
        np.testing.assert_array_equal(other.predict(x, verbose=0), model.predict(x, verbose=0))


def test_a_layer_keeps_its_name_where_another_is_numbered():
    """A path that is given by a name never moves to make room for a number."""

    class Three(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [layers.Dense(3, name=name) for name in ("a", "a", "a_1")]

        def call(self, x):
            return sum(part(x) for part in self.parts)

    inner = Three()
    inner(blobs()[0][:1])
    found = by_path(DWDModel.from_model(inner))
    kernels = [path.split("/")[1] for path in found if path.endswith("kernel")]
    assert kernels == ["a", "a_2", "a_1"]
    assert next(v for path, v in found.items() if "/a_1/" in path) is inner.parts[2].kernel


def test_a_larger_model_inherits_layers_of_the_same_name():
    x, y = blobs()
    model = compiled(twin_stack(2), **cheap())
    model.fit(x, y, verbose=0)
    model.consolidate((x, y))
    larger = compiled(twin_stack(3), **cheap())
    larger.inherit(model)
    for path, variable in by_path(model).items():
        np.testing.assert_array_equal(variable, by_path(larger)[path])


def twin_stack(count):
    class Stack(keras.Model):
        def __init__(self):
            super().__init__(name="stack")
            self.parts = [layers.Dense(3, name="twin") for _ in range(count)]

        def call(self, x):
            return sum(part(x) for part in self.parts)

    model = Stack()
    model(blobs()[0][:1])
    return model


# Inputs of subclassed models.


class Adding(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3)

    def call(self, x):
        return self.head(sum(keras.tree.flatten(x)))


@pytest.mark.parametrize(
    "structure",
    [
        lambda x: {"a": x, "b": x},
        lambda x: [x, x],
        lambda x: (x, x),
        lambda x: {"b": {"c": x}, "a": [x, x]},
    ],
)
def test_inputs_have_the_structure_the_model_was_called_on(structure):
    x, y = blobs()
    plain = Adding()
    plain(structure(x[:1]))
    model = compiled(plain, **cheap())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.predict(structure(x), verbose=0)
    np.testing.assert_array_equal(found, plain.predict(structure(x), verbose=0))
    model.fit(structure(x), y, verbose=0)
    model.consolidate((structure(x), y))


class Embedded(keras.Model):
    def __init__(self, count, **kwargs):
        super().__init__(**kwargs)
        self.embed = layers.Embedding(count, 4)
        self.head = layers.Dense(3)

    def call(self, x):
        return self.head(self.embed(x))


def test_integers_that_float_inputs_do_not_hold_are_refused():
    ids = np.array([4997])
    for policy in ("float32", "mixed_float16"):
        plain = Embedded(5000, dtype=policy)
        plain(ids)
        if policy == "mixed_float16":
            with pytest.raises(ValueError, match="embeds 5000 integers"):
                DWDModel.from_model(plain)
        inputs = None if policy == "float32" else keras.Input((), dtype="int32")
        model = DWDModel.from_model(plain, inputs)
        np.testing.assert_array_equal(model.predict(ids, verbose=0), plain.predict(ids, verbose=0))


def test_a_model_of_several_arguments_needs_inputs():
    class Two(Adding):
        def call(self, x, other):
            return self.head(x + other)

    model = Two()
    model(blobs()[0][:1], blobs()[0][:1])
    with pytest.raises(ValueError, match="`inputs` is needed"):
        DWDModel.from_model(model)


def test_a_functional_model_with_its_own_call_needs_inputs():
    class Doubling(keras.Model):
        def call(self, inputs, training=None, mask=None):
            return 2 * super().call(inputs)

    x, _ = blobs()
    inputs = keras.Input((6,))
    doubling = Doubling(inputs, layers.Dense(3)(inputs))
    with pytest.raises(ValueError, match="`call` of its own"):
        DWDModel.from_model(doubling)
    model = DWDModel.from_model(doubling, keras.Input((6,)))
    np.testing.assert_array_equal(model.predict(x, verbose=0), doubling.predict(x, verbose=0))


def test_a_model_without_trainable_weights_warns_as_keras_does():
    plain = mlp()
    plain.trainable = False
    model = compiled(plain, **cheap())
    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        model.fit(*blobs(), verbose=0)


class Pretended(Communicator):
    """Rank 0 of two workers, of which nothing is asked."""

    rank, size = 0, 2


@keras.saving.register_keras_serializable("test_like_keras")
class Reached(DWDModel):
    """Finds two workers wherever it is compiled."""

    def compile(self, *args, **kwargs):
        super().compile(*args, communicator=Pretended(), **kwargs)


@pytest.mark.parametrize("sharded", [False, True])
def test_whether_the_state_is_sharded_is_restored(sharded):
    model = Reached.from_model(mlp(), fisher=DiagonalFisher("empirical"), grouping=None)
    model.compile("sgd", LOSS, sharded=sharded)
    assert "sharded" not in model.get_compile_config()
    serialized = keras.saving.serialize_keras_object(model)
    again = keras.saving.deserialize_keras_object(serialized)
    assert again.workers.sharded is sharded
    # As earlier versions wrote it.
    serialized["config"].pop("sharded", None)
    serialized["compile_config"]["sharded"] = sharded
    assert keras.saving.deserialize_keras_object(serialized).workers.sharded is sharded
