"""Batches of every form that Keras trains on, and losses without gradients of single examples."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, long, pass_statistics, state_of, sweep
from keras import layers, ops

from keras_dwd import DiagonalFisher, DWDModel

CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def made(net, loss=CE, fisher=None, optimizer="sgd"):
    model = DWDModel.from_model(net, fisher=fisher, grouping=None)
    model.compile(optimizer, loss)
    return model


def empirical():
    return DiagonalFisher("empirical", gamma=0.0, every=1)


def softmax_residuals(logits, y):
    """The gradients of a cross-entropy at logits, in float64."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return p


def squares(x, residuals):
    """The mean squared gradients of a kernel and a bias."""
    return np.einsum("bi,bj->ij", x**2, residuals**2) / len(x), (residuals**2).mean(0)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # of Keras, on the third output
def test_none_is_taken_wherever_keras_takes_it():
    x, y = blobs(8)
    z = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    w = np.linspace(0, 2, 8).astype("float32")
    first, second = keras.Input((6,), name="x"), keras.Input((6,), name="offset", optional=True)

    class Plus(layers.Layer):
        def call(self, a, b=None):
            return a if b is None else a + b

    h = Plus()(first, second)
    outputs = [layers.Dense(3, name="a")(h), layers.Dense(2, name="b")(h), layers.Dense(1)(h)]
    net = keras.Model({"x": first, "offset": second}, outputs)
    model = made(net, [CE, "mse", None], empirical(), keras.optimizers.SGD(0.0))
    inputs, labels, weights = {"x": x, "offset": None}, [y, z, None], [w, None, None]
    net.compile("sgd", [CE, "mse", None])
    try:
        net.evaluate(inputs, labels, sample_weight=weights, batch_size=8, verbose=0)
    except AttributeError:
        pytest.skip("this version of Keras takes no `None`")
    model.fit(inputs, labels, sample_weight=weights, batch_size=8, verbose=0)
    online = model.fisher.estimate()
    in_pass = pass_statistics(model, (inputs, labels, weights), 3)
    a, b = net.get_layer("a"), net.get_layer("b")
    x64 = x.astype("float64")
    g_a = w[:, None] * softmax_residuals(x64 @ a.get_weights()[0], y)
    g_b = x64 @ b.get_weights()[0] - z
    for statistics in (online, in_pass):
        for name, g in (("a", g_a), ("b", g_b)):
            kernel, bias = squares(x64, g)
            np.testing.assert_allclose(statistics[f"fisher/{name}/kernel"], kernel, rtol=1e-4)
            np.testing.assert_allclose(statistics[f"fisher/{name}/bias"], bias, rtol=1e-4)
    model.consolidate((inputs, labels, weights))


@pytest.mark.parametrize("form", sweep(["tf", "scipy"], "tf"))
def test_sparse_inputs_give_what_dense_ones_do(form):
    x, y = blobs(8)
    x[np.abs(x) < 0.7] = 0
    source = keras.Input((6,), sparse=True)
    net = keras.Model(source, layers.Dense(3, name="head")(source))
    if form == "tf":
        data = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(x), y)).batch(4)
    else:
        data = (pytest.importorskip("scipy.sparse").csr_matrix(x), y)
    model = made(net, fisher=empirical())
    statistics = pass_statistics(model, data, 3)
    x = x.astype("float64")
    kernel, bias = squares(x, softmax_residuals(x @ net.layers[-1].get_weights()[0], y))
    np.testing.assert_allclose(statistics["fisher/head/kernel"], kernel, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(statistics["fisher/head/bias"], bias, rtol=1e-4)
    default = DWDModel.from_model(net)
    default.compile("sgd", CE)
    default.fit(*(data if form == "scipy" else [data]), shuffle=False, verbose=0)
    default.consolidate(data)
    default.fit(*(data if form == "scipy" else [data]), shuffle=False, verbose=0)
    assert float(default.penalty()) > 0


@pytest.mark.long
def test_ragged_inputs_are_estimated_example_by_example():
    rows, y = [[1, 2], [3], [4, 5, 6], [1]], np.array([0, 1, 2, 1])
    source = keras.Input((None,), dtype="int32", ragged=True)
    mean = layers.Lambda(lambda t: tf.reduce_mean(t, 1))
    net = keras.Model(source, layers.Dense(3, name="head")(mean(layers.Embedding(7, 3)(source))))
    data = tf.data.Dataset.from_tensor_slices((tf.ragged.constant(rows), y)).batch(4)
    model = made(net, fisher=empirical())
    statistics = pass_statistics(model, data, 3)
    table, kernel, _ = (w.astype("float64") for w in net.get_weights())
    expected = np.zeros_like(table)
    for row, label in zip(rows, y, strict=True):
        g = softmax_residuals(table[row].mean(0)[None] @ kernel, [label])[0] @ kernel.T
        by_token = np.zeros_like(table)
        np.add.at(by_token, row, g / len(row))
        expected += by_token**2 / len(rows)
    name = next(name for name in statistics if name.endswith("embeddings"))
    np.testing.assert_allclose(statistics[name], expected, rtol=1e-4, atol=1e-9)
    default = DWDModel.from_model(net)
    default.compile("sgd", CE)
    default.fit(data, shuffle=False, verbose=0)
    default.consolidate()


@pytest.mark.long
def test_a_loss_that_cannot_be_vectorized_is_differentiated_in_a_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 8, 3)).astype("float32"), rng.integers(1, 4, (4, 3)).astype("int32")
    net = keras.Sequential([keras.Input((8, 3)), layers.Dense(4, name="head")])
    model = made(net, keras.losses.CTC(), empirical())
    model.fit(x, y, verbose=0)
    statistics = pass_statistics(model, (x, y), 3)
    expected = [0.0, 0.0]
    for i in range(4):
        with tf.GradientTape() as tape:
            loss = keras.losses.CTC()(y[i : i + 1], net(x[i : i + 1]))
        gradients = tape.gradient(loss, [v.value for v in net.trainable_variables])
        expected = [e + np.square(g) / 4 for e, g in zip(expected, gradients, strict=True)]
    np.testing.assert_allclose(statistics["fisher/head/kernel"], expected[0], rtol=1e-3)
    np.testing.assert_allclose(statistics["fisher/head/bias"], expected[1], rtol=1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_states_carried_from_batch_to_batch_are_used_and_kept():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 5, 2)).astype("float32"), rng.integers(0, 2, 8)

    def net():
        lstm = layers.LSTM(3, stateful=True, name="lstm")
        return keras.Sequential(
            [keras.Input(batch_shape=(4, 5, 2)), lstm, layers.Dense(2, name="head")]
        )

    def states(model):
        return [np.array(v) for v in model.get_layer("lstm").states]

    reference, alone = net(), net()
    model = made(net(), fisher=empirical(), optimizer=keras.optimizers.SGD(0.0))
    alone.set_weights(reference.get_weights())
    model.set_weights(reference.get_weights())
    reference.compile(keras.optimizers.SGD(0.0), CE)
    for trained in (model, reference):
        trained.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    after = states(reference)
    np.testing.assert_array_equal(states(model), after)
    online = model.fisher.estimate()  # of the last batch alone
    alone(x[:4])
    between = states(alone)
    expected = [0.0] * len(alone.trainable_variables)
    for i in range(4):
        for state, value in zip(alone.get_layer("lstm").states, between, strict=True):
            state.assign(value)
        with tf.GradientTape() as tape:
            loss = CE(y[4 + i : 5 + i], alone(x[4:])[i : i + 1])
        gradients = tape.gradient(loss, [v.value for v in alone.trainable_variables])
        expected = [e + np.square(g) / 4 for e, g in zip(expected, gradients, strict=True)]
    for variable, square in zip(alone.trainable_variables, expected, strict=True):
        name = next(n for n in online if variable.path.endswith(n.split("/", 1)[1]))
        np.testing.assert_allclose(online[name], square, rtol=1e-3, atol=1e-9)
    model.consolidate((x, y))
    np.testing.assert_array_equal(states(model), after)


class InBatch(keras.losses.Loss):
    """Each example's first half is to match its second half rather than those of the others."""

    def call(self, y_true, y_pred):
        logits = y_pred[:, :2] @ ops.transpose(y_pred[:, 2:])
        labels = ops.arange(ops.shape(y_pred)[0])
        return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)


class InBatchAndAlone(InBatch):
    def call(self, y_true, y_pred):
        return super().call(y_true, y_pred) + ops.mean(y_pred**2, -1)


ACROSS = [InBatch(), InBatchAndAlone(), keras.losses.Dice()]


@pytest.mark.parametrize("loss", sweep(ACROSS, ACROSS[1]))
def test_losses_across_examples_are_refused_unless_estimated_from_batches(loss):
    x, _ = blobs(16)
    y = (x[:, :4] > 0).astype("float32")
    net = keras.Sequential([keras.Input((6,)), layers.Dense(4, "sigmoid")])
    model = made(net, loss)
    model.fit(x, y, verbose=0)
    before = state_of(model)
    for data in (None, (x, y)):
        with pytest.raises(ValueError, match=r"compares the examples .*DiagonalFisher\(\"batch\""):
            model.consolidate(data)
        after = state_of(model)
        assert model.tasks_learned == 0
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
    of_batches = made(net, loss, DiagonalFisher("batch"))
    of_batches.fit(x, y, verbose=0)
    of_batches.consolidate()
    of_batches.fit(x, 1 - y, verbose=0)
    assert float(of_batches.penalty()) > 0


class Centred(layers.Layer):
    def call(self, x):
        return x - ops.mean(x, 0, keepdims=True)


class Pairs(layers.Layer):
    """The products of all pairs in a batch, for a cross-entropy with one's own partner."""

    def call(self, a, b):
        return a @ ops.transpose(b)


def towers():
    a, b = keras.Input((3,)), keras.Input((3,))
    tower = layers.Dense(4)
    return keras.Model([a, b], Pairs()(tower(a), tower(b)))


def centred():
    return keras.Sequential([keras.Input((6,)), layers.Dense(4), Centred(), layers.Dense(3)])


@pytest.mark.parametrize("jit", sweep([False, True], False))
@pytest.mark.parametrize("build", sweep([towers, centred], towers))
def test_models_that_compare_examples_are_refused_unless_estimated_from_batches(build, jit):
    x, y = blobs(8)
    if build is towers:
        x, y = [x[:, :3], x[:, 3:]], np.arange(8)
    for settings in ({}, {"fisher": empirical()}):
        model = DWDModel.from_model(build(), **settings)
        model.compile("sgd", CE, jit_compile=jit)
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
        for data in (None, (x, y)) if not settings else ((x, y),):
            with pytest.raises(ValueError, match="or the model compares the examples"):
                model.consolidate(data)
        assert model.tasks_learned == 0
    model = DWDModel.from_model(build(), fisher=DiagonalFisher("batch"), grouping=None)
    model.compile("sgd", CE, jit_compile=jit)
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    model.consolidate()
    assert model.tasks_learned == 1


def variable_length():
    vectorization = layers.TextVectorization(max_tokens=8)
    texts = np.array(["a", "b c d e", "c d", "d a b c a"] * 2, object)
    vectorization.adapt(texts)
    inputs = keras.Input((), dtype="string")
    x = layers.Embedding(8, 3, mask_zero=True)(vectorization(inputs))
    return keras.Model(inputs, layers.Dense(3)(layers.LSTM(3)(x))), texts


def noisy():
    class Noise(layers.Layer):
        def call(self, x):
            return x + keras.random.normal(ops.shape(x))

    return keras.Sequential([keras.Input((6,)), Noise(), layers.Dense(3)]), blobs(8)[0]


@pytest.mark.parametrize("build", sweep([variable_length, noisy], noisy))
def test_models_that_only_seem_to_compare_examples_are_not_refused(build):
    """Batches are padded to their longest text; noise makes outputs differ without a cause."""
    net, x = build()
    model = DWDModel.from_model(net)
    model.compile("sgd", CE)
    model.fit(x, np.arange(8) % 3, batch_size=4, verbose=0)
    model.consolidate()
    assert model.tasks_learned == 1


def masked_sequences():
    x = np.array([[1, 2, 0, 0], [3, 4, 5, 6], [1, 0, 0, 0], [2, 3, 4, 0]])
    net = [layers.Embedding(7, 3, mask_zero=True), layers.Dropout(0.5), layers.Dense(3)]
    return keras.Sequential([keras.Input((4,), dtype="int32"), *net]), CE, x, x % 3, None


def weighted(reduction):
    net = [layers.Dense(4), layers.BatchNormalization(), layers.Dense(3)]
    x, y = blobs(8)
    loss = keras.losses.SparseCategoricalCrossentropy(True, reduction=reduction)
    weights = np.arange(8, dtype="float32")
    return keras.Sequential([keras.Input((6,)), *net]), loss, x, y, weights


def random_loss():
    generator = keras.random.SeedGenerator(0)

    def loss(y_true, y_pred):
        return ops.mean((y_pred - keras.random.normal(ops.shape(y_pred), seed=generator)) ** 2, -1)

    x, y = blobs(8)
    return keras.Sequential([keras.Input((6,)), layers.Dense(3)]), loss, x, y, None


@pytest.mark.parametrize(
    "case",
    [
        masked_sequences,
        long(lambda: weighted("mean_with_sample_weight")),
        long(lambda: weighted("sum")),
        random_loss,
    ],
)
def test_losses_that_are_means_over_examples_are_not_taken_for_others(case):
    net, loss, x, y, weights = case()
    model = made(net, loss)
    model.fit(x, y, sample_weight=weights, verbose=0)
    model.consolidate()
    model = made(net, loss)
    model.consolidate((x, y) if weights is None else (x, y, weights))


@pytest.mark.parametrize("fisher", [None, DiagonalFisher("batch")])
def test_a_loss_by_add_loss_alone_is_refused_at_the_boundary(fisher):
    class Reconstruction(layers.Layer):
        def call(self, pair):
            self.add_loss(ops.mean((pair[0] - pair[1]) ** 2))
            return pair[1]

    source = keras.Input((6,))
    net = keras.Model(source, Reconstruction()([source, layers.Dense(6)(source)]))
    model = DWDModel.from_model(net, fisher=fisher, grouping=None)
    model.compile("sgd")
    x, _ = blobs(8)
    model.fit(x, verbose=0)
    for data in (None, x) if fisher is None else (None,):
        with pytest.raises(ValueError, match=r"zero at all weights.*add_loss"):
            model.consolidate(data)
    assert model.tasks_learned == 0


def test_a_loss_of_ones_own_needs_no_labels_and_no_training_argument():
    class Auto(DWDModel):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return ops.mean((x - y_pred) ** 2)

    source = keras.Input((6,))
    model = Auto(source, layers.Dense(6, name="d")(source), fisher=empirical(), grouping=None)
    model.compile(keras.optimizers.SGD(0.0))
    x, _ = blobs(8)
    model.fit(x, verbose=0, batch_size=8)
    g = (x @ model.get_weights()[0] - x) / 3
    for data in (x, (x,), tf.data.Dataset.from_tensor_slices(x).batch(3)):
        kernel, bias = squares(x, g)
        for statistics in (model.fisher.estimate(), pass_statistics(model, data, 3)):
            np.testing.assert_allclose(statistics["fisher/d/kernel"], kernel, rtol=1e-4)
            np.testing.assert_allclose(statistics["fisher/d/bias"], bias, rtol=1e-4)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("estimator", ["empirical", "batch"])
def test_added_losses_are_no_information_whether_a_loss_of_ones_own_has_them_or_not(
    estimator, within
):
    class Auto(DWDModel):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            loss = ops.mean((x - y_pred) ** 2)
            return loss + sum(self.losses) if within else loss

    source = keras.Input((6,))
    dense = layers.Dense(6, kernel_regularizer=keras.regularizers.L2(0.5), name="d")
    fisher = DiagonalFisher(estimator, every=1)
    model = Auto(source, dense(source), fisher=fisher, grouping=None)
    model.compile(keras.optimizers.SGD(0.0))
    x, _ = blobs(8)
    model.fit(x, verbose=0, batch_size=8)
    g = (x @ model.get_weights()[0] - x) / 3
    by_example = np.einsum("bi,bo->bio", x.astype("float64"), g)
    expected = 8 * by_example.mean(0) ** 2 if estimator == "batch" else (by_example**2).mean(0)
    for statistics in (model.fisher.estimate(), pass_statistics(model, x, 8)):
        np.testing.assert_allclose(statistics["fisher/d/kernel"], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The model cannot be run on a batch")
def test_a_model_without_single_examples_trains_as_in_keras_and_says_so_at_the_boundary():
    class Pairs(layers.Layer):
        def call(self, x):
            pairs = ops.reshape(x, (-1, 2, 4))
            return ops.reshape(pairs - ops.mean(pairs, 1, keepdims=True), (-1, 4))

        def compute_output_shape(self, shape):
            return shape

    def net():
        return keras.Sequential([keras.Input((6,)), layers.Dense(4), Pairs(), layers.Dense(3)])

    x, y = blobs(8)
    plain = net()
    model = made(net())
    model.set_weights(plain.get_weights())
    plain.compile("sgd", CE)
    plain.fit(x, y, shuffle=False, verbose=0)
    with pytest.warns(UserWarning, match=r"DiagonalFisher\(\"batch\"\).*Training goes on"):
        model.fit(x, y, shuffle=False, verbose=0)
    for a, b in zip(plain.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"cannot be estimated from single examples .*batch"):
        model.consolidate()
    with pytest.raises(ValueError, match="divisible") as raised:
        model.consolidate((x, y))
    assert "single examples" in raised.value.__notes__[-1]
    assert model.tasks_learned == 0


def test_classes_masked_by_infinite_logits_are_left_out():
    x, y = blobs(8)
    allowed = np.eye(3, dtype="float32")[y]

    class Mask(layers.Layer):
        def call(self, logits, mask_of_classes):
            return ops.where(mask_of_classes > 0, logits, -np.inf)

    inputs = keras.Input((6,)), keras.Input((3,))
    allowed[::2] = 1
    net = keras.Model(inputs, Mask()(layers.Dense(3)(inputs[0]), inputs[1]))
    model = made(net)  # with the margins of `influence`
    model.fit([x, allowed], y, verbose=0)
    model.consolidate()
    drawn = made(net, fisher=DiagonalFisher("mc", gamma=None))
    repeated = ([np.repeat(x, 500, 0), np.repeat(allowed, 500, 0)], np.repeat(y, 500))
    sampled = pass_statistics(drawn, repeated, 1000)
    fails = made(net, fisher=DiagonalFisher("negated", gamma=None))
    with pytest.raises(ValueError, match=r"although the weights are.*-inf.*'empirical'"):
        fails.consolidate(([x, allowed], y))
    works = made(net, fisher=empirical())
    statistics = pass_statistics(works, ([x, allowed], y), 8)
    dense = next(layer for layer in net.layers if isinstance(layer, layers.Dense))
    logits = x.astype("float64") @ dense.get_weights()[0] + dense.get_weights()[1]
    g = softmax_residuals(np.where(allowed > 0, logits, -np.inf), y)
    kernel, bias = squares(x, g)
    np.testing.assert_allclose(statistics[f"fisher/{dense.name}/kernel"], kernel, rtol=1e-4)
    np.testing.assert_allclose(statistics[f"fisher/{dense.name}/bias"], bias, rtol=1e-4)
    # Labels drawn from the allowed classes: Σ_k p_k (p − e_k)² is p (1 − p) in each class.
    e = np.where(allowed > 0, np.exp(logits), 0.0)
    p = e / e.sum(1, keepdims=True)
    expected = (p * (1 - p)).mean(0)
    found = sampled[f"fisher/{dense.name}/bias"]
    np.testing.assert_allclose(found, expected, rtol=0.1)
    for variable in model.trainable_variables:
        variable.assign_add(tf.ones(variable.shape))
    assert 0 < float(model.penalty()) < np.inf
