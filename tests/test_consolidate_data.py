"""`consolidate` takes what `fit` takes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, state_of, sweep

from keras_dwd import DiagonalFisher

X, Y = blobs(24)
W = np.linspace(0.5, 2.0, 24).astype("float32")


def data(count=24):
    return tf.data.Dataset.from_tensor_slices((X[:count], Y[:count]))


def trained(net=None):
    keras.utils.set_random_seed(4)
    fisher = DiagonalFisher("empirical", gamma=None)
    model = compiled(net, strength=2.0, fisher=fisher, grouping=None)
    x = X if len(model.inputs) == 1 else [X, X]
    y = Y if len(model.outputs) == 1 else [Y, Y]
    model.fit(x, y, verbose=0)
    return model


def precision(model):
    return {n: a for n, a in state_of(model).items() if n.startswith("precision/")}


class Frame:
    """What this package needs of a pandas DataFrame."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def to_numpy(self):
        return self.array


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[8 * index : 8 * index + 8], Y[8 * index : 8 * index + 8]


class Endless(Batches):
    num_batches = None


def endless():
    while True:
        yield from generator()


def generator():
    yield from ((X[i : i + 8], Y[i : i + 8]) for i in range(0, 24, 8))


FORMS = {
    "x, y": lambda m: m.consolidate(X, Y),
    "x=, y=": lambda m: m.consolidate(x=X, y=Y),
    "x, y, None, batch": lambda m: m.consolidate(X, Y, None, 8),
    "x, y, batch": lambda m: m.consolidate(X, Y, 8),
    "x, y, batch_size=": lambda m: m.consolidate(X, Y, batch_size=8),
    "(x, y), batch": lambda m: m.consolidate((X, Y), 8),
    "(x, y)": lambda m: m.consolidate((X, Y)),
    "[x, y]": lambda m: m.consolidate([X, Y]),
    "data=": lambda m: m.consolidate(data=(X, Y), batch_size=8),
    "tensors": lambda m: m.consolidate(tf.constant(X), tf.constant(Y)),
    "dataset": lambda m: m.consolidate(data().batch(8)),
    "dataset, batch": lambda m: m.consolidate(data().batch(24), 8),
    "pydataset": lambda m: m.consolidate(Batches(workers=1)),
    "generator": lambda m: m.consolidate(generator()),
    "steps of a generator": lambda m: m.consolidate(endless(), steps=3),
    "steps of a dataset": lambda m: m.consolidate(data().batch(8).repeat(), steps=3),
    "steps of a pydataset": lambda m: m.consolidate(Endless(workers=1), steps=3),
    "list of batches": lambda m: m.consolidate(list(generator())),
    "list of lists": lambda m: m.consolidate([list(batch) for batch in generator()]),
    "frames": lambda m: m.consolidate(Frame(X), Frame(Y)),
}


@pytest.fixture(scope="module")
def expected():
    model = trained()
    model.consolidate((X, Y))
    return precision(model)


@pytest.mark.parametrize(
    "name",
    sweep(
        FORMS,
        "x, y, batch",
        "steps of a generator",
        "[x, y]",
        "dataset, batch",
        "pydataset",
        "list of batches",
    ),
)
def test_all_forms_of_the_same_data_give_the_same_precision(name, expected):
    model = trained()
    FORMS[name](model)
    found = precision(model)
    assert found.keys() == expected.keys() != set()
    for path, array in found.items():
        np.testing.assert_allclose(array, expected[path], rtol=1e-5, atol=1e-9)


@pytest.mark.long
def test_sample_weights_are_those_of_the_tuple():
    states = []
    for given in ((X, Y, W), ((X, Y, W),), ([X, Y, W],)):
        model = trained()
        model.consolidate(*given)
        states.append(precision(model))
    for state in states[1:]:
        for path, array in state.items():
            np.testing.assert_array_equal(array, states[0][path])


def two_inputs():
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    added = keras.layers.Add()([a, b])
    return keras.Model([a, b], keras.layers.Dense(3, name="dense")(added))


@pytest.mark.long
def test_several_inputs():
    states = []
    for given in (([X, X], Y), (((X, X), Y),), ({"a": X, "b": X}, Y)):
        keras.utils.set_random_seed(3)
        model = trained(two_inputs())
        model.consolidate(*given)
        states.append(precision(model))
    for state in states[1:]:
        for path, array in state.items():
            np.testing.assert_array_equal(array, states[0][path])


REFUSED = {
    "labels alone": ((), {"y": Y}, "`y` was given without `x`"),
    "weights alone": ((), {"sample_weight": W}, "`sample_weight` was given without `x`"),
    "dataset and labels": ((data().batch(8), Y), {}, "`y` must not be given"),
    "steps of arrays": ((X, Y), {"steps": 2}, "Received: steps=2 with arrays"),
    "steps of nothing": ((), {"steps": 2}, "Received: steps=2 with no data"),
    "no steps": ((data().batch(8),), {"steps": 0}, "`steps` must be"),
    "endless dataset": ((data().batch(8).repeat(),), {}, "how many batches to take, in `steps`"),
    "generator and labels": ((generator(), Y), {}, "`y` must not be given"),
    "both names": ((X, Y), {"data": (X, Y)}, "not both"),
    "four arrays": (([X, Y, W, W],), {}, "does not tell which"),
    "lists of numbers": (([X.tolist(), Y.tolist()],), {}, "does not tell which"),
    "labels as numbers": ((X, Y.tolist()), {}, "labels as an array"),
    "text": (("data.csv",), {}, "must be arrays or a dataset"),
    "number": ((3.0,), {}, "must be arrays or a dataset"),
    "function": ((generator.__call__,), {}, "must be arrays or a dataset"),
    "unbatched": ((data(),), {}, r"batch it with `\.batch\(32\)`"),
    "unbatched, one-hot": (
        (data().map(lambda x, y: (x, tf.one_hot(y, 3))),),
        {},
        r"batch it with `\.batch\(32\)`",
    ),
    "single examples": ((zip(X, Y, strict=True),), {}, r"\.batch\(32\)"),
    "batch size of nothing": ((X, Y), {"batch_size": 0}, "`batch_size` must be an integer"),
    "negative batch size": (((X, Y), -1), {}, "`batch_size` must be an integer"),
    "labels of text": ((X, Y.astype(str)), {}, "Labels must be numbers, not text"),
    "labels of bytes": ((X, Y.astype("S1")), {}, "Labels must be numbers, not text"),
    "labels of objects": ((X, Y.astype(str).astype(object)), {}, "must be numbers, not text"),
}


def test_what_is_no_data_is_refused_and_changes_nothing():
    model = trained()
    for name, (args, settings, message) in REFUSED.items():
        with pytest.raises(ValueError, match=message):
            model.consolidate(*args, **settings)
        assert model.tasks_learned == 0, name


def test_a_list_is_ambiguous_for_several_inputs():
    model = trained(two_inputs())
    for given in ([[X, X], Y], [[X, X], [Y, Y]]):
        with pytest.raises(ValueError, match="does not tell which"):
            model.consolidate(given)
    assert model.tasks_learned == 0


def test_labels_of_text_are_refused_by_fit():
    model = trained()
    with pytest.raises(ValueError, match="Labels must be numbers, not text"):
        model.fit(X, np.array(["cat", "dog"] * 12), verbose=0)


def test_batches_of_scalar_inputs_are_batches():
    net = keras.Sequential([keras.Input((1,)), keras.layers.Dense(3)])
    keras.utils.set_random_seed(4)
    model = compiled(net, fisher=DiagonalFisher("empirical", gamma=None), grouping=None)
    model.fit(X[:, :1], Y, verbose=0)
    model.consolidate(tf.data.Dataset.from_tensor_slices((X[:, 0], Y)).batch(8))
    assert model.tasks_learned == 1
