import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, dtype_policy, mlp, pass_statistics, sweep
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from keras_dwd import DiagonalFisher, DWDModel, DWDOptimizer, KroneckerFisher
from keras_dwd.curvature.influence import squared_margins
from keras_dwd.variables import by_path, trainable_by_path

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
EXACT = {"fisher": DiagonalFisher("empirical", gamma=None), "grouping": None}


def mixed_net(dtype=None):
    """A network with Dense, Conv2D, BatchNormalization and Embedding layers."""
    image = keras.Input((6, 6, 2), dtype=dtype)
    word = keras.Input((3,), dtype="int32")
    x = layers.Conv2D(3, 3, activation="relu", dtype=dtype, name="conv")(image)
    x = layers.BatchNormalization(dtype=dtype, name="norm")(x)
    x = layers.Flatten(dtype=dtype)(x)
    e = layers.Flatten(dtype=dtype)(layers.Embedding(5, 2, dtype=dtype, name="embed")(word))
    x = layers.Dropout(0.5, dtype=dtype)(layers.Concatenate(dtype=dtype)([x, e]))
    x = layers.Dense(7, activation="tanh", dtype=dtype, name="dense")(x)
    return keras.Model([image, word], layers.Dense(4, dtype=dtype, name="head")(x))


def mixed_data(count=12, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(count, 6, 6, 2)).astype("float32")
    word = rng.integers(0, 5, (count, 3)).astype("int32")
    return (image, word), rng.integers(0, 4, count).astype("int32")


def paths(model):
    """The paths of the trainable variables, in their order."""
    names = {id(v): path for path, v in by_path(model).items()}
    return [names[id(v)] for v in model.trainable_variables]


def trained_mixed(**settings):
    model = DWDModel.from_model(mixed_net(), **settings)
    model.compile("adam", LOSS)
    model.fit(*mixed_data(), epochs=3, verbose=0)  # changes the statistics of BatchNormalization
    return model


def float64_losses(model):
    """Losses and gradients of a float64 copy of the model, one example at a time."""
    copy = mixed_net("float64")
    copy.set_weights([w.astype("float64") for w in model.get_weights()])

    def loss(x, y, i):
        logits = copy([x[0][i : i + 1].astype("float64"), x[1][i : i + 1]], training=False)
        return -tf.nn.log_softmax(logits)[0, y[i]]

    return copy, loss


def test_exact_equals_a_float64_loop():
    model = trained_mixed(strength=1.0, **EXACT)
    x, y = mixed_data()
    copy, loss = float64_losses(model)
    expected = [np.zeros(v.shape) for v in copy.trainable_variables]
    for i in range(len(y)):
        with tf.GradientTape() as tape:
            value = loss(x, y, i)
        gradients = tape.gradient(value, [v.value for v in copy.trainable_variables])
        for total, gradient in zip(expected, gradients, strict=True):
            total += np.asarray(tf.convert_to_tensor(gradient)) ** 2 / len(y)
    measured = pass_statistics(model, (x, y), batch_size=5)
    assert len(measured) == len(expected) == 9
    for path, reference in zip(paths(copy), expected, strict=True):
        fisher = measured[f"fisher/{path}"]
        np.testing.assert_allclose(
            fisher, reference, rtol=1e-5, atol=1e-5 * reference.max(), err_msg=path
        )


def test_exact_equals_finite_differences():
    model = trained_mixed(strength=1.0, **EXACT)
    x, y = mixed_data()
    copy, loss = float64_losses(model)
    measured = pass_statistics(model, (x, y), batch_size=5)
    places = {
        "dense/kernel": (3, 2),
        "conv/kernel": (1, 1, 0, 2),
        "embed/embeddings": (2, 1),
        "norm/gamma": (1,),
    }
    variables = by_path(copy)
    for path, index in places.items():
        variable = variables[path]
        before, step, total = np.array(variable), 1e-5, 0.0
        for i in range(len(y)):
            sides = []
            for sign in (1, -1):
                moved = before.copy()
                moved[index] += sign * step
                variable.assign(moved)
                sides.append(float(loss(x, y, i)))
            total += ((sides[0] - sides[1]) / (2 * step)) ** 2 / len(y)
        variable.assign(before)
        assert measured[f"fisher/{path}"][index] == pytest.approx(total, rel=1e-4)


def test_estimating_leaves_the_model_alone():
    model = trained_mixed(strength=1.0, **EXACT)
    before = [np.array(w) for w in model.weights]
    pass_statistics(model, mixed_data(), batch_size=4)
    for a, b in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_batch_is_the_squared_mean_gradient_times_the_batch_size():
    model = compiled(strength=1.0, fisher=DiagonalFisher("batch"))
    x, y = blobs(40)
    with tf.GradientTape() as tape:
        loss = LOSS(y, model(x))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    measured = pass_statistics(model, (x, y), batch_size=40)
    for path, gradient in zip(paths(model), gradients, strict=True):
        fisher = measured[f"fisher/{path}"]
        np.testing.assert_allclose(fisher, 40 * np.asarray(gradient) ** 2, rtol=1e-4, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(gamma=st.floats(0, 0.999), seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 30))
def test_the_moving_average_equals_its_closed_form(gamma, seed, steps):
    fisher = DiagonalFisher(gamma=gamma)
    fisher.build({"w": (3,)})
    estimates = np.random.default_rng(seed).uniform(0, 10, (steps, 3)).astype("float32")
    for estimate in estimates:
        fisher.update({"w": tf.constant(estimate)})
    shares = (1 - gamma) * gamma ** np.arange(steps - 1, -1, -1, dtype="float64")
    expected = (shares[:, None] * estimates).sum(0) / shares.sum()
    np.testing.assert_allclose(fisher.estimate()["w"], expected, rtol=2e-4)


@pytest.mark.parametrize("every", sweep([1, 2], 2))
@pytest.mark.parametrize("estimator", ["batch", "empirical"])
def test_training_updates_it_at_every_nth_step(estimator, every):
    x, y = blobs(40)
    model = compiled(
        optimizer=keras.optimizers.SGD(0.0),
        strength=1.0,
        fisher=DiagonalFisher(estimator, gamma=0.5, every=every),
    )
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    starts = range(0, 40, 8 * every)
    batches = [pass_statistics(model, (x[i : i + 8], y[i : i + 8]), 8) for i in starts]
    shares = 2.0 ** np.arange(len(batches))
    for path, value in model.fisher.estimate().items():
        total = sum(share * batch[path] for share, batch in zip(shares, batches, strict=True))
        np.testing.assert_allclose(value, total / shares.sum(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("estimator", sweep(["batch", "empirical"], "batch"))
def test_it_sees_neither_penalty_nor_regularisation(estimator):
    x, y = blobs(24)

    def online(**dense):
        keras.utils.set_random_seed(1)
        model = compiled(
            mlp(**dense),
            optimizer=keras.optimizers.SGD(0.0),
            strength=100.0,
            fisher=DiagonalFisher(estimator, gamma=0.9, every=1),
        )
        model.fit(x, y, shuffle=False, verbose=0)
        return model

    plain = online()
    expected = plain.fisher.estimate()
    decayed = online(kernel_regularizer="l2", activity_regularizer="l2", bias_regularizer="l1")
    for path, value in decayed.fisher.estimate().items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=1e-9)
    # The penalty must not affect the estimate for the same weights and data.
    plain.consolidate()
    plain.regularizer.anchors["hidden/kernel"].assign_add(tf.ones((6, 8)))
    assert float(plain.penalty()) > 1
    plain.fit(x, y, shuffle=False, verbose=0)
    for path, value in plain.fisher.estimate().items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-6)


def test_mixed_precision_gives_the_float32_fisher():
    x, y = blobs(256)
    measured = {}
    for policy in ("float32", "mixed_float16"):
        for estimator in ("batch", "empirical"):
            keras.utils.set_random_seed(3)
            with dtype_policy(policy):
                model = compiled(
                    optimizer=keras.optimizers.SGD(0.0),
                    strength=1.0,
                    fisher=DiagonalFisher(estimator, gamma=0.9, every=1),
                )
            model.fit(x, y, shuffle=False, verbose=0)
            measured[policy, estimator, "online"] = model.fisher.estimate()
            measured[policy, estimator, "pass"] = pass_statistics(model, (x, y), 64)
    for estimator in ("batch", "empirical"):
        for form in ("online", "pass"):
            full = measured["float32", estimator, form]
            half = measured["mixed_float16", estimator, form]
            for path, value in full.items():
                assert np.abs(half[path] - value).sum() <= 0.02 * value.sum(), (path, estimator)


def test_batches_that_overflow_leave_no_trace():
    fisher = DiagonalFisher(gamma=0.5)
    fisher.build({"w": (1,)})
    fisher.update({"w": tf.constant([3.0])}, valid=tf.constant(True))
    fisher.update({"w": tf.constant([np.inf])}, valid=tf.constant(False))
    np.testing.assert_allclose(fisher.estimate()["w"], [3.0])


def test_influence_weighs_examples_by_their_residual_and_all_by_their_margin():
    model = compiled(strength=1.0, fisher=DiagonalFisher("influence", None))
    x, y = blobs(9)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    squares, residuals, margins = [], [], []
    for i in range(9):
        with tf.GradientTape() as tape:
            logits = copy(x[i : i + 1])
            loss = LOSS(y[i : i + 1], logits)
        gradients = tape.gradient(loss, [v.value for v in copy.trainable_variables])
        squares.append([np.asarray(g) ** 2 for g in gradients])
        residuals.append(
            float(np.sum((np.eye(3)[y[i]] - keras.ops.softmax(logits[0]).numpy()) ** 2))
        )
        lower, highest = np.sort(logits[0])[-2:]
        margins.append((highest - lower) ** 2)
    weights = 1 / (np.array(residuals) + np.median(residuals)) / (np.mean(margins) + 0.1) / 9
    measured = pass_statistics(model, (x, y), 9)
    blocks = model.fisher.blocks(model, by_path(model), measured)
    for k, path in enumerate(paths(model)):
        value = blocks[path].values
        expected = sum(w * s[k] for w, s in zip(weights, squares, strict=True))
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-9)


def probabilities(kind, outputs):
    if kind == "binary":
        return 1 / (1 + np.exp(-outputs))
    shifted = np.exp(outputs - outputs.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


CROSS_ENTROPIES = {
    "sparse": (keras.losses.SparseCategoricalCrossentropy, lambda y: y),
    "categorical": (keras.losses.CategoricalCrossentropy, lambda y: np.eye(3, dtype="float32")[y]),
    "binary": (keras.losses.BinaryCrossentropy, lambda y: (y[:, None] == 0).astype("float32")),
}


@pytest.mark.parametrize("from_logits", sweep([True, False], True))
@pytest.mark.parametrize("estimator", ["mc", "negated"])
@pytest.mark.parametrize("kind", CROSS_ENTROPIES)
def test_drawn_labels_and_negated_logits(kind, estimator, from_logits):
    """Compared with a linear model in float64 NumPy; sampled labels are compared in expectation."""
    loss, labels = CROSS_ENTROPIES[kind]
    units = 1 if kind == "binary" else 3
    inputs = keras.Input((6,))
    z = layers.Dense(units, name="head")(inputs)
    last = {"binary": "sigmoid"}.get(kind, "softmax")
    outputs = z if from_logits else layers.Activation(last)(z)
    settings = {"fisher": DiagonalFisher(estimator, None), "strength": 1.0}
    model = DWDModel(inputs, outputs, grouping=None, **settings)
    model.compile("sgd", loss(from_logits=from_logits))
    x, y = blobs(8)
    target = labels(y)
    logits = x.astype("float64") @ np.asarray(model.weights[0], "float64") + 0.0
    p = probabilities(kind, logits)
    if estimator == "negated":
        onehot = target if kind != "sparse" else np.eye(3)[y]
        squares = (probabilities(kind, -logits) - onehot) ** 2
    else:
        squares = p * (1 - p)  # the variance of a sampled label
    expected = np.einsum("bi,bo->io", x.astype("float64") ** 2, squares) / len(x)
    times = 1 if estimator == "negated" else 4000
    measured = pass_statistics(
        model, (np.tile(x, (times, 1)), np.concatenate([target] * times)), 400
    )
    np.testing.assert_allclose(
        measured["fisher/head/kernel"], expected, rtol=1e-3 if times == 1 else 0.06
    )


def test_drawn_labels_of_a_mean_squared_error():
    """The Fisher information of a normal distribution of variance n / 2: 2 / n per output."""
    inputs = keras.Input((6,))
    model = DWDModel(
        *(inputs, layers.Dense(4, name="head")(inputs)),
        **{"strength": 1.0, "grouping": None, "fisher": DiagonalFisher("mc", None)},
    )
    model.compile("sgd", "mse")
    x, _ = blobs(8)
    measured = pass_statistics(model, (np.tile(x, (3000, 1)), np.zeros((24000, 4), "float32")), 400)
    expected = np.repeat((x.astype("float64") ** 2).mean(0)[:, None], 4, 1) * 2 / 4
    np.testing.assert_allclose(measured["fisher/head/kernel"], expected, rtol=0.06)


def test_any_loss_has_an_exact_fisher_and_no_drawn_labels():
    def loss(y, y_pred):
        return tf.reduce_sum(tf.abs(y_pred - y) ** 3, axis=-1)

    inputs = keras.Input((6,))
    x, y = blobs(8)[0], np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    for estimator in ("empirical", "mc"):
        fisher = DiagonalFisher(estimator, None)
        model = DWDModel(
            inputs, layers.Dense(2, name="head")(inputs), fisher=fisher, strength=1.0, grouping=None
        )
        model.compile("sgd", loss)
        if estimator == "mc":
            with pytest.raises(ValueError, match="MeanSquaredError"):
                pass_statistics(model, (x, y), 8)
            continue
        measured = pass_statistics(model, (x, y), 8)["fisher/head/kernel"]
        residual = x.astype("float64") @ np.asarray(model.weights[0], "float64") - y
        g = 3 * np.sign(residual) * residual**2
        expected = np.einsum("bi,bo->io", x.astype("float64") ** 2, g**2) / 8
        np.testing.assert_allclose(measured, expected, rtol=1e-3)


@pytest.mark.parametrize("accumulation", [None, 2])
def test_adams_second_moment_times_the_batch_size(accumulation):
    x, y = blobs(32)
    inner = keras.optimizers.Adam(0.0, beta_2=0.5, gradient_accumulation_steps=accumulation)
    model = compiled(optimizer=DWDOptimizer(inner), fisher=DiagonalFisher("adam"), strength=100.0)
    size = 8 * (accumulation or 1)
    squares = []
    for i in range(0, 32, size):
        with tf.GradientTape() as tape:
            loss = LOSS(y[i : i + size], model(x[i : i + size]))
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        squares.append([np.asarray(g, "float64") ** 2 for g in gradients])
    shares = 0.5 ** np.arange(len(squares))[::-1]
    for pulled in (False, True):
        for variable in model.optimizer.inner_optimizer.variables:
            if variable is not inner.learning_rate:
                variable.assign(tf.zeros_like(variable))
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        measured = model.fisher.estimate(model.optimizer, trainable_by_path(model))
        for k, path in enumerate(paths(model)):
            mean = sum(w * s[k] for w, s in zip(shares, squares, strict=True)) / shares.sum()
            np.testing.assert_allclose(
                measured[f"fisher/{path}"], size * mean, rtol=1e-3, atol=1e-8
            )
        if not pulled:
            model.consolidate()
            # The learning rate is zero, so the penalty cannot change the weights.
            model.regularizer.anchors["hidden/kernel"].assign_add(tf.ones((6, 8)))
            assert float(model.penalty()) > 1


def test_adams_second_moment_needs_a_decoupled_pull_and_no_data():
    model = compiled(optimizer="adam", fisher=DiagonalFisher("adam"), strength=1.0)
    with pytest.raises(ValueError, match="`DWDOptimizer`"):
        model.fit(*blobs(), verbose=0)
    model = compiled(optimizer=DWDOptimizer("sgd"), fisher=DiagonalFisher("adam"), strength=1.0)
    model.fit(*blobs(), verbose=0)
    with pytest.raises(ValueError, match="around Adam"):
        model.consolidate()
    with pytest.raises(ValueError, match="leave `x` out"):
        model.consolidate(blobs())
    assert model.tasks_learned == 0


def test_sample_weights_count_examples():
    model = compiled(strength=1.0, **EXACT)
    x, y = blobs(10)
    weight = np.array([2, 1, 0, 0, 1, 1, 1, 1, 1, 2], "float32")
    repeated = np.repeat(np.arange(10), weight.astype(int))
    once = pass_statistics(model, (x, y, weight), 4)
    twice = pass_statistics(model, (x[repeated], y[repeated]), 4)
    for path, value in once.items():
        np.testing.assert_allclose(value, twice[path], rtol=1e-4, atol=1e-9)


def test_there_must_be_an_estimate():
    model = compiled(strength=1.0)
    with pytest.raises(ValueError, match="no online Fisher estimate"):
        model.consolidate()


@pytest.mark.parametrize("gamma", [1.0, -0.1, float("nan"), "x"])
def test_bad_gamma(gamma):
    with pytest.raises(ValueError, match="`gamma`"):
        DiagonalFisher(gamma=gamma)


def sequences(mask=False, outputs=1):
    """A network with an output for each time step, and data for it."""
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=mask, name="embed")(inputs)
    x = layers.Dense(4, activation="tanh", name="hidden")(x)
    heads = [layers.Dense(3, name=f"head_{i}")(x) for i in range(outputs)]
    rng = np.random.default_rng(0)
    x = rng.integers(0, 7, (6, 5)).astype("int32")
    y = [rng.integers(0, 3, (6, 5)).astype("int32") for _ in heads]
    single = outputs == 1
    return keras.Model(inputs, heads[0] if single else heads), x, y[0] if single else y


def loop(model, loss_of, count):
    """Mean square over examples of ∂ loss_of(i) / ∂θ, by path."""
    values = [v.value for v in model.trainable_variables]
    total = [np.zeros(v.shape) for v in values]
    for i in range(count):
        with tf.GradientTape() as tape:
            loss = loss_of(i)
        for t, g in zip(total, tape.gradient(loss, values), strict=True):
            t += np.asarray(tf.convert_to_tensor(g), "float64") ** 2 / count
    return dict(zip(paths(model), total, strict=True))


def assert_fisher_is(model, data, expected):
    measured = pass_statistics(model, data, batch_size=4)
    assert set(measured) == {f"fisher/{path}" for path in expected}
    for path, reference in expected.items():
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * reference.max()}
        np.testing.assert_allclose(measured[f"fisher/{path}"], reference, **tolerance)


def cross_entropies(model, x, y, i, output=0):
    logits = tf.nest.flatten(model(x[i : i + 1], training=False))[output]
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y[i], logits[0])


def test_weights_of_time_steps_are_part_of_the_loss():
    base, x, y = sequences()
    model = DWDModel.from_model(base, **EXACT)
    model.compile("sgd", LOSS)
    w = np.random.default_rng(1).uniform(0, 2, (6, 5)).astype("float32")

    def loss_of(i):  # whose square is that of one step: gradients of steps do not correlate
        each = w[i] * cross_entropies(model, x, y, i)
        return tf.reduce_sum(each) / np.linalg.norm(w[i])

    assert_fisher_is(model, (x, y, w), loop(model, loss_of, len(x)))
    online = DWDModel.from_model(base)
    online.compile("sgd", LOSS)
    online.fit(x, y, sample_weight=w, verbose=0)
    online.consolidate()


@pytest.mark.long
def test_weights_of_outputs_are_part_of_the_loss():
    base, x, y = sequences(outputs=2)
    model = DWDModel.from_model(base, **EXACT)
    model.compile("sgd", [LOSS, LOSS])
    w = [np.random.default_rng(i).uniform(0, 2, (6, 1)).astype("float32") for i in (1, 2)]

    def loss_of(i):
        parts = (cross_entropies(model, x, y[o], i, o) for o in (0, 1))
        means = [w[o][i] * tf.reduce_mean(part) for o, part in enumerate(parts)]
        return np.sqrt(5) * tf.add_n(means)  # of five steps

    assert_fisher_is(model, (x, y, w), loop(model, loss_of, len(x)))


def test_masked_time_steps_do_not_count():
    base, x, y = sequences(mask=True)
    assert (x == 0).any()
    assert (x != 0).any(axis=1).all()
    model = DWDModel.from_model(base, **EXACT)
    model.compile("sgd", LOSS)

    def loss_of(i):
        seen = x[i] != 0
        each = tf.boolean_mask(cross_entropies(model, x, y, i), seen)
        return tf.reduce_sum(each) / np.sqrt(seen.sum())

    assert_fisher_is(model, (x, y), loop(model, loss_of, len(x)))


@pytest.mark.filterwarnings("ignore:The output .* has no activation")  # the outputs are given
def test_margins_are_distances_of_logits():
    logits = np.array([[1.0, 4.0, -2.0], [0.5, 0.25, 0.0]], "float32")
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gaps = np.array([9.0, 0.0625])
    cases = [
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), logits, gaps),
        (keras.losses.CategoricalCrossentropy(), probabilities, gaps),
        (keras.losses.BinaryCrossentropy(from_logits=True), logits, (logits**2).mean(1)),
        (keras.losses.BinaryCrossentropy(), 1 / (1 + np.exp(-logits)), (logits**2).mean(1)),
        (keras.losses.MeanSquaredError(), logits, np.full(2, 25.0)),
    ]
    for loss, outputs, expected in cases:
        model = compiled()
        model.compile("sgd", loss)
        (found,) = squared_margins(model, tf.constant(outputs, "float32"))
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", sweep(["sparse", "categorical", "binary"], "categorical"))
def test_influence_is_the_same_for_probabilities_and_logits(kind):
    x, y = blobs(40)
    activation = "sigmoid" if kind == "binary" else "softmax"
    if kind != "sparse":
        y = np.eye(3, dtype="float32")[y]
    losses = {
        "sparse": keras.losses.SparseCategoricalCrossentropy,
        "categorical": keras.losses.CategoricalCrossentropy,
        "binary": keras.losses.BinaryCrossentropy,
    }
    of_logits = mlp()
    of_probabilities = keras.Sequential(
        [keras.Input((6,)), *of_logits.layers, layers.Activation(activation)]
    )
    found = []
    for base, from_logits in ((of_logits, True), (of_probabilities, False)):
        model = DWDModel.from_model(base, fisher=DiagonalFisher("influence", None), grouping=None)
        model.compile("sgd", losses[kind](from_logits=from_logits))
        found.append(pass_statistics(model, (x, y), 40))
    assert found[0].keys() == found[1].keys()
    for path, values in found[0].items():
        np.testing.assert_allclose(values, found[1][path], rtol=1e-2, atol=1e-5 * values.max())


def test_negated_probabilities_of_zero_are_no_obstacle():
    base = keras.Sequential([keras.Input((6,)), layers.Dense(3, "softmax", name="head")])
    model = DWDModel.from_model(base, fisher=DiagonalFisher("negated", None), grouping=None)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy())
    x, y = blobs(8)
    found = pass_statistics(model, (1000 * x, y), 8)  # most of the probabilities are exactly 0
    assert all(np.isfinite(values).all() for values in found.values())


def test_layers_that_inference_does_not_call_have_no_fisher_information(monkeypatch):
    class Auxiliary(keras.Model):
        def __init__(self):
            super().__init__()
            self.head, self.other = layers.Dense(3, name="head"), layers.Dense(3, name="other")

        def call(self, x, training=False):
            return self.head(x) + self.other(x) if training else self.head(x)

    base = Auxiliary()
    x, y = blobs(8)
    base(x, training=True)
    model = compiled(base, **EXACT)
    monkeypatch.setattr("keras_dwd.curvature.fisher.one_by_one", None)  # the slow path
    model.fit(x, y, verbose=0)
    model.consolidate((x, y))
    assert len(model.regularizer.precisions) == 2


@pytest.mark.parametrize(("earlier", "now"), [("exact", "empirical"), ("sampled", "mc")])
@pytest.mark.parametrize("kind", [DiagonalFisher, KroneckerFisher])
def test_earlier_names_of_estimators_are_accepted(kind, earlier, now):
    fisher = kind(earlier)
    assert fisher.estimator == now
    assert fisher.get_config() == kind(now).get_config()
    again = kind.from_config(fisher.get_config() | {"estimator": earlier})  # as in earlier files
    assert again.estimator == now


def test_a_step_that_overflows_leaves_the_online_estimate_as_it_was():
    with dtype_policy("mixed_float16"):
        model = compiled(fisher=DiagonalFisher("batch", every=1), strength=1.0)
    x, y = blobs(16)
    model.train_on_batch(x, y)
    before = model.fisher.state()
    assert before["fisher_weight"] > 0
    model.optimizer.dynamic_scale.assign(1e38)
    model.train_on_batch(x, y)
    after = model.fisher.state()
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    model.optimizer.dynamic_scale.assign(1024.0)
    model.train_on_batch(x, y)
    assert model.fisher.state()["fisher_weight"] > before["fisher_weight"]


def test_labels_of_a_task_are_drawn_alike_whatever_came_before_it():
    fisher = DiagonalFisher("mc", gamma=0.5, every=1)
    model = compiled(optimizer=keras.optimizers.SGD(0.0), fisher=fisher, strength=1.0)
    x, y = blobs(24)
    found = []
    for _ in "ab":
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        found.append(model.fisher.estimate())
        assert int(model.fisher.state()["fisher_looked"]) == 24
        model.fisher.reset()
        assert all(np.all(array == 0) for array in model.fisher.state().values())
    for name, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][name], err_msg=name)


def test_examples_without_weight_do_not_count_for_the_influence_of_others():
    x, y = blobs(13)
    weight = np.where(np.arange(13) % 3 == 1, 0.0, 1.0)
    there = weight > 0
    assert there.sum() == 9
    base = mlp()
    found = []
    for data in ((x, y, weight), (x[there], y[there])):
        model = compiled(
            keras.models.clone_model(base),
            fisher=DiagonalFisher("influence", None),
            strength=1.0,
            grouping=None,
        )
        model.set_weights(base.get_weights())
        model.consolidate(data)
        found.append(model.regularizer.precisions)
    assert found[0].keys() == found[1].keys()
    for path, block in found[0].items():
        expected = np.array(found[1][path].values) * 9 / 13  # a mean over all, of weight or none
        np.testing.assert_allclose(block.values, expected, rtol=1e-4, err_msg=path)


def test_gradients_too_small_for_float16_are_in_the_fisher_information():
    with dtype_policy("mixed_float16"):
        base = mlp()
    model = compiled(base, strength=1.0, fisher=DiagonalFisher("empirical", None), grouping=None)
    head = model.get_layer("head")
    head.kernel.assign(tf.zeros((8, 3)))
    head.bias.assign([18.0, 0.0, 0.0])  # the other labels have a probability of 1.5e-8
    model.consolidate((blobs(8)[0], np.zeros(8, "int32")))
    p = np.exp([18.0, 0.0, 0.0]) / np.exp([18.0, 0.0, 0.0]).sum()
    found = np.array(model.regularizer.precisions["head/bias"].values, "float64")
    # Of the first label float32 itself has lost it: 1 − p is zero.
    np.testing.assert_allclose(found[1:], p[1:] ** 2, rtol=0.05)


@pytest.mark.parametrize("estimator", ["batch", "empirical"])
def test_nothing_of_one_task_is_in_the_estimate_of_the_next(estimator):
    def learner(base):
        fisher = DiagonalFisher(estimator, gamma=0.9, every=1)
        return compiled(base, keras.optimizers.SGD(0.0), fisher=fisher, strength=1.0, grouping=None)

    model = learner(mlp())
    first, second = blobs(24), blobs(24, seed=1)
    model.fit(*first, batch_size=8, shuffle=False, verbose=0)
    model.consolidate()
    model.get_layer("head").bias.assign_add([0.1, 0.0, 0.0])
    with pytest.raises(ValueError, match="no online Fisher estimate"):
        model.consolidate()
    fresh = learner(keras.models.clone_model(keras.Model(model.inputs, model.outputs)))
    fresh.set_weights(model.get_weights())
    for each in (model, fresh):
        each.fit(*second, batch_size=8, shuffle=False, verbose=0)
    expected = fresh.fisher.estimate()
    assert expected.keys() == model.fisher.estimate().keys()
    for name, value in model.fisher.estimate().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-9, err_msg=name)
