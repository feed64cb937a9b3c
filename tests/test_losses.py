"""The Fisher information is that of the loss in use: its labels, reduction and weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import pass_statistics, sweep
from keras import layers

from keras_dwd import DiagonalFisher, DWDModel, DWDOptimizer, KroneckerFisher
from keras_dwd.curvature.fisher import Fisher
from keras_dwd.curvature.likelihood import counted_positions

SPARSE = keras.losses.SparseCategoricalCrossentropy
REDUCTIONS = [
    "sum_over_batch_size",
    "mean",
    "sum",
    "none",
    None,
    "mean_with_sample_weight",
]
RNG = np.random.default_rng(0)
START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _same_numbers():
    """Each test draws the same numbers, whichever tests ran before it."""
    RNG.bit_generator.state = START


def linear(shape, units, loss, estimator="empirical", activation=None, **settings):
    """One layer, whose gradients are easily written down."""
    base = keras.Sequential(
        [keras.Input(shape), layers.Dense(units, activation, use_bias=False, name="o")]
    )
    fisher = estimator if isinstance(estimator, Fisher) else DiagonalFisher(estimator, None)
    model = DWDModel.from_model(base, strength=1.0, fisher=fisher, grouping=None)
    model.compile(settings.pop("optimizer", keras.optimizers.SGD(0.0)), loss, **settings)
    return model


def kernel_of(model):
    return np.asarray(model.get_layer("o").kernel, "float64")


def softmax(z, axis=-1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def diagonal(model, data, size=100):
    return pass_statistics(model, data, size)["fisher/o/kernel"]


def by_positions(model, x, y):
    """∂ℓ/∂W of each position, `(batch, positions, features, classes)`, in float64."""
    g = softmax(x @ kernel_of(model)) - np.eye(3)[y]
    return np.einsum("bti,bto->btio", x, g)


def weighed(reduction, w):
    """What the squares of examples count, by the reduction of the loss."""
    return w / w.mean() if reduction == "mean_with_sample_weight" else w


@pytest.mark.parametrize("reduction", sweep(REDUCTIONS, "mean_with_sample_weight"))
def test_weights_of_examples_are_those_of_the_loss(reduction):
    loss = SPARSE(from_logits=True, reduction=reduction)
    x, y = RNG.normal(size=(6, 4)).astype("float32"), RNG.integers(0, 3, 6)
    w = RNG.uniform(0, 9, 6).astype("float32")
    model = linear((4,), 3, loss)
    d = by_positions(model, x[:, None].astype("float64"), y[:, None])[:, 0]
    for weights in (None, w, np.full(6, 100.0, "float32")):
        data = (x, y) if weights is None else (x, y, weights)
        u = weighed(reduction, np.ones(6) if weights is None else weights.astype("float64"))
        expected = np.einsum("b,bio->io", u, d**2) / 6
        np.testing.assert_allclose(diagonal(model, data), expected, rtol=1e-4)
        factors = pass_statistics(model, data, 100, KroneckerFisher("empirical", None))
        expected = np.einsum("b,bio,bjo->ij", u, d, d) / 6
        np.testing.assert_allclose(factors["input/o/kernel"], expected, rtol=1e-4, atol=1e-6)
        # The online estimate is the same: it sees the same batch and weights.
        fisher = DiagonalFisher("empirical", 0.9, every=1)
        online = linear((4,), 3, loss, fisher)
        online.set_weights(model.get_weights())
        online.fit(x, y, sample_weight=weights, batch_size=6, shuffle=False, verbose=0)
        expected = np.einsum("b,bio->io", u, d**2) / 6
        np.testing.assert_allclose(online.fisher.estimate()["fisher/o/kernel"], expected, rtol=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_of_positions_are_part_of_the_loss(reduction):
    x, y = RNG.normal(size=(5, 4, 2)).astype("float32"), RNG.integers(0, 3, (5, 4))
    w = RNG.uniform(0, 3, (5, 4)).astype("float32") * (RNG.uniform(size=(5, 4)) < 0.7)
    model = linear((4, 2), 3, SPARSE(from_logits=True, reduction=reduction))
    at = by_positions(model, x.astype("float64"), y)
    total, u = np.einsum("bt,btio->bio", w, at), np.ones(5)
    if reduction in ("sum_over_batch_size", "mean"):
        total = total / 4
    elif reduction == "mean_with_sample_weight":
        total = total / w.sum(1)[:, None, None]
        u = w.mean(1) / w.mean()
    # Of a sum of independent gradients to that of one position.
    share = {"mean_with_sample_weight": w / w.sum(1, keepdims=True), "mean": w / 4}
    share["sum_over_batch_size"] = w / 4
    u = u / (share.get(reduction, w).astype("float64") ** 2).sum(1)
    expected = np.einsum("b,bio->io", u, total**2) / 5
    np.testing.assert_allclose(diagonal(model, (x, y, w)), expected, rtol=1e-4)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", None])
@pytest.mark.parametrize("estimator", ["batch", "adam"])
def test_of_a_summed_loss_the_mean_gradient_is_taken(estimator, reduction):
    x, y = RNG.normal(size=(8, 4)).astype("float32"), RNG.integers(0, 3, 8)
    loss = SPARSE(from_logits=True, reduction=reduction)
    fisher = DiagonalFisher(estimator, 0.9 if estimator == "batch" else None, every=1)
    optimizer = DWDOptimizer(keras.optimizers.Adam(0.0))
    model = linear((4,), 3, loss, fisher, optimizer=optimizer)
    d = by_positions(model, x[:, None].astype("float64"), y[:, None])[:, 0]
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    expected = 8 * d.mean(0) ** 2
    if estimator == "batch":
        np.testing.assert_allclose(diagonal(model, (x, y)), expected, rtol=1e-4)
        found = model.fisher.estimate()["fisher/o/kernel"]
    else:
        model.get_layer("o").kernel.assign_add(np.full((4, 3), 0.1))
        model.consolidate()
        found = np.asarray(model.regularizer.precisions["o/kernel"].values)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def two_heads(losses, estimator):
    inputs = keras.Input((4,))
    heads = [layers.Dense(3, name=name)(inputs) for name in ("a", "b")]
    model = DWDModel.from_model(
        keras.Model(inputs, heads), strength=1.0, fisher=DiagonalFisher(estimator, None)
    )
    model.compile("sgd", losses)
    return model


def test_what_no_weight_of_an_example_can_say_is_refused():
    x, y, w = np.ones((4, 4), "float32"), np.zeros(4, int), np.ones(4, "float32")
    weighted, mean, summed = (
        SPARSE(from_logits=True, reduction=r) for r in ("mean_with_sample_weight", "mean", "sum")
    )
    for losses, given in (([weighted, mean], w), ([weighted, weighted], [w, w])):
        with pytest.raises(ValueError, match="'mean_with_sample_weight' and several outputs"):
            two_heads(losses, "empirical").consolidate((x, [y, y], given))
    model = two_heads([summed, mean], "batch")
    with pytest.raises(ValueError, match="all sums over the batch or all means"):
        model.consolidate((x, [y, y]))
    assert not model.regularizer.precisions


# Labels.


def drawn(loss, x, y, units=3, weights=None, activation=None, repeats=2000):
    """The estimate by drawn labels, from many copies of the data, and the model."""
    model = linear(x.shape[1:], units, loss, "mc", activation)
    data = [np.repeat(x, repeats, 0), np.repeat(y, repeats, 0)]
    if weights is not None:
        data.append(np.repeat(weights, repeats, 0))
    return diagonal(model, tuple(data), 1000), model


def true_fisher(model, x, counted, scale):
    """E over labels of the squared gradient of Σ_t scale_bt ℓ_bt: positions are independent."""
    p = softmax(x.astype("float64") @ kernel_of(model))
    variance = p * (1 - p)
    at = np.einsum("bti,bto->btio", x.astype("float64") ** 2, variance)
    return np.einsum("bt,btio->io", counted * scale**2, at) / len(x)


def test_positions_of_an_ignored_class_are_given_no_labels():
    x, y = RNG.normal(size=(4, 5, 2)).astype("float32"), RNG.integers(0, 3, (4, 5))
    y[0, 2:] = y[1, :3] = y[2] = -1
    counted = (y != -1).astype("float64")
    number = np.maximum(counted.sum(1, keepdims=True), 1)
    loss = SPARSE(from_logits=True, ignore_class=-1)
    found, model = drawn(loss, x, y)
    np.testing.assert_allclose(found, true_fisher(model, x, counted, number**-0.5), rtol=0.12)


@pytest.mark.parametrize("estimator", ["empirical", "negated"])
def test_positions_of_an_ignored_class_have_no_gradient(estimator):
    x, y = RNG.normal(size=(4, 5, 2)).astype("float32"), RNG.integers(0, 3, (4, 5))
    y[0, 2:] = y[1, :3] = -1
    model = linear((5, 2), 3, SPARSE(from_logits=True, ignore_class=-1), estimator)
    counted = y != -1
    logits = x.astype("float64") @ kernel_of(model)
    g = softmax(-logits if estimator == "negated" else logits) - np.eye(3)[np.maximum(y, 0)]
    if estimator == "negated":  # ∂/∂logits of the loss at −logits
        g = -g
    d = np.einsum("bt,bti,bto->bio", counted / np.sqrt(counted.sum(1))[:, None], x, g)
    np.testing.assert_allclose(diagonal(model, (x, y)), (d**2).mean(0), rtol=1e-4)


@pytest.mark.parametrize("how", ["ignored", "masked", "weighted"])
def test_margins_are_those_of_positions_that_count(how):
    """`influence`, with the last example without any that counts."""
    x, y = RNG.normal(size=(5, 4, 2)).astype("float32"), RNG.integers(0, 3, (5, 4))
    counted = np.ones((5, 4), bool)
    counted[0, 2:] = counted[1, :3] = counted[4] = False
    weights = ()
    reduction = "mean_with_sample_weight" if how == "weighted" else "mean"
    loss = SPARSE(from_logits=True, reduction=reduction)
    if how == "ignored":
        loss, y = SPARSE(from_logits=True, ignore_class=7), np.where(counted, y, 7)
    elif how == "weighted":
        weights = (counted.astype("float32"),)
    if how == "masked":
        x[~counted] = 0
        base = keras.Sequential(
            [
                keras.Input((4, 2)),
                layers.Masking(0.0),
                layers.Dense(3, use_bias=False, name="o"),
            ]
        )
        model = DWDModel.from_model(
            base, strength=1.0, fisher=DiagonalFisher("influence", None), grouping=None
        )
        model.compile("sgd", loss)
    else:
        model = linear((4, 2), 3, loss, "influence")
    logits = x.astype("float64") @ kernel_of(model)
    p = softmax(logits)
    number = np.maximum(counted.sum(1, keepdims=True), 1)
    share = counted / number
    g = (p - np.eye(3)[np.where(counted, y, 0)]) * (share * np.sqrt(number))[..., None]
    r = (g**2).sum((1, 2))
    ordered = np.sort(logits, -1)
    squares = (ordered[..., -1] - ordered[..., -2]) ** 2
    margins = (share * squares).sum(1)[:4]
    d = np.einsum("bti,bto->bio", x, g)
    u = np.ones(5)
    if how == "weighted":
        u = counted.mean(1) / counted.mean()
    divided = u / (r + np.sort(r[:4])[2])
    expected = np.einsum("b,bio->io", divided, d**2) / 5
    statistics = pass_statistics(model, (x, y, *weights), 100)
    np.testing.assert_allclose(statistics["margin/o/kernel"], margins.mean(), rtol=1e-4)
    np.testing.assert_allclose(statistics["fisher/o/kernel"], expected, rtol=1e-4)


@pytest.mark.parametrize("estimator", ["empirical", "influence"])
@pytest.mark.parametrize("reduction", sweep(REDUCTIONS, "sum_over_batch_size"))
def test_padding_and_the_length_of_sequences_change_nothing(estimator, reduction):
    """Of n tokens with the same gradient but independent labels, all n are worth one."""
    x = RNG.normal(size=(3, 1, 2)).astype("float32")
    y = RNG.integers(0, 3, (3, 1))
    found = []
    for length, padding in ((1, 0), (1, 4), (4, 3)):
        model = linear((length + padding, 2), 3, SPARSE(True, reduction=reduction), estimator)
        model.set_weights([0.1 * np.arange(6.0).reshape(2, 3)])
        tiled = np.repeat(x, length, 1), np.repeat(y, length, 1)
        weights = np.ones((3, length))
        data = (np.pad(a, [(0, 0), (0, padding), (0, 0)][: a.ndim]) for a in (*tiled, weights))
        found.append(
            diagonal(model, tuple(data)) / length
        )  # gradients that add up, not their squares
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4)


def test_labels_are_drawn_for_the_loss_without_label_smoothing():
    """Gradients of −log p, which have mean zero: smoothed labels would leave a bias."""
    x = RNG.normal(size=(4, 1, 2)).astype("float32")
    y = np.eye(3, dtype="int32")[RNG.integers(0, 3, (4, 1))]
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.6)
    found, model = drawn(loss, x, y)
    expected = true_fisher(model, x, np.ones((4, 1)), np.ones((4, 1)))
    np.testing.assert_allclose(found, expected, rtol=0.12)


def test_labels_are_drawn_along_the_axis_of_the_classes():
    inputs = keras.Input((4, 2))
    logits = layers.Permute((2, 1))(layers.Dense(3, use_bias=False, name="o")(inputs))
    model = DWDModel.from_model(
        keras.Model(inputs, logits),
        strength=1.0,
        fisher=DiagonalFisher("mc", None),
        grouping=None,
    )
    x = RNG.normal(size=(3, 4, 2)).astype("float32")
    expected = true_fisher(model, x, np.ones((3, 4)), np.full((3, 4), 0.5))
    y = np.moveaxis(np.eye(3)[np.zeros((3, 4), int)], -1, 1).astype("float32")
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True, axis=1))
    data = np.repeat(x, 2000, 0), np.repeat(y, 2000, 0)
    np.testing.assert_allclose(diagonal(model, data, 1000), expected, rtol=0.12)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_targets_of_masked_positions_add_no_noise(reduction):
    """The squares of padded sequences are those of the sequences cut to their length."""
    x = RNG.normal(size=(3, 6, 2)).astype("float32")
    x[:, 2:] = 0
    base = keras.Sequential(
        [keras.Input((6, 2)), layers.Masking(0.0), layers.Dense(2, use_bias=False, name="o")]
    )
    model = DWDModel.from_model(
        base, strength=1.0, fisher=DiagonalFisher("mc", None), grouping=None
    )
    model.compile("sgd", keras.losses.MeanSquaredError(reduction=reduction))
    data = np.repeat(x, 2000, 0), np.zeros((6000, 6, 2), "float32")
    # Of n squares in their mean, the Fisher information is 2/n times that of the inputs.
    n = 2 if reduction == "sum" else 2 * 2
    expected = np.repeat((2 / n * x.astype("float64") ** 2).sum(1).mean(0)[:, None], 2, 1)
    np.testing.assert_allclose(diagonal(model, data, 6000), expected, rtol=0.12)


def test_a_loss_with_a_call_of_its_own_is_another_loss():
    class Focal(SPARSE):
        def call(self, y_true, y_pred):
            loss = super().call(y_true, y_pred)
            return (1 - tf.exp(-loss)) ** 2 * loss

    class Same(SPARSE):
        def get_config(self):
            return {}

    x, y = np.ones((4, 4), "float32"), np.zeros(4, int)
    for estimator in ("mc", "negated"):
        with pytest.raises(ValueError, match="no `call` of its own"):
            linear((4,), 3, Focal(from_logits=True), estimator).consolidate((x, y))
    model = linear((4,), 3, Same(from_logits=True), "negated")
    g = softmax(-(x @ kernel_of(model))) - np.eye(3)[y]
    expected = (np.einsum("bi,bo->bio", x, g) ** 2).mean(0)
    np.testing.assert_allclose(diagonal(model, (x, y)), expected, rtol=1e-4)


def test_weights_of_positions_may_be_booleans():
    """As the padding masks are that preprocessors of KerasHub give as weights."""
    model = linear((4, 2), 3, SPARSE(from_logits=True))
    weights = np.array([[True, True, False, False], [True, False, True, False]])
    outputs = model(np.zeros((2, 4, 2), "float32"))
    (counted,) = counted_positions(model, np.zeros((2, 4), "int32"), outputs, {}, weights)
    np.testing.assert_array_equal(counted, weights.astype("float32"))


@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy", "binary_crossentropy"])
def test_a_loss_of_probabilities_on_logits_is_told(loss):
    inputs = keras.Input((3,))
    outputs = {
        "logits": layers.Dense(2, name="logits")(inputs),
        "chances": layers.Dense(2, "softmax", name="chances")(inputs),
    }
    model = DWDModel(inputs, outputs, grouping=None)
    with pytest.warns(UserWarning, match=r"output 'logits' .*from_logits=True\)` to `comp") as said:
        model.compile("sgd", {"logits": loss, "chances": loss})
    assert len(said) == 1
    assert said[0].filename == __file__
    # No warning, which would be an error: the right loss, another loss, an activation, no loss.
    for other in (SPARSE(from_logits=True), "mse", None):
        model.compile("sgd", {"logits": other, "chances": loss})
    model.compile("sgd")
