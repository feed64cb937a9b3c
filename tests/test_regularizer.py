import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, mlp, pass_statistics
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dwd import DiagonalFisher, DWDRegularizer, KroneckerFisher
from keras_dwd.precision.diagonal import Diagonal
from keras_dwd.variables import trainable_by_path


def _variable(values):
    return keras.Variable(np.asarray(values, "float32"), dtype="float32", name="w")


def fold(regularizer, variables, blocks):
    regularizer.prepare_task(variables, blocks)()


def _fold_tasks(regularizer, fishers, optima):
    variable = _variable(optima[0])
    for fisher, theta in zip(fishers, optima, strict=True):
        variable.assign(theta)
        fold(regularizer, {"w": variable}, {"w": Diagonal("w", np.asarray(fisher))})
    return variable


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 4), strength=st.floats(0.01, 100))
def test_folding_is_the_explicit_sum_over_tasks(seed, spread, strength):
    rng = np.random.default_rng(seed)
    tasks, shape = 5, (4, 3)
    fishers = 10.0 ** rng.uniform(-spread, spread, (tasks, *shape))
    optima = rng.normal(size=(tasks, *shape)).astype("float32")
    regularizer = DWDRegularizer(strength, anchor="folded")
    variable = _fold_tasks(regularizer, fishers, optima)

    def explicit(theta):
        difference = theta - optima.astype("float64")
        value = 0.5 * strength * (fishers * difference**2).sum()
        return value, strength * (fishers * difference).sum(0)

    points = rng.normal(size=(2, *shape)).astype("float32")
    values, expected = [], []
    for theta in points:
        variable.assign(theta)
        value, gradient = explicit(theta.astype("float64"))
        expected.append(value)
        values.append(float(regularizer.value({"w": variable})))
        folded = np.asarray(regularizer.gradients({"w": variable})["w"], "float64")
        # Relative to the terms of the sum, as θ − θ* cancels where the two are close.
        scale = (fishers * (np.abs(theta) + np.abs(optima))).sum(0) * strength
        assert np.all(np.abs(folded - gradient) <= 1e-6 * scale)
    # The values agree up to a constant, so their differences between two points agree.
    assert values[0] - values[1] == pytest.approx(
        expected[0] - expected[1], abs=1e-6 * (sum(expected))
    )


def test_decay_and_latest_anchor_are_online_ewc():
    regularizer = DWDRegularizer(2.0, decay=0.5, anchor="latest")
    _fold_tasks(regularizer, [[1.0], [10.0], [100.0]], [[1.0], [2.0], [3.0]])
    np.testing.assert_allclose(regularizer.precisions["w"].values, [2 * (100 + 5 + 0.25)])
    np.testing.assert_allclose(regularizer.anchors["w"], [3.0])


def test_zero_fisher_pulls_nothing():
    regularizer = DWDRegularizer(1.0)
    variable = _fold_tasks(regularizer, [[0.0, 1.0]], [[1.0, 1.0]])
    variable.assign([5.0, 5.0])
    np.testing.assert_array_equal(regularizer.gradients({"w": variable})["w"], [0.0, 4.0])


def test_a_failing_fold_changes_nothing():
    regularizer = DWDRegularizer(1.0)
    with pytest.raises(KeyError):
        fold(
            regularizer,
            {"a": _variable([1.0])},
            {path: Diagonal(path, np.ones(1)) for path in ("a", "b")},
        )
    assert not regularizer.precisions


@pytest.mark.parametrize(
    "arguments",
    [
        {"strength": -1.0},
        {"strength": float("nan")},
        {"strength": "big"},
        {"decay": 1.5},
        {"anchor": "x"},
    ],
)
def test_bad_arguments_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}`"):
        DWDRegularizer(**arguments)


def test_config_round_trip():
    regularizer = DWDRegularizer(3.0, decay=0.5, anchor="latest")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(regularizer))
    assert again.get_config() == regularizer.get_config()


def test_a_layer_sets_its_own_strength_or_is_excluded():
    model = mlp(kernel_regularizer=DWDRegularizer(0.0), bias_regularizer=DWDRegularizer(6.0))
    model = compiled(model, strength=3.0, fisher=DiagonalFisher("empirical"), grouping=None)
    x, y = blobs()
    model.consolidate((x, y))
    precisions = model.regularizer.precisions
    assert set(precisions) == {"hidden/bias", "head/kernel", "head/bias"}
    # The regularizer of the hidden bias has twice the strength of the model's own.
    fisher = pass_statistics(model, (x, y), 32)
    for path, strength in {"hidden/bias": 6, "head/bias": 3}.items():
        expected = strength * fisher[f"fisher/{path}"]
        np.testing.assert_allclose(precisions[path].values, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["kernel", "bias"])
def test_an_excluded_part_of_a_matrix_is_not_pulled(name):
    model = mlp(**{f"{name}_regularizer": DWDRegularizer(0.0)})
    model = compiled(model, strength=3.0, fisher=KroneckerFisher("empirical", None))
    model.consolidate(blobs())
    held = {p: np.array(v) for p, v in model.regularizer.anchors.items()}
    for variable in model.trainable_variables:
        variable.assign_add(tf.ones(variable.shape))
    variables = trainable_by_path(model)
    pulls = model.regularizer.gradients(variables)
    assert set(pulls) == set(variables) - {f"hidden/{name}"}
    model.regularizer.proximal_step(variables, dict.fromkeys(variables, tf.constant(1.0)))
    moved = {p: np.abs(np.array(v) - held[p] - 1).max() for p, v in variables.items() if p in held}
    assert moved.pop(f"hidden/{name}") < 1e-6
    assert min(moved.values()) > 1e-4


def test_in_a_plain_model_it_has_no_effect():
    model = mlp(kernel_regularizer=DWDRegularizer(5.0))
    model.compile("sgd", "mse")
    assert [float(term) for term in model.losses] == [0.0]


def test_the_arrays_of_a_precision_answer_to_their_earlier_name():
    model = compiled(strength=1.0, fisher=DiagonalFisher("batch"), grouping=None)
    model.fit(*blobs(), verbose=0)
    model.consolidate()
    for block in model.regularizer.precisions.values():
        with pytest.warns(DeprecationWarning, match="use `arrays`"):
            assert block.leaves() == block.arrays()
