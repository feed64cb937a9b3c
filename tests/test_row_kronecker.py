"""The precision of a large table of embeddings agrees with a dense matrix."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blocks_of, compiled, load, moved, pass_statistics, saved
from keras import layers

from keras_dwd import KroneckerFisher
from keras_dwd.precision.block import Place
from keras_dwd.precision.blocks import block_from
from keras_dwd.precision.diagonal import Diagonal
from keras_dwd.precision.factor import Factor
from keras_dwd.precision.row_kronecker import RowKronecker
from keras_dwd.variables import by_path

WORDS, WIDTH = 7, 4


def block(seed, rank=WIDTH):
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(WIDTH, WIDTH))
    g = Factor.from_matrix(half @ half.T, rank)
    return RowKronecker("e/embeddings", rng.uniform(0, 2, WORDS), g, rank)


def dense(of):
    u, values, rest = (np.asarray(a, "float64") for a in (of.g.vectors, of.g.values, of.g.rest))
    g = (u * (values - rest)) @ u.T + rest * np.eye(len(u))
    return np.kron(np.diag(np.asarray(of.rows, "float64")), g)


@pytest.mark.parametrize("rank", [WIDTH, 2])
def test_products_equal_those_of_the_dense_matrix(rank):
    made = block(0, rank)
    whole, rng = dense(made), np.random.default_rng(1)
    arrays = {name: keras.Variable(a.astype("float32")) for name, a in made.arrays().items()}
    held = made.with_arrays(arrays)
    x = rng.normal(size=(WORDS, WIDTH)).astype("float32")
    stiffness = rng.uniform(1, 2, x.shape).astype("float32")
    (found,) = held.matvec([tf.constant(x)])
    np.testing.assert_allclose(found, (whole @ x.ravel()).reshape(x.shape), rtol=1e-3, atol=1e-4)
    (found,) = held.proximal_correction([tf.constant(x)], [tf.constant(stiffness)])
    expected = np.linalg.solve(stiffness.mean() * np.eye(x.size) + whole, whole @ x.ravel())
    np.testing.assert_allclose(found, expected.reshape(x.shape), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(made.trace, np.trace(whole))
    place = Place(("e/embeddings",), (x.shape,))
    again = block_from(made.arrays(), place, rank, 1)
    np.testing.assert_allclose(dense(again), whole)
    with pytest.raises(ValueError, match="other sizes"):
        block_from(made.arrays(), Place(("e/embeddings",), ((WORDS + 1, WIDTH),)), rank, 1)


def test_merging_keeps_the_trace_of_each_row():
    old, new, decay = block(0), block(1), 0.7
    merged = old.merged(new, decay)
    by_row = [np.diag(dense(b)).reshape(WORDS, WIDTH).sum(1) for b in (old, new, merged)]
    np.testing.assert_allclose(by_row[2], decay * by_row[0] + by_row[1], rtol=1e-6)
    nothing = RowKronecker("e/embeddings", np.zeros(WORDS), block(2).g, WIDTH)
    np.testing.assert_allclose(dense(nothing.merged(new, decay)), dense(new))
    np.testing.assert_allclose(dense(old.merged(nothing, decay)), decay * dense(old))
    diagonal = np.random.default_rng(2).uniform(size=(WORDS, WIDTH))
    earlier = new.of_diagonal(Diagonal("e/embeddings", diagonal))
    mixed = np.diag(dense(earlier.merged(new, decay)))
    expected = decay * diagonal.sum(1) + by_row[1]
    np.testing.assert_allclose(mixed.reshape(WORDS, WIDTH).sum(1), expected, rtol=1e-6)


def test_strengths_and_growth():
    made = block(0)
    scaled = made.scale_variables({"e/embeddings": 3.0})
    np.testing.assert_allclose(dense(scaled), 3 * dense(made))
    same = made.scale_importances(np.full((WORDS, WIDTH), 2.0))
    np.testing.assert_allclose(dense(same), 2 * dense(made))
    strengths = np.random.default_rng(3).uniform(0.5, 2, (WORDS, WIDTH))
    eigenvalues = strengths * made.importances()
    found = made.scale_importances(strengths).importances()
    for axis in (0, 1):
        np.testing.assert_allclose(found.sum(axis), eigenvalues.sum(axis))
    grown = made.grown(Place(("f",), ((WORDS + 2, WIDTH + 1),)))
    whole = dense(grown).reshape(WORDS + 2, WIDTH + 1, WORDS + 2, WIDTH + 1)
    old = whole[:WORDS, :WIDTH, :WORDS, :WIDTH].reshape(dense(made).shape)
    np.testing.assert_allclose(old, dense(made), atol=1e-12)
    assert not whole[WORDS:].any()
    assert not whole[:, WIDTH:].any()


def speaking(reversible):
    """A model of token sequences: with `reversible`, its embedding is also the output matrix."""
    keras.utils.set_random_seed(1)
    ids = keras.Input((5,), dtype="int32")
    kind = layers.ReversibleEmbedding if reversible else layers.Embedding
    embedding = kind(30, WIDTH, name="e")
    x = layers.Dense(WIDTH, name="d")(embedding(ids))
    x = embedding(x, reverse=True) if reversible else layers.Dense(3, name="head")(x)
    return keras.Model(ids, x)


@pytest.mark.parametrize("reversible", [False, True])
def test_the_factors_are_those_of_single_examples(reversible):
    if reversible and not hasattr(layers, "ReversibleEmbedding"):
        pytest.skip("not in this version of Keras")
    model = compiled(speaking(reversible), fisher=KroneckerFisher("empirical", rank=2))
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 30, (6, 5)), rng.integers(0, 3, (6, 5))
    x[:, 1] = x[:, 0]  # a word that occurs twice
    found = pass_statistics(model, (x, y), 6)
    table = by_path(model)["e/embeddings"]
    rows, gram = np.zeros(30), np.zeros((WIDTH, WIDTH))
    for i in range(6):
        with tf.GradientTape() as tape:
            logits = tf.cast(model(x[i : i + 1]), "float64")
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y[i : i + 1], logits)
            loss = tf.reduce_sum(loss) / np.sqrt(5)
        d = np.asarray(tf.convert_to_tensor(tape.gradient(loss, table.value)), "float64")
        rows += (d**2).sum(1) / 6
        gram += d.T @ d / 6
    np.testing.assert_allclose(found["input/e/embeddings"], rows, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["output/e/embeddings"], gram, rtol=1e-4, atol=1e-6)
    assert "fisher/e/embeddings" not in found
    made = blocks_of(model, found)["e/embeddings"]
    np.testing.assert_allclose(made.trace, np.trace(gram), rtol=1e-4)


def test_a_large_embedding_is_pulled_and_saved():
    model = compiled(
        speaking(False), fisher=KroneckerFisher(rank=2, gamma=None), grouping="gmm", strength=1.0
    )
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 30, (16, 5)), rng.integers(0, 3, (16, 5))
    for _ in range(2):
        moved(model).consolidate(x, y)
    assert isinstance(model.regularizer.precisions["e/embeddings"], RowKronecker)
    moved(model)
    again = compiled(
        speaking(False), fisher=KroneckerFisher(rank=2, gamma=None), grouping="gmm", strength=1.0
    )
    again.set_weights(model.get_weights())
    load(again, saved(model))
    assert float(again.penalty()) == pytest.approx(float(model.penalty()))
    assert float(model.penalty()) > 0
