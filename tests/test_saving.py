"""The state survives saving, copying and exchanging weights with plain models."""

import copy
import json
import shutil
import threading
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from cases import blobs, compiled, load, long, mlp, saved, state_of, sweep, weights
from keras import layers
from packaging.version import Version

from keras_dwd import (
    DiagonalFisher,
    DWDModel,
    DWDOptimizer,
    DWDRegularizer,
    KroneckerFisher,
    TaskGraph,
)
from keras_dwd.communicator import Communicator
from keras_dwd.experimental import GroupingPolicy
from keras_dwd.files import FileError
from keras_dwd.groupings import LayerGrouping, SingleGroup
from keras_dwd.layers import KWinners, TaskHeads
from keras_dwd.state import FORMAT
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
    """Learn a complete task."""
    model.fit(*task(model, number), verbose=0)
    if isinstance(model.grouping, GroupingPolicy):
        model.grouping.reward([0.5] * number + [0.5 + 0.1 * number])
    model.consolidate()


def in_the_middle(model):
    """A model that has learned one task and a part of the next one."""
    learn(model, 0)
    model.fit(*task(model, 1), verbose=0)
    return model


def stored(model):
    """The state of a model by positions of variables, as the numbers in names may differ."""
    store = {}
    store = saved(model)
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
        with_norm(),
        DWDOptimizer("adam"),
        strength=300.0,
        fisher=KroneckerFisher(correction=3),
        grouping="gmm",
    ),
    "diagonal EWC": lambda path: compiled(
        optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
        regularizer=DWDRegularizer(3.0, 0.9, "folded"),
        fisher=DiagonalFisher("empirical", every=1),
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


@pytest.mark.parametrize("way", sweep(WAYS, "kronecker", "task graph"))
def test_a_loaded_model_goes_on_as_the_one_that_was_saved(way, tmp_path):
    model = in_the_middle(WAYS[way](tmp_path))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    assert type(again) is DWDModel
    assert again.groups == model.groups
    assert float(model.penalty()) == float(again.penalty()) > 0
    assert_same(model, again)
    if way == "task graph":  # a folder belongs to one model
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


@pytest.mark.parametrize("kind", sweep([mlp, functional, subclassed], subclassed))
def test_weights_are_exchanged_with_plain_models(kind, tmp_path):
    model = in_the_middle(compiled(kind(), "adam", fisher=DiagonalFisher()))
    file = tmp_path / "model.weights.h5"
    model.save_weights(file)
    plain = kind()
    plain.load_weights(file)
    np.testing.assert_array_equal(plain.predict(X, verbose=0), model.predict(X, verbose=0))
    # A new `DWDModel` loads everything, including the optimizer's state.
    again = compiled(kind(), "adam", fisher=DiagonalFisher())
    again.optimizer.build(again.trainable_variables)
    again.load_weights(file)
    assert_same(model, again)
    # Loading the weights of a plain model leaves the state unchanged.
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


@pytest.mark.long
def test_a_clone_has_the_settings_and_no_state():
    settings = {
        "regularizer": DWDRegularizer(7.0, 0.5),
        "fisher": DiagonalFisher("empirical"),
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
    # A model that is not compiled can be cloned too, and a clone of it again.
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
    with pytest.raises(ValueError, match="no place for the"):
        keras.saving.save_model(model, str(tmp_path / "model.h5"))


def test_formats_are_told_apart():
    model = in_the_middle(compiled(fisher=DiagonalFisher()))
    store = {}
    store = saved(model)
    assert store["format"] == FORMAT == 2
    before = state_of(model)
    for bad in ({**store, "format": np.array(FORMAT + 1)}, {**store, "format": np.zeros(2)}):
        with pytest.raises(ValueError, match="newer version of keras_dwd"):
            load(model, bad)
    del store["format"]  # as in files older than the format number
    load(model, store)
    for name, array in state_of(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_state_of_another_grouping_is_refused():
    store = {}
    model = in_the_middle(compiled(fisher=DiagonalFisher(), grouping=policy()))
    store = saved(model)
    three = compiled(grouping=GroupingPolicy([SingleGroup(), LayerGrouping(), SingleGroup()]))
    for other in (compiled(grouping="gmm"), three):
        with pytest.raises(ValueError, match="state of a grouping"):
            load(other, store)
        assert not state_of(other)
    model.grouping.reward([0.5, 1.0])
    load(model, store)
    assert model.grouping.picked == 0
    assert model.grouping.counts == [0, 0]


@pytest.mark.parametrize("fisher", [DiagonalFisher(), long(KroneckerFisher())])
def test_assignments_that_fit_no_group_or_no_variable_are_refused(fisher):
    store = {}
    model = in_the_middle(compiled(fisher=fisher, grouping="gmm"))
    store = saved(model)
    (name,) = (name for name in store if name.startswith("group|") and "hidden|kernel" in name)
    before, groups = store[name], state_of(model)
    of_no_group = np.where(before == 0, 4, before).astype(before.dtype)
    for bad in (of_no_group, np.zeros((99, 8), "int8"), before[None], before.astype("float32")):
        with pytest.raises(FileError, match="saved group of 'hidden/kernel'"):
            load(model, {**store, name: bad})
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
    layers.Dense(1)  # the first layer now gets the automatic name that the second one had
    again = compiled(square(), fisher=DiagonalFisher())
    assert "dense_1/kernel" in by_path(again)
    again.load_weights(tmp_path / "model.weights.h5")
    for before, after in (("dense", "dense_1"), ("dense_1", "dense_2")):
        np.testing.assert_array_equal(
            state_of(again)[f"anchor/{after}/kernel"], state_of(model)[f"anchor/{before}/kernel"]
        )


def test_weights_of_another_architecture_are_refused_by_name():
    store = {}
    store = saved(in_the_middle(compiled(fisher=DiagonalFisher())))
    other = compiled(
        keras.Sequential([keras.Input((6,)), layers.Dense(8, name="a"), layers.Dense(3, name="b")])
    )
    with pytest.raises(ValueError, match=r"'head/bias', .*'hidden/kernel', which the model"):
        load(other, store)
    assert not state_of(other)


@pytest.mark.parametrize("file", sorted(DATA.glob("model_*.keras")), ids=lambda file: file.stem)
def test_models_of_earlier_versions_are_read(file):
    with zipfile.ZipFile(file) as parts:
        written_by = json.loads(parts.read("metadata.json"))["keras_version"]
    if Version(keras.__version__) < Version(written_by):
        pytest.skip(f"Keras {keras.__version__} does not read files of Keras {written_by}")
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
    model.fit(x, np.array(expected["y"]), verbose=0)
    assert float(model.penalty()) > 0


def test_there_is_a_model_of_this_version():
    from keras_dwd import __version__

    assert (DATA / f"model_{__version__}.keras").stat().st_size < 100_000


def test_loading_state_without_a_budget_leaves_no_levels_of_before(tmp_path):
    early = compiled(fisher=DiagonalFisher(), grouping=LayerGrouping())
    learn(early, 0)
    early.fit(*task(early, 1), verbose=0)
    early.save_weights(tmp_path / "model.weights.h5")
    late = compiled(fisher=DiagonalFisher(), grouping=LayerGrouping("budget"))
    learn(late, 0)
    for level in late.regularizer.budget_strengths.values.values():
        level.assign(7.0)
    late.load_weights(tmp_path / "model.weights.h5")
    assert float(late.penalty()) == pytest.approx(float(early.penalty()), rel=1e-6)
    assert float(early.penalty()) > 0


@pytest.mark.long
def test_factors_keep_their_rank_after_loading(tmp_path):
    model = in_the_middle(
        compiled(fisher=KroneckerFisher("empirical", rank=2, every=1), grouping=None)
    )
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, again):
        learn(each, 2)
        assert each.regularizer.precisions["hidden/kernel"].a.vectors.shape == (7, 2)
    assert {n: a.shape for n, a in state_of(model).items() if n != "groups"} == {
        n: a.shape for n, a in state_of(again).items() if n != "groups"
    }


@pytest.mark.parametrize("text", [True, False])
def test_arrays_without_numbers_are_refused_and_nothing_changes(text):
    model = compiled(fisher=DiagonalFisher("batch"), grouping=None)
    model.fit(*blobs(), verbose=0)
    model.consolidate()
    before = {name: array.copy() for name, array in state_of(model).items()}
    for name, array in saved(model).items():
        bad = np.full(array.shape, "abc") if text else np.full(array.shape, 1j)
        with pytest.raises(FileError):
            load(model, {**saved(model), name: bad})
        assert state_of(model).keys() == before.keys()
    path = next(name for name in saved(model) if name.startswith("anchor|")).removeprefix("anchor")
    with pytest.raises(FileError, match="saved tie of"):
        load(model, {**saved(model), f"tie{path}": np.zeros(())})
    for name, array in state_of(model).items():
        np.testing.assert_array_equal(array, before[name])


class Twin(Communicator):
    """Two workers in two threads of this process."""

    size = 2

    def __init__(self, rank, shared):
        self.rank, (self._barrier, self._said) = rank, shared

    def messages(self, mine, name):
        self._said[self.rank] = mine
        self._barrier.wait(60)
        said = [self._said[0], self._said[1]]
        self._barrier.wait(60)
        return said


def test_loading_into_divided_workers_loses_no_block():
    source = compiled(fisher=DiagonalFisher("empirical", gamma=None), grouping=None)
    source.fit(*blobs(), verbose=0)
    source.consolidate(blobs())
    whole, file = state_of(source), saved(source)
    shared = threading.Barrier(2), {}
    found, models = (
        {},
        [
            compiled(
                fisher=DiagonalFisher("empirical", gamma=None),
                grouping=None,
                compile_settings={"communicator": Twin(rank, shared), "sharded": True},
            )
            for rank in (0, 1)
        ],
    )
    for rank, model in enumerate(models):
        load(model, file)
        found[rank] = {name for name in state_of(model) if name.startswith("precision/")}
        for name in found[rank]:
            np.testing.assert_array_equal(state_of(model)[name], whole[name])
    assert found[0]
    assert found[1]
    assert not found[0] & found[1]
    assert found[0] | found[1] == {name for name in whole if name.startswith("precision/")}
