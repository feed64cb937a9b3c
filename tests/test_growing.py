"""Models that change between tasks: larger ones, frozen, adapted and quantised layers."""

import keras
import numpy as np
import pytest
from cases import DEFAULTS, blobs, compiled, long, mlp, state_of, weights
from keras import layers

from keras_dwd import DiagonalFisher, DWDModel, KroneckerFisher, TaskGraph
from keras_dwd.experimental import GroupingPolicy
from keras_dwd.groupings import LayerGrouping, SingleGroup
from keras_dwd.layers import KWinners, TaskHeads
from keras_dwd.variables import by_path

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
X, Y = blobs()


def learned(model, tasks=2, more=True):
    for number in range(tasks):
        model.fit(*blobs(seed=number), verbose=0)
        model.consolidate()
    if more:
        model.fit(*blobs(seed=tasks), verbose=0)
    return model


def net(hidden=8, classes=3, between=(), head="head", norm=True):
    """A new network, with optional other sizes and additional layers."""
    inputs = keras.Input((6,))
    x = layers.Dense(hidden, activation="relu", name="hidden")(inputs)
    x = layers.BatchNormalization(name="norm")(x) if norm else x
    for layer in between:
        x = layer(x)
    return keras.Model(inputs, layers.Dense(classes, name=head)(x))


def moved(model, seed=0):
    """Add random numbers to the weights of a model."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(variable + rng.normal(size=variable.shape))


def pulls(model):
    return {path: np.array(g) for path, g in model.regularizer.gradients(by_path(model)).items()}


def corner(array):
    return tuple(slice(n) for n in np.shape(array))


def test_a_model_with_one_layer_more_goes_on():
    old = learned(compiled(net(), "adam", **DEFAULTS))
    new = compiled(net(between=[layers.Dense(8, name="extra")]), "adam", **DEFAULTS)
    new.inherit(old)
    assert float(new.penalty()) == float(old.penalty()) > 0
    assert new.tasks_learned == 2
    assert new.groups == old.groups
    assert set(pulls(new)) == set(pulls(old))
    np.testing.assert_array_equal(
        new.get_layer("norm").moving_mean, old.get_layer("norm").moving_mean
    )
    before = weights(old), state_of(old)
    new.fit(*blobs(seed=3), verbose=0)
    new.consolidate()
    assert {"extra/kernel", "extra/bias"} <= set(pulls(new))
    for a, b in zip(before[0], weights(old), strict=True):
        np.testing.assert_array_equal(a, b)
    for name, array in state_of(old).items():
        np.testing.assert_array_equal(array, before[1][name])


def test_layers_may_be_shared():
    old = learned(compiled(fisher=DiagonalFisher()), more=False)
    inputs = keras.Input((6,))
    features = old.get_layer("hidden")(inputs)
    outputs = [old.get_layer("head")(features), layers.Dense(2, name="second")(features)]
    new = DWDModel(inputs, outputs, fisher=DiagonalFisher())
    new.compile("sgd", [LOSS, LOSS])
    new.inherit(old)
    moved(old)
    assert float(new.penalty()) == float(old.penalty()) > 0
    assert new.tasks_learned == 2


@pytest.mark.parametrize(
    ("fisher", "norm"),
    [
        (DiagonalFisher("empirical"), False),
        long(KroneckerFisher(correction=2), True),
        long(KroneckerFisher(rank=2), False),
    ],
)
def test_what_has_become_wider_is_pulled_where_it_was_and_free_where_it_is_new(fisher, norm):
    old = learned(compiled(net(norm=norm), fisher=fisher, grouping=None), tasks=1)
    new = compiled(net(11, 5, norm=norm), fisher=fisher, grouping=None)
    new.inherit(old)
    assert float(new.penalty()) == pytest.approx(float(old.penalty()), rel=1e-5)
    moved(new)
    for path, variable in by_path(old).items():
        if variable.trainable:
            variable.assign(np.array(by_path(new)[path])[corner(variable)])
    expected, found = pulls(old), pulls(new)
    assert expected.keys() == found.keys()
    for path, pull in expected.items():
        size = np.abs(pull).max()
        assert size > 0
        np.testing.assert_allclose(found[path][corner(pull)], pull, rtol=1e-3, atol=1e-4 * size)
        found[path][corner(pull)] = 0
        assert np.abs(found[path]).max() < 1e-5 * size
    x, y = blobs(classes=5, seed=5)
    new.fit(x, y, verbose=0)
    new.consolidate()
    assert new.tasks_learned == 2


def test_a_matrix_of_many_rows_grows_without_making_all_directions_explicit(monkeypatch):
    old = compiled(net(norm=False), fisher=KroneckerFisher(rank=2), grouping=None)
    learned(old, tasks=1, more=False)
    new = compiled(net(11, norm=False), fisher=KroneckerFisher(rank=2), grouping=None)
    monkeypatch.setattr("keras_dwd.precision.factor.Factor.EXPLICIT", 4)
    new.inherit(old)
    blocks = [model.regularizer.precisions["hidden/kernel"] for model in (old, new)]
    vectors, rests = ([getattr(b.g, name).numpy() for b in blocks] for name in ("vectors", "rest"))
    assert [v.shape[1] for v in vectors] == [2, 2]
    assert rests[1] == pytest.approx(rests[0] * (8 - 2) / (11 - 2))
    assert rests[0] > 0


def test_inputs_that_were_never_active_may_become_more():
    def sparse(hidden):
        return net(hidden, between=[KWinners(0.05)], norm=False)

    fisher = KroneckerFisher(sparsity=True, every=1)
    old = learned(compiled(sparse(40), fisher=fisher, grouping=None), tasks=1)
    for side in ("input", "output"):
        assert any(name.startswith(f"{side}_rows/") for name in state_of(old))
    new = compiled(sparse(50), fisher=fisher, grouping=None)
    new.inherit(old)
    assert float(new.penalty()) == pytest.approx(float(old.penalty()), rel=1e-5)


def test_more_heads():
    def heads(tasks):
        inputs, task = keras.Input((6,)), keras.Input((), dtype="int32")
        features = layers.Dense(8, activation="tanh", name="hidden")(inputs)
        return keras.Model([inputs, task], TaskHeads(tasks, 3, name="heads")(features, task))

    old = compiled(heads(2), fisher=DiagonalFisher())
    for number in range(2):
        x, y = blobs(seed=number)
        old.fit([x, np.full(64, number)], y, verbose=0)
        old.consolidate()
    new = compiled(heads(4), fisher=DiagonalFisher())
    new.inherit(old)
    kernel = np.array(new.get_layer("heads").kernel)
    np.testing.assert_array_equal(kernel[:2], old.get_layer("heads").kernel)
    inputs = [X, np.ones(64)]
    np.testing.assert_allclose(
        new.predict(inputs, verbose=0), old.predict(inputs, verbose=0), rtol=1e-5, atol=1e-6
    )
    new.fit([X, np.full(64, 3)], Y, verbose=0)
    np.testing.assert_array_equal(new.get_layer("heads").kernel[:3], kernel[:3])
    assert np.any(new.get_layer("heads").kernel[3] != kernel[3])


def test_layers_are_renamed_and_dropped():
    settings = {"fisher": DiagonalFisher(), "grouping": LayerGrouping("budget")}
    old = learned(compiled(net(), **settings))
    new = compiled(net(head="second"), **settings)
    new.inherit(old, renamed={"hidden": "hidden", "head": "second"})
    assert float(new.penalty()) == pytest.approx(float(old.penalty()), rel=1e-5)
    assert state_of(new)["level/second/bias"].shape == (2,)
    assert {path for group in new.groups for path in group["layers"]} == set(pulls(new))
    other = compiled(net(head="second"), **settings)
    other.inherit(old, dropped=["head/*"])
    assert set(pulls(other)) == {path for path in pulls(old) if "head" not in path}
    assert {path for group in other.groups for path in group["layers"]} == set(pulls(other))
    other.fit(X, Y, verbose=0)
    other.consolidate()
    assert other.tasks_learned == 3


def test_what_a_policy_learned_goes_on():
    policy = GroupingPolicy([SingleGroup(), LayerGrouping()])
    old = learned(compiled(fisher=DiagonalFisher(), grouping=policy), more=False)
    old.grouping.reward([0.7])
    old.fit(X, Y, verbose=0)
    old.consolidate()
    new = compiled(fisher=DiagonalFisher(), grouping=policy)
    new.inherit(old)
    assert new.grouping.rewards == old.grouping.rewards
    assert new.grouping.picked == old.grouping.picked is not None
    with pytest.raises(ValueError, match="train the model on the next task"):
        new.consolidate((X, Y))  # the weights are unchanged since the last boundary
    plain = compiled(fisher=DiagonalFisher())
    plain.inherit(old)
    assert plain.tasks_learned == 3


def test_what_fits_nothing_is_refused(tmp_path):
    old = learned(compiled(fisher=DiagonalFisher()), tasks=1, more=False)
    same = compiled()
    smaller = compiled(net(hidden=4, norm=False))
    other = compiled(net(head="second", norm=False))
    with_graph = compiled(task_graph=TaskGraph(tmp_path, X[:8]))
    for new, settings, error in (
        (other, {}, r"'head/kernel' \(8, 3\); 'head/bias' \(3,\)\. Say .* New .* 'second/kernel'"),
        (smaller, {}, r"'hidden/kernel' \(6, 8\) of float32, where this one has .* \(6, 4\)"),
        (same, {"dropped": ["hed/*"]}, "`dropped` has 'hed/\\*', which is nothing in `previous`"),
        (same, {"renamed": {"hed": "head"}}, "`renamed` has 'hed'"),
        (same, {"renamed": {"hidden/bias": "head/kernel"}}, "'hidden/bias' .*, where this one"),
        (with_graph, {}, "task graph"),
        (old, {}, "must be another DWDModel"),
    ):
        before, state = weights(new), state_of(new)
        with pytest.raises(ValueError, match=error):
            new.inherit(old, **settings)
        for a, b in zip(before, weights(new), strict=True):
            np.testing.assert_array_equal(a, b)
        assert state_of(new).keys() == state.keys()
    with pytest.raises(ValueError, match="must be another DWDModel"):
        same.inherit(mlp())
    one, other = (compiled(net(hidden=3, norm=False)) for _ in "ab")
    with pytest.raises(ValueError, match=r"gives 'head/bias' to two"):
        other.inherit(one, {"hidden/bias": "head/bias"})


def test_nothing_learned_is_no_hindrance():
    old, new = compiled(), compiled()
    new.inherit(old)
    for a, b in zip(weights(old), weights(new), strict=True):
        np.testing.assert_array_equal(a, b)
    assert new.tasks_learned == 0


def test_freezing_and_thawing_is_kept_in_files(tmp_path):
    model = compiled(optimizer="adam", fisher=DiagonalFisher())
    learned(model, tasks=1, more=False)
    model.get_layer("hidden").trainable = False
    model.compile("adam", LOSS)
    model.fit(*blobs(seed=1), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_goes_on_alike(model, again)
    assert "hidden/kernel" in again.regularizer.precisions


def assert_goes_on_alike(*models):
    for each in models:
        keras.utils.set_random_seed(3)
        each.fit(*blobs(seed=4), verbose=0)
        each.consolidate()
    states = [state_of(each) for each in models]
    assert states[0].keys() == states[1].keys()
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name], err_msg=name)
    for a, b in zip(*map(weights, models), strict=True):
        np.testing.assert_array_equal(a, b)


def adaptable():
    """A model with all kinds of layers that support LoRA."""
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 4, name="embedding")(inputs)
    x = layers.EinsumDense("bsd,de->bse", (6, 5), bias_axes="e", name="einsum")(x)
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


@pytest.mark.long
def test_lora_between_tasks(tmp_path):
    rng = np.random.default_rng(0)
    data = [(rng.integers(0, 9, (32, 6)), rng.integers(0, 3, 32)) for _ in range(3)]
    model = compiled(adaptable(), "adam", fisher=KroneckerFisher())
    model.fit(*data[0], verbose=0)
    model.consolidate()
    kernels = ["embedding/embeddings", "einsum/kernel", "head/kernel"]
    before = {path: np.array(by_path(model)[path]) for path in kernels}
    for name in ("embedding", "einsum", "head"):
        model.get_layer(name).enable_lora(2)
    model.compile("adam", LOSS)
    model.fit(*data[1], epochs=2, verbose=0)
    assert np.isfinite(float(model.penalty()))
    model.consolidate()
    assert {p for p in model.regularizer.precisions if "lora" in p} == {
        f"{name}_{side}"
        for name in ("embedding/lora_embeddings", "einsum/lora_kernel", "head/lora_kernel")
        for side in "ab"
    }
    for path, value in before.items():
        np.testing.assert_array_equal(by_path(model)[path], value)
    model.fit(*data[2], verbose=0)
    # Keras merges LoRA adapters into their kernels in files, so the state must hold the adapters.
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(weights(model), weights(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(again.penalty()) == float(model.penalty()) > 0
    plain = adaptable()
    model.save_weights(tmp_path / "model.weights.h5")
    plain.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(
        plain.predict(data[0][0], verbose=0), model.predict(data[0][0], verbose=0), atol=1e-5
    )


def test_a_bias_is_pulled_by_its_matrix_and_on_its_own():
    model = learned(compiled(fisher=KroneckerFisher()), tasks=1, more=False)
    model.get_layer("hidden").enable_lora(2)
    model.compile("sgd", LOSS)
    model.fit(*blobs(seed=2), verbose=0)
    model.consolidate()
    blocks = model.regularizer.precisions
    assert [key for key, block in blocks.items() if "hidden/bias" in block.paths] == [
        "hidden/bias",
        "hidden/kernel",
    ]
    moved(model)
    difference = np.array(model.get_layer("hidden").bias - model.regularizer.anchors["hidden/bias"])
    zeros = np.zeros((6, 8), "float32")
    _, of_matrix = blocks["hidden/kernel"].matvec([keras.ops.array(zeros), difference])
    alone = np.array(blocks["hidden/bias"].values) * difference
    np.testing.assert_allclose(pulls(model)["hidden/bias"], of_matrix + alone, rtol=1e-4)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
def test_a_model_quantised_to_int8_goes_on_with_what_is_left(tmp_path):
    model = learned(compiled(optimizer="adam", fisher=KroneckerFisher()), tasks=1)
    with pytest.raises(ValueError, match="must be 'int8' for a model that has learned tasks"):
        model.quantize("float8")
    assert model.get_layer("head").quantization_mode is None
    held = float(model.penalty())
    model.quantize("int8")
    model.compile("adam", LOSS)
    assert 0 <= float(model.penalty()) < held  # quantised kernels are not trained
    model.fit(*blobs(seed=2), verbose=0)
    model.consolidate()
    assert {"head/bias", "hidden/bias"} <= set(pulls(model))
    model.fit(*blobs(seed=3), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert float(again.penalty()) == float(model.penalty()) > 0
    assert_goes_on_alike(model, again)
    with pytest.raises(ValueError, match=r"'hidden/kernel' \(6, 8\) of int8, where this one has"):
        compiled().inherit(model)


def test_the_estimate_of_a_task_that_is_not_over_is_not_inherited():
    old = learned(compiled(fisher=DiagonalFisher()), tasks=1)
    new = compiled(fisher=DiagonalFisher())
    new.inherit(old)
    with pytest.raises(ValueError, match="no online Fisher estimate"):
        new.consolidate()
    assert new.tasks_learned == 1
    new.fit(X, Y, verbose=0)
    new.consolidate()
    assert new.tasks_learned == 2
