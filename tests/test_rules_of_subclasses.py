"""A closed form is used only for layers that compute what it was derived from."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import dtype_policy, pass_statistics
from keras import layers, ops

from keras_dwd import DiagonalFisher, DWDModel, KroneckerFisher
from keras_dwd.curvature import rules
from keras_dwd.curvature.rules import GENERIC, rule_for, ruled_layers
from keras_dwd.variables import by_path, trainable_by_path

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Masked(layers.Dense):
    @property
    def kernel(self):
        kernel = super().kernel
        return kernel * ops.cast(ops.arange(kernel.shape[0])[:, None] < 2, kernel.dtype)


class Standardised(layers.Conv1D):
    @property
    def kernel(self):
        kernel = super().kernel
        return kernel - ops.mean(kernel, (0, 1), keepdims=True)


class Doubling:
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel * kernel)


class Mixed(Doubling, layers.Conv1D):
    pass


class Depthwise(layers.DepthwiseConv1D):
    """Squares a kernel that its base keeps in an attribute."""

    @property
    def kernel(self):
        return self.own * self.own

    @kernel.setter
    def kernel(self, variable):
        self.own = variable


class Slope(layers.Dense):
    """Has an activation with a weight."""

    def build(self, shape):
        super().build(shape)
        self.beta = self.add_weight(shape=(self.units,), initializer="ones", name="beta")
        self.activation = lambda z: z * ops.sigmoid(self.beta * z)


class Renamed(layers.Dense):
    def build(self, shape):
        self._kernel = self.add_weight(shape=(shape[-1], self.units), name="w")
        self.bias = None


class Recurrent(layers.Dense):
    """Its activation uses its kernel too."""

    def build(self, shape):
        super().build(shape)
        self.activation = lambda z: z * ops.mean(self._kernel)


class Called(layers.Dense):
    def __call__(self, *args, **kwargs):
        return 3 * super().__call__(*args, **kwargs)


class Scaled(layers.Embedding):
    @property
    def embeddings(self):
        return super().embeddings ** 2


class Shifted(layers.LayerNormalization):
    """Has a scale of one plus its weight."""

    @property
    def gamma(self):
        return 1 + self.own

    @gamma.setter
    def gamma(self, variable):
        self.own = variable


class Generated(layers.Wrapper):
    """Calls a dense layer on another kernel than that of its variable."""

    def call(self, x):
        kernel = self.layer._kernel
        self.layer._kernel = kernel * kernel
        try:
            return self.layer(x)
        finally:
            self.layer._kernel = kernel


class Stateless(layers.Wrapper):
    def call(self, x):
        values = [v * v for v in self.layer.trainable_variables]
        return self.layer.stateless_call(values, [], x)[0]


def patched():
    layer = layers.Dense(2, name="patched")
    layer.call = types.MethodType(lambda self, x, training=None: x @ self.kernel**2, layer)
    return layer


def unbiased():
    layer = layers.Conv1D(2, 2, name="unbiased")
    layer.build((None, 4, 3))
    layer.use_bias = False
    return layer


class Harmless(layers.Dense):
    """Computes as a dense layer does."""

    kind = "dense"

    def __init__(self, units, **settings):
        super().__init__(units, activation="tanh", **settings)

    def build(self, shape):
        super().build(shape)
        self.seen = self.add_weight(shape=(), trainable=False, name="seen")

    def compute_output_shape(self, shape):
        return super().compute_output_shape(shape)

    def describe(self):
        return self.kind


GENERIC_LAYERS = {
    "masked": lambda: Masked(2, activation="tanh", name="masked"),
    "standardised": lambda: Standardised(2, 2, name="standardised"),
    "mixed": lambda: Mixed(2, 2, name="mixed"),
    "depthwise": lambda: Depthwise(2, name="depthwise"),
    "slope": lambda: Slope(2, name="slope"),
    "renamed": lambda: Renamed(2, name="renamed"),
    "patched": patched,
    "unbiased": unbiased,
    "shifted": lambda: Shifted(name="shifted"),
}
ONE_BY_ONE = {
    "recurrent": lambda: Recurrent(2, name="recurrent"),
    "called": lambda: Called(2, name="called"),
    "generated": lambda: Generated(layers.Dense(2, name="within"), name="generated"),
    "stateless": lambda: Stateless(layers.Dense(2, name="within"), name="stateless"),
    "spectral": lambda: layers.SpectralNormalization(layers.Dense(2, name="in"), name="spectral"),
}
CLOSED = {
    "harmless": lambda: Harmless(2, name="harmless"),
    "prelu": lambda: layers.Dense(2, activation=layers.PReLU(name="slopes"), name="prelu"),
    "constrained": lambda: layers.Dense(
        2, kernel_constraint="non_neg", kernel_regularizer="l2", name="constrained"
    ),
}


def network():
    """All the layers side by side."""
    x, ids = keras.Input((4, 3)), keras.Input((5,), dtype="int32")
    many = [make()(x) for make in (GENERIC_LAYERS | ONE_BY_ONE | CLOSED).values()]
    many.append(Scaled(4, 2, name="scaled")(ids))
    joined = layers.Concatenate()([layers.Flatten()(each) for each in many])
    return keras.Model([x, ids], layers.Dense(3, name="head")(joined))


@pytest.fixture(scope="module")
def case():
    """The model, its data, and the gradient of each example in float64 by path."""
    keras.utils.set_random_seed(1)
    model = DWDModel.from_model(
        network(), strength=1.0, fisher=DiagonalFisher("empirical", None), grouping=None
    )
    model.compile("sgd", LOSS)
    rng = np.random.default_rng(0)
    for v in model.trainable_variables:
        v.assign_add(rng.uniform(0.1, 0.4, v.shape))
    x, ids, y = rng.normal(size=(5, 4, 3)), rng.integers(0, 4, (5, 5)), rng.integers(0, 3, 5)
    with dtype_policy("float64"):
        copy = network()
    copy.set_weights([w.astype("float64") for w in model.get_weights()])
    theirs = list(trainable_by_path(copy).values())
    gradients = {path: [] for path in trainable_by_path(model)}
    assert len(theirs) == len(gradients)
    for i in range(5):
        with tf.GradientTape() as tape:
            logits = copy([x[i : i + 1], ids[i : i + 1].astype("int32")], training=False)
            loss = -tf.nn.log_softmax(logits)[0, y[i]]
        found = tape.gradient(loss, [v.value for v in theirs], unconnected_gradients="zero")
        for path, g in zip(gradients, found, strict=True):
            gradients[path].append(np.asarray(tf.convert_to_tensor(g)))
    data = ([x.astype("float32"), ids.astype("int32")], y)
    return model, data, {path: np.stack(g) for path, g in gradients.items()}


def assert_diagonals(statistics, gradients, but=()):
    checked = 0
    for path, g in gradients.items():
        if path in but:
            continue
        expected = (g**2).mean(0)
        tolerance = {"rtol": 1e-3, "atol": 1e-5 * expected.max() + 1e-12}
        np.testing.assert_allclose(
            statistics[f"fisher/{path}"], expected, **tolerance, err_msg=path
        )
        checked += 1
    return checked


def test_what_changes_the_computation_is_differentiated(case):
    model, data, gradients = case
    assert assert_diagonals(pass_statistics(model, data, 5), gradients) == len(gradients)


@pytest.mark.long
def test_only_layers_that_compute_as_their_type_have_factors(case):
    model, data, gradients = case
    fisher = KroneckerFisher("empirical", None)
    statistics = pass_statistics(model, data, 5, fisher)
    by_matrix = {r.layer.name: r for r in ruled_layers(model) if r.form is not None}
    assert set(by_matrix) == {"harmless", "prelu", "constrained", "head"}
    paths = {path for ruled in by_matrix.values() for path in ruled.matrix_paths}
    assert assert_diagonals(statistics, gradients, paths)
    for ruled in by_matrix.values():
        parts = [gradients[path] for path in ruled.matrix_paths]
        d = np.stack([ruled.form.join(*example) for example in zip(*parts, strict=True)])
        expected = np.einsum("bio,bjo->ij", d, d) / len(d)
        np.testing.assert_allclose(
            statistics[f"input/{ruled.kernel}"], expected, rtol=1e-3, atol=1e-5 * expected.max()
        )


def test_each_kind_takes_its_path(case):
    model, _, _ = case
    followed = {ruled.layer.name: ruled.rule for ruled in ruled_layers(model)}
    assert all(followed[name] is GENERIC for name in [*GENERIC_LAYERS, "scaled"])
    assert all(followed.get(name) is not GENERIC for name in CLOSED)
    assert not followed.keys() & {*ONE_BY_ONE, "within"}


def test_all_types_with_a_rule_have_it_and_attributes_of_keras_are_none_of_ones_own():
    made = [
        layers.Dense(2),
        *(t(2, 2) for t in (layers.Conv1D, layers.Conv2D, layers.Conv3D)),
        *(t(2) for t in (layers.DepthwiseConv1D, layers.DepthwiseConv2D)),
        *(t(2, 2) for t in (layers.SeparableConv1D, layers.SeparableConv2D)),
        layers.Embedding(3, 2),
        layers.BatchNormalization(),
        layers.LayerNormalization(),
    ]
    shapes = {1: (2, 5, 2), 2: (2, 5, 5, 2), 3: (2, 5, 5, 5, 2)}
    for layer in made:
        assert rule_for(layer) is not GENERIC, layer
        layer.build(shapes[getattr(layer, "rank", 1)])
        assert rule_for(layer) is not GENERIC, layer


def test_a_rule_that_leaves_out_a_variable_is_completed(monkeypatch):
    class Affine(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1],), initializer="ones", name="w")
            self.b = self.add_weight(shape=(shape[-1],), initializer="zeros", name="b")

        def call(self, x):
            return x * self.w + self.b

    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))

    @rules.register_rule(Affine)
    class AffineRule(rules.Rule):
        def gradients(self, layer, flow):
            return {"w": flow.inputs[0] * flow.gradient}

    model = DWDModel.from_model(
        keras.Sequential([keras.Input((3,)), Affine(name="affine")]),
        strength=1.0,
        fisher=DiagonalFisher("empirical", None),
        grouping=None,
    )
    model.compile("sgd", LOSS)
    x, y = np.random.default_rng(0).normal(size=(4, 3)).astype("float32"), np.arange(4) % 3
    found = pass_statistics(model, (x, y), 4)
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)  # weights of one, a bias of zero
    g = p - np.eye(3)[y]
    np.testing.assert_allclose(found["fisher/affine/b"], (g**2).mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["fisher/affine/w"], ((x * g) ** 2).mean(0), rtol=1e-4)


class Training(layers.Wrapper):
    """Calls a layer to train even in inference."""

    def call(self, x):
        return self.layer(x, training=True)


def test_a_normalization_by_the_batch_has_no_gradients_of_single_examples():
    inputs = keras.Input((3,))
    normalized = Training(layers.BatchNormalization(name="by_batch"))(inputs)
    base = keras.Model(inputs, layers.Dense(3)(normalized))
    x, y = np.random.default_rng(0).normal(size=(4, 3)).astype("float32"), np.arange(4) % 3
    for fisher, refused in (
        (DiagonalFisher("empirical", None), True),
        (DiagonalFisher("batch", None), False),
    ):
        model = DWDModel.from_model(base, strength=1.0, fisher=fisher, grouping=None)
        model.compile("sgd", LOSS)
        if refused:
            with pytest.raises(ValueError, match="calls by_batch with `training=True`"):
                model.consolidate((x, y))
        else:
            model.consolidate((x, y))
        assert bool(model.regularizer.precisions) != refused


class Switched(layers.Layer):
    """Computes otherwise in training."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), initializer="ones", name="w")

    def call(self, x, training=False):
        return x * self.w**3 if training else x * self.w


def test_a_layer_that_is_called_to_train_is_differentiated_so():
    inputs = keras.Input((3,))
    base = keras.Model(inputs, Training(Switched(name="switched"), name="t")(inputs))
    model = DWDModel.from_model(
        base, strength=1.0, fisher=DiagonalFisher("empirical", None), grouping=None
    )
    model.compile("sgd", LOSS)
    x, y = np.random.default_rng(0).normal(size=(4, 3)).astype("float32"), np.arange(4) % 3
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    expected = ((3 * x * (p - np.eye(3)[y])) ** 2).mean(0)  # the weights are ones
    (found,) = pass_statistics(model, (x, y), 4).values()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_places_of_layers_that_compute_otherwise_are_kept():
    """Files of earlier versions have blocks of their matrices."""
    model = keras.Sequential([keras.Input((3,)), Masked(2, name="masked")])
    assert rules.places_of(model)["masked/kernel"].form is not None
    assert set(by_path(model)) == {"masked/kernel", "masked/bias"}
