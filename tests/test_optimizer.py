"""The decoupled step: the step of the wrapped optimizer, followed by a proximal step."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, dtype_policy, load, mlp, saved, sweep, weights

from keras_dwd import DiagonalFisher, DWDModel, DWDOptimizer, KroneckerFisher

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "adamax": lambda: keras.optimizers.Adamax(0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "centered": lambda: keras.optimizers.RMSprop(0.01, centered=True),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05),
    "schedule": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.ExponentialDecay(0.01, 10, 0.5)
    ),
    "clipping": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.1),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=3),
}
# The other optimizers are tried by `make test-long`.
CORE = ("momentum", "adam")
FISHERS = {
    "diagonal": lambda: DiagonalFisher("empirical", gamma=None),
    "kronecker": lambda: KroneckerFisher("empirical", gamma=None),
}


@functools.cache
def first_task(strength, fisher, policy):
    """The weights and the consolidation state after a first task, made once for all tests."""
    keras.utils.set_random_seed(2)
    model = compiled(strength=strength, fisher=FISHERS[fisher]())
    model.set_weights(trained_weights(policy))
    model.consolidate(blobs())
    return weights(model), saved(model)


@functools.cache
def trained_weights(policy):
    keras.utils.set_random_seed(2)
    plain = mlp()
    plain.compile("adam", LOSS)
    plain.fit(*blobs(), epochs=3, verbose=0)
    return weights(plain)


def learner(optimizer, strength=1.0, fisher="diagonal"):
    """A model after its first task boundary."""
    values, state = first_task(strength, fisher, keras.config.dtype_policy().name)
    model = DWDModel.from_model(mlp(), strength=strength, fisher=FISHERS[fisher](), grouping=None)
    model.set_weights(values)
    load(model, state)
    model.compile(optimizer, LOSS)
    return model


def plain_learner(optimizer):
    """A plain Keras model after the same task."""
    model = mlp()
    model.set_weights(trained_weights("float32"))
    model.compile(optimizer, LOSS)
    return model


def learn(model, epochs=5):
    keras.utils.set_random_seed(3)
    model.fit(*blobs(seed=5), epochs=epochs, batch_size=16, verbose=0)
    return weights(model)


@pytest.mark.parametrize("name", sweep(OPTIMIZERS, *CORE))
def test_without_a_pull_it_is_the_wrapped_optimizer(name):
    make = OPTIMIZERS[name]
    plain = learn(plain_learner(make()))
    wrapped = learn(learner(DWDOptimizer(make()), strength=0.0))
    for a, b in zip(plain, wrapped, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "fisher", "strength"),
    sweep([(name, "diagonal", 1e8) for name in OPTIMIZERS], *CORE)
    + sweep([(name, "kronecker", 1e8) for name in ("sgd", "adam", "accumulation")], "adam")
    + sweep([("sgd", "diagonal", 10.0), ("adam", "kronecker", 10.0)], "adam"),
)
def test_it_holds_what_matters_at_any_strength(name, fisher, strength):
    free = learn(plain_learner(OPTIMIZERS[name]()))
    model = learner(DWDOptimizer(OPTIMIZERS[name]()), strength, fisher)
    assert all(np.isfinite(w).all() for w in learn(model))
    held = float(model.penalty())
    model.set_weights(free)
    assert held < (1e-2 if strength == 1e8 else 0.9) * float(model.penalty())


def test_optimizers_with_steps_of_any_size_need_no_wrapper():
    x, y = blobs()
    before = learner(keras.optimizers.SGD(0.1))
    curvature = max(float(np.max(b.values)) for b in before.regularizer.precisions.values())
    strength = 1000 * 2 / (0.1 * curvature)  # as a gradient it diverges from η·λ·F = 2 on
    ends = []
    for optimizer in (keras.optimizers.SGD(0.1), DWDOptimizer(keras.optimizers.SGD(0.1))):
        model = learner(optimizer, strength)
        ends.append(learn(model))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)
    assert max(np.abs(w).max() for w in ends[0]) < 10
    assert model.evaluate(x, y, verbose=0) == pytest.approx(
        before.evaluate(x, y, verbose=0), abs=0.5
    )


@pytest.mark.parametrize("fisher", sweep(FISHERS, "diagonal"))
def test_at_small_strength_it_agrees_with_the_gradient_form(fisher):
    """They evaluate the penalty at different points of a step, a relative error of 1 / steps."""
    x, y = blobs(seed=5)

    def end(strength, step):
        model = learner(keras.optimizers.SGD(0.01), strength, fisher)
        for _ in range(60):
            step(model)
        return np.concatenate([w.ravel() for w in weights(model)])

    def proximal(model):
        model.train_on_batch(x, y)

    def with_penalty(model):
        variables = [v.value for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True)) + model.penalty()
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(0.01 * gradient)

    free, gradient, decoupled = end(0.0, proximal), end(0.1, with_penalty), end(0.1, proximal)
    assert np.linalg.norm(free - gradient) > 0
    assert np.linalg.norm(gradient - decoupled) < 0.05 * np.linalg.norm(free - gradient)


def adam_metric(optimizer, index):
    moments = optimizer._velocity_hats if optimizer.amsgrad else optimizer._velocities
    return (np.sqrt(np.asarray(moments[index], "float64") / (1 - 0.999)) + 1e-7) / 0.01


def centered_metric(optimizer, index):
    slots = (optimizer._velocities, optimizer._average_gradients)
    v, mean = (np.asarray(slot[index], "float64") for slot in slots)
    return np.sqrt(v - mean**2 + 1e-7) / 0.01


METRICS = {
    "sgd": lambda optimizer, index: 1 / 0.1,
    "momentum": lambda optimizer, index: 0.1 / 0.05,
    "adam": adam_metric,
    "adamw": adam_metric,
    "amsgrad": adam_metric,
    "centered": centered_metric,
}


@pytest.mark.parametrize("name", sweep(METRICS, *list(METRICS)[:3]))
def test_one_step_is_the_proximal_formula(name):
    x, y = blobs(seed=5)
    model = learner(DWDOptimizer(OPTIMIZERS[name]()), 50.0)
    plain = keras.models.clone_model(model)
    plain.set_weights(model.get_weights())
    plain = keras.Model(plain.inputs, plain.outputs)
    optimizer = OPTIMIZERS[name]()
    plain.compile(optimizer, LOSS)
    for m in (model, plain):
        m.fit(x, y, batch_size=len(x), verbose=0)
    for variable, moved, held in zip(
        plain.trainable_variables, weights(plain), weights(model), strict=True
    ):
        path = "/".join(variable.path.split("/")[-2:])
        precision = np.asarray(model.regularizer.precisions[path].values, "float64")
        anchor = np.asarray(model.regularizer.anchors[path], "float64")
        d = METRICS[name](optimizer, optimizer._get_variable_index(variable))
        expected = (d * moved + precision * anchor) / (d + precision)
        np.testing.assert_allclose(held, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [{"jit_compile": True}, {"steps_per_execution": 3}])
def test_it_does_the_same_however_the_step_is_run(settings):
    ends = []
    for given in ({"jit_compile": False}, settings):
        model = learner(DWDOptimizer(keras.optimizers.Adam(0.01)), 100.0, "kronecker")
        model.compile(model.optimizer, LOSS, **given)
        ends.append(learn(model))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_mixed_precision_wraps_it():
    with dtype_policy("mixed_float16"):
        model = learner(DWDOptimizer(keras.optimizers.Adam(0.01)), 100.0, "kronecker")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert all(np.isfinite(w).all() for w in learn(model))
    assert float(model.penalty()) > 0


def test_a_step_that_overflows_is_without_a_pull():
    found = {}
    for policy in ("float32", "mixed_float16"):
        with dtype_policy(policy):
            model = learner(DWDOptimizer(keras.optimizers.SGD(0.01)), 100.0, "kronecker")
        for variable in model.trainable_variables:
            variable.assign_add(0.1 * tf.ones(variable.shape))
        if policy == "mixed_float16":
            model.optimizer.build(model.trainable_variables)
            before, scale = weights(model), np.array(model.optimizer.dynamic_scale)
            model.optimizer.dynamic_scale.assign(1e38)
            model.train_on_batch(*blobs(16, seed=5))
            for a, b in zip(before, weights(model), strict=True):
                np.testing.assert_array_equal(a, b)
            model.optimizer.dynamic_scale.assign(scale)
        before = weights(model)
        model.train_on_batch(*blobs(16, seed=5))
        found[policy] = [a - b for a, b in zip(weights(model), before, strict=True)]
    for full, half in zip(*found.values(), strict=True):
        np.testing.assert_allclose(half, full, atol=0.05 * np.abs(full).max())


def test_learning_rate_and_iterations_are_those_of_the_wrapped_optimizer():
    optimizer = DWDOptimizer(keras.optimizers.Adam(0.5))
    assert float(optimizer.learning_rate) == 0.5
    optimizer.learning_rate = 0.25
    assert float(optimizer.inner_optimizer.learning_rate) == 0.25
    model = compiled(optimizer=optimizer, strength=0.0)
    model.fit(*blobs(64), batch_size=16, verbose=0)
    assert int(optimizer.iterations) == 4


def test_it_is_saved_with_the_model(tmp_path):
    model = learner(DWDOptimizer(keras.optimizers.AdamW(0.01)), 5.0)
    model.fit(*blobs(seed=5), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(again, DWDModel)
    assert isinstance(again.optimizer, DWDOptimizer)
    assert isinstance(again.optimizer.inner_optimizer, keras.optimizers.AdamW)
    for a, b in zip(learn(model, 1), learn(again, 1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_either_form_folds_the_same_state():
    """The state depends on the weights alone, not on how the penalty was applied."""
    states = []
    for optimizer in (keras.optimizers.SGD(0.0), DWDOptimizer(keras.optimizers.SGD(0.0))):
        model = learner(optimizer, 3.0, "kronecker")
        model.trainable_variables[0].assign_add(tf.ones(model.trainable_variables[0].shape))
        model.consolidate(blobs(seed=5))
        states.append(model.regularizer.state())
    assert states[0].keys() == states[1].keys()
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name])


def rms_metric(optimizer, index):
    return np.sqrt(np.asarray(optimizer._velocities[index], "float64") + 1e-7) * (1 - 0.8) / 0.01


def nadam_metric(optimizer, index):  # after one step
    v = np.asarray(optimizer._velocities[index], "float64") / (1 - 0.999)
    return (np.sqrt(v) + 1e-7) / 0.01


def adagrad_metric(optimizer, index):
    return np.sqrt(np.asarray(optimizer._accumulators[index], "float64") + 1e-7) / 0.05


OTHER_METRICS = {
    "adagrad": (OPTIMIZERS["adagrad"], adagrad_metric),
    "adamax": (
        OPTIMIZERS["adamax"],
        lambda optimizer, index: (np.asarray(optimizer._u[index], "float64") + 1e-7) / 0.01,
    ),
    "nadam": (OPTIMIZERS["nadam"], nadam_metric),
    "rmsprop_momentum": (lambda: keras.optimizers.RMSprop(0.01, momentum=0.8), rms_metric),
}


@pytest.mark.parametrize("name", sweep(OTHER_METRICS, *list(OTHER_METRICS)[:2]))
def test_the_proximal_formula_of_optimizers_with_other_slots(name):
    make, metric = OTHER_METRICS[name]
    x, y = blobs(seed=5)
    model = learner(DWDOptimizer(make()), 50.0)
    base = keras.models.clone_model(keras.Model(model.inputs, model.outputs))
    base.set_weights(model.get_weights())
    optimizer = make()
    base.compile(optimizer, LOSS)
    for each in (model, base):
        each.train_on_batch(x, y)
    checked = 0
    for layer in ("hidden", "head"):
        for kind in ("kernel", "bias"):
            plain, held = (getattr(each.get_layer(layer), kind) for each in (base, model))
            index = optimizer._get_variable_index(plain)
            d = metric(optimizer, index)
            block = model.regularizer.precisions[f"{layer}/{kind}"]
            precision = np.asarray(block.values, "float64")
            anchor = np.asarray(model.regularizer.anchors[f"{layer}/{kind}"], "float64")
            expected = (d * np.asarray(plain, "float64") + precision * anchor) / (d + precision)
            assert np.abs(expected - plain).max() > 1e-4  # it does pull
            np.testing.assert_allclose(held, expected, rtol=1e-3, atol=1e-5)
            checked += 1
    assert checked == 4
