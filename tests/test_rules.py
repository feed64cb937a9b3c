"""The closed forms of layers agree with the generic path and a float64 loop over examples."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, dtype_policy, pass_statistics, sweep
from keras import layers

from keras_dwd import (
    DiagonalFisher,
    DWDModel,
    KroneckerFisher,
    Rule,
    register_rule,
)
from keras_dwd.curvature import rules
from keras_dwd.curvature.layer_recorder import LayerRecorder
from keras_dwd.curvature.sketches import _groups, _signs, probe_of
from keras_dwd.precision.matrix_form import MatrixForm
from keras_dwd.variables import by_path, trainable_by_path

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def images(*shape):
    return lambda rng: rng.normal(size=(7, *shape))


def tokens(rng):
    return rng.integers(0, 5, (7, 6)).astype("int32")


def shared(layer):
    """The same layer called twice, on inputs of different sizes."""
    return lambda x: layers.Concatenate(axis=1)([layer(x), layer(layers.Cropping1D(1)(x))])


def with_lora(layer):
    """A layer with LoRA."""

    def call(x):
        layer.build(x.shape)
        layer.enable_lora(2, lora_alpha=3)
        return layer(x)

    return call


def tied(lora=False, **settings):
    """Token by token, the embedding is also the matrix of the logits."""
    embedding = layers.ReversibleEmbedding(5, 4, **settings)

    def call(x):
        embedding.build(x.shape)
        if lora:
            embedding.enable_lora(2)
        return embedding(layers.Dense(4, name="between")(embedding(x)), reverse=True)

    return call


class Positions(layers.Layer):
    """Adds an embedding that all examples share and that has no batch axis."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(6, 3, name="embedding")

    def call(self, x):
        return x + self.embedding(keras.ops.arange(6))


class Windows(layers.Layer):
    """Folds windows into the batch axis."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, name="dense")

    def call(self, x):
        return keras.ops.reshape(self.dense(keras.ops.reshape(x, (-1, 4))), (-1, 9))


class Looped(layers.Layer):
    """Calls a layer inside a `tf.function` of its own."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, name="dense")

    def build(self, shape):
        self.dense.build((None, shape[-1]))

    def call(self, x):
        return tf.transpose(tf.map_fn(self.dense, tf.transpose(x, (1, 0, 2))), (1, 0, 2))


class Flagged(layers.Layer):
    """Has arguments that are not tensors."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), name="w")

    def call(self, x, power=1, training=True):
        return x * self.w**power + (100.0 if training else 0.0)


class Weighed(layers.Layer):
    """Has no rule; takes a second tensor by name, and a mask that Keras passes as `None`."""

    def build(self, x_shape, value_shape=None):
        self.w = self.add_weight(shape=(x_shape[-1],), name="w")

    def call(self, x, key=None, value=None, mask=None):
        return x * self.w + (0.0 if value is None else value * self.w**2)


class Queries(layers.Layer):
    """Calls a layer on a variable in place of inputs."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, name="dense")

    def build(self, shape):
        self.queries = self.add_weight(shape=(2, shape[-1]), name="queries")
        self.dense.build((None, shape[-1]))

    def call(self, x):
        mixed = keras.ops.sum(self.dense(self.queries), axis=1)
        return x[:, :2] * mixed


# The layers between the input and a dense head, and the input.
CASES = {
    "dense": (lambda: layers.Dense(4, activation="tanh"), images(5)),
    "dense_without_bias": (lambda: layers.Dense(4, use_bias=False), images(5)),
    "dense_over_time": (lambda: layers.Dense(4, activation="relu"), images(6, 3)),
    "dense_with_activation_layer": (
        lambda: layers.Dense(4, activation=layers.LeakyReLU()),
        images(5),
    ),
    "shared_dense": (lambda: shared(layers.Dense(3, activation="tanh")), images(6, 4)),
    "conv1d": (lambda: layers.Conv1D(3, 3, strides=2, padding="same"), images(9, 2)),
    "conv1d_causal": (lambda: layers.Conv1D(3, 3, dilation_rate=2, padding="causal"), images(8, 2)),
    "conv1d_causal_strided": (
        lambda: layers.Conv1D(3, 3, strides=2, padding="causal"),
        images(8, 2),
    ),
    "conv2d": (lambda: layers.Conv2D(3, 3, activation="relu"), images(6, 5, 2)),
    "conv2d_same": (lambda: layers.Conv2D(3, (3, 2), strides=2, padding="same"), images(7, 6, 2)),
    "conv2d_dilated": (
        lambda: layers.Conv2D(2, 3, dilation_rate=2, padding="same"),
        images(7, 6, 2),
    ),
    "conv2d_wide": (lambda: layers.Conv2D(12, 3, use_bias=False), images(4, 4, 2)),
    "conv3d": (lambda: layers.Conv3D(2, 2, padding="same"), images(3, 4, 3, 2)),
    "depthwise1d": (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), images(7, 2)),
    "depthwise2d": (
        lambda: layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2),
        images(6, 6, 2),
    ),
    "separable1d": (lambda: layers.SeparableConv1D(3, 3, padding="same"), images(7, 2)),
    "separable2d": (
        lambda: layers.SeparableConv2D(3, 3, depth_multiplier=2, activation="relu"),
        images(6, 6, 2),
    ),
    "lora_dense": (lambda: with_lora(layers.Dense(4, activation="tanh")), images(6, 5)),
    "lora_einsum": (
        lambda: with_lora(layers.EinsumDense("abc,cde->abde", (6, 2, 3), bias_axes="de")),
        images(6, 4),
    ),
    "lora_embedding": (lambda: with_lora(layers.Embedding(5, 3)), tokens),
    "einsum": (lambda: layers.EinsumDense("abc,cd->abd", (6, 3), bias_axes="d"), images(6, 4)),
    "einsum_heads": (
        lambda: layers.EinsumDense("abc,cde->abde", (6, 2, 3), bias_axes="de"),
        images(6, 4),
    ),
    "einsum_swapped": (
        lambda: layers.EinsumDense("abc,dc->adb", (3, 6), bias_axes="d"),
        images(6, 4),
    ),
    "einsum_merged": (
        lambda: layers.EinsumDense("abcd,cde->abe", (5, 3), bias_axes="e"),
        images(5, 2, 3),
    ),
    "einsum_ellipsis": (lambda: layers.EinsumDense("...c,cd->...d", 3), images(6, 4)),
    "einsum_own_matrices": (lambda: layers.EinsumDense("abc,bcd->abd", (6, 3)), images(6, 4)),
    "embedding": (lambda: layers.Embedding(5, 3), tokens),
    "embedding_masked": (
        lambda: (lambda e: lambda x: keras.ops.tanh(e(x)))(layers.Embedding(5, 3, mask_zero=True)),
        tokens,
    ),
    "dense_by_name": (lambda: (lambda d: lambda x: d(inputs=x))(layers.Dense(3)), images(5)),
    "positions": (Positions, images(6, 3)),
    "windows": (Windows, images(3, 4)),
    "looped": (Looped, images(4, 2)),
    "weighed": (Weighed, images(5)),
    "weighed_by_name": (lambda: (lambda w: lambda x: w(x, value=x))(Weighed()), images(5)),
    "queries": (Queries, images(5)),
    "flagged": (lambda: (lambda f: lambda x: f(x, power=3))(Flagged()), images(5)),
    "layer_norm": (lambda: layers.LayerNormalization(), images(6, 4)),
    "layer_norm_axes": (
        lambda: layers.LayerNormalization(axis=(1, 2), scale=False),
        images(3, 4, 2),
    ),
    "batch_norm": (lambda: layers.BatchNormalization(), images(6, 4)),
    "batch_norm_bias_only": (lambda: layers.BatchNormalization(scale=False), images(5, 5, 2)),
    "attention": (
        lambda: (lambda a: lambda x: a(x, x))(layers.MultiHeadAttention(2, 3)),
        images(6, 4),
    ),
    "without_a_rule": (lambda: layers.PReLU(), images(5)),
    "stacked_cells": (
        lambda: layers.RNN([layers.SimpleRNNCell(3), layers.SimpleRNNCell(2)]),
        images(4, 2),
    ),
    "distributed": (lambda: layers.TimeDistributed(layers.Dense(3)), images(4, 2)),
    "groups": (lambda: layers.Conv2D(4, 2, groups=2), images(4, 4, 2)),
}
if hasattr(layers, "RMSNormalization"):
    CASES["rms_norm"] = (layers.RMSNormalization, images(3, 4))
if hasattr(layers, "ReversibleEmbedding"):
    CASES |= {
        "reversible": (lambda: tied(logit_soft_cap=2.0), tokens),
        "reversible_untied": (lambda: tied(tie_weights=False, logit_soft_cap=2.0), tokens),
        "reversible_lora": (lambda: tied(lora=True), tokens),
    }
WITHOUT_RULE = {"without_a_rule", "groups", "flagged", "weighed", "weighed_by_name", "queries"}
NOT_FOLLOWED = ("positions", "windows", "looped", "stacked_cells", "queries")
# One of each kind of rule is enough for the path of layers that have none.
GENERIC_TOO = {
    *WITHOUT_RULE,
    *NOT_FOLLOWED,
    *("dense", "dense_over_time", "dense_by_name", "shared_dense", "conv1d_causal", "conv2d_same"),
    *("depthwise2d", "einsum_heads", "embedding_masked", "layer_norm_axes", "batch_norm"),
    *("attention", "distributed"),
}
MATRICES = [
    case
    for case in CASES
    if case not in WITHOUT_RULE
    and case.partition("_")[0] in ("dense", "conv1d", "conv2d", "conv3d", "einsum", "shared")
    and case != "einsum_own_matrices"
]


def network(case, policy="float32"):
    build, make = CASES[case]
    data = make(np.random.default_rng(0))
    with dtype_policy(policy):
        inputs = keras.Input(data.shape[1:], dtype="int32" if data.dtype == "int32" else None)
        x = layers.Flatten()(build()(inputs))
        return keras.Model(inputs, layers.Dense(3, name="head")(x)), data


def made(case, fisher):
    keras.utils.set_random_seed(3)
    base, x = network(case)
    model = DWDModel.from_model(base, strength=1.0, fisher=fisher, grouping=None)
    model.compile("sgd", LOSS)
    for variable in model.variables:  # zero biases and unit scales would hide mistakes
        variable.assign_add(0.3 * tf.random.uniform(variable.shape))
    y = np.random.default_rng(1).integers(0, 3, len(x))
    return model, x if x.dtype == "int32" else x.astype("float32"), y


def float64_gradients(model, case, x, y):
    """∂ℓ_b/∂θ by path, one example at a time."""
    copy, _ = network(case, "float64")
    copy.set_weights([w.astype("float64") for w in model.get_weights()])
    names = {id(v): path for path, v in by_path(copy).items()}
    paths = [names[id(v)] for v in copy.trainable_variables]
    theirs = {id(v): path for path, v in by_path(model).items()}
    ours = [theirs[id(v)] for v in model.trainable_variables]
    found = []
    for i in range(len(y)):
        with tf.GradientTape() as tape:
            one = x[i : i + 1] if x.dtype == "int32" else x[i : i + 1].astype("float64")
            logits = copy(one, training=False)
            loss = -tf.nn.log_softmax(logits)[0, y[i]]
        gradients = tape.gradient(loss, [v.value for v in copy.trainable_variables])
        found.append([np.asarray(tf.convert_to_tensor(g)) for g in gradients])
    assert len(paths) == len(ours)
    return {path: np.stack(g) for path, g in zip(ours, zip(*found, strict=True), strict=True)}


CORE = [
    *("dense", "shared_dense", "conv2d_same", "embedding_masked"),
    *("without_a_rule", "lora_einsum"),
    *(["reversible"] if "reversible" in CASES else []),
]


@pytest.mark.parametrize("case", sweep(CASES, *CORE))
def test_the_fast_path_is_the_generic_path_is_a_float64_loop(case, monkeypatch):
    """And Kronecker factors are those of the gradients of single examples in float64."""
    fisher = DiagonalFisher("empirical", gamma=None)
    model, x, y = made(case, fisher)
    generic = [r for r in rules.ruled_layers(model) if r.rule is rules.GENERIC]
    assert bool(generic) == (case in WITHOUT_RULE)
    # Otherwise both estimates would use the slow path through the whole model.
    covered = {path for r in rules.ruled_layers(model) for path in r.paths.values()}
    followed = set(trainable_by_path(model)) <= covered
    assert followed == (case not in NOT_FOLLOWED)
    found = [pass_statistics(model, (x, y), 4)]
    exact = float64_gradients(model, case, x, y)
    if case in MATRICES:
        check_factors(model, pass_statistics(model, (x, y), 4, factors()), exact)
    if case in GENERIC_TOO:
        monkeypatch.setattr(rules, "_RULES", {})
        found.append(pass_statistics(model, (x, y), 4, model.fisher))
    for path, gradients in exact.items():
        expected = (gradients**2).mean(0)
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * expected.max() + 1e-12}
        for statistics in found:
            assert statistics.keys() == found[0].keys()
            measured = statistics[f"fisher/{path}"]
            np.testing.assert_allclose(measured, expected, **tolerance, err_msg=path)


def factors(**settings):
    return KroneckerFisher("empirical", gamma=None, **settings)


def seen_along(d, positions):
    """Each example's D, projected if both its columns and the positions are many."""
    if positions <= 8 or d.shape[2] <= 16:
        return d
    directions = directions_of(d.shape[2])
    return np.stack([m @ directions[i % len(directions)] for i, m in enumerate(d)])


def directions_of(size):
    """`(groups, size, 8)`: column c is added to direction c mod 8 with the sign of its group."""
    signs = np.asarray(_signs(size, tf.range(_groups(size))), "float64")
    return signs[:, :, None] * (np.arange(size)[:, None] % 8 == np.arange(8))


def check_factors(model, statistics, gradients):
    """Compare with D Dᵀ and Dᵀ D of each example's gradient as a matrix, summed in float64."""
    checked = 0
    for ruled in rules.ruled_layers(model):
        if ruled.form is None:
            continue
        parts = [gradients[path] for path in ruled.matrix_paths]
        d = np.stack([ruled.form.join(*example) for example in zip(*parts, strict=True)])
        positions = int(np.prod(ruled.layer.output.shape[1:-1]))
        for side, whole in (("input", d), ("output", np.transpose(d, (0, 2, 1)))):
            seen = seen_along(whole, positions)
            expected = np.einsum("bio,bjo->ij", seen, seen) / len(seen)
            measured = statistics[f"{side}/{ruled.kernel}"]
            np.testing.assert_allclose(
                measured, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
            )
        checked += 1
    assert checked == 2


class Standardised(layers.Conv2D):
    """A convolution whose kernel differs from its variable."""

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - keras.ops.mean(kernel, (0, 1, 2)))


def test_layers_that_compute_otherwise_have_no_closed_form(monkeypatch):
    monkeypatch.setitem(CASES, "own", (lambda: Standardised(3, 3), images(5, 5, 2)))
    model, x, y = made("own", DiagonalFisher("empirical", gamma=None))
    found = pass_statistics(model, (x, y), 4)
    for path, gradients in float64_gradients(model, "own", x, y).items():
        expected = (gradients**2).mean(0)
        np.testing.assert_allclose(
            found[f"fisher/{path}"], expected, rtol=1e-4, atol=1e-5 * expected.max()
        )


def test_a_kernel_that_is_not_trained_leaves_the_bias():
    class Biased(layers.Dense):
        def build(self, shape):
            super().build(shape)
            self.kernel.trainable = False

    x = images(5)(np.random.default_rng(0)).astype("float32")
    y = np.arange(len(x)) % 3
    for fisher in (
        DiagonalFisher("empirical", gamma=None),
        KroneckerFisher("empirical", gamma=None),
    ):
        base = keras.Sequential([keras.Input((5,)), Biased(4, "tanh"), layers.Dense(3)])
        model = DWDModel.from_model(base, strength=1.0, fisher=fisher, grouping=None)
        model.compile("sgd", LOSS)
        bias = base.layers[0].bias
        squares = []
        for i in range(len(y)):
            with tf.GradientTape() as tape:
                loss = LOSS(y[i : i + 1], base(x[i : i + 1]))
            squares.append(np.square(tape.gradient(loss, bias.value), dtype="float64"))
        path, *_ = trainable_by_path(model)
        if isinstance(fisher, DiagonalFisher):
            found = pass_statistics(model, (x, y), 4)
            np.testing.assert_allclose(found[f"fisher/{path}"], np.mean(squares, 0), rtol=1e-4)
        model.consolidate((x, y))
        bias.assign_add(tf.ones(bias.shape))
        assert np.all(np.array(model.regularizer.gradients(by_path(model))[path]) > 0)


def test_a_model_of_fixed_batches_says_that_it_cannot_be_followed():
    inputs = keras.Input((4,))
    pairs = keras.ops.reshape(layers.Dense(4)(inputs), (-1, 6, 4))
    outputs = layers.Dense(3)(keras.ops.reshape(pairs, (-1, 4)))
    model = DWDModel.from_model(keras.Model(inputs, outputs))
    with pytest.warns(UserWarning, match="cannot be run on a batch of 2 examples"):
        assert rules.ruled_layers(model) == []
    assert rules.ruled_layers(model) == []  # no second warning


@pytest.mark.parametrize("case", sweep(NOT_FOLLOWED, "queries"))
def test_layers_whose_calls_cannot_be_followed_have_a_diagonal(case):
    model, x, y = made(case, KroneckerFisher("empirical"))
    statistics = pass_statistics(model, (x, y), 4)
    gradients = float64_gradients(model, case, x, y)
    hidden = [path for path in gradients if not path.startswith("head/")]
    for path in hidden:
        expected = (gradients[path] ** 2).mean(0)
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * expected.max()}
        np.testing.assert_allclose(statistics[f"fisher/{path}"], expected, **tolerance)
    model.consolidate((x, y))
    assert set(hidden) < set(model.regularizer.precisions)
    model.fit(x, y, batch_size=4, verbose=0)
    model.consolidate()


@pytest.mark.parametrize("size", [17, 24, 64, 577])
def test_all_directions_are_looked_along_alike(size):
    directions = directions_of(size)
    assert set(np.unique(directions)) == {-1, 0, 1}
    mean = np.mean([group @ group.T for group in directions], axis=0)
    np.testing.assert_allclose(mean, np.eye(size), atol=1e-12)


def test_small_batches_look_along_what_one_of_all_would():
    """Each example is projected onto a few directions, which differ from example to example."""
    model, x, y = made("conv2d_wide", factors())
    whole, small = (pass_statistics(model, (x, y), size) for size in (len(y), 1))
    for name in whole:
        np.testing.assert_allclose(small[name], whole[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "case", sweep(["dense", "conv2d_same", "conv1d", "conv2d_wide"], "dense", "conv2d_same")
)
def test_a_sketched_factor_is_the_factor_times_its_probe(case):
    model, x, y = made(case, factors())
    whole = pass_statistics(model, (x, y), 4)
    sketch = pass_statistics(model, (x, y), 4, factors(rank=1))
    (path,) = [n for n in sketch if n.startswith("input/") and not n.startswith("input/head")]
    probe = probe_of(len(sketch[path]), 1)
    np.testing.assert_allclose(sketch[path], whole[path] @ probe, rtol=1e-3, atol=1e-6)
    trace = sketch[path.replace("input/", "input_trace/")]
    assert float(trace) == pytest.approx(np.trace(whole[path]), rel=1e-4)


def test_taps_record_and_change_nothing():
    dense = layers.Dense(3, activation="relu")
    x = tf.random.normal((5, 4))
    expected = dense(x)
    with tf.GradientTape() as tape, LayerRecorder([dense]) as recorder:
        result = dense(x)
        again = dense(2 * x)
        loss = tf.reduce_sum(result) + tf.reduce_sum(again)
    np.testing.assert_array_equal(result, expected)
    first, second = recorder.calls(dense)
    np.testing.assert_array_equal(first.inputs[0], x)
    np.testing.assert_array_equal(second.inputs[0], 2 * x)
    np.testing.assert_allclose(first.output, tf.matmul(x, dense.kernel.value) + dense.bias.value)
    gradient = tape.gradient(loss, first.output)
    np.testing.assert_array_equal(gradient, tf.cast(first.output > 0, "float32"))
    assert "call" not in vars(dense)
    assert dense.activation is keras.activations.relu


def test_a_layer_that_is_passed_no_mask_is_not_looped_over(monkeypatch):
    model, x, y = made("weighed", DiagonalFisher("empirical", gamma=None))
    monkeypatch.setattr("keras_dwd.curvature.fisher.one_by_one", None)  # fails on the slow path
    assert len(pass_statistics(model, (x, y), 4)) == 3


def test_a_model_of_a_fixed_batch_size_is_followed():
    inputs = keras.Input(batch_shape=(4, 6))
    windows = keras.ops.reshape(inputs, (4, 3, 2))  # works for this batch size only
    outputs = layers.Dense(3)(layers.Flatten()(layers.Dense(2)(windows)))
    assert len(rules.ruled_layers(keras.Model(inputs, outputs))) == 2


def test_a_call_of_the_layers_own_is_put_back():
    dense = layers.Dense(3)
    own = dense.__dict__["call"] = lambda x: x
    with LayerRecorder([dense]):
        assert dense.__dict__["call"] is not own
    assert dense.__dict__["call"] is own


def test_taps_are_taken_off_after_an_error():
    dense = layers.Dense(3)
    dense.build((None, 4))
    with pytest.raises(Exception, match="shape"), LayerRecorder([dense]):
        dense(tf.ones((2, 7)))
    assert "call" not in vars(dense)


class Scale(layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), name="w")

    def call(self, x):
        return x * self.w


def test_a_rule_of_ones_own(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    monkeypatch.setitem(CASES, "own", (Scale, images(5)))
    called = []

    @register_rule(Scale)
    class ScaleRule(Rule):
        def gradients(self, layer, flow):
            called.append(layer)
            return {"w": flow.inputs[0] * flow.gradient}

    model, x, y = made("own", DiagonalFisher("empirical", gamma=None))
    measured = pass_statistics(model, (x, y), 7)
    assert called
    for path, gradients in float64_gradients(model, "own", x, y).items():
        np.testing.assert_allclose(measured[f"fisher/{path}"], (gradients**2).mean(0), rtol=1e-4)


class Rotated(layers.Dense):
    """A dense layer on its inputs in reverse order, for which a rule must reverse them too."""

    def call(self, x, training=None):
        return super().call(x[:, ::-1])


class _RotatedRule(Rule):
    reverse = True

    def _input(self, flow):
        return flow.inputs[0][:, ::-1] if self.reverse else flow.inputs[0]

    def gradients(self, layer, flow):
        kernel = tf.einsum("bi,bo->bio", flow.inputs[0][:, ::-1], flow.gradient)
        return {"kernel": kernel, "bias": flow.gradient}

    def matrix(self, layer):
        return MatrixForm(tuple(layer.kernel.shape), tuple(layer.kernel.shape), (0, 1), (4,))

    def rows(self, layer, flow):
        return self._input(flow)[:, None], flow.gradient[:, None]


@pytest.mark.parametrize("online", sweep([False, True], False))
@pytest.mark.parametrize("what", ["gradients", "rows"])
def test_a_rule_of_ones_own_that_is_wrong_is_refused(what, online, monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    gamma = 0.9 if online else None

    def learned(right):
        if what == "gradients":

            class OwnRule(Rule):
                def gradients(self, layer, flow):
                    return {"w": (1.0 if right else 2.0) * flow.inputs[0] * flow.gradient}

            register_rule(Scale)(OwnRule)
            layer, fisher = Scale(), DiagonalFisher("empirical", gamma, every=1)
        else:

            class OwnRule(_RotatedRule):
                reverse = right

            register_rule(Rotated)(OwnRule)
            layer, fisher = Rotated(4), KroneckerFisher("empirical", gamma, every=1)
        net = keras.Sequential([keras.Input((5,)), layer, layers.Dense(3, name="head")])
        model = compiled(net, fisher=fisher)
        data = blobs(24, features=5)
        model.fit(*data, verbose=0)
        model.consolidate(None if online else data)
        return model

    assert learned(right=True).tasks_learned == 1
    with pytest.raises(ValueError, match=r"other gradients than .*: OwnRule of "):
        learned(right=False)


def test_rules_are_for_layers():
    with pytest.raises(ValueError, match="types of Keras layers"):
        register_rule(int)


def test_a_subclass_with_a_call_of_its_own_has_no_rule():
    class Doubled(layers.Dense):
        def call(self, x):
            return 2 * super().call(x)

    class Named(layers.Dense):
        pass

    assert rules.rule_for(Doubled(3)) is rules.GENERIC
    assert rules.rule_for(Named(3)) is rules.rule_for(layers.Dense(3)) is not rules.GENERIC


def test_shared_variables_take_the_generic_path():
    first, head = layers.Dense(6, name="first"), layers.Dense(3, name="head")
    first.build((None, 6))

    class Tied(layers.Layer):
        def __init__(self, kernel):
            super().__init__()
            self.kernel = kernel

        def call(self, x):
            return keras.ops.matmul(x, keras.ops.transpose(self.kernel))

    class Borrowing(layers.Layer):
        """Uses a variable that it does not track."""

        def __init__(self, owner):
            super().__init__()
            self.__dict__["owner"] = owner

        def call(self, x):
            return keras.ops.matmul(x, keras.ops.transpose(self.owner.kernel))

    inputs = keras.Input((6,))
    model = keras.Model(inputs, head(Borrowing(first)(first(inputs))))
    assert [ruled.kernel for ruled in rules.ruled_layers(model)] == ["head/kernel"]
    model = keras.Model(inputs, head(Tied(first._kernel)(first(inputs))))
    assert [ruled.kernel for ruled in rules.ruled_layers(model)] == ["head/kernel"]


def _gives(*names):
    return type("Odd", (Rule,), dict.fromkeys(names, lambda self, *args: None))


@pytest.mark.parametrize(
    ("names", "said"),
    [((), "none of these"), (("matrix",), "matrix"), (("rows", "squares"), "rows, squares")],
)
def test_rules_that_lack_a_part_are_refused_when_registered(names, said):
    class Unknown(keras.layers.Layer):
        pass

    with pytest.raises(ValueError, match=f"Odd defines {said}"):
        register_rule(Unknown)(_gives(*names))
    assert rules.rule_for(Unknown()) is rules.GENERIC


def test_a_type_may_be_named_and_need_not_be_imported(monkeypatch):
    class Unknown(keras.layers.Layer):
        pass

    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    rule = register_rule(f"{Unknown.__module__}.{Unknown.__qualname__}")(_gives("squares"))
    assert isinstance(rules.rule_for(Unknown()), rule)
    with pytest.raises(ValueError, match=r"or their names with those of their modules.*'Unknown'"):
        register_rule("Unknown")


@pytest.mark.parametrize("jit", [False, True])
def test_the_memory_of_an_embedding_grows_with_the_tokens(jit):
    """No tensor has the square of the number of tokens; and the gradients are those of a loop."""
    layer = layers.Embedding(50, 3)
    layer.build()
    rng = np.random.default_rng(0)
    tokens, weights = 400, rng.uniform(size=4).astype("float32")
    ids = [rng.integers(0, 50, (4, n)).astype("int32") for n in (tokens - 7, 7)]
    gs = [rng.normal(size=(*each.shape, 3)).astype("float32") for each in ids]

    @tf.function(jit_compile=jit)
    def squares(ids, gs, weights):
        flows = [rules.LayerIO((i,), g) for i, g in zip(ids, gs, strict=True)]
        return rules.rule_for(layer).squares(layer, flows, weights)["embeddings"]

    expected = np.zeros((50, 3))
    for b, weight in enumerate(weights):
        total = np.zeros((50, 3))
        for i, g in zip(ids, gs, strict=True):
            np.add.at(total, i[b], g[b].astype("float64"))
        expected += weight * total**2
    found = squares(ids, gs, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    graph = squares.get_concrete_function(ids, gs, weights).graph
    sizes = [t.shape.num_elements() or 0 for op in graph.get_operations() for t in op.outputs]
    assert max(sizes) <= 4 * tokens * 3
