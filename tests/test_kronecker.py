"""Kronecker-factored precision: checked against dense float64 matrices."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, blocks_of, compiled, load, moved, pass_statistics, saved
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dwd import DiagonalFisher, DWDRegularizer, KroneckerFisher
from keras_dwd.precision.diagonal import Diagonal
from keras_dwd.precision.factor import Factor
from keras_dwd.precision.kronecker import Kronecker
from keras_dwd.precision.matrix_form import MatrixForm
from keras_dwd.variables import trainable_by_path, untracked


def positive(rng, n, rank=None):
    half = rng.normal(size=(n, rank or n))
    return half @ half.T


def dense(factor):
    """The dense matrix of a factor."""
    u = np.asarray(factor.vectors, "float64")
    outside = np.eye(factor.size) - u @ u.T
    return (u * np.asarray(factor.values)) @ u.T + float(np.asarray(factor.rest)) * outside


def dense_kronecker(block):
    return np.kron(dense(block.a), dense(block.g))


def block(rng, fan_in=4, fan_out=3, rank=None, bias=True):
    form = MatrixForm((fan_in, fan_out), (fan_in, fan_out), (0, 1), (fan_out,) if bias else None)
    a = Factor.from_matrix(positive(rng, form.rows), rank or form.rows)
    g = Factor.from_matrix(positive(rng, fan_out), rank or fan_out)
    return Kronecker(("w", "b") if bias else ("w",), form, a, g, rank or 64)


def held(kronecker):
    """The same block with its arrays in variables, as in the training step."""
    return kronecker.with_arrays({n: untracked(v, "leaf") for n, v in kronecker.arrays().items()})


SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 9), rank=st.integers(1, 9), share=st.floats(0, 1))
def test_factors_keep_the_trace_and_their_largest_directions(seed, n, rank, share):
    rng = np.random.default_rng(seed)
    matrix = positive(rng, n)
    factor = Factor.from_matrix(matrix, rank)
    values = np.linalg.eigvalsh(matrix)[::-1]
    kept = len(factor.values)
    assert kept <= min(rank, n)
    assert factor.trace == pytest.approx(np.trace(matrix))
    assert np.trace(dense(factor)) == pytest.approx(np.trace(matrix))
    np.testing.assert_allclose(factor.values, values[:kept], rtol=1e-6, atol=1e-9)
    if kept == n:
        np.testing.assert_allclose(dense(factor), matrix, rtol=1e-6, atol=1e-6 * values[0])
    damped = (1 - share) * dense(factor) + share * np.trace(matrix) / n * np.eye(n)
    np.testing.assert_allclose(
        dense(factor.damped(share)), damped, rtol=1e-6, atol=1e-6 * values[0]
    )


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, n=st.integers(2, 8), first=st.integers(1, 8), second=st.integers(1, 8))
def test_combining_factors_adds_their_matrices(seed, n, first, second):
    rng = np.random.default_rng(seed)
    a, b = (Factor.from_matrix(positive(rng, n), min(r, n)) for r in (first, second))
    expected = 0.3 * dense(a) + 2 * dense(b)
    combined = a.combine(0.3, b, 2.0, rank=n)
    assert combined.trace == pytest.approx(np.trace(expected))
    # The factor drops directions that hold up to a thousandth of the trace.
    assert np.linalg.norm(dense(combined) - expected) <= 2e-3 * np.trace(expected)


def test_a_sketch_of_low_rank_gives_the_matrix():
    rng = np.random.default_rng(0)
    matrix = positive(rng, 20, rank=3)
    probe = np.linalg.qr(rng.normal(size=(20, 6)))[0]
    factor = Factor.from_sketch(matrix @ probe, probe, np.trace(matrix))
    np.testing.assert_allclose(dense(factor), matrix, atol=1e-3 * np.trace(matrix))
    assert factor.trace == pytest.approx(np.trace(matrix), rel=1e-3)


@pytest.mark.parametrize("fan_out", [3, 20])  # the smaller factor is on either side
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_products_equal_those_of_the_dense_matrix(rank, bias, fan_out):
    rng = np.random.default_rng(0)
    kronecker = held(block(rng, fan_out=fan_out, rank=rank, bias=bias))
    matrix = dense_kronecker(kronecker)
    shapes = ((4, fan_out), (fan_out,))[: 1 + bias]
    delta = [rng.normal(size=shape).astype("float32") for shape in shapes]
    tensors = [tf.constant(d) for d in delta]
    flat = kronecker.form.join(*delta).ravel()

    def flattened(parts):
        return kronecker.form.join(*(np.asarray(p) for p in parts)).ravel()

    product = flattened(kronecker.matvec(tensors))
    np.testing.assert_allclose(product, matrix @ flat, rtol=1e-4, atol=1e-4 * np.abs(product).max())
    for stiffness in (1e-3, 1.0, 1e3):
        move = flattened(kronecker.proximal_correction(tensors, [tf.constant(stiffness)]))
        expected = np.linalg.solve(stiffness * np.eye(len(flat)) + matrix, matrix @ flat)
        np.testing.assert_allclose(move, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, decay=st.floats(0, 1), scale=st.floats(1e-3, 1e3))
def test_merging_keeps_the_trace_and_all_directions(seed, decay, scale):
    rng = np.random.default_rng(seed)
    old, new = block(rng), block(rng)
    new = Kronecker(new.paths, new.form, new.a, new.g.times(scale), new.rank)
    merged = held(old).merged(new, decay)
    expected = decay * dense_kronecker(old) + dense_kronecker(new)
    assert merged.a.trace * merged.g.trace == pytest.approx(np.trace(expected), rel=1e-4)
    traces = decay * old.a.trace * old.g.trace, new.a.trace * new.g.trace
    for side in ("a", "g"):
        parts = [dense(getattr(b, side)) / getattr(b, side).trace for b in (old, new)]
        mean = sum(t * p for t, p in zip(traces, parts, strict=True)) / sum(traces)
        got = dense(getattr(merged, side)) / getattr(merged, side).trace
        np.testing.assert_allclose(got, mean, atol=3e-3)


def test_merging_with_nothing():
    rng = np.random.default_rng(0)
    some, zero = block(rng), block(rng).scale_variables({"w": 0.0, "b": 0.0})
    for merged in (held(zero).merged(some, 1.0), held(some).merged(zero, 1.0)):
        np.testing.assert_allclose(dense_kronecker(merged), dense_kronecker(some), rtol=1e-4)


def test_one_strength_for_kernel_and_bias_scales_the_matrix():
    made = block(np.random.default_rng(0), rank=2)
    scaled = made.scale_variables({"w": 3.0, "b": 3.0})
    np.testing.assert_allclose(dense_kronecker(scaled), 3 * dense_kronecker(made), rtol=1e-9)


def test_strengths_of_kernel_and_bias_scale_rows():
    kronecker = block(np.random.default_rng(0))
    weighted = kronecker.scale_variables({"w": 4.0, "b": 0.25})
    rows = np.array([2.0] * 4 + [0.5])
    expected = np.kron(dense(kronecker.a) * np.outer(rows, rows), dense(kronecker.g))
    np.testing.assert_allclose(dense_kronecker(weighted), expected, atol=2e-3 * np.trace(expected))
    excluded = dense_kronecker(kronecker.scale_variables({"w": 1.0, "b": 0.0}))
    assert np.abs(excluded[-3:]).max() <= 2e-3 * np.trace(excluded)


def test_the_strengths_of_groups_scale_directions():
    kronecker = block(np.random.default_rng(0))
    rows, columns = np.array([1.0, 2, 3, 4, 5])[:, None], np.array([0.5, 1, 2])
    scaled = kronecker.scale_importances(rows * columns)
    expected = kronecker.importances() * rows * columns
    np.testing.assert_allclose(scaled.importances(), expected, rtol=1e-6)
    np.testing.assert_allclose(scaled.a.vectors, kronecker.a.vectors)


def test_strengths_that_are_no_product_keep_the_total_of_each_direction():
    kronecker = block(np.random.default_rng(0))
    strengths = np.random.default_rng(1).choice((0.0, 0.1, 3.0), kronecker.importances().shape)
    wanted = strengths * kronecker.importances()
    scaled = kronecker.scale_importances(strengths).importances()
    for axis in (0, 1):
        np.testing.assert_allclose(scaled.sum(axis), wanted.sum(axis), rtol=1e-6)
    np.testing.assert_allclose(
        scaled, np.outer(wanted.sum(1), wanted.sum(0)) / wanted.sum(), rtol=1e-6
    )
    nothing = kronecker.scale_importances(np.zeros(strengths.shape))
    assert np.all(nothing.importances() == 0)
    assert nothing.a.rest * nothing.g.rest == 0


def falling(rng, size, directions):
    """A positive matrix in which this many directions hold 99.9% of the trace."""
    vectors = np.linalg.qr(rng.normal(size=(size, size)))[0]
    values = np.where(np.arange(size) < directions, 1.0, 1e-3 * directions / size / 2)
    return (vectors * values) @ vectors.T


def test_directions_hold_nearly_all_and_there_is_room_for_more():
    rng = np.random.default_rng(0)
    rank, sizes, factor = 150, [], None
    for directions in (20, 20, 40, 20):
        matrix = falling(rng, 200, directions)
        new = Factor.from_matrix(matrix, rank)
        assert new.vectors.shape == (200, 64 if directions == 20 else 96)
        assert new.trace == pytest.approx(np.trace(matrix))
        held = new.values[: directions + 1].sum()
        assert held > 0.999 * (np.trace(matrix) - 200 * new.rest)
        factor = new if factor is None else factor.combine(1.0, new, 1.0, rank)
        sizes.append(factor.vectors.shape[1])
    # 40 directions fit into 64 columns. 80 do not: then there are twice 80 columns, up to the rank.
    assert sizes == [64, 64, 150, 150]
    assert factor.combine(1.0, new, 1.0, 30).vectors.shape[1] == 30


def test_what_is_zero_has_room_for_what_comes():
    nothing = Factor.from_matrix(np.zeros((60, 60)), 50)
    assert nothing.trace == 0
    something = nothing.combine(1.0, Factor.from_matrix(np.eye(60), 50), 1.0, 50)
    assert something.trace == pytest.approx(60)


@pytest.mark.parametrize("estimator", ["empirical", "influence", "mc", "negated"])
def test_the_pull_is_the_gradient_of_the_penalty(estimator):
    model = compiled(strength=2.0, fisher=KroneckerFisher(estimator))
    model.consolidate(blobs())
    for variable in model.trainable_variables:
        variable.assign_add(tf.random.normal(variable.shape))
    variables = trainable_by_path(model)
    with tf.GradientTape() as tape:
        penalty = model.penalty()
    expected = tape.gradient(penalty, [v.value for v in variables.values()])
    pulls = model.regularizer.gradients(variables)
    for path, gradient in zip(variables, expected, strict=True):
        np.testing.assert_allclose(pulls[path], gradient, rtol=1e-3, atol=1e-5)


def test_the_online_factors_are_the_moving_average_of_batches():
    x, y = blobs(24)
    fisher = KroneckerFisher("empirical", gamma=0.5, every=2)
    model = compiled(optimizer=keras.optimizers.SGD(0.0), strength=1.0, fisher=fisher)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    seen = [pass_statistics(model, (x[i : i + 4], y[i : i + 4]), 4) for i in (0, 8, 16)]
    for name, value in model.fisher.estimate().items():
        expected = (seen[0][name] + 2 * seen[1][name] + 4 * seen[2][name]) / 7
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


def test_tasks_shorter_than_the_interval_of_updates_have_an_estimate():
    model = compiled(strength=1.0, fisher=KroneckerFisher(every=100))
    for seed in (0, 1, 2):
        model.fit(*blobs(seed=seed), verbose=0)
        model.consolidate()
    assert model.tasks_learned == 3


def test_a_block_is_the_exact_fisher_where_it_is_a_kronecker_product():
    """For one example the Fisher information of a dense layer is exactly A ⊗ G."""
    x, y = blobs(1)
    kronecker = compiled(strength=1.0, fisher=KroneckerFisher("empirical", None, damping=0.0))
    statistics = pass_statistics(kronecker, (x, y), 1)
    blocks = blocks_of(kronecker, statistics)
    diagonal = pass_statistics(kronecker, (x, y), 1, DiagonalFisher("empirical", None))
    for layer in ("hidden", "head"):
        found = blocks[f"{layer}/kernel"]
        matrix = dense_kronecker(found).diagonal().reshape(found.form.rows, -1)
        for path, part in zip(found.paths, found.form.split(matrix), strict=True):
            np.testing.assert_allclose(part, diagonal[f"fisher/{path}"], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"estimator": "batch"}, "estimator"),
        ({"rank": 0}, "rank"),
        ({"damping": 1.5}, "damping"),
        ({"every": 0}, "every"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        KroneckerFisher(**arguments)


def test_the_exact_sum_over_tasks_is_for_diagonals():
    with pytest.raises(ValueError, match="`anchor`"):
        compiled(regularizer=DWDRegularizer(1.0, anchor="folded"), fisher=KroneckerFisher())


def test_another_kind_of_fisher_information_is_refused_and_nothing_changes():
    model = compiled(strength=1.0, fisher=KroneckerFisher(gamma=None))
    model.consolidate(blobs())
    before = {name: a.copy() for name, a in model.regularizer.state().items()}
    diagonal = moved(compiled(strength=1.0, fisher=DiagonalFisher("empirical", None)))
    load(diagonal, saved(model))
    with pytest.raises(ValueError, match=r"so far is Kronecker, the new .* Diagonal"):
        diagonal.consolidate(blobs(seed=1))
    model = diagonal
    assert model.tasks_learned == 1
    for name, array in model.regularizer.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_sketch_of_less_rank_than_columns_gives_the_matrix():
    rng = np.random.default_rng(0)
    thin = rng.normal(size=(30, 2))
    probe = np.linalg.qr(rng.normal(size=(30, 6)))[0]
    matrix = thin @ thin.T
    factor = Factor.from_sketch(matrix @ probe, probe, np.trace(matrix))
    np.testing.assert_allclose(dense(factor), matrix, atol=1e-5 * np.trace(matrix))


def test_a_task_that_adds_next_to_nothing_weakens_the_earlier_ones_too():
    regularizer = DWDRegularizer(2.0, decay=0.5)
    fisher = KroneckerFisher("empirical", gamma=None)
    model = compiled(regularizer=regularizer, fisher=fisher, grouping=None)
    x, y = blobs()
    penalties = []
    for weight in (1.0, 1e-6):
        model.consolidate((x, y, np.full(64, weight)))
        variables = model.trainable_variables
        held = [np.array(v) for v in variables]
        for variable in variables:
            variable.assign_add(0.1 * keras.random.normal(variable.shape, seed=1))
        penalties.append(float(model.penalty()))
        for variable, value in zip(variables, held, strict=True):
            variable.assign(value + 1e-3)  # something is to change between two boundaries
    assert penalties[1] == pytest.approx(0.5 * penalties[0], rel=1e-3)


@pytest.mark.parametrize("damping", [0.0, 0.4, 1.0])
def test_damping_makes_a_share_of_the_output_factor_the_same_for_all_outputs(damping):
    """The pull on a linear layer, from A = E[D Dᵀ] and G = E[Dᵀ D] / tr A in float64."""
    base = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, use_bias=False, name="head")])
    fisher = KroneckerFisher("empirical", gamma=None, damping=damping)
    model = compiled(base, strength=2.0, fisher=fisher, grouping=None)
    x, y = blobs(16)
    kernel = model.get_layer("head").kernel
    held = np.array(kernel, "float64")
    model.consolidate((x, y))
    shifted = np.exp(x @ held)
    g = shifted / shifted.sum(1, keepdims=True) - np.eye(3)[y]
    d = np.einsum("bi,bo->bio", x.astype("float64"), g)
    a = np.einsum("bio,bjo->ij", d, d) / 16
    factor = np.einsum("bio,bip->op", d, d) / 16 / np.trace(a)
    factor = (1 - damping) * factor + damping * np.trace(factor) / 3 * np.eye(3)
    delta = np.random.default_rng(0).normal(size=(6, 3))
    kernel.assign(held + delta)
    pull = model.regularizer.gradients({"head/kernel": kernel})["head/kernel"]
    expected = 2 * a @ delta @ factor
    np.testing.assert_allclose(pull, expected, atol=2e-3 * np.abs(expected).max())


def test_a_diagonal_of_an_earlier_version_goes_on_as_a_product():
    """Recurrent layers had one: the sums of its rows and columns stay, the bias has its own."""
    rng = np.random.default_rng(0)
    old = Diagonal("kernel", rng.uniform(size=(3, 4)))
    form = MatrixForm((3, 4), (3, 4), (0, 1), (4,))
    one = Factor(np.eye(4), np.ones(4), np.asarray(0.0))
    new = Kronecker(("kernel", "bias"), form, one, one, 8)
    found = new.of_diagonal(old)
    sums = np.outer(np.diag(dense(found.a)), np.diag(dense(found.g)))
    np.testing.assert_allclose(sums.sum(1), [*old.values.sum(1), 0], atol=1e-12)
    np.testing.assert_allclose(sums.sum(0), old.values.sum(0))
    regularizer = DWDRegularizer(1.0)
    values = {"kernel": np.ones((3, 4)), "bias": np.ones(4)}
    variables = {path: keras.Variable(value, name=path) for path, value in values.items()}
    for block in (old, new):
        regularizer.prepare_task(variables, {"kernel": block})()
    total = regularizer.precisions["kernel"]
    arrays = {name: np.asarray(array) for name, array in total.arrays().items()}
    assert total.with_arrays(arrays).trace == pytest.approx(old.trace + new.trace)
