"""What a user sees while training: notices, summaries, progress, callbacks, own training loops."""

import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import DEFAULTS, blobs, compiled, load, mlp, moved, saved, sweep, weights
from keras import layers

from keras_dwd import DiagonalFisher, Distillation, DWDModel, DWDOptimizer, DWDRegularizer
from keras_dwd.callbacks import (
    ConsolidateOnTrainEnd,
    EvaluatePastTasks,
    PenaltyLogger,
    StopOnForgetting,
)
from keras_dwd.groupings.histograms import concentration, histograms
from keras_dwd.precision.diagonal import Diagonal

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
NOTICE = "nothing is consolidated"


# A notice where a trained model is wrapped and nothing is consolidated.


def trained():
    model = mlp()
    model.compile("adam", LOSS)
    model.fit(*blobs(), verbose=0)
    return model


def test_a_trained_model_without_consolidate_is_noticed_once():
    model = compiled(trained())
    with pytest.warns(UserWarning, match=NOTICE) as said:
        model.fit(*blobs(seed=2), verbose=0)
    assert "was trained before" in str(said[0].message)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(*blobs(seed=2), verbose=0)


def test_so_is_one_that_only_got_weights():
    values = trained().get_weights()
    model = mlp()
    model.set_weights(values)
    with pytest.warns(UserWarning, match="got its weights before"):
        compiled(model).fit(*blobs(), verbose=0)


def fresh():
    return mlp()


def with_a_bias_set():
    model = mlp()
    model.layers[-1].bias.assign([0.1, 0.2, 0.7])
    return model


def with_a_new_head():
    body = trained().layers[0]
    return keras.Sequential([keras.Input((6,)), body, layers.Dense(3)])


def on_a_frozen_body():
    """All biases are those of the body, which cannot forget."""
    body = trained()
    body.trainable = False
    return keras.Sequential([keras.Input((6,)), body, layers.Dense(3, use_bias=False)])


def recurrent():
    inputs = keras.Input((6,))
    x = layers.LSTM(3)(layers.Reshape((6, 1))(inputs))
    return keras.Model(inputs, layers.Dense(3)(layers.LayerNormalization()(x)))


@pytest.mark.parametrize(
    "build",
    sweep(
        [fresh, with_a_bias_set, with_a_new_head, on_a_frozen_body, recurrent],
        fresh,
        with_a_new_head,
        on_a_frozen_body,
    ),
)
def test_new_models_are_not_noticed(build):
    compiled(build()).fit(*blobs(), verbose=0)  # warnings are errors


def consolidated(model):
    model.consolidate(*blobs(), verbose=0)
    return moved(model)


def without_strength(model):
    model.strength = 0
    return model


def begun_in_a_loop(model):
    model.train_on_batch(*blobs())
    return model


def with_the_state_of_another(model):
    other = compiled(strength=1.0)
    other.fit(*blobs(), verbose=0)
    other.consolidate()
    load(model, saved(other))
    return model


@pytest.mark.parametrize(
    "then",
    sweep(
        [consolidated, without_strength, begun_in_a_loop, with_the_state_of_another],
        consolidated,
        without_strength,
    ),
)
def test_trained_models_are_not_noticed_where_it_is_meant(then):
    then(compiled(trained())).fit(*blobs(seed=2), verbose=0)


def test_a_loaded_model_that_goes_on_with_its_first_task_is_not_noticed(tmp_path):
    model = compiled(fisher=DiagonalFisher("empirical", gamma=None))
    model.fit(*blobs(), verbose=0)
    model.save(tmp_path / "model.keras")
    keras.models.load_model(tmp_path / "model.keras").fit(*blobs(), verbose=0)


# What is consolidated, in words.


def test_the_summary_agrees_with_the_precision():
    model = compiled(strength=3.0)
    model.fit(*blobs(), verbose=0)
    found = model.consolidate(*blobs(), verbose=0)
    sums, sizes, squares = {}, {}, {}
    for path, block in model.regularizer.precisions.items():
        layer = path.split("/")[0]
        sums[layer] = sums.get(layer, 0) + np.asarray(block.importances(), "float64").sum()
        anchor = np.asarray(model.regularizer.anchors[path], "float64")
        sizes[layer] = sizes.get(layer, 0) + anchor.size
        squares[layer] = squares.get(layer, 0) + (anchor**2).sum()
    assert [x.name for x in found.layers] == sorted(sums, key=lambda name: -sums[name])
    for layer in found.layers:
        assert layer.parameters == sizes[layer.name]
        assert layer.share == pytest.approx(sums[layer.name] / sum(sums.values()))
        # The mean penalty of random moves of that size is 1.
        delta = layer.reach * np.sqrt(squares[layer.name] / sizes[layer.name])
        assert 0.5 * delta**2 * sums[layer.name] == pytest.approx(1)
    assert (found.tasks, found.held, found.trainable, found.examples) == (1, 83, 83, 64)
    assert found.bytes == 4 * 83 * 3  # precision, anchor and the online estimate
    model.strength = 12.0
    assert model.consolidation.layers[0].reach == pytest.approx(found.layers[0].reach / 2)
    assert json.loads(json.dumps(found.as_dict()))["layers"][0]["name"] == found.layers[0].name


def test_the_summary_in_words():
    model = compiled(strength=3.0, optimizer="adam", **DEFAULTS)
    assert "No task is consolidated yet" in str(model.consolidation)
    model.fit(*blobs(), verbose=0)
    text = str(model.consolidate(*blobs(), verbose=0))
    assert "1 task consolidated: 83 of 83 trainable parameters are held with λ = 3" in text
    assert "The pull is part of the gradient." in text
    assert "from 64 examples" in text
    assert "groups, with λ_k from" in text
    assert model.consolidation.histograms["counts"]


def test_layers_that_are_not_held_are_left_out_and_zero_strength_lets_all_move():
    model = compiled(mlp(kernel_regularizer=DWDRegularizer(0.0)), strength=3.0)
    model.fit(*blobs(), verbose=0)
    model.consolidate(verbose=0)
    assert model.consolidation.held == 83 - 48
    model.strength = 0
    assert "freely" in str(model.consolidation)
    assert model.consolidation.as_dict()["layers"][0]["reach"] is None


def test_keras_summary_shows_what_is_consolidated(capsys):
    lines = []
    model = compiled(strength=3.0, optimizer="sgd")
    model.fit(*blobs(), verbose=0)
    model.consolidate(verbose=0)
    model.summary(print_fn=lambda line, **_: lines.append(line))
    assert "Total params" in lines[0]
    assert "1 task consolidated" in lines[1]
    assert "a proximal step after each update of the optimizer" in lines[1]
    model.summary()
    assert "1 task consolidated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("sgd", "a proximal step"),
        ("adam", "part of the gradient"),
        (DWDOptimizer("adam"), "a proximal step"),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "part of the gradient"),
    ],
)
def test_the_form_of_the_pull(optimizer, words):
    assert compiled(optimizer=optimizer).consolidation.pull.startswith(words)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_histogram_counts_each_direction_once(dtype):
    rng = np.random.default_rng(0)
    values = (10.0 ** rng.uniform(-6, 2, (30, 7))).astype(dtype)
    values[0] = 0
    groups = rng.integers(0, 3, (30, 7))
    soft = np.zeros((30, 7, 2), "uint8")
    soft[..., 0], soft[..., 1] = 55, 200
    blocks = {"a": Diagonal("a", values), "b": Diagonal("b", values)}
    found = histograms(blocks, {"a": groups, "b": soft})
    edges = 10.0 ** ((found["first"] + np.arange(len(found["counts"]["0"]) + 1)) / 4)
    for group, share in ((0, 55 / 255), (1, 200 / 255), (2, 0)):
        expected = np.histogram(values[groups == group], edges)[0]
        expected = expected + share * np.histogram(values, edges)[0]
        np.testing.assert_allclose(found["counts"][str(group)], expected, atol=0.011)
    assert sum(map(sum, found["counts"].values())) == pytest.approx(2 * 29 * 7, abs=0.5)


def test_the_concentration_agrees_with_sorting():
    values = 10.0 ** np.random.default_rng(0).normal(-3, 1, 5000)
    ordered = np.sort(values)[::-1]
    exact = (np.cumsum(ordered) < 0.9 * ordered.sum()).mean()
    assert concentration([values[:2000], values[2000:]]) == pytest.approx(exact, rel=0.02)
    assert concentration([np.zeros(5)]) == 0
    assert concentration([np.ones(50)]) == pytest.approx(0.9)


def test_consolidate_shows_progress_if_asked(capsys):
    model = compiled()
    model.consolidate(*blobs(), verbose=1)
    assert "64/64" in capsys.readouterr().out
    moved(model).consolidate(tf.data.Dataset.from_tensor_slices(blobs()).batch(32), verbose=2)
    assert capsys.readouterr().out == "Fisher information of 64 examples\n"
    moved(model).consolidate(*blobs(), verbose=0)
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="`verbose` must be"):
        moved(model).consolidate(*blobs(), verbose=3)


# Callbacks.


def test_past_tasks_are_in_the_logs_of_each_epoch(tmp_path):
    model = compiled()
    past = {"first": blobs(seed=3), "second": tf.data.Dataset.from_tensors(blobs(seed=4))}
    logged = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    callbacks = [EvaluatePastTasks(past), logged]
    history = model.fit(*blobs(), epochs=2, verbose=0, callbacks=callbacks).history
    for name, data in (("first", blobs(seed=3)), ("second", blobs(seed=4))):
        accuracy = (model.predict(data[0], verbose=0).argmax(1) == data[1]).mean()
        assert history[f"{name}_accuracy"][-1] == pytest.approx(accuracy)
        assert len(history[f"{name}_loss"]) == 2
    mean = (history["first_accuracy"][-1] + history["second_accuracy"][-1]) / 2
    assert history["past_accuracy"][-1] == pytest.approx(mean)
    assert "past_accuracy" in (tmp_path / "log.csv").read_text()
    # The training metrics are those of training.
    plain = compiled(mlp())
    assert set(plain.fit(*blobs(), verbose=0).history) <= set(history)
    with pytest.raises(ValueError, match="`tasks` must be a dictionary"):
        EvaluatePastTasks([blobs()])


def test_evaluating_past_tasks_changes_no_training():
    results = []
    for callbacks in ([], [EvaluatePastTasks({"past": blobs(seed=3)})]):
        keras.utils.set_random_seed(0)
        model = compiled()
        history = model.fit(*blobs(), epochs=2, verbose=0, callbacks=callbacks).history
        results.append((history["loss"], history["accuracy"], weights(model)))
    assert results[0][:2] == results[1][:2]
    for a, b in zip(results[0][2], results[1][2], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long
def test_training_stops_on_forgetting_and_restores_the_weights():
    keras.utils.set_random_seed(0)
    x, y = blobs()
    model = compiled(optimizer="adam", strength=0.0)
    model.fit(x, y, epochs=30, verbose=0)
    before = weights(model)
    stop = StopOnForgetting({"old": (x, y)}, most=0.1)
    history = model.fit(x, (y + 1) % 3, epochs=200, verbose=0, callbacks=[stop]).history
    assert stop.stopped_epoch is not None
    assert len(history["loss"]) == stop.stopped_epoch + 1 < 200
    lost = history["old_accuracy"]
    start = (compiled_accuracy(model, before, x, y)) - 0.1
    assert lost[-1] < start <= min(lost[:-1], default=1)
    assert model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"] == pytest.approx(
        lost[-2] if len(lost) > 1 else start + 0.1
    )


def compiled_accuracy(model, values, x, y):
    now = weights(model)
    model.set_weights(values)
    accuracy = model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"]
    model.set_weights(now)
    return accuracy


def test_what_to_monitor_is_checked():
    for mode, names in {
        "min": ("loss", "head_loss", "mae", "mse", "root_mean_squared_error", "false_positives"),
        "max": ("accuracy", "loss_accuracy", "auc", "sparse_top_k_categorical_accuracy", "f1"),
    }.items():
        for name in names:
            assert StopOnForgetting({"old": blobs()}, monitor=name).mode == mode, name
    with pytest.raises(ValueError, match=r"`mode` must be .* `monitor` 'own'"):
        StopOnForgetting({"old": blobs()}, monitor="own")
    assert StopOnForgetting({"old": blobs()}, monitor="own", mode="max").mode == "max"
    stop = StopOnForgetting({"old": blobs()}, monitor="auc")
    with pytest.raises(ValueError, match=r"one of accuracy, loss\. Received: 'auc'"):
        compiled().fit(*blobs(), verbose=0, callbacks=[stop])


def test_each_fit_is_a_task_with_consolidate_on_train_end():
    model = compiled(strength=1.0)
    end = ConsolidateOnTrainEnd()
    for seed in range(2):
        model.fit(*blobs(seed=seed), verbose=0, callbacks=[end])
    assert model.tasks_learned == end.found.tasks == 2
    end = ConsolidateOnTrainEnd(*blobs(), batch_size=16)
    model.fit(*blobs(), verbose=0, callbacks=[end])
    assert end.found.examples == 64
    x, y = blobs()
    stop = StopOnForgetting({"old": (x, y)}, most=0.0)  # and restore the weights of the boundary
    with pytest.warns(UserWarning, match="Nothing was consolidated"):
        model.fit(x, (y + 1) % 3, epochs=99, verbose=0, callbacks=[stop, end])
    assert stop.stopped_epoch is not None
    assert end.found is None
    assert model.tasks_learned == 3


def test_what_the_pull_does_is_in_the_logs(tmp_path):
    model = compiled(strength=1.0)
    model.fit(*blobs(), verbose=0)
    model.consolidate()
    x, y = blobs(seed=2)
    callbacks = [PenaltyLogger(batch=(x, y)), keras.callbacks.TensorBoard(tmp_path)]
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks).history
    pulls, distances, anchors = [], [], []
    for path, block in model.regularizer.precisions.items():
        anchor = np.asarray(model.regularizer.anchors[path], "float64")
        value = next(np.asarray(v) for v in model.trainable_variables if path in v.path)
        distances.append((value - anchor).ravel())
        anchors.append(anchor.ravel())
        pulls.append((np.asarray(block.importances(), "float64") * (value - anchor)).ravel())
    norm = np.linalg.norm(np.concatenate(pulls))
    assert history["pull"][-1] == pytest.approx(norm, rel=1e-4)
    drift = np.linalg.norm(np.concatenate(distances)) / np.linalg.norm(np.concatenate(anchors))
    assert history["drift"][-1] == pytest.approx(drift, rel=1e-4)
    with tf.GradientTape() as tape:
        loss = LOSS(y, model(x))
    gradient = float(tf.linalg.global_norm(tape.gradient(loss, model.trainable_variables)))
    assert history["pull_to_gradient"][-1] == pytest.approx(norm / gradient, rel=1e-4)
    assert list(tmp_path.rglob("*tfevents*"))


# Training loops of the user's own.


def pair(optimizer, **settings):
    """Two equal models that have learned a task."""
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        model = compiled(optimizer=optimizer(), strength=5.0, **settings)
        model.fit(*blobs(), batch_size=16, shuffle=False, verbose=0)
        model.consolidate(*blobs(), verbose=0)
        models.append(model)
    return models


def loop(model, x, y, batch_size=16, function=tf.function):
    @function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
            loss = model.optimizer.scale_loss(loss)
        model.apply_gradients(tape.gradient(loss, model.trainable_variables))

    for i in range(0, len(x), batch_size):
        step(tf.constant(x[i : i + batch_size]), tf.constant(y[i : i + batch_size]))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    sweep(
        [
            ("sgd", lambda: keras.optimizers.SGD(0.1, momentum=0.9)),
            ("adam", lambda: keras.optimizers.Adam(0.01)),
            ("wrapped", lambda: DWDOptimizer(keras.optimizers.Adam(0.01))),
            ("scaled", lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())),
            ("accumulating", lambda: keras.optimizers.Adam(gradient_accumulation_steps=2)),
        ],
        "sgd",
        "adam",
    ),
)
def test_a_loop_with_apply_gradients_does_what_fit_does_to_the_last_bit(name, optimizer):
    one, other = pair(optimizer)
    x, y = blobs(seed=2)
    one.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    loop(other, x, y)
    for a, b in zip(weights(one), weights(other), strict=True):
        np.testing.assert_array_equal(a, b)
    # It is pulled: without, the weights differ.
    unpulled = pair(optimizer)[0]
    unpulled.strength = 0
    unpulled.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    assert any((a != b).any() for a, b in zip(weights(one), weights(unpulled), strict=True))


def test_an_eager_loop_holds_as_well():
    one, other = pair(lambda: keras.optimizers.SGD(0.1))
    x, y = blobs(seed=2)
    loop(one, x, y)
    loop(other, x, y, function=lambda step: step)
    for a, b in zip(weights(one), weights(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_function_of_before_a_boundary_does_not_leave_the_pull_out_in_silence():
    model = compiled(strength=1.0)
    x, y = map(tf.constant, blobs())

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        model.apply_gradients(tape.gradient(loss, model.trainable_variables))

    own = tf.function(model.train_step, autograph=False)
    step()
    own((x, y))
    model.consolidate(*blobs(), verbose=0)
    before = weights(model)
    for old in (step, lambda: own((x, y))):
        with pytest.raises(tf.errors.InvalidArgumentError, match="was consolidated"):
            old()
    tf.function(step.python_function)()
    model.fit(x, y, verbose=0)  # Keras' own function is traced again
    assert any((a != b).any() for a, b in zip(before, weights(model), strict=True))


def test_gradients_that_cannot_be_applied_are_refused():
    model = compiled()
    with pytest.raises(ValueError, match="one for each of"):
        model.apply_gradients([])
    with pytest.raises(ValueError, match="Compile the model first"):
        DWDModel.from_model(mlp()).apply_gradients([])
    distilling = compiled(distillation=Distillation())
    with pytest.raises(ValueError, match="does not distil"):
        distilling.apply_gradients([None] * 4)
