"""Batch normalization with statistics for each task, and the conversion of plain models to it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, dtype_policy, pass_statistics, sweep
from keras import layers

from keras_dwd import DiagonalFisher, DWDModel, KroneckerFisher
from keras_dwd.curvature import rules
from keras_dwd.layers import TaskHeads, TaskNormalization, with_task_normalization

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TASKS = 3


def batch(task, seed=0, count=16):
    x, y = blobs(count, seed=seed)
    return (2.0 * x + task, np.full(count, task, "int32")), y


def normalized_net(tasks=TASKS, **settings):
    x, task = keras.Input((6,)), keras.Input((), dtype="int32", name="task")
    h = layers.Dense(5, name="hidden")(x)
    h = TaskNormalization(tasks, momentum=0.8, name="norm", **settings)(h, task)
    outputs = layers.Dense(3, name="head")(layers.Activation("relu")(h))
    return keras.Model([x, task], outputs)


def learner(fisher=None, strength=1.0, optimizer=None, tasks=TASKS, **settings):
    keras.utils.set_random_seed(1)
    fisher = fisher or DiagonalFisher("batch")
    model = DWDModel.from_model(
        normalized_net(tasks, **settings), fisher=fisher, grouping=None, strength=strength
    )
    model.compile(optimizer or keras.optimizers.AdamW(0.01, weight_decay=0.1), LOSS)
    return model


SHAPES = {
    "dense": ((8, 5), -1, None),
    "images": ((8, 4, 3, 5), -1, None),
    "channels_first": ((8, 5, 4, 3), 1, None),
    "masked": ((8, 4, 5), -1, np.random.default_rng(3).uniform(size=(8, 4)) < 0.6),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_batch_of_one_task_is_normalized_as_by_batch_normalization(case):
    """Outputs, gradients and moving statistics, over several steps, also of a second task."""
    shape, axis, mask = SHAPES[case]
    rng = np.random.default_rng(0)
    plain = layers.BatchNormalization(axis=axis, momentum=0.9)
    layer = TaskNormalization(TASKS, axis=axis, momentum=0.9)
    for task in (1, 1, 2, 2):
        x = tf.constant(rng.normal(1.0, 3.0, shape).astype("float32"))
        upstream = rng.normal(size=shape).astype("float32")
        found = []
        ids = np.full((shape[0], 1), task, "int32")
        for call in (
            lambda x: plain(x, training=True, mask=mask),
            lambda x, ids=ids: layer(x, ids, training=True, mask=mask),
        ):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = call(x)
                loss = tf.reduce_sum(y * upstream)
            owner = plain if not found else layer
            variables = [owner.gamma.value, owner.beta.value]
            found.append([y, *tape.gradient(loss, [x, *variables])])
        for expected, ours in zip(*found, strict=True):
            scale = float(np.abs(expected).max())
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6 * scale)
        for name in ("moving_mean", "moving_variance"):
            expected = np.asarray(getattr(plain, name))
            np.testing.assert_allclose(getattr(layer, name)[task], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer(x, ids), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_task_affine", [False, True])
def test_each_example_of_a_mixed_batch_has_the_statistics_of_its_task(per_task_affine):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 4, 2)).astype("float32")
    task = np.array([0, 2, 0, 2, 2, 0, 0, 2, 2], "int32")
    layer = TaskNormalization(TASKS, momentum=0.5, per_task_affine=per_task_affine)
    layer(x, task)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    found = np.asarray(layer(x, task, training=True))
    for t in (0, 2):
        own = x[task == t].astype("float64")
        mean, variance = own.mean((0, 1)), own.var((0, 1))
        gamma, beta = (np.asarray(v)[t if per_task_affine else ...] for v in layer.weights[:2])
        expected = gamma * (own - mean) / np.sqrt(variance + 1e-3) + beta
        np.testing.assert_allclose(found[task == t], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.moving_mean[t], mean / 2, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer.moving_variance[t], (1 + variance) / 2, rtol=1e-4)
    np.testing.assert_array_equal(layer.moving_mean[1], np.zeros(2))
    np.testing.assert_array_equal(layer.moving_variance[1], np.ones(2))


def test_a_task_never_trained_uses_the_statistics_of_the_task_trained_last():
    layer = TaskNormalization(TASKS)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 4)).astype("float32")
    plain = np.asarray(layer(x, np.full(8, 1)))  # mean zero, variance one
    np.testing.assert_allclose(plain, x / np.sqrt(1.001), rtol=1e-5)
    for last in (1, 0, 1):
        layer(rng.normal(3.0, size=(8, 4)).astype("float32"), np.full(8, last), training=True)
        of_last, of_new = (np.asarray(layer(x, np.full(8, t))) for t in (last, 2))
        np.testing.assert_allclose(of_new, of_last, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(layer(x, np.full(8, 0)), layer(x, np.full(8, 1)))


def test_a_frozen_layer_keeps_its_statistics():
    layer = TaskNormalization(TASKS)
    layer.trainable = False
    (x, task), _ = batch(1)
    np.testing.assert_array_equal(layer(x, task, training=True), layer(x, task))
    assert not np.any(layer.moving_mean)


def test_a_task_without_a_position_that_counts_keeps_its_statistics():
    layer = TaskNormalization(2)
    x = np.random.default_rng(0).normal(size=(4, 3, 2)).astype("float32")
    mask = np.repeat([[True], [True], [False], [False]], 3, 1)
    y = layer(x, np.array([0, 0, 1, 1]), training=True, mask=mask)
    assert np.isfinite(y).all()
    assert np.any(layer.moving_mean[0])
    assert not np.any(layer.moving_mean[1])


def test_a_mask_of_keras_is_heeded_and_passed_on():
    words, task = keras.Input((4,), dtype="int32"), keras.Input((), dtype="int32")
    e = layers.Embedding(5, 3, mask_zero=True, name="e")(words)
    layer = TaskNormalization(2, momentum=0.0, name="norm")
    model = keras.Model([words, task], layers.LSTM(2)(layer(e, task)))
    x = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    model([x, np.array([1, 1])], training=True)
    rows = np.asarray(model.get_layer("e").embeddings)[[1, 2, 3]]
    np.testing.assert_allclose(layer.moving_mean[1], rows.mean(0), rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="one dimension less"):
        layer(np.ones((2, 4, 3)), np.array([1, 1]), training=True, mask=np.ones((2, 4, 3)))


@pytest.mark.parametrize("per_task_affine", sweep([False, True], True))
def test_training_a_task_leaves_what_others_have_exactly_as_it_is(per_task_affine):
    model = learner(strength=10.0, per_task_affine=per_task_affine, gamma_regularizer="l2")
    norm = model.get_layer("norm")
    per_task = [norm.moving_mean, norm.moving_variance]
    per_task += [norm.gamma, norm.beta] if per_task_affine else []
    for task in range(TASKS):
        before = [np.array(v) for v in per_task]
        model.fit(*batch(task, seed=task), epochs=2, batch_size=8, verbose=0)
        for old, variable in zip(before, per_task, strict=True):
            new = np.array(variable)
            for t in range(TASKS):
                assert np.array_equal(old[t], new[t]) == (t != task)
        model.consolidate()


def test_with_one_task_a_model_trains_as_with_batch_normalization():
    inputs = keras.Input((6,))
    h = layers.Dense(5, name="hidden")(inputs)
    h = layers.BatchNormalization(momentum=0.8, name="norm")(h)
    outputs = layers.Dense(3, name="head")(layers.Activation("relu")(h))
    plain = keras.Model(inputs, outputs)
    model = learner(strength=0.0, optimizer=keras.optimizers.SGD(0.1, 0.9))
    for name in ("hidden", "head"):
        plain.get_layer(name).set_weights(model.get_layer(name).get_weights())
    plain.compile(keras.optimizers.SGD(0.1, 0.9), LOSS)
    for task in (2, 0):
        (x, ids), y = batch(task, seed=task)
        plain.fit(x, y, epochs=3, batch_size=8, shuffle=False, verbose=0)
        model.fit((x, ids), y, epochs=3, batch_size=8, shuffle=False, verbose=0)
        np.testing.assert_allclose(
            model.predict((x, ids), verbose=0), plain.predict(x, verbose=0), rtol=1e-3, atol=1e-4
        )


def float64_gradients(model, x, task, y, per_task):
    """∂ℓ/∂γ and ∂ℓ/∂β of each example, in inference mode, by hand."""
    w = {
        n: [np.asarray(v, "float64") for v in model.get_layer(n).weights]
        for n in ("hidden", "head")
    }
    norm = model.get_layer("norm")
    gamma, beta, mean, variance = (
        np.asarray(v, "float64")
        for v in (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
    )
    found = [np.zeros((len(y), *gamma.shape)), np.zeros((len(y), *beta.shape))]
    for b, t in enumerate(task):
        place = t if per_task else ...
        h = x[b].astype("float64") @ w["hidden"][0] + w["hidden"][1]
        n = (h - mean[t]) / np.sqrt(variance[t] + norm.epsilon)
        a = gamma[place] * n + beta[place]
        logits = np.maximum(a, 0) @ w["head"][0] + w["head"][1]
        p = np.exp(logits - logits.max())
        g = w["head"][0] @ (p / p.sum() - np.eye(3)[y[b]]) * (a > 0)
        found[0][b][place] = g * n
        found[1][b][place] = g
    return found


@pytest.mark.parametrize("per_task", sweep([False, True], True))
def test_the_fisher_information_is_that_of_a_float64_loop_with_the_tasks_own_statistics(
    per_task, monkeypatch
):
    model = learner(DiagonalFisher("empirical", 0.0, every=1), per_task_affine=per_task)
    for task in range(2):
        model.fit(*batch(task, seed=task), batch_size=8, verbose=0)
    parts = [batch(task, seed=4 + task, count=6) for task in range(2)]
    x, task = (np.concatenate([part[0][i] for part in parts]) for i in (0, 1))
    y = np.concatenate([part[1] for part in parts])
    norm = model.get_layer("norm")
    before = [np.array(v) for v in norm.variables]
    ruled = next(r for r in rules.ruled_layers(model) if r.layer is norm)
    assert ruled.rule is not rules.GENERIC
    found = [pass_statistics(model, ((x, task), y), 5)]
    sketched = pass_statistics(
        model, ((x, task), y), 5, KroneckerFisher("empirical", None, correction=64)
    )
    for old, variable in zip(before, norm.variables, strict=True):
        np.testing.assert_array_equal(old, variable)
    monkeypatch.setattr(rules, "_RULES", {})
    found.append(pass_statistics(model, ((x, task), y), 5, DiagonalFisher("empirical", None)))
    monkeypatch.undo()
    exact = float64_gradients(model, x, task, y, per_task)
    for name, gradients in zip(("gamma", "beta"), exact, strict=True):
        expected = (gradients**2).mean(0)
        for statistics in (*found, sketched):
            np.testing.assert_allclose(
                statistics[f"fisher/norm/{name}"], expected, rtol=1e-3, atol=1e-6 * expected.max()
            )


def test_the_online_estimate_has_the_statistics_of_the_task():
    model = learner(DiagonalFisher("empirical", 0.0, every=1), optimizer=keras.optimizers.SGD(0.0))
    norm = model.get_layer("norm")
    for task in range(2):
        model.fit(*batch(task, seed=task), batch_size=8, verbose=0)
    x, y = batch(0, seed=7, count=8)
    model.fit(x, y, batch_size=8, verbose=0)
    # The step updates the moving statistics before it makes the estimate.
    expected = (float64_gradients(model, *x, y, False)[0] ** 2).mean(0)
    found = model.fisher.estimate()["fisher/norm/gamma"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * expected.max())
    assert np.asarray(norm.updated).tolist() == [5, 4, 0]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_dtypes(policy):
    x = np.random.default_rng(0).normal(size=(8, 3, 4))
    exact = TaskNormalization(2)(x.astype("float32"), np.ones(8, int), training=True)
    with dtype_policy(policy):
        layer = TaskNormalization(2)
        y = layer(x, np.ones(8, int), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    assert {layer.gamma.dtype, layer.moving_mean.dtype} == {layer.variable_dtype}
    np.testing.assert_allclose(tf.cast(y, "float32"), exact, rtol=0.02, atol=0.02)


@pytest.mark.long
def test_it_is_compiled_by_xla():
    results = []
    for jit in (False, True):
        model = learner(KroneckerFisher("empirical", every=1), per_task_affine=True)
        model.compile(keras.optimizers.SGD(0.1), LOSS, jit_compile=jit)
        for task in range(2):
            model.fit(*batch(task), batch_size=8, shuffle=False, verbose=0)
            model.consolidate()
        results.append(model.get_weights())
    for plain, compiled in zip(*results, strict=True):
        np.testing.assert_allclose(plain, compiled, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_files_and_export(tmp_path):
    model = learner(per_task_affine=True)
    for task in range(2):
        model.fit(*batch(task, seed=task), verbose=0)
        model.consolidate()
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    model.export(str(tmp_path / "saved"), verbose=False)
    serve = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"]
    name = next(i.name for i in model.inputs if i.name != "task")
    for task in range(TASKS):
        x, ids = batch(task)[0]
        expected = model.predict((x, ids), verbose=0)
        np.testing.assert_array_equal(again.predict((x, ids), verbose=0), expected)
        served = serve(**{name: tf.constant(x), "task": tf.constant(ids)})["output_0"]
        np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-6)
    for each in (model, again):
        each.fit(*batch(2, seed=9), shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_config_and_bad_arguments():
    layer = TaskNormalization(2, axis=1, momentum=0.5, per_task_affine=True, name="n")
    config = layer.get_config()
    assert TaskNormalization.from_config(config).get_config() == config
    assert {config[n] for n in ("tasks", "momentum")} == {2, 0.5}
    with pytest.raises(ValueError, match="`tasks` must be an integer >= 1"):
        TaskNormalization(0)
    with pytest.raises(ValueError, match="`synchronized` must be False"):
        TaskNormalization(2, synchronized=True)
    for axis in (0, 3, -3):
        with pytest.raises(ValueError, match="`axis` must be an axis"):
            TaskNormalization(2, axis=axis)(np.ones((2, 3, 4)), np.zeros(2))


@pytest.mark.parametrize("ids", [-1, TASKS])
def test_ids_of_no_task_are_refused(ids):
    model = learner()
    (x, task), y = batch(0)
    bad = (x, np.full_like(task, ids))
    for call in (lambda: model.fit(bad, y, verbose=0), lambda: model.consolidate((bad, y))):
        with pytest.raises(ValueError, match=r"in \[0, 3\), the number of tasks of `TaskNorm"):
            call()


def test_a_model_for_more_tasks_inherits():
    model = learner(per_task_affine=True)
    for task in range(TASKS):
        model.fit(*batch(task, seed=task), verbose=0)
        model.consolidate()
    larger = learner(tasks=TASKS + 1, per_task_affine=True)
    larger.inherit(model)
    for task in range(TASKS):
        x = batch(task)[0]
        np.testing.assert_allclose(
            larger.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
        )


# The conversion of plain models.


def convolutions(name="net"):
    return [
        layers.Conv2D(4, 3, use_bias=False, name=f"{name}_conv"),
        layers.BatchNormalization(name=f"{name}_norm"),
        layers.ReLU(name=f"{name}_relu"),
    ]


def sequential():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            *convolutions(),
            layers.Dropout(0.5),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def functional():
    inputs = keras.Input((6, 6, 2), name="image")
    x = inputs
    for layer in convolutions():
        x = layer(x)
    x = keras.ops.tanh(x)  # an operation that is no layer
    shared = layers.BatchNormalization(name="shared")
    x = layers.Add()([shared(x), shared(2.0 * x)])
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))


def nested():
    source = keras.Input((6, 6, 2))
    y = source
    for layer in convolutions("inner"):
        y = layer(y)
    inner = keras.Model(source, y, name="inner")
    last = keras.Sequential([keras.Input((8,)), layers.Dense(4), layers.BatchNormalization()])
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="dense")], name="plain")
    a, b = (keras.Input((6, 6, 2), name=n) for n in "ab")
    pooled = [layers.GlobalMaxPooling2D()(inner(x)) for x in (a, b)]  # twice the same model
    outputs = plain(last(layers.Concatenate()(pooled)))
    return keras.Model({"a": a, "b": b}, {"out": outputs, "pooled": pooled[0]})


def with_heads():
    image, task = keras.Input((6, 6, 2)), keras.Input((), dtype="int32", name="task")
    x = image
    for layer in convolutions():
        x = layer(x)
    return keras.Model([image, task], TaskHeads(TASKS, 2)(layers.Flatten()(x), task))


NETS = {"sequential": sequential, "functional": functional, "nested": nested}


def shaken(model):
    rng = np.random.default_rng(2)
    model.set_weights([w + rng.uniform(0.0, 0.5, w.shape) for w in model.get_weights()])
    return model


@pytest.mark.parametrize("per_task_affine", sweep([False, True], True))
@pytest.mark.parametrize("case", NETS)
def test_a_converted_model_predicts_as_before_for_every_task(case, per_task_affine):
    model = shaken(NETS[case]())
    before = model.get_weights()
    converted = with_task_normalization(model, TASKS, per_task_affine)
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(5, 6, 6, 2)).astype("float32") for _ in model.inputs]
    given = dict(zip("ab", images, strict=True)) if case == "nested" else images[0]
    expected = model.predict(given, verbose=0)
    for task in range(TASKS):
        ids = np.full(5, task)
        with_ids = {**given, "task": ids} if case == "nested" else [given, ids]
        found = converted.predict(with_ids, verbose=0)
        keras.tree.map_structure(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
        )
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    shared = {id(v) for v in model.variables} & {id(v) for v in converted.variables}
    assert not shared
    assert converted.name == model.name


@pytest.mark.long
def test_a_converted_model_learns_task_after_task(tmp_path):
    model = DWDModel.from_model(
        with_task_normalization(nested_classifier(), TASKS, True),
        fisher=DiagonalFisher("empirical"),
        grouping=None,
    )
    model.compile("sgd", LOSS)
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    y = np.arange(8) % 3
    for task in range(2):
        model.fit([x + task, np.full(8, task)], y, verbose=0)
        model.consolidate()
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    given = [x, np.arange(8) % TASKS]
    np.testing.assert_array_equal(again.predict(given, verbose=0), model.predict(given, verbose=0))


def nested_classifier():
    inner = keras.Sequential(
        [keras.Input((6,)), layers.Dense(4), layers.BatchNormalization(name="norm")], name="inner"
    )
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Dense(3, name="head")(inner(inputs)))


def test_an_input_of_task_ids_is_used_again():
    model = shaken(with_heads())
    converted = with_task_normalization(model, TASKS)
    assert len(converted.inputs) == 2
    x = np.random.default_rng(0).normal(size=(6, 6, 6, 2)).astype("float32")
    given = [x, np.arange(6) % TASKS]
    np.testing.assert_allclose(
        converted.predict(given, verbose=0), model.predict(given, verbose=0), rtol=1e-5, atol=1e-5
    )


def test_the_dtype_policy_of_a_model_is_kept():
    with dtype_policy("mixed_float16"):
        model = sequential()
    converted = with_task_normalization(model, TASKS)
    assert converted.dtype_policy.name == "mixed_float16"
    norm = converted.get_layer("net_norm")
    assert norm.compute_dtype == "float16"
    assert norm.moving_mean.dtype == "float32"


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization()

    def call(self, x):
        return self.norm(x)


class Special(layers.BatchNormalization):
    pass


def around(layer, shape=(4, 6)):
    return keras.Sequential([keras.Input(shape), layer, layers.Dense(3)])


def test_what_cannot_be_converted_is_refused():
    own = Own()
    own(np.ones((2, 6)))
    floats = keras.Input((), name="task")
    refused = {
        "has none": around(layers.Dense(2)),
        "`TaskNormalization` in place of": own,
        "must be a Keras model": "model",
        "is built": keras.Sequential([layers.BatchNormalization()]),
        "Convert the plain model before it becomes": DWDModel.from_model(sequential()),
        r"'t', a TimeDistributed, cannot be converted": around(
            layers.TimeDistributed(layers.BatchNormalization(), name="t")
        ),
        r"a Special, cannot be converted": around(Special()),
        "a Own, cannot be converted": around(own, (6,)),
        "must be integers of shape": keras.Model(
            [model_input := keras.Input((3,)), floats],
            layers.BatchNormalization()(model_input * floats[:, None]),
        ),
    }
    for message, model in refused.items():
        with pytest.raises(ValueError, match=message):
            with_task_normalization(model, TASKS)
    with pytest.raises(ValueError, match="`tasks` must be an integer"):
        with_task_normalization(sequential(), 0)
