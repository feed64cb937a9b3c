"""Nothing is lost in files, copies and exchanges with plain models."""

import copy
import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import blobs, compiled, mlp, weights
from keras import layers

from keras_dwd import (
    DiagonalFisher,
    DWDModel,
    DWDOptimizer,
    DWDRegularizer,
    GroupingPolicy,
    KroneckerFisher,
    KWinners,
    LayerGrouping,
    SingleGroup,
    TaskGraph,
    TaskHeads,
)
from keras_dwd.files import FileError
from keras_dwd.state import FORMAT, restore, save, state_of
from keras_dwd.variables import by_path

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
X, Y = blobs()
DATA = Path(__file__).parent / "data"


def with_norm():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu", name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.2, name="drop"),
            layers.Dense(3, name="head"),
        ]
    )


def sparse():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(40, activation="relu", name="hidden"),
            KWinners(0.05),
            layers.Dense(3, name="head"),
        ]
    )


def heads():
    inputs, task = keras.Input((6,)), keras.Input((), dtype="int32")
    features = layers.Dense(8, activation="tanh", name="hidden")(inputs)
    return keras.Model([inputs, task], TaskHeads(3, 3, name="heads")(features, task))


def policy():
    return GroupingPolicy([SingleGroup(), LayerGrouping()])


def task(model, number):
    x, y = blobs(seed=number)
    return ([x, np.full(len(x), number % 3)], y) if len(model.inputs) == 2 else (x, y)


def learn(model, number):
    """A whole task."""
    model.fit(*task(model, number), verbose=0)
    if isinstance(model.grouping, GroupingPolicy):
        model.grouping.reward([0.5] * number + [0.5 + 0.1 * number])
    model.consolidate()


def in_the_middle(model):
    """A model that learned a task and a part of the next one."""
    learn(model, 0)
    model.fit(*task(model, 1), verbose=0)
    return model


def stored(model):
    """Its state by positions of variables, as names may be numbered anew."""
    store = {}
    save(model, store)
    del store["groups"]
    return {"|".join(name.split("|")[:2]): array for name, array in store.items()}


def assert_same(a, b):
    for one, other in zip(weights(a), weights(b), strict=True):
        np.testing.assert_array_equal(one, other)
    states = [stored(model) for model in (a, b)]
    assert states[0].keys() == states[1].keys()
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name], err_msg=name)
    optimizers = [[np.array(v) for v in model.optimizer.variables] for model in (a, b)]
    for one, other in zip(*optimizers, strict=True):
        np.testing.assert_array_equal(one, other)


WAYS = {
    "kronecker": lambda path: compiled(
        with_norm(), DWDOptimizer("adam"), strength=300.0, fisher=KroneckerFisher(correction=3)
    ),
    "diagonal EWC": lambda path: compiled(
        optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
        regularizer=DWDRegularizer(3.0, 0.9, "folded"),
        fisher=DiagonalFisher("exact", every=1),
        grouping=None,
    ),
    "policy": lambda path: compiled(
        optimizer=DWDOptimizer("adam"), fisher=DiagonalFisher("adam"), grouping=policy()
    ),
    "heads": lambda path: compiled(
        heads(), "adam", fisher=DiagonalFisher(), grouping=LayerGrouping("budget")
    ),
    "sparsity": lambda path: compiled(sparse(), fisher=KroneckerFisher(sparsity=True, every=1)),
    "task graph": lambda path: compiled(
        fisher=DiagonalFisher(), task_graph=TaskGraph(path / "graph", X[:16], 0.1)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_loaded_model_goes_on_as_the_one_that_was_saved(way, tmp_path):
    model = in_the_middle(WAYS[way](tmp_path))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    assert type(again) is DWDModel
    assert again.groups == model.groups
    assert float(model.penalty()) == float(again.penalty()) > 0
    assert_same(model, again)
    if way == "task graph":  # the folder is that of one model
        copied = shutil.copytree(tmp_path / "graph", tmp_path / "copied")
        again.task_graph = TaskGraph(copied, strength=0.1)
    for each in (model, again):
        keras.utils.set_random_seed(2)
        learn(each, 2)
    assert_same(model, again)


class Plain(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(8, activation="tanh")
        self._head = layers.Dense(3)

    def call(self, x):
        return self._head(self.hidden(x))


def subclassed():
    model = Plain()
    model(X)
    return model


def functional():
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(8)(inputs)))


@pytest.mark.parametrize("kind", [mlp, functional, subclassed])
def test_weights_are_exchanged_with_plain_models(kind, tmp_path):
    model = in_the_middle(compiled(kind(), "adam", fisher=DiagonalFisher()))
    file = tmp_path / "model.weights.h5"
    model.save_weights(file)
    plain = kind()
    plain.load_weights(file)
    np.testing.assert_array_equal(plain.predict(X, verbose=0), model.predict(X, verbose=0))
    # And a new DWDModel takes all of it, the optimizer's state too.
    again = compiled(kind(), "adam", fisher=DiagonalFisher())
    again.optimizer.build(again.trainable_variables)
    again.load_weights(file)
    assert_same(model, again)
    # Weights of a plain model leave the state as it is.
    before = state_of(again)
    plain = kind()
    plain.compile("adam", LOSS)
    plain.fit(X, Y, verbose=0)
    plain.save_weights(file)
    again.load_weights(file)
    np.testing.assert_array_equal(plain.predict(X, verbose=0), again.predict(X, verbose=0))
    assert again.tasks_learned == 1
    for name, array in state_of(again).items():
        np.testing.assert_array_equal(array, before[name])
    assert not [name for name in vars(plain) if "consolidation" in name]


def test_a_clone_has_the_settings_and_no_state():
    settings = {
        "regularizer": DWDRegularizer(7.0, 0.5),
        "fisher": DiagonalFisher("exact"),
        "grouping": policy(),
    }
    model = in_the_middle(compiled(optimizer="adam", **settings))
    clone = keras.models.clone_model(model)
    assert type(clone) is DWDModel
    for name in settings:
        assert getattr(clone, name).get_config() == getattr(model, name).get_config()
        assert getattr(clone, name) is not getattr(model, name)
    assert not state_of(clone)
    assert clone.grouping.counts == [0, 0]
    assert np.any(clone.get_layer("hidden").kernel != model.get_layer("hidden").kernel)
    before = state_of(model), weights(model)
    learn(clone, 1)
    for name, array in state_of(model).items():
        np.testing.assert_array_equal(array, before[0][name])
    for a, b in zip(before[1], weights(model), strict=True):
        np.testing.assert_array_equal(a, b)
    # One that is not compiled, too; and the outputs of a clone are no clone's again.
    clone = keras.models.clone_model(DWDModel.from_model(mlp(), strength=7.0, grouping=None))
    assert clone.regularizer.strength == 7.0
    assert clone.grouping is None
    assert DWDModel(clone.inputs, clone.outputs, strength=2.0).regularizer.strength == 2.0


@pytest.mark.parametrize(("kind", "how"), [(mlp, copy.copy), (subclassed, copy.deepcopy)])
def test_a_copy_has_all_and_shares_nothing(kind, how):
    model = in_the_middle(compiled(kind(), "adam", fisher=DiagonalFisher()))
    copied = how(model)
    assert type(copied) is DWDModel
    assert_same(model, copied)
    before = weights(model), state_of(model)
    learn(copied, 1)
    assert copied.tasks_learned == 2
    for a, b in zip(before[0], weights(model), strict=True):
        np.testing.assert_array_equal(a, b)
    for name, array in state_of(model).items():
        np.testing.assert_array_equal(array, before[1][name])


def test_a_task_graph_is_not_shared_by_two_models(tmp_path):
    graph = TaskGraph(tmp_path / "graph", X[:16])
    model = compiled(fisher=DiagonalFisher(), task_graph=graph)
    learn(model, 0)
    copied = copy.deepcopy(model)
    learn(model, 1)
    with pytest.raises(ValueError, match="another model has gone on in it"):
        learn(copied, 1)
    assert copied.tasks_learned == 1


def test_a_format_without_room_for_the_state_is_refused(tmp_path):
    model = compiled()
    model.fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match=r"must end in '\.keras'"):
        model.save(tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())


def test_formats_are_told_apart():
    model = in_the_middle(compiled(fisher=DiagonalFisher()))
    store = {}
    save(model, store)
    assert store["format"] == FORMAT == 1
    before = state_of(model)
    for bad in ({**store, "format": np.array(FORMAT + 1)}, {**store, "format": np.zeros(2)}):
        with pytest.raises(ValueError, match="newer version of keras_dwd"):
            restore(model, bad)
    del store["format"]  # as before there was one
    restore(model, store)
    for name, array in state_of(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_state_of_another_grouping_is_refused():
    store = {}
    model = in_the_middle(compiled(fisher=DiagonalFisher(), grouping=policy()))
    save(model, store)
    three = compiled(grouping=GroupingPolicy([SingleGroup(), LayerGrouping(), SingleGroup()]))
    for other in (compiled(), three):
        with pytest.raises(ValueError, match="state of a grouping"):
            restore(other, store)
        assert not state_of(other)
    model.grouping.reward([0.5, 1.0])
    restore(model, store)
    assert model.grouping.picked == 0
    assert model.grouping.counts == [0, 0]


@pytest.mark.parametrize("fisher", [DiagonalFisher(), KroneckerFisher()])
def test_assignments_that_fit_no_group_or_no_variable_are_refused(fisher):
    store = {}
    model = in_the_middle(compiled(fisher=fisher))
    save(model, store)
    (name,) = (name for name in store if name.startswith("group|") and "hidden|kernel" in name)
    before, groups = store[name], state_of(model)
    of_no_group = np.where(before == 0, 4, before).astype(before.dtype)
    for bad in (of_no_group, np.zeros((99, 8), "int8"), before[None], before.astype("float32")):
        with pytest.raises(FileError, match="saved group of 'hidden/kernel'"):
            restore(model, {**store, name: bad})
        for key, array in state_of(model).items():
            np.testing.assert_array_equal(array, groups[key])


def test_layers_that_are_numbered_anew_are_found_by_their_order(tmp_path):
    def square():
        inputs = keras.Input((6,))
        return keras.Model(inputs, layers.Dense(6)(layers.Dense(6)(inputs)))

    model = in_the_middle(compiled(square(), fisher=DiagonalFisher()))
    assert "anchor/dense_1/kernel" in state_of(model)
    model.save_weights(tmp_path / "model.weights.h5")
    keras.utils.clear_session()
    layers.Dense(1)  # then the first one is called as the second was
    again = compiled(square(), fisher=DiagonalFisher())
    assert "dense_1/kernel" in by_path(again)
    again.load_weights(tmp_path / "model.weights.h5")
    for before, after in (("dense", "dense_1"), ("dense_1", "dense_2")):
        np.testing.assert_array_equal(
            state_of(again)[f"anchor/{after}/kernel"], state_of(model)[f"anchor/{before}/kernel"]
        )


def test_weights_of_another_architecture_are_refused_by_name():
    store = {}
    save(in_the_middle(compiled(fisher=DiagonalFisher())), store)
    other = compiled(
        keras.Sequential([keras.Input((6,)), layers.Dense(8, name="a"), layers.Dense(3, name="b")])
    )
    with pytest.raises(ValueError, match=r"'head/bias', .*'hidden/kernel', which the model"):
        restore(other, store)
    assert not state_of(other)


@pytest.mark.parametrize("file", sorted(DATA.glob("model_*.keras")), ids=lambda file: file.stem)
def test_models_of_earlier_versions_are_read(file):
    model = keras.models.load_model(file, safe_mode=True)
    expected = json.loads(file.with_suffix(".json").read_text())
    x = np.array(expected["x"], "float32")
    np.testing.assert_allclose(
        model.predict(x, verbose=0), expected["predictions"], rtol=1e-4, atol=1e-5
    )
    assert float(model.penalty()) == pytest.approx(expected["penalty"], rel=1e-4)
    assert model.tasks_learned == expected["tasks_learned"]
    assert model.groups == expected["groups"]
    model.fit(x, np.array(expected["y"]), verbose=0)
    model.consolidate()
    assert model.tasks_learned == expected["tasks_learned"] + 1
    assert float(model.penalty()) >= 0


def test_there_is_a_model_of_this_version():
    from keras_dwd import __version__

    assert (DATA / f"model_{__version__}.keras").stat().st_size < 100_000
