"""`consolidate` with inputs alone draws the labels from the model's own predictions."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import DEFAULTS, blobs, compiled, long, mlp, moved, pass_statistics, state_of, sweep
from keras import layers

from keras_dwd import DiagonalFisher, DWDModel, KroneckerFisher
from keras_dwd.curvature import fisher as fisher_module
from keras_dwd.variables import by_path

X, Y = blobs(24)
W = np.linspace(0.5, 2.0, 24).astype("float32")
SPARSE = keras.losses.SparseCategoricalCrossentropy
LOSSES = {
    "softmax logits": (SPARSE(from_logits=True), None),
    "softmax probabilities": (keras.losses.CategoricalCrossentropy(), "softmax"),
    "sigmoid": (keras.losses.BinaryCrossentropy(), "sigmoid"),
    "squares": (keras.losses.MeanSquaredError(), None),
}


def linear(loss, activation=None, fisher=None, shape=(6,), units=3):
    """One layer, whose gradients are easily written down."""
    keras.utils.set_random_seed(5)
    base = keras.Sequential(
        [keras.Input(shape), layers.Dense(units, activation, use_bias=False, name="o")]
    )
    fisher = fisher or DiagonalFisher("mc", None)
    model = DWDModel.from_model(base, strength=1.0, fisher=fisher, grouping=None)
    model.compile(keras.optimizers.SGD(0.0), loss)
    return model


def probabilities(model, case, x):
    z = x.astype("float64") @ np.asarray(model.get_layer("o").kernel, "float64")
    if case == "sigmoid":
        return 1 / (1 + np.exp(-z))
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def variances(model, case, x):
    """E[g²] of the loss gradient g at each logit, with labels from the model, in float64."""
    if case == "squares":  # of a normal distribution of variance 3 / 2
        return np.full((len(x), 3), 2 / 3)
    p = probabilities(model, case, x)
    return p * (1 - p) / (9 if case == "sigmoid" else 1)  # a mean of three binary losses


@pytest.mark.parametrize("case", LOSSES)
def test_many_draws_give_the_expected_fisher_information(case):
    model = linear(*LOSSES[case])
    x = X[:8]
    found = pass_statistics(model, (np.tile(x, (3000, 1)),), 800)["fisher/o/kernel"]
    squares = variances(model, case, x)
    expected = np.einsum("bi,bo->io", x.astype("float64") ** 2, squares) / len(x)
    np.testing.assert_allclose(found, expected, rtol=0.06)


@pytest.mark.parametrize(
    "case", sweep(["softmax logits", "softmax probabilities"], "softmax logits")
)
@pytest.mark.parametrize("fisher", [DiagonalFisher("mc", None), KroneckerFisher("mc", None)])
def test_the_sum_over_all_classes_is_the_expected_fisher_information(case, fisher, monkeypatch):
    """Each class in place of the drawn labels, weighted by its probability: Σ_k p_k g_k g_kᵀ."""
    total = 0.0
    name = "fisher/o/kernel" if isinstance(fisher, DiagonalFisher) else "input/o/kernel"
    for k in range(3):
        model = linear(*LOSSES[case], fisher)

        def always(model, y, outputs, first, counted=None, k=k):
            labels = tf.fill(tf.shape(outputs)[:1], k)
            return tf.one_hot(labels, 3) if case == "softmax probabilities" else labels

        monkeypatch.setattr(fisher_module, "sample_labels", always)
        p = probabilities(model, case, X)[:, k].astype("float32")
        total = total + pass_statistics(model, (X, None, p), 8)[name]
    x, p = X.astype("float64"), probabilities(model, case, X)
    g = np.eye(3) - p[:, None]  # by class
    if isinstance(fisher, DiagonalFisher):
        expected = np.einsum("bk,bi,bko->io", p, x**2, g**2) / 24
    else:
        expected = np.einsum("bk,bi,bj,bko->ij", p, x, x, g**2) / 24
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-6)


def drawn_labels(model, x, size):
    """The labels that a pass over `x` draws, batch by batch."""
    labels = []
    for i in range(0, len(x), size):
        logits = model(x[i : i + size], training=False)
        labels += tf.random.stateless_categorical(logits, 1, [i, 0])[:, 0].numpy().tolist()
    return np.array(labels)


def trained(fisher, **settings):
    keras.utils.set_random_seed(4)
    net = keras.Sequential(
        [keras.Input((6,), name="x"), layers.Dense(8, "tanh", name="h"), layers.Dense(3, name="o")]
    )
    return compiled(net, **{"fisher": fisher, "strength": 2.0, "grouping": None} | settings)


def precision(model):
    return {n: a for n, a in state_of(model).items() if n.startswith("precision/")}


def same(one, other, message=""):
    assert any(np.any(array) for array in one.values())
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-4, atol=1e-6, err_msg=message)


@pytest.mark.parametrize(
    "fisher",
    [
        KroneckerFisher("influence", None),
        *(
            long(fisher)
            for fisher in (
                *(DiagonalFisher(e, None) for e in ("batch", "empirical", "influence", "negated")),
                *(kind("mc", None) for kind in (DiagonalFisher, KroneckerFisher)),
            )
        ),
    ],
    ids=lambda f: f"{type(f).__name__}-{f.estimator}",
)
def test_every_estimator_takes_the_drawn_labels_for_true_ones(fisher):
    for weights in (None, W):
        model, labelled = trained(fisher), trained(fisher)
        model.consolidate(X, sample_weight=weights, batch_size=8)
        labels = drawn_labels(labelled, X, 8)
        assert len(set(labels)) == 3
        labelled.consolidate(X, labels, weights, batch_size=8)
        same(pulls(labelled), pulls(model))


def pulls(model):
    """The gradients of the penalty away from the anchor, whatever the form of the precision."""
    found = moved(model).regularizer.gradients(by_path(model))
    return {path: np.asarray(pull) for path, pull in found.items()}


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[8 * index : 8 * index + 8]


class Frame:
    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def to_numpy(self):
        return self.array


def parts():
    yield from (X[i : i + 8] for i in range(0, 24, 8))


def dataset(x=X):
    return tf.data.Dataset.from_tensor_slices(x)


FORMS = {
    "x, size": lambda m: m.consolidate(X, 8),
    "data=": lambda m: m.consolidate(data=X, batch_size=8),
    "(x,)": lambda m: m.consolidate((X,), batch_size=8),
    "[x]": lambda m: m.consolidate([X], batch_size=8),
    "tensor": lambda m: m.consolidate(tf.constant(X), batch_size=8),
    "frame": lambda m: m.consolidate(Frame(X), batch_size=8),
    "dataset": lambda m: m.consolidate(dataset().batch(8)),
    "dataset of (x,)": lambda m: m.consolidate(dataset((X,)).batch(8)),
    "pydataset": lambda m: m.consolidate(Batches(workers=1)),
    "generator": lambda m: m.consolidate(parts()),
    "list of (x,)": lambda m: m.consolidate([(x,) for x in parts()]),
}


@pytest.mark.long
def test_all_forms_of_inputs_alone_give_the_same():
    model = trained(DiagonalFisher("mc", None))
    model.consolidate(X, batch_size=8)
    for form, consolidate in FORMS.items():
        again = trained(DiagonalFisher("mc", None))
        consolidate(again)
        same(precision(model), precision(again), form)


def test_a_tuple_or_list_of_two_has_labels_where_the_model_has_one_input():
    models = [trained(DiagonalFisher("empirical", None)) for _ in range(3)]
    for model, args in zip(models, ((X, Y), ((X, Y),), ([X, Y],)), strict=True):
        model.consolidate(*args)
    for model in models[1:]:
        same(precision(models[0]), precision(model))


def test_a_list_of_as_many_arrays_as_inputs_is_inputs():
    states = []
    inputs = {"a": X, "b": X}
    for given in ([X, X], inputs, ((X, X),), dataset(inputs).batch(32)):
        keras.utils.set_random_seed(4)
        a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
        net = keras.Model([a, b], layers.Dense(3, name="dense")(layers.Add()([a, b])))
        model = compiled(net, fisher=DiagonalFisher("mc", None), strength=1.0)
        model.consolidate(given)
        states.append(precision(model))
    for state in states[1:]:
        same(states[0], state)


def test_a_newcomer_goes_on_from_a_model_of_others():
    pretrained = mlp()
    model = DWDModel.from_model(pretrained, **DEFAULTS)
    with pytest.raises(ValueError, match="Compile the model first"):
        model.consolidate(X)
    model.compile("adam", SPARSE(from_logits=True))
    model.consolidate(X)
    assert model.tasks_learned == 1
    assert float(model.penalty()) == 0
    model.fit(*blobs(24, seed=1), epochs=2, verbose=0)
    assert float(model.penalty()) > 0
    model.consolidate()
    assert model.tasks_learned == 2


def test_each_position_of_a_sequence_is_drawn():
    model = linear(SPARSE(from_logits=True), shape=(4, 6))
    x = X[:8].reshape(2, 4, 6)
    found = pass_statistics(model, (np.tile(x, (6000, 1, 1)),), 1000)["fisher/o/kernel"]
    p = probabilities(model, "softmax", x)
    # The draws are independent: the variance of their mean, times 4, is the mean of theirs.
    expected = np.einsum("bti,bto->io", x.astype("float64") ** 2, p * (1 - p)) / 2 / 4
    np.testing.assert_allclose(found, expected, rtol=0.06)


def test_masked_positions_do_not_count():
    """The words of a shorter sentence are those of a longer one without padding."""
    found = []
    for width in (3, 5):
        keras.utils.set_random_seed(4)
        words = keras.Input((width,), dtype="int32")
        e = layers.Embedding(7, 4, mask_zero=True, name="e")(words)
        net = keras.Model(words, layers.Dense(4, name="d")(e))
        model = compiled(net, fisher=DiagonalFisher("mc", None), strength=1.0)
        x = np.zeros((1, width), "int32")
        x[0, :3] = [1, 2, 3]
        squares = pass_statistics(model, (np.repeat(x, 8000, 0),), 1000)
        found.append(squares["fisher/d/bias"])
    np.testing.assert_allclose(*found, rtol=0.06)


def two_heads(losses, loss_weights=None, names="ab"):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    heads = {name: layers.Dense(3, name=name, use_bias=False)(inputs) for name in names}
    fisher = DiagonalFisher("mc", None)
    model = DWDModel(inputs, heads, fisher=fisher, strength=1.0, grouping=None)
    model.compile("sgd", losses, loss_weights=loss_weights)
    return model


def test_the_labels_of_each_output_are_drawn():
    losses = {"a": SPARSE(from_logits=True), "b": "mse"}
    model = two_heads(losses, {"a": 2.0, "b": 0.5})
    x = X[:8]
    found = pass_statistics(model, (np.tile(x, (3000, 1)),), 800)
    p = np.exp(x @ np.asarray(model.get_layer("a").kernel, "float64"))
    p /= p.sum(1, keepdims=True)
    squares = {"a": 4 * p * (1 - p), "b": np.full((8, 3), 0.25 * 2 / 3)}
    for name, each in squares.items():
        expected = np.einsum("bi,bo->io", x.astype("float64") ** 2, each) / 8
        np.testing.assert_allclose(found[f"fisher/{name}/kernel"], expected, rtol=0.06)


def test_outputs_alike_are_drawn_on_their_own():
    model = two_heads({name: SPARSE(from_logits=True) for name in "ab"})
    logits = dict.fromkeys("ab", tf.zeros((50, 3)))
    drawn = fisher_module.sample_labels(model, None, logits, tf.constant(0))
    assert set(drawn) == {"a", "b"}
    assert not np.array_equal(drawn["a"], drawn["b"])


def test_an_output_without_a_loss_needs_no_distribution():
    model = two_heads({"a": SPARSE(from_logits=True), "b": None})
    found = pass_statistics(model, (X,), 8)
    assert np.all(found["fisher/a/kernel"] > 0)
    assert not np.any(found["fisher/b/kernel"])


def cubed(y, y_pred):
    return tf.reduce_sum(tf.abs(y_pred - y) ** 3, axis=-1)


class Own(SPARSE):
    def call(self, y, y_pred):
        return 2.0 * super().call(y, y_pred)


@pytest.mark.parametrize(
    ("loss", "name"), [(cubed, "cubed"), ("mae", "mean_absolute_error"), (Own(), "Own")]
)
def test_a_loss_that_is_no_log_likelihood_is_refused_by_name(loss, name):
    model = linear(loss, fisher=DiagonalFisher("empirical", None))
    for data in (X, dataset().batch(8)):
        with pytest.raises(ValueError, match=rf"log-likelihoods.*loss of 'o' is {name}.*\(x, y\)"):
            model.consolidate(data)
    assert model.tasks_learned == 0
    assert state_of(model) == {}


def test_what_is_made_while_training_has_no_pass_without_labels_either():
    model = compiled(fisher=DiagonalFisher("adam"), optimizer="adam")
    with pytest.raises(ValueError, match="made by training alone"):
        model.consolidate(X)


def test_weights_beside_labels_in_one_argument_are_refused():
    model = trained(DiagonalFisher("mc", None))
    for data, message in (
        ((X, Y), "in one argument"),
        ([X, Y], "in one argument"),
        (dataset().batch(8), "give the weights with the inputs"),
        (parts(), "give the weights with the inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            model.consolidate(data, sample_weight=W)
    assert model.tasks_learned == 0
