"""A diagonal with a low-rank correction, compared with dense matrices."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, moved, pass_statistics, sweep
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from test_rules import float64_gradients, made

from keras_dwd import DWDModel, DWDOptimizer, KroneckerFisher
from keras_dwd.precision.factor import Factor
from keras_dwd.precision.low_rank import LowRank
from keras_dwd.variables import trainable_by_path, untracked

SEEDS = st.integers(0, 2**32 - 1)


def some(rng, shape=(3, 2), columns=2):
    n = int(np.prod(shape))
    return LowRank("w", rng.uniform(0, 1, shape), rng.normal(size=(n, columns)), columns)


def dense(block):
    w = np.asarray(block.correction, "float64")
    return np.diag(np.asarray(block.values, "float64").ravel()) + w @ w.T


def held(block):
    return block.with_arrays({n: untracked(v, "leaf") for n, v in block.arrays().items()})


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_what_had_no_gradient_in_one_task_may_have_one_in_another(first):
    network = keras.Sequential(
        [keras.Input((6,)), layers.PReLU(name="slopes"), layers.Dense(3, name="head")]
    )
    model = compiled(network, fisher=KroneckerFisher("empirical", None, correction=2))
    x, y = blobs()
    for sign in (first, -first):  # positive inputs do not use the slopes
        moved(model).consolidate((sign * np.abs(x), y))
    block = model.regularizer.precisions["slopes/alpha"]
    assert isinstance(block, LowRank)
    assert block.trace > 0


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, stiff=st.floats(1e-3, 1e3))
def test_products_equal_the_matrix(seed, stiff):
    rng = np.random.default_rng(seed)
    block, delta = some(rng), rng.normal(size=(3, 2)).astype("float32")
    stiffness = (stiff * rng.uniform(0.5, 1, (3, 2))).astype("float32")
    matrix, flat = dense(block), delta.ravel()
    (product,) = held(block).matvec([tf.constant(delta)])
    np.testing.assert_allclose(np.ravel(product), matrix @ flat, rtol=1e-3, atol=1e-4)
    (step,) = held(block).proximal_correction([tf.constant(delta)], [tf.constant(stiffness)])
    expected = np.linalg.solve(np.diag(stiffness.ravel().astype("float64")) + matrix, matrix @ flat)
    np.testing.assert_allclose(np.ravel(step), expected, rtol=1e-2, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, decay=st.floats(0, 1), columns=st.integers(1, 6))
def test_merging_keeps_the_diagonal_and_the_largest_directions(seed, decay, columns):
    rng = np.random.default_rng(seed)
    old, new = some(rng, columns=columns), some(rng, columns=columns)
    merged = held(old).merged(new, decay)
    total = decay * dense(old) + dense(new)
    np.testing.assert_allclose(np.diag(dense(merged)), np.diag(total), rtol=1e-5)
    assert merged.correction.shape[1] <= columns
    if 2 * columns >= 6 and columns == 6:  # all directions fit
        np.testing.assert_allclose(dense(merged), total, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, rank=st.integers(1, 6))
def test_the_diagonal_is_exact_whatever_the_rank(seed, rank):
    root = np.random.default_rng(seed).normal(size=(6, 4))
    matrix = root @ root.T
    block = LowRank.around("w", matrix.diagonal(), Factor.from_matrix(matrix, rank), rank)
    np.testing.assert_allclose(np.diag(dense(block)), matrix.diagonal(), rtol=1e-9)
    np.testing.assert_allclose(block.importances(), matrix.diagonal(), rtol=1e-9)
    assert (block.values >= 0).all()


def test_strengths_scale_rows_and_columns():
    rng = np.random.default_rng(0)
    block, strengths = some(rng), rng.uniform(0, 2, (3, 2))
    roots = np.sqrt(strengths.ravel())
    np.testing.assert_allclose(
        dense(block.scale_importances(strengths)), np.outer(roots, roots) * dense(block)
    )
    np.testing.assert_allclose(dense(block.scale_variables({"w": 3.0})), 3 * dense(block))


@pytest.mark.parametrize("case", ["layer_norm", "without_a_rule", "depthwise2d"])
def test_with_full_rank_it_is_the_fisher_information(case):
    model, x, y = made(case, KroneckerFisher("empirical", gamma=None, correction=64))
    blocks = model.fisher.blocks(model, trainable_by_path(model), pass_statistics(model, (x, y), 4))
    gradients = float64_gradients(model, case, x, y)
    checked = 0
    for path, block in blocks.items():
        if isinstance(block, LowRank):
            g = gradients[path].reshape(len(y), -1)
            expected = g.T @ g / len(y)
            # Directions are kept until they hold 99.9 % of the trace.
            np.testing.assert_allclose(dense(block), expected, atol=4e-3 * np.trace(expected))
            np.testing.assert_allclose(
                np.diag(dense(block)), np.diag(expected), rtol=1e-3, atol=1e-7
            )
            checked += 1
    assert checked


def normalized():
    inputs = keras.Input((6,))
    x = layers.LayerNormalization(name="norm")(layers.Dense(8, name="hidden")(inputs))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


@pytest.mark.long
@pytest.mark.parametrize("decoupled", sweep([False, True], False))
def test_a_model_learns_with_it_and_is_saved_with_it(tmp_path, decoupled):
    optimizer = DWDOptimizer("adam") if decoupled else "adam"
    model = compiled(normalized(), optimizer, fisher=KroneckerFisher(correction=3, every=1))
    for seed in (0, 1):
        model.fit(*blobs(seed=seed), epochs=2, verbose=0)
        model.consolidate()
    assert isinstance(model.regularizer.precisions["norm/gamma"], LowRank)
    model.fit(*blobs(seed=2), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, DWDModel)
    assert float(loaded.penalty()) == pytest.approx(float(model.penalty()), rel=1e-5)
    held_by = [m.regularizer.precisions["norm/gamma"] for m in (model, loaded)]
    np.testing.assert_array_equal(*(np.asarray(b.correction) for b in held_by))
