"""The strength λ may change at any time, and is then that of all tasks learned so far."""

import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, load, long, mlp, saved, state_of

from keras_dwd import DiagonalFisher, DWDOptimizer, DWDRegularizer, KroneckerFisher
from keras_dwd.groupings import SingleGroup
from keras_dwd.variables import by_path, trainable_by_path

RATE = 0.1
X, Y = blobs(32)
X2, Y2 = blobs(32, seed=1)


def linear(optimizer="sgd", fisher=None, compile_settings=None, **settings):
    """Logistic regression, whose gradients are known in closed form."""
    net = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, name="dense")])
    fisher = fisher or DiagonalFisher("empirical", gamma=None)
    settings = {"grouping": None, "fisher": fisher, **settings}
    return compiled(net, optimizer, compile_settings, **settings)


def theta(model):
    return np.concatenate([np.asarray(v, "float64").ravel() for v in model.trainable_variables])


def examples(weights, x, y):
    """The gradient of each example, in float64."""
    x1 = np.concatenate([x, np.ones((len(x), 1))], 1).astype("float64")
    logits = x1 @ weights.reshape(7, 3)
    p = np.exp(logits - logits.max(1, keepdims=True))
    residual = p / p.sum(1, keepdims=True) - np.eye(3)[y]
    return (x1[:, :, None] * residual[:, None, :]).reshape(len(x), -1)


def fisher_of(weights, x, y):
    return (examples(weights, x, y) ** 2).mean(0)


def counting(model):
    """Counts how often the training step of a model is traced."""
    traces = []
    step = model.train_step
    model.train_step = lambda data: (traces.append(1), step(data))[1]
    return traces


@pytest.mark.parametrize("jit", [False, True])
def test_an_assigned_strength_weighs_the_pull_of_the_step_that_is_traced_already(jit):
    sgd = keras.optimizers.SGD(RATE)
    model = linear(sgd, strength=2.0, compile_settings={"jit_compile": jit})
    model.fit(X, Y, verbose=0)
    traces = counting(model)
    model.consolidate((X, Y))
    anchor = theta(model)
    fisher = fisher_of(anchor, X, Y)
    for strength in (2.0, 50.0, 0.0, 0.3, 7):
        model.strength = strength
        assert model.strength == model.regularizer.strength == strength
        before = theta(model)
        expected = 0.5 * strength * (fisher * (before - anchor) ** 2).sum()
        assert float(model.penalty()) == pytest.approx(expected, rel=1e-5)
        model.train_on_batch(X2, Y2)
        moved = before - RATE * examples(before, X2, Y2).mean(0)
        precision = strength * fisher  # SGD takes the pull as a proximal step
        expected = (moved / RATE + precision * anchor) / (1 / RATE + precision)
        np.testing.assert_allclose(theta(model), expected, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


def test_a_strength_is_that_of_all_tasks():
    anchors, fishers = [], []
    regularizer = DWDRegularizer(2.0, anchor="folded")
    model = linear(regularizer=regularizer)
    for strength, (x, y) in zip((0.5, 6.0, 0.0), ((X, Y), (X2, Y2), (X[::2], Y[::2])), strict=True):
        model.fit(x, y, epochs=3, verbose=0)
        model.regularizer.strength = strength  # at 0 the task is estimated as well
        model.consolidate((x, y))
        anchors.append(theta(model))
        fishers.append(fisher_of(anchors[-1], x, y))
    model.strength = 9.0
    variables = trainable_by_path(model)
    values = []
    for shift in (0.0, 0.4):
        for v in variables.values():
            v.assign_add(tf.fill(v.shape, shift))
        pull = [np.asarray(p).ravel() for p in model.regularizer.gradients(variables).values()]
        terms = list(zip(anchors, fishers, strict=True))
        expected = 9.0 * sum(f * (theta(model) - a) for a, f in terms)
        np.testing.assert_allclose(np.concatenate(pull[::-1]), expected, rtol=1e-4, atol=1e-5)
        explicit = 0.5 * 9.0 * sum((f * (theta(model) - a) ** 2).sum() for a, f in terms)
        values.append((float(model.penalty()), explicit))
    (first, expected_first), (second, expected_second) = values  # equal up to a constant
    assert second - first == pytest.approx(expected_second - expected_first, rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"fisher": KroneckerFisher("empirical"), "grouping": "gmm"},
        long({"fisher": KroneckerFisher("empirical", correction=2), "grouping": None}),
        {"fisher": DiagonalFisher(), "grouping": SingleGroup("budget")},
    ],
    ids=["kronecker", "low rank", "budget"],
)
def test_penalty_and_pull_are_linear_in_the_strength(settings):
    model = compiled(
        keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.LayerNormalization(name="norm"),
                keras.layers.Dense(3, name="head"),
            ]
        ),
        strength=3.0,
        **settings,
    )
    model.fit(X, Y, verbose=0)
    model.consolidate()
    model.fit(X2, Y2, epochs=2, verbose=0)
    variables = by_path(model)
    penalty = float(model.penalty())
    assert penalty > 0
    pulls = {p: np.asarray(v) for p, v in model.regularizer.gradients(variables).items()}
    for strength in (0.01, 300.0):
        model.strength = strength
        assert float(model.penalty()) == pytest.approx(strength / 3 * penalty, rel=1e-5)
        for path, pull in model.regularizer.gradients(variables).items():
            np.testing.assert_allclose(pull, strength / 3 * pulls[path], rtol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1e4])
def test_the_proximal_step_has_the_new_strength(strength):
    model = linear(DWDOptimizer(keras.optimizers.SGD(RATE)), strength=2.0)
    model.fit(X, Y, verbose=0)
    model.consolidate((X, Y))
    anchor = theta(model)
    fisher = fisher_of(anchor, X, Y)
    model.fit(X2, Y2, verbose=0)
    model.strength = strength
    before = theta(model)
    model.train_on_batch(X2, Y2)
    moved = before - RATE * examples(before, X2, Y2).mean(0)
    scaled = RATE * strength * fisher
    np.testing.assert_allclose(theta(model), (moved + scaled * anchor) / (1 + scaled), rtol=1e-4)


def dense_precision(model, key):
    """A block as a matrix over the flattened variables, from products with unit vectors."""
    block = model.regularizer.precisions[key]
    a, g = (
        np.asarray(f.vectors, "float64")
        @ np.diag(np.asarray(f.values, "float64") - float(f.rest))
        @ np.asarray(f.vectors, "float64").T
        + float(f.rest) * np.eye(f.size)
        for f in (block.a, block.g)
    )
    return np.kron(a, g)


def test_kernel_and_bias_of_one_matrix_may_change_apart():
    kernel, bias = DWDRegularizer(4.0), DWDRegularizer(2.0)
    settings = {"kernel_regularizer": kernel, "bias_regularizer": bias}
    net = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, name="dense", **settings)])
    model = compiled(net, fisher=KroneckerFisher("empirical"), grouping=None)
    model.fit(X, Y, verbose=0)
    model.consolidate()
    anchor = theta(model)
    precision = dense_precision(model, "dense/kernel")
    model.fit(X2, Y2, verbose=0)
    layer = model.layers[-1]
    for of_kernel, of_bias in ((4.0, 2.0), (1.0, 2.0), (4.0, 8.0), (2.0, 0.0), (0.0, 0.0)):
        layer.kernel_regularizer.strength = of_kernel
        layer.bias_regularizer.strength = of_bias
        roots = np.sqrt(np.repeat([of_kernel / 4, of_bias / 2], [18, 3]))
        delta = theta(model) - anchor
        expected = roots * (precision @ (roots * delta))
        variables = trainable_by_path(model)
        pulls = model.regularizer.gradients(variables)
        pull = np.concatenate([np.asarray(pulls[p]).ravel() for p in variables])
        np.testing.assert_allclose(pull, expected, rtol=1e-4, atol=1e-5)
        assert float(model.penalty()) == pytest.approx(delta @ expected / 2, rel=1e-4, abs=1e-7)
        # A proximal step of a weak pull is a step along the gradient; a strong one ends at c.
        now = theta(model)
        for stiffness in (1e4, 1e-8):
            model.regularizer.proximal_step(
                variables, dict.fromkeys(variables, tf.constant(stiffness))
            )
            moved = now - theta(model)
            for v, value in zip(variables.values(), (now[:18], now[18:]), strict=True):
                v.assign(value.reshape(v.shape))
            if stiffness > 1:
                np.testing.assert_allclose(moved, expected / stiffness, rtol=2e-2, atol=1e-6)
            else:
                np.testing.assert_array_less(np.abs(moved[roots == 0]), 1e-6)
        for v, value in zip(variables.values(), (now[:18], now[18:]), strict=True):
            v.assign(value.reshape(v.shape))


def learned(strength, **settings):
    model = linear(strength=strength, **settings)
    model.fit(X, Y, verbose=0)
    model.consolidate((X, Y))
    model.fit(X2, Y2, verbose=0)
    return model


def test_files_have_the_strength_of_the_model_that_loads_them(tmp_path):
    model = learned(2.0)
    penalty = float(model.penalty())
    model.strength = 6.0
    assert float(model.penalty()) == pytest.approx(3 * penalty, rel=1e-6)
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.strength == 6.0
    assert float(again.penalty()) == float(model.penalty())
    again.strength = 2.0
    assert float(again.penalty()) == penalty
    for strength in (0.0, 10.0):
        other = linear(strength=strength)
        other.load_weights(tmp_path / "m.weights.h5")
        other.strength = 10.0
        assert float(other.penalty()) == pytest.approx(5 * penalty, rel=1e-6)


def test_a_model_saved_at_strength_zero_can_be_raised_again(tmp_path):
    model = learned(2.0)
    penalty = float(model.penalty())
    model.strength = 0
    assert float(model.penalty()) == 0
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.strength == float(again.penalty()) == 0
    again.consolidate((X2, Y2))  # is estimated, though nothing pulls
    again.strength = 2.0
    again.layers[-1].kernel.assign_add(tf.ones((6, 3)))
    assert float(again.penalty()) > penalty


def test_an_earlier_format_keeps_its_penalty():
    model = learned(2.0)
    store = {n: a for n, a in saved(model).items() if not n.startswith("folded|")}
    store["format"] = np.array(1)
    for strength in (2.0, 50.0):  # λ of the file is unknown: only its penalty is
        again = linear(strength=strength)
        again.set_weights(model.get_weights())
        load(again, store)
        assert float(again.penalty()) == pytest.approx(float(model.penalty()), rel=1e-6)
        again.strength = 2 * strength
        assert float(again.penalty()) == pytest.approx(2 * float(model.penalty()), rel=1e-6)


def test_a_layer_that_no_task_has_had_does_not_keep_a_strength_at_zero():
    previous = learned(2.0)
    base = keras.Sequential(
        [keras.Input((6,)), *previous.layers[1:], keras.layers.Dense(3, name="extra")]
    )
    larger = compiled(base, strength=0.0, fisher=previous.fisher, grouping=None)
    larger.inherit(previous)
    larger.strength = 3.0
    for model in (previous, larger):
        model.trainable_variables[0].assign_add(tf.ones(model.trainable_variables[0].shape))
    previous.strength = 3.0
    assert float(larger.penalty()) > 0


def test_nothing_can_be_raised_that_was_not_estimated(tmp_path):
    model = learned(0.0)
    model.save(tmp_path / "m.keras")
    for m in (model, keras.models.load_model(tmp_path / "m.keras")):
        with pytest.raises(ValueError, match="`strength` cannot be raised from 0"):
            m.strength = 5.0
        assert m.strength == 0
        m.strength = 0.0
    net = mlp(kernel_regularizer=DWDRegularizer(0.0))
    model = compiled(net, strength=2.0, fisher=DiagonalFisher("batch"), grouping=None)
    model.fit(X, Y, verbose=0)
    model.consolidate()
    with pytest.raises(ValueError, match="`strength` cannot be raised from 0"):
        net.get_layer("hidden").kernel_regularizer.strength = 1.0
    model.strength = 0.0  # of the others, which were estimated
    model.strength = 3.0


@pytest.mark.parametrize("fisher", [DiagonalFisher("batch"), long(KroneckerFisher())])
def test_a_strength_raised_within_the_first_task_is_in_force_from_there_on(fisher):
    model = compiled(strength=0.0, fisher=fisher, grouping=None)
    model.fit(X, Y, verbose=0)
    model.strength = 3.0
    with pytest.raises(ValueError, match="raised from 0 since the last call of `fit`"):
        model.consolidate()
    model.fit(X, Y, verbose=0)
    model.consolidate()
    model.fit(X2, Y2, verbose=0)
    assert float(model.penalty()) > 0
    model.strength = 0.0
    assert float(model.penalty()) == 0
    model.consolidate()  # the task was estimated, though nothing pulled at its end
    assert model.tasks_learned == 2


@pytest.mark.parametrize("strength", [-1, np.nan, np.inf, "5", None, True, 1e39])
def test_a_strength_that_is_none_is_refused_when_assigned(strength):
    model = linear(strength=2.0)
    for owner in (model, model.regularizer):
        with pytest.raises(ValueError, match=re.escape("`strength` must be a number in [0, ")):
            owner.strength = strength
    assert model.strength == 2.0
    assert not state_of(model)


def test_a_larger_model_holds_what_it_inherits_with_its_own_strength():
    model = learned(2.0)
    other = linear(strength=8.0)
    other.inherit(model)
    assert float(other.penalty()) == pytest.approx(4 * float(model.penalty()), rel=1e-6)


@pytest.mark.parametrize(
    ("strength", "told"),
    [(1e9, "so large that this `fit`"), (1e-6, "so small that it holds nothing"), (200.0, None)],
)
def test_a_strength_that_makes_no_sense_is_told(strength, told):
    keras.utils.set_random_seed(0)
    x, y = blobs(256)
    adam = keras.optimizers.Adam(0.01)
    model = compiled(optimizer=adam, fisher=DiagonalFisher("influence", None), strength=strength)
    model.fit(x, y, epochs=8, verbose=0)
    model.consolidate(x, y, verbose=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.fit(x, (y + 1) % 3, epochs=8, verbose=0)
        model.fit(x, (y + 1) % 3, epochs=2, verbose=0)  # goes on with what it has learned
    assert [told in str(each.message) for each in said] == [True] * (2 if told else 0)
    assert all(each.filename == __file__ for each in said)
