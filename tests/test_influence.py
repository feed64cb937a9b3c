"""The estimator `influence`: one scale for all losses, outputs and examples."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import pass_statistics, sweep
from keras import layers

from keras_dwd import DiagonalFisher, DWDModel

RNG = np.random.default_rng(0)
X = RNG.normal(size=(11, 4)).astype("float32")
CLASSES = RNG.integers(0, 3, 11).astype("int32")
VALUES = RNG.normal(size=(11, 2)).astype("float32")
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
KERNEL = (0.5 * RNG.normal(size=(4, 5))).astype("float32")
CLASS_KERNEL = RNG.normal(size=(5, 3)).astype("float32")
VALUE_KERNEL = RNG.normal(size=(5, 2)).astype("float32")


class Unruled(keras.Layer):
    """A dense layer that is differentiated example by example."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 5), name="kernel")

    def call(self, x):
        return x @ self.kernel


def network(heads, hidden=None):
    """A linear layer, and one head for each kernel."""
    inputs = keras.Input((4,))
    hidden = hidden or layers.Dense(5, use_bias=False, name="hidden")
    x = hidden(inputs)
    outputs = []
    for i, kernel in enumerate(heads):
        outputs.append(layers.Dense(kernel.shape[1], use_bias=False, name=f"head_{i}")(x))
    model = DWDModel(
        inputs,
        outputs if len(outputs) > 1 else outputs[0],
        strength=1.0,
        fisher=DiagonalFisher("influence", None),
        grouping=None,
    )
    model.set_weights([KERNEL, *heads])
    return model


def importances(model, y, **compiled):
    """The diagonal of the hidden kernel and of the heads, in the order of the weights."""
    model.compile("sgd", **compiled)
    statistics = pass_statistics(model, (X, y), 11)
    blocks = model.fisher.blocks(model, {v.path: v for v in model.weights}, statistics)
    return [blocks[v.path].values for v in model.weights]


def examples(kernels, of_outputs):
    """What is expected: single examples' squared gradients, in float64 loops.

    Args:
        kernels: Of the heads.
        of_outputs: By output, the gradients by the logits, `(examples, n)`, b and the margin m².
    """
    x, hidden = X.astype("float64"), X.astype("float64") @ KERNEL
    overall = np.mean([m for _, _, m in of_outputs])
    scaled = []
    for g, bend, margin in of_outputs:
        r = (g**2).sum(1)
        factor = bend / (r + np.sort(r)[len(r) // 2]) * (overall + 0.1) / (margin + 0.1)
        scaled.append(np.sqrt(factor)[:, None] * g)
    back = sum(g @ k.T for g, k in zip(scaled, kernels, strict=True))
    of_all = [np.mean([np.outer(a, g) ** 2 for a, g in zip(x, back, strict=True)], 0)]
    of_all += [
        np.mean([np.outer(a, b) ** 2 for a, b in zip(hidden, g, strict=True)], 0) for g in scaled
    ]
    return [each / (overall + 0.1) for each in of_all]


def errors():
    return (X.astype("float64") @ KERNEL) @ VALUE_KERNEL - VALUES


def of_classes(weight=1.0):
    logits = (X.astype("float64") @ KERNEL) @ CLASS_KERNEL
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    highest = np.sort(logits, 1)
    margin = np.mean((highest[:, -1] - highest[:, -2]) ** 2)
    return weight * (p - np.eye(3)[CLASSES]), weight, margin


def assert_all_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-9)


# The gradient of a loss of two values by the error, and b: g = b e for squares, and the share of
# their sums, weighted as the examples are, for absolute errors.
VALUE_LOSSES = {
    "mean_squared_error": lambda e: e,
    "mean_absolute_error": lambda e: np.sign(e) / 2,
    "huber": lambda e: np.clip(e, -1, 1) / 2,
}


@pytest.mark.parametrize("loss", sweep(list(VALUE_LOSSES), "mean_absolute_error"))
def test_a_loss_of_values_counts_by_how_it_bends(loss):
    e = errors()
    g = VALUE_LOSSES[loss](e)
    r = (g**2).sum(1)
    share = 1 / (r + np.sort(r)[5])
    bend = (share * r).sum() / (share * (g * e).sum(1)).sum()
    if loss == "mean_squared_error":
        np.testing.assert_allclose(bend, 1.0)  # ½ (e₁² + e₂²)
    found = importances(network([VALUE_KERNEL]), VALUES, loss=loss)
    assert_all_close(found, examples([VALUE_KERNEL], [(g, bend, 25.0)]))


def test_a_loss_that_is_no_distance_counts_by_its_weight_alone():
    turn = np.array([[0.05, 1.0], [-1.0, 0.05]])  # gradients that are all but orthogonal to errors

    def loss(y, p):
        along = keras.ops.stop_gradient((p - y) @ turn.astype("float32"))
        return keras.ops.mean(along * p, axis=-1)

    found = importances(network([VALUE_KERNEL]), VALUES, loss=loss)
    assert_all_close(found, examples([VALUE_KERNEL], [(errors() @ turn, 1.0, 25.0)]))


def test_each_output_counts_by_its_own_gradients_margin_and_weight():
    outputs = [of_classes(weight=3.0), (0.5 * errors(), 0.5, 25.0)]
    found = importances(
        network([CLASS_KERNEL, VALUE_KERNEL]),
        [CLASSES, VALUES],
        loss=[CROSS_ENTROPY, "mean_squared_error"],
        loss_weights=[3.0, 0.5],
    )
    assert_all_close(found, examples([CLASS_KERNEL, VALUE_KERNEL], outputs))


def test_layers_without_a_rule_count_the_same_with_several_outputs():
    ruled, unruled = (
        importances(
            network([CLASS_KERNEL, VALUE_KERNEL], hidden),
            [CLASSES, VALUES],
            loss=[CROSS_ENTROPY, "mean_squared_error"],
        )
        for hidden in (None, Unruled(name="hidden"))
    )
    assert_all_close(unruled, ruled)


@pytest.mark.parametrize(
    "loss", sweep(["mean_squared_error", "mean_absolute_error"], "mean_squared_error")
)
def test_the_penalty_grows_as_the_loss_does_with_the_unit_of_the_targets(loss):
    """A loss in other units is c² or c times as large, and so is the penalty on hidden layers."""
    power = 2 if loss == "mean_squared_error" else 1
    plain = importances(network([VALUE_KERNEL]), VALUES, loss=loss)
    larger = importances(network([100 * VALUE_KERNEL]), 100 * VALUES, loss=loss)
    np.testing.assert_allclose(larger[0], 100.0**power * plain[0], rtol=2e-4)


class OwnLoss(DWDModel):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        classes, values = y_pred
        return tf.reduce_mean((values - y) ** 2) + 0.1 * tf.reduce_mean(classes**2)


def test_outputs_that_share_a_loss_count_together():
    base = network([CLASS_KERNEL, VALUE_KERNEL])
    model = OwnLoss(
        base.inputs,
        base.outputs,
        strength=1.0,
        fisher=DiagonalFisher("influence", None),
        grouping=None,
    )
    logits = (X.astype("float64") @ KERNEL) @ CLASS_KERNEL
    gradients = [0.2 * logits / 3, errors()]
    r = sum((g**2).sum(1) for g in gradients)
    factor = 1 / (r + np.sort(r)[5]) / 25.1
    back = gradients[0] @ CLASS_KERNEL.T + gradients[1] @ VALUE_KERNEL.T
    squares = [np.outer(a, g) ** 2 for a, g in zip(X.astype("float64"), back, strict=True)]
    expected = np.einsum("b,bio->io", factor, squares) / 11
    found = importances(model, VALUES)
    np.testing.assert_allclose(found[0], expected, rtol=2e-4)
