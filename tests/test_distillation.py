import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, dtype_policy, load, long, mlp, moved, saved, state_of, sweep
from keras import layers

from keras_dwd import (
    DiagonalFisher,
    Distillation,
    DWDModel,
    DWDOptimizer,
    DWDRegularizer,
    FileError,
)
from keras_dwd.layers import TaskHeads
from keras_dwd.layers.task_heads import recorded_heads
from keras_dwd.variables import by_path

T = 2.0
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def kl(teacher, student):
    """T² KL(softmax(t / T) ‖ softmax(s / T)) along the last axis."""
    p, q = softmax(teacher / T), softmax(student / T)
    return T**2 * (p * np.log(p / q)).sum(-1)


def bernoulli_kl(teacher, student):
    p, q = sigmoid(teacher / T), sigmoid(student / T)
    return T**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


def linear(units=3, activation=None):
    """One dense layer on `blobs`."""
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(units, activation=activation, name="head")]
    )


def distilling(model, loss, weight=1.0, compile_settings=None, **settings):
    """A compiled model of distillation alone, whose steps are the negative gradient."""
    settings = {"strength": 0.0, "distillation": Distillation(weight, T)} | settings
    made = DWDModel.from_model(model, **settings)
    eager = {"run_eagerly": True, "optimizer": keras.optimizers.SGD(1.0)}
    made.compile(loss=loss, **(eager | (compile_settings or {})))
    return made


def taught(model, x, y, **kwargs):
    """One task; returns the values of its teacher. Then the weights move away from them."""
    model.train_on_batch(x, y, **kwargs)
    model.consolidate(x, y)
    teacher = [np.array(v, "float64") for v in model.weights]
    moved(model, 0.3)
    return teacher


def divergence(model, x, y, sample_weight=None):
    """What a training step adds to what it differentiates."""
    distillation, anchors = model.distillation, model.regularizer.anchors
    before = distillation.teach(model, x, anchors)
    with recorded_heads() as calls:
        outputs = model(x, training=True)
    return float(distillation.loss(model, before, y, outputs, sample_weight, calls))


def added(model, x, y, sample_weight=None):
    """What distillation adds to the gradient in a step."""
    before = model.get_weights()
    model.train_on_batch(x, y, sample_weight)
    after = model.get_weights()
    model.set_weights(before)
    plain = keras.Model(model.input, model.output)
    config = model.get_compile_config()
    plain.compile(
        keras.optimizers.SGD(1.0),
        model.loss,
        loss_weights=config["loss_weights"],
        run_eagerly=True,
    )
    plain.train_on_batch(x, y, sample_weight)
    without = plain.get_weights()
    model.set_weights(before)
    return [np.array(b, "float64") - a for a, b in zip(after, without, strict=True)]


def check(model, value, x, y, sample_weight=None):
    """Compare value and gradient with those of a function of the weights, in float64."""
    weights = [np.array(v, "float64") for v in model.weights]
    assert divergence(model, x, y, sample_weight) == pytest.approx(value(*weights), rel=1e-3)
    assert value(*weights) > 1e-3
    for weight, gradient in zip(weights, added(model, x, y, sample_weight), strict=True):
        numeric = np.zeros_like(weight)
        for index in np.ndindex(weight.shape):
            at = weight[index]
            sides = []
            for side in (at + 1e-5, at - 1e-5):
                weight[index] = side
                sides.append(value(*weights))
            weight[index] = at
            numeric[index] = (sides[0] - sides[1]) / 2e-5
        np.testing.assert_allclose(gradient, numeric, rtol=2e-3, atol=2e-5)


# The divergences.


@pytest.mark.parametrize("activation", [None, "softmax"])
@pytest.mark.parametrize("sparse", [True, False])
def test_categorical_outputs_are_compared_by_tempered_softmax(activation, sparse):
    x, y = blobs(16)
    kind = "SparseCategoricalCrossentropy" if sparse else "CategoricalCrossentropy"
    labels = y if sparse else keras.utils.to_categorical(y, 3)
    loss = getattr(keras.losses, kind)(from_logits=activation is None)
    model = distilling(linear(activation=activation), loss, weight=0.7)
    k, b = taught(model, x, labels)
    check(model, lambda *w: 0.7 * kl(x @ k + b, x @ w[0] + w[1]).mean(), x, labels)


@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy", "crossentropy of a class"])
def test_only_classes_of_earlier_tasks_are_compared(loss):
    x, y = blobs(16)
    function = loss == "sparse_categorical_crossentropy"
    model = distilling(
        linear(4, "softmax" if function else None),
        loss if function else keras.losses.SparseCategoricalCrossentropy(True, ignore_class=-1),
    )
    old, new = np.where(y == 0, 0, 2), np.where(y == 0, 1, 3)
    if not function:
        old[3] = -1
    k, b = taught(model, x, old)
    pick = [0, 2]
    check(model, lambda *w: kl((x @ k + b)[:, pick], (x @ w[0] + w[1])[:, pick]).mean(), x, new)
    model.train_on_batch(x, new)
    model.consolidate()
    np.testing.assert_array_equal(model.distillation.old[0], True)
    assert not np.asarray(model.distillation.seen[0]).any()


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_binary_outputs_are_compared_by_tempered_sigmoids(activation):
    x, y = blobs(16)
    labels = keras.utils.to_categorical(y, 4)  # the last has no positive label
    model = distilling(
        linear(4, activation), keras.losses.BinaryCrossentropy(from_logits=activation is None)
    )
    k, b = taught(model, x, labels)

    def value(kernel, bias):
        return bernoulli_kl(x @ k + b, x @ kernel + bias)[:, :3].sum() / (16 * 4)

    check(model, value, x, labels)


def test_a_single_binary_output_is_always_compared():
    x, _ = blobs(16)
    labels = np.zeros(16)
    model = distilling(linear(1), keras.losses.BinaryCrossentropy(from_logits=True))
    k, b = taught(model, x, labels)
    check(model, lambda *w: bernoulli_kl(x @ k + b, x @ w[0] + w[1]).mean(), x, labels)


@pytest.mark.parametrize("loss", ["mse", keras.losses.MeanSquaredError(), "Huber"])
def test_values_are_compared_by_the_loss_itself(loss):
    x, _ = blobs(16)
    labels = x[:, :2] * 3
    model = distilling(linear(2), loss, compile_settings={"optimizer": keras.optimizers.SGD(1.0)})
    k, b = taught(model, x, labels)

    def value(kernel, bias):
        difference = np.abs(x @ kernel + bias - x @ k - b)
        if loss != "Huber":
            return (difference**2).mean()
        return np.where(difference < 1, difference**2 / 2, difference - 0.5).mean()

    check(model, value, x, labels)


def test_sample_weights_and_sums_are_those_of_the_loss():
    x, y = blobs(16)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    model = distilling(linear(), loss)
    sample_weight = np.linspace(0, 0.2, 16)
    k, b = taught(model, x, y, sample_weight=sample_weight)
    check(
        model,
        lambda *w: (sample_weight * kl(x @ k + b, x @ w[0] + w[1])).sum(),
        x,
        y,
        sample_weight,
    )


def test_positions_that_the_loss_does_not_count_are_not_compared():
    x = np.array([[1, 2, 3, 0], [3, 1, 0, 0], [2, 2, 1, 3]])
    y = np.array([[0, 1, 1, 2], [1, 0, 2, 2], [1, -1, 0, 1]])
    inputs = keras.Input((4,), dtype="int32")
    embedded = layers.Embedding(4, 3, mask_zero=True, name="embedding")(inputs)
    network = keras.Model(inputs, layers.Dense(3, name="head")(embedded))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    model = distilling(network, loss)
    e, k, b = taught(model, x, y)
    # Class 2 is the label of padding alone.
    np.testing.assert_array_equal(model.distillation.old[0], [True, True, False])
    valid = (x > 0) & (y >= 0)

    def value(embeddings, kernel, bias):
        teacher, student = e[x] @ k + b, embeddings[x] @ kernel + bias
        return kl(teacher[..., :2], student[..., :2])[valid].mean()

    check(model, value, x, y)


def test_classes_that_are_masked_with_infinity_are_left_out():
    x, y = blobs(16)
    inputs, mask = keras.Input((6,)), keras.Input((3,))
    network = keras.Model([inputs, mask], layers.Dense(3, name="head")(inputs) + mask)
    model = distilling(network, SPARSE)
    allowed = np.zeros((16, 3), "float32")
    allowed[:8, 2] = -np.inf
    y = np.where(y == 2, 0, y)
    y[-1] = 2
    k, b = taught(model, [x, allowed], y)

    def value(kernel, bias):
        teacher, student = x @ k + b, x @ kernel + bias
        first = kl(teacher[:8, :2], student[:8, :2])
        return np.concatenate([first, kl(teacher[8:], student[8:])]).mean()

    check(model, value, [x, allowed], y)


def test_several_outputs_are_summed_with_their_weights():
    x, y = blobs(16)
    inputs = keras.Input((6,))
    outputs = {
        "which": layers.Dense(3, name="which")(inputs),
        "where": layers.Dense(2, name="where")(inputs),
    }
    outputs["free"] = layers.ReLU(name="free")(outputs["which"])  # has no loss
    losses = {"which": SPARSE, "where": "mse"}
    weights = {"which": 0.5, "where": 2.0}
    model = distilling(
        keras.Model(inputs, outputs), losses, compile_settings={"loss_weights": weights}
    )
    labels = {"which": y, "where": x[:, :2]}
    before = dict(zip((v.path for v in model.weights), taught(model, x, labels), strict=True))

    def value(*values):
        now = dict(zip((v.path for v in model.weights), values, strict=True))
        t, s = (
            {n: x @ of[f"{n}/kernel"] + of[f"{n}/bias"] for n in losses} for of in (before, now)
        )
        squares = ((t["where"] - s["where"]) ** 2).mean()
        return 0.5 * kl(t["which"], s["which"]).mean() + 2.0 * squares

    check(model, value, x, labels)


def heads_model(activation=None, **compile_settings):
    features, task = keras.Input((6,)), keras.Input((), dtype="int32")
    hidden = layers.Dense(4, name="hidden")(features)
    outputs = TaskHeads(3, 2, activation, name="heads")(hidden, task)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=activation is None)
    return distilling(
        keras.Model([features, task], outputs), loss, compile_settings=compile_settings
    )


def on_task(task, count=16):
    x, y = blobs(count, classes=2)
    return [x, np.full(count, task, "int32")], y


@pytest.mark.parametrize("activation", [None, "softmax"])
def test_all_heads_of_earlier_tasks_are_compared_and_get_no_gradient(activation):
    model = heads_model(activation)
    for task in (0, 2):
        model.train_on_batch(*on_task(task))
        model.consolidate()
    np.testing.assert_array_equal(list(model.distillation.old_heads.values()), [[1, 0, 1]])
    x, y = on_task(1)
    teacher = [np.array(v, "float64") for v in model.weights]
    moved(model, 0.3)
    heads = [np.array(v, "float64") for v in model.weights][2:]

    def value(kernel, bias, *_):
        def of(kernel, bias, heads, biases):
            hidden = x[0] @ kernel + bias
            return [hidden @ heads[task] + biases[task] for task in (0, 2)]

        pairs = zip(of(*teacher), of(kernel, bias, *heads), strict=True)
        return sum(kl(t, s).mean() for t, s in pairs)

    check(model, value, x, y)
    before = np.array(model.get_layer("heads").kernel)
    model.train_on_batch(x, y)
    after = np.array(model.get_layer("heads").kernel)
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert (after[1] != before[1]).any()


# The training step.


@pytest.mark.parametrize("fisher", [DiagonalFisher("batch"), long(DiagonalFisher("empirical"))])
def test_nothing_changes_before_the_first_boundary(fisher):
    x, y = blobs()
    models = [
        compiled(copy.copy(mlp()), fisher=fisher, distillation=given, optimizer="adam")
        for given in (None, Distillation())
    ]
    models[1].set_weights(models[0].get_weights())
    losses = [m.fit(x, y, epochs=2, shuffle=False, verbose=0).history["loss"] for m in models]
    assert losses[0] == losses[1]
    for one, other in zip(*(m.get_weights() for m in models), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("estimator", ["batch", "empirical"])
def test_the_fisher_information_and_the_loss_do_not_see_it(estimator):
    x, y = blobs()
    results = []
    for given in (None, Distillation(5.0)):
        keras.utils.set_random_seed(1)
        model = compiled(
            fisher=DiagonalFisher(estimator, every=1),
            distillation=given,
            strength=10.0,
            compile_settings={"run_eagerly": True},
        )
        model.train_on_batch(x, y)
        model.consolidate()
        moved(model, 0.3)
        loss = model.train_on_batch(x, y)[0]
        slots = {k: a for k, a in state_of(model).items() if k.startswith("fisher")}
        results.append((loss, slots, model.get_weights()))
    (loss, slots, weights), (other_loss, other_slots, other_weights) = results
    assert loss == other_loss
    for key, array in slots.items():
        np.testing.assert_allclose(other_slots[key], array, rtol=1e-5, atol=1e-9)
    assert any((a != b).any() for a, b in zip(weights, other_weights, strict=True))


def normalized(**settings):
    network = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4, name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(3, name="head"),
        ]
    )
    return compiled(network, **settings)


def outputs_of_teacher(model, x):
    return np.asarray(model.distillation.teach(model, x, model.regularizer.anchors).outputs[0])


@pytest.mark.parametrize("anchor", sweep(["latest", "folded"], "latest"))
def test_the_teacher_is_the_model_at_the_boundary_in_inference_mode(anchor):
    x, y = blobs()
    model = normalized(
        regularizer=DWDRegularizer(10.0, anchor=anchor),
        distillation=Distillation(),
        compile_settings={"run_eagerly": True},
    )
    sizes = []
    for seed in range(3):
        model.fit(x, y, epochs=2, verbose=0)
        model.consolidate()
        expected = np.asarray(model(x, training=False))
        state = state_of(model)
        model.fit(x + seed, y, verbose=0)
        np.testing.assert_allclose(outputs_of_teacher(model, x), expected, rtol=1e-4, atol=1e-5)
        sizes.append(sorted(model.distillation.teacher))
        for key, array in state.items():
            if key.startswith(("teacher/", "anchor/")):
                np.testing.assert_array_equal(state_of(model)[key], array)
    # What the penalty has an anchor of is not stored twice.
    norm = ["norm/moving_mean", "norm/moving_variance"]
    assert sizes[0] == sizes[2] == (norm if anchor == "latest" else sorted(by_path(model)))


@pytest.mark.parametrize(
    "settings",
    [
        {"jit_compile": True},
        long({"steps_per_execution": 2}),
        long({"gradient_accumulation_steps": 2}),
    ],
    ids=["jit", "several steps", "accumulation"],
)
def test_it_retains_in_every_kind_of_step(settings):
    x, y = blobs()
    settings = dict(settings)
    steps = settings.pop("gradient_accumulation_steps", None)
    kept = []
    for weight, how in ((0.0, {"run_eagerly": True}), (100.0, settings)):
        keras.utils.set_random_seed(0)
        adam = keras.optimizers.Adam(0.01, gradient_accumulation_steps=steps)
        own = {"optimizer": adam, "run_eagerly": False}
        model = distilling(mlp(), SPARSE, weight, own | how)
        model.fit(x, y, epochs=2, verbose=0)
        model.consolidate()
        before = np.asarray(model(x))
        model.fit(x, (y + 1) % 3, epochs=4, verbose=0)
        kept.append(float(np.abs(np.asarray(model(x)) - before).mean()))
    assert kept[1] < 0.5 * kept[0]


def test_half_precision_is_compared_in_single_precision():
    x, y = blobs()
    with dtype_policy("mixed_float16"):
        model = compiled(mlp(), "adam", distillation=Distillation(), strength=1.0)
        model.fit(x, y, epochs=2, verbose=0)
        model.consolidate()
        before = np.asarray(model(x), "float64")
        moved(model, 0.3)
        expected = kl(before, np.asarray(model(x), "float64")).mean()
        assert divergence(model, x, y) == pytest.approx(expected, rel=0.02)
        history = model.fit(x, y, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert all(np.isfinite(w).all() for w in model.get_weights())


# Files, copies and growth.


@pytest.mark.parametrize("strength", sweep([0.0, 10.0], 10.0))
@pytest.mark.parametrize("at_boundary", sweep([True, False], False))
def test_a_loaded_model_goes_on_as_the_saved_one(tmp_path, strength, at_boundary):
    x, y = blobs()
    model = normalized(distillation=Distillation(2.0), strength=strength, optimizer="adam")
    model.fit(x, np.minimum(y, 1), verbose=0)
    if at_boundary:
        model.consolidate()
        model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.distillation.get_config() == {"weight": 2.0, "temperature": 2.0}
    other = normalized(distillation=Distillation(2.0), strength=strength)
    load(other, saved(model))
    for key, array in state_of(model).items():
        np.testing.assert_array_equal(state_of(loaded)[key], array)
        np.testing.assert_array_equal(state_of(other)[key], array)
    for each in (model, loaded):
        each.fit(x, y, shuffle=False, verbose=0)
        each.consolidate()
        each.fit(x, y, shuffle=False, verbose=0)
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_state_with_a_teacher_fits_a_model_without_distillation_and_the_reverse():
    x, y = blobs()
    with_it, without = (compiled(strength=0.0, distillation=d) for d in (Distillation(), None))
    for model in (with_it, without):
        model.train_on_batch(x, y)
        model.consolidate()
    arrays = saved(with_it), saved(without)
    load(without, arrays[0])
    load(with_it, arrays[1])
    assert with_it.distillation.boundaries == 0
    assert not with_it.distillation.teacher
    with_it.train_on_batch(x, y)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("teacher", np.zeros(5, "float32")),
        ("distillation.old.0", np.zeros(7, "bool")),
        ("distillation.old.1", np.zeros(3, "bool")),
        ("distillation.other", np.zeros(3, "bool")),
        ("distillation.boundaries", np.array(-1)),
    ],
)
def test_a_state_that_does_not_fit_is_refused(name, array):
    x, y = blobs()
    model = compiled(strength=0.0, distillation=Distillation())
    model.train_on_batch(x, y)
    model.consolidate()
    arrays = saved(model)
    key = next((key for key in arrays if key.startswith(f"{name}|")), name)
    before = state_of(model)
    with pytest.raises(FileError, match="The saved"):
        load(model, arrays | {key: array})
    for key, array in state_of(model).items():
        np.testing.assert_array_equal(before[key], array)


def test_clones_and_configurations_have_the_setting():
    model = compiled(distillation=Distillation(3.0, 4.0))
    expected = {"weight": 3.0, "temperature": 4.0}
    assert keras.models.clone_model(model).distillation.get_config() == expected
    assert DWDModel.from_config(model.get_config()).distillation.get_config() == expected
    assert compiled().distillation is None


@pytest.mark.parametrize("strength", [0.0, 10.0])
def test_the_teacher_of_a_grown_model_gives_the_outputs_of_the_smaller_one(strength):
    x, y = blobs()
    model = compiled(mlp(), distillation=Distillation(), strength=strength)
    model.train_on_batch(x, np.minimum(y, 1))
    model.consolidate()
    moved(model, 0.2)
    expected = outputs_of_teacher(model, x)
    network = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(12, activation="tanh", name="hidden"),
            layers.Dense(5, name="classes"),
        ]
    )
    larger = DWDModel.from_model(
        network,
        strength=strength,
        fisher=DiagonalFisher("batch"),
        grouping=None,
        distillation=Distillation(),
    )
    larger.inherit(model, renamed={"head": "classes"})
    larger.compile("sgd", SPARSE)
    larger.train_on_batch(x, y + 2)
    np.testing.assert_array_equal(larger.distillation.old[0], [1, 1, 0, 0, 0])
    outputs = outputs_of_teacher(larger, x)
    np.testing.assert_allclose(outputs[:, :3], expected, rtol=1e-4, atol=1e-5)
    larger.consolidate()
    np.testing.assert_array_equal(larger.distillation.old[0], [1, 1, 1, 1, 1])


# What is refused.


def test_losses_that_do_not_tell_how_to_compare_are_refused_before_training():
    x, y = blobs()
    for loss in (lambda y, p: keras.ops.mean(p), keras.losses.Hinge(), None):
        model = distilling(linear(), loss)
        before = model.get_weights()
        with pytest.raises(ValueError, match="`distillation`"):
            model.fit(x, y, verbose=0)
        for one, other in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_layers_with_states_are_refused():
    inputs = keras.Input(batch_shape=(4, 2, 3))
    outputs = layers.Dense(3)(layers.LSTM(2, stateful=True, name="lstm")(inputs))
    model = distilling(keras.Model(inputs, outputs), SPARSE)
    with pytest.raises(ValueError, match=r"carry a state from one batch to the next.*: lstm"):
        model.fit(np.zeros((4, 2, 3)), np.zeros(4), batch_size=4, verbose=0)


def test_task_heads_must_be_the_last_layer():
    features, task = keras.Input((6,)), keras.Input((), dtype="int32")
    outputs = layers.Dense(2)(TaskHeads(3, 4, name="heads")(features, task))
    model = distilling(keras.Model([features, task], outputs), SPARSE)
    with pytest.raises(ValueError, match=r"`TaskHeads` must be the last layer.*'heads'"):
        model.fit(*on_task(0), verbose=0)


def test_settings_are_checked():
    for arguments in ({"weight": -1}, {"temperature": 0}, {"temperature": np.nan}):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be a number"):
            Distillation(**arguments)
    with pytest.raises(AttributeError, match="`weight` of a Distillation"):
        Distillation().weight = 2.0
    with pytest.raises(ValueError, match="`distillation` must be a Distillation or None"):
        compiled(distillation=1.0)
    with pytest.raises(ValueError, match="does not work with the estimator 'adam'"):
        compiled(
            optimizer=DWDOptimizer("adam"),
            fisher=DiagonalFisher("adam"),
            distillation=Distillation(),
        )


def test_a_model_that_was_trained_before_teaches_all_classes():
    x, y = blobs()
    model = compiled(distillation=Distillation())
    model.consolidate(x, y)
    np.testing.assert_array_equal(model.distillation.old[0], True)
    assert tf.reduce_all(outputs_of_teacher(model, x) == model(x))
