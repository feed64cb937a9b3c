"""Units that were never active are left out of the Fisher estimate and the penalty."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, blocks_of, compiled, pass_statistics, state_of, sweep

from keras_dwd import DWDOptimizer, KroneckerFisher
from keras_dwd.layers import KWinners
from keras_dwd.variables import trainable_by_path


def test_only_the_winners_pass():
    x = np.random.default_rng(0).normal(size=(5, 3, 20)).astype("float32")
    y = np.array(KWinners(4)(x))
    assert ((y != 0).sum(-1) == 4).all()
    np.testing.assert_array_equal(np.sort(y[y != 0]), np.sort(np.sort(x, -1)[..., -4:].ravel()))
    np.testing.assert_array_equal(y, KWinners(0.2)(x))
    np.testing.assert_array_equal(KWinners(50)(x), x)
    layer = KWinners(0.1)
    assert KWinners.from_config(layer.get_config()).winners == 0.1
    with tf.GradientTape() as tape:
        inputs = tf.constant(x)
        tape.watch(inputs)
        total = tf.reduce_sum(KWinners(4)(inputs))
    np.testing.assert_array_equal(tape.gradient(total, inputs), (y != 0).astype("float32"))


@pytest.mark.parametrize("winners", [0, -1, 0.0, 1.5, "few"])
def test_bad_numbers_of_winners_are_named(winners):
    with pytest.raises(ValueError, match="`winners`"):
        KWinners(winners)


def network(dead=14):
    """A network with 20 hidden units, `dead` of which are never active."""
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(20, "relu", name="hidden")
    x = hidden(inputs)
    outputs = keras.layers.Dense(3, name="head")(x)
    model = keras.Model(inputs, outputs)
    hidden.bias.assign(np.where(np.arange(20) < dead, -100.0, 0.5))
    return model


def learner(sparsity, optimizer="sgd", dead=14, **settings):
    keras.utils.set_random_seed(1)
    fisher = KroneckerFisher("empirical", sparsity=sparsity, **settings)
    return compiled(network(dead), optimizer, strength=1.0, fisher=fisher, grouping=None)


def test_it_goes_without_xla():
    model = learner(True)
    with pytest.warns(UserWarning, match="jit_compile"):
        model.compile("sgd", "mse", jit_compile=True)
    assert not model.jit_compile
    x, y = blobs()
    model.fit(x, np.eye(3)[y], verbose=0)
    learner(False).compile("sgd", "mse", jit_compile=True)  # other models do, without a warning


@pytest.mark.parametrize(("rank", "online"), sweep([(256, True), (256, False), (3, False)], 3))
def test_the_estimate_and_the_pull_are_the_same_with_less(online, rank):
    found = {}
    for sparsity in (False, True):
        model = learner(sparsity, rank=rank, damping=0.0)
        if online:
            model.fit(*blobs(), epochs=2, verbose=0)
        model.consolidate(None if online else blobs())
        blocks = model.regularizer.precisions
        for variable in model.trainable_variables:
            variable.assign_add(0.1 * keras.random.normal(variable.shape, seed=1))
        found[sparsity] = (
            model.regularizer.gradients(trainable_by_path(model)),
            float(model.penalty()),
            sum(a.nbytes for a in state_of(model).values()),
            dict(blocks),
        )
    blocks = found[True][3]
    rows = np.asarray(blocks["head/kernel"].rows[0], int)
    np.testing.assert_array_equal(rows, [*range(14, 20), 20])  # six units and the row of the bias
    np.testing.assert_array_equal(blocks["hidden/kernel"].rows[1], np.arange(14, 20))
    assert blocks["hidden/kernel"].rows[0] is blocks["head/kernel"].rows[1] is None
    assert all(block.rows == (None, None) for block in found[False][3].values())
    assert blocks["head/kernel"].a.vectors.shape[0] == 7
    assert blocks["hidden/kernel"].g.vectors.shape[0] == 6
    if rank == 256:  # full rank, so no remainder is spread over all or only the active rows
        for path, pull in found[False][0].items():
            np.testing.assert_allclose(found[True][0][path], pull, atol=1e-5)
        assert found[True][1] == pytest.approx(found[False][1], rel=1e-4)
    assert np.all(np.array(found[True][0]["head/kernel"])[:14] == 0)
    for path in ("hidden/kernel", "hidden/bias"):
        pull = np.array(found[True][0][path])
        assert np.all(pull[..., :14] == 0)
        assert np.all(pull[..., 14:] != 0)
    assert found[True][2] < found[False][2]


def test_damping_is_not_for_outputs_that_were_never_active():
    model = learner(True, damping=0.5)
    model.consolidate(blobs())
    for variable in model.trainable_variables:
        variable.assign_add(tf.ones(variable.shape))
    pull = np.array(model.regularizer.gradients(trainable_by_path(model))["hidden/kernel"])
    assert np.all(pull[:, :14] == 0)
    assert np.all(pull[:, 14:] != 0)


def test_later_tasks_widen_it():
    model = learner(True)
    model.consolidate(blobs())
    # Other units are active now; those active before stay in the penalty.
    model.get_layer("hidden").bias.assign(np.where(np.arange(20) % 4 == 0, 0.5, -100.0))
    model.fit(*blobs(seed=2), verbose=0)
    model.consolidate()
    rows = np.asarray(model.regularizer.precisions["head/kernel"].rows[0], int)
    np.testing.assert_array_equal(rows, sorted({*range(14, 21), 0, 4, 8, 12, 16}))
    # When more than half of the units have been active, all are included.
    model.get_layer("hidden").bias.assign(np.full(20, 0.5))
    model.consolidate(blobs(seed=3))
    assert model.regularizer.precisions["head/kernel"].rows[0] is None


def test_merging_is_that_of_whole_matrices():
    penalties = {}
    for sparsity in (False, True):
        model = learner(sparsity)
        for seed in range(2):
            bias = np.where(np.arange(20) % 4 == seed, 0.5, -100.0)
            model.get_layer("hidden").bias.assign(bias)
            model.consolidate(blobs(seed=seed))
        kernel = model.get_layer("head").kernel
        kernel.assign_add(0.1 * keras.random.normal(kernel.shape, seed=1))
        penalties[sparsity] = float(model.penalty())
    assert penalties[True] == pytest.approx(penalties[False], rel=1e-3)


def test_the_trace_stays_when_it_widens():
    model = learner(True, rank=2, damping=0.0)
    traces = []
    for seed in range(2):
        bias = np.where(np.arange(20) % 4 == seed, 0.5, -100.0)
        model.get_layer("hidden").bias.assign(bias)
        statistics = pass_statistics(model, blobs(seed=seed), 64)
        block = blocks_of(model, statistics)["head/kernel"]
        traces.append(block.a.trace * block.g.trace)
        model.consolidate(blobs(seed=seed))
    held = model.regularizer.precisions["head/kernel"]
    found = 1.0
    for factor in (held.a, held.g):
        left = factor.size - len(np.array(factor.values))
        found *= np.array(factor.values).sum() + left * float(factor.rest)
    assert found == pytest.approx(sum(traces), rel=1e-3)


@pytest.mark.long
def test_the_decoupled_step_leaves_the_others_alone():
    moved = {}
    for sparsity in (False, True):
        model = learner(sparsity, DWDOptimizer(keras.optimizers.SGD(0.05)))
        model.consolidate(blobs())
        model.fit(*blobs(seed=4), epochs=3, verbose=0)
        moved[sparsity] = np.array(model.get_layer("head").kernel)
    np.testing.assert_allclose(moved[True], moved[False], atol=1e-5)


def test_it_is_saved(tmp_path):
    model = learner(True)
    model.consolidate(blobs())
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.fisher.sparsity
    for each in (model, again):
        each.get_layer("head").kernel.assign_add(tf.ones((20, 3)))
    assert float(again.penalty()) == pytest.approx(float(model.penalty()))
    assert float(model.penalty()) > 0


@pytest.mark.long
def test_winners_with_the_sparse_estimate_learn_tasks():
    inputs = keras.Input((6,))
    x = KWinners(0.1)(keras.layers.Dense(60, "relu", name="hidden")(inputs))
    network = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    model = compiled(network, "adam", strength=1.0, fisher=KroneckerFisher(sparsity=True))
    for seed in range(2):
        model.fit(*blobs(seed=seed), epochs=30, verbose=0)
        model.consolidate()
    assert model.evaluate(*blobs(seed=1), verbose=0, return_dict=True)["accuracy"] > 0.9
