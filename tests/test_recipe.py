import json
import math
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, mlp, sweep
from scipy.stats import beta, kstest
from typer.testing import CliRunner

from keras_dwd import DiagonalFisher
from keras_dwd.cli import _again
from keras_dwd.evaluation import Method, Recipe, Scenario, run_sequence
from keras_dwd.evaluation.experiment import Experiment
from keras_dwd.evaluation.methods import method_named
from keras_dwd.evaluation.profiles import profile_for
from keras_dwd.evaluation.recipe import CosineOfTask, cropped_and_flipped, mixed
from keras_dwd.files import read_arrays
from keras_dwd_command.app import app

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
CHEAP = Method(
    "cheap",
    lambda strength: {"strength": strength, "fisher": DiagonalFisher("batch"), "grouping": None},
    strength=10.0,
)


def images(count, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count).astype("int32")
    return (0.5 * y[:, None, None, None] + rng.random((count, 6, 6, 1))).astype("float32"), y


def scenario(sizes=(24, 24)):
    tasks = [(f"task {t}", images(n, t), images(12, 10 + t)) for t, n in enumerate(sizes)]
    return Scenario.from_tasks(tasks, outputs=3)


def network(_):
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(2, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


def run(recipe, method="finetune", sizes=(24, 24), epochs=2, callbacks=(), **settings):
    return run_sequence(
        network,
        scenario(sizes),
        method,
        recipe=recipe,
        epochs=epochs,
        batch_size=8,
        callbacks=lambda t, task: list(callbacks),
        compile_settings={"steps_per_execution": 1},
        **settings,
    )


def weights_of(result):
    return [np.array(v) for v in result.model.weights]


def test_the_default_is_that_of_before():
    assert Recipe().configuration() == {"learning_rate": 1e-3}
    assert str(Recipe()) == "Adam 0.001 reset for each task"
    saved = json.loads((RESULTS / "retention_permuted-digits.json").read_text())["protocol"]
    now = Experiment(scenario="permuted:digits", tasks=5).describe(3)
    assert json.loads(json.dumps(now)) == saved
    by_recipe, by_rate = (
        run_sequence(network, scenario(), "finetune", epochs=1, **given)
        for given in ({"recipe": Recipe("adam", 1e-3)}, {"learning_rate": 1e-3})
    )
    for one, other in zip(weights_of(by_recipe), weights_of(by_rate), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_full_profile():
    profile = profile_for((32, 32, 3), "split", "full")
    assert profile.recipe == Recipe("sgd", 0.1, "cosine", 5e-4, 0.9, True, 2.0, 0.2)
    assert (profile.epochs, profile.batch_size, profile.network) == (27, 128, "ResNet-32")
    assert profile.recipe.configuration() == {
        "optimizer": "SGD",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "schedule": "cosine",
        "weight_decay": 5e-4,
        "augment": "crop and flip",
        "warmup": 2.0,
        "mixup": 0.2,
    }
    assert str(profile.recipe) == (
        "SGD 0.1 (Nesterov momentum 0.9) reset for each task, rising for 2 epochs, falling to 0 by "
        "a cosine, weight decay 0.0005, random crops and flips, mixup 0.2"
    )
    # Networks without local structure keep the plain recipe.
    assert profile_for((28, 28, 1), "permuted", "full").recipe == Recipe()


def test_another_optimizer_has_its_own_learning_rate():
    full = Recipe("sgd", 0.1, "cosine", momentum=0.5)
    assert full.changed(optimizer="adam") == Recipe("adam", 1e-3, "cosine")
    assert full.changed(optimizer="sgd", augment=True) == Recipe("sgd", 0.1, "cosine", 0, 0.5, True)
    assert Recipe().changed(optimizer="sgd", learning_rate=0.2) == Recipe("sgd", 0.2)
    assert full.changed(augment=False, weight_decay=0.0) == full


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"optimizer": "lion"}, "`optimizer` must be one of adam, sgd. Received: 'lion'"),
        ({"schedule": "linear"}, "`schedule` must be one of constant, cosine"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a number"),
        ({"weight_decay": -1.0}, "`weight_decay` must be a number"),
        ({"momentum": 0.9}, "`momentum` is a setting of SGD"),
        ({"optimizer": "sgd", "momentum": 1.0}, "`momentum` must be a number"),
        ({"augment": "yes"}, "`augment` must be True or False"),
        ({"warmup": 1.0}, "`warmup` is a setting of the schedule 'cosine'"),
        ({"mixup": -0.1}, "`mixup` must be"),
    ],
)
def test_settings_that_cannot_be(settings, error):
    with pytest.raises(ValueError, match=error):
        Recipe(**settings)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_cosine_falls_to_zero_in_each_task(optimizer):
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            seen.append(float(self.model.optimizer.learning_rate))

    sizes, epochs = (24, 40), 3
    run(Recipe(optimizer, 0.04, "cosine"), sizes=sizes, epochs=epochs, callbacks=[Look()])
    expected = []
    for size in sizes:
        steps = epochs * math.ceil(size / 8)
        expected += [0.02 * (1 + math.cos(math.pi * s / steps)) for s in range(steps)]
    np.testing.assert_allclose(seen, expected, rtol=1e-5)


def test_a_model_trained_by_a_cosine_can_be_saved(tmp_path):
    result = run(Recipe("sgd", schedule="cosine"), epochs=1)
    result.model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == result.model.optimizer.get_config()
    assert float(loaded.optimizer.learning_rate) == pytest.approx(0.0, abs=1e-7)


def test_weight_decay_of_sgd_adds_up_to_that_in_the_gradient():
    """Without any other gradient, against a loop of heavy-ball momentum."""
    recipe = Recipe("sgd", 0.01, weight_decay=0.01)
    optimizer, weight = recipe.build_optimizer(recipe.rate()), keras.Variable([2.0])
    optimizer.build([weight])
    expected, velocity = 2.0, 0.0
    for _ in range(300):
        optimizer.apply([tf.zeros(1)], [weight])
        velocity = 0.9 * velocity + 0.01 * expected
        expected -= 0.01 * velocity
    assert float(weight[0]) == pytest.approx(expected, rel=0.02)
    assert expected < 1.6


def test_weight_decay_of_adam_is_that_of_adamw():
    recipe = Recipe("adam", 0.01, weight_decay=0.1)
    found = []
    for optimizer in (recipe.build_optimizer(0.01), keras.optimizers.AdamW(0.01, 0.1)):
        weight = keras.Variable([2.0, -1.0])
        optimizer.build([weight])
        for _ in range(3):
            optimizer.apply([tf.constant([0.3, 0.1])], [weight])
        found.append(np.array(weight))
    np.testing.assert_array_equal(*found)


def test_images_are_crops_of_the_padded_ones_or_their_mirrors():
    rng = np.random.default_rng(0)
    x = rng.random((300, 5, 7, 2)).astype("float32")
    ids = np.arange(300)
    found, same_ids = cropped_and_flipped((x, ids), (3, 4))
    np.testing.assert_array_equal(same_ids, ids)
    padded = np.pad(x, [(0, 0), (4, 4), (4, 4), (0, 0)])
    seen = set()
    for image, source in zip(np.array(found), padded, strict=True):
        fits = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (1, -1)
            if np.array_equal(image, source[top : top + 5, left : left + 7][:, ::flip])
        ]
        assert fits
        seen.add(fits[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {flip for _, _, flip in seen} == {1, -1}
    again, _ = cropped_and_flipped((x, ids), (3, 4))
    other, _ = cropped_and_flipped((x, ids), (3, 5))
    np.testing.assert_array_equal(found, again)
    assert not np.array_equal(found, other)


@pytest.mark.long
def test_each_epoch_and_step_has_its_own_crops():
    """The network returns what it is given; the data are one image, again and again."""
    seen = []

    class Look(keras.layers.Layer):
        def call(self, x):
            tf.py_function(lambda a: seen.append(np.array(a)), [x], [])
            return x

    def build(_):
        inputs = keras.Input((6, 6, 1))
        return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(Look()(inputs))))

    x = np.repeat(images(1, 0)[0], 16, 0)
    y = np.zeros(16, "int32")
    tasks = [(str(t), (x, y), (x[:2], y[:2])) for t in range(2)]
    for seed in (0, 1):
        run_sequence(
            build,
            Scenario.from_tasks(tasks, outputs=3),
            "finetune",
            recipe=Recipe(augment=True),
            epochs=2,
            batch_size=8,
            seed=seed,
            compile_settings={"steps_per_execution": 1, "run_eagerly": True},
        )
    batches = [a for a in seen if len(a) == 8]
    assert len(batches) == 16  # 2 seeds, 2 tasks, 2 epochs, 2 steps
    assert len({a.tobytes() for a in batches}) == 16
    tests = [a for a in seen if len(a) == 2]
    assert tests
    assert all(np.array_equal(a, x[:2]) for a in tests)  # test data stay as they are


def test_the_learning_rate_rises_and_falls():
    rate = CosineOfTask(0.3)
    rate.begin_task(epochs=4, batches=5, warmup=1.2)
    found = [float(rate(step)) for step in range(21)]
    expected = [
        0.3 * min(1, (step + 1) / 6) * 0.5 * (1 + math.cos(math.pi * step / 20))
        for step in range(21)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    again = CosineOfTask.from_config(rate.get_config())
    assert float(again(3)) == found[3]


def test_examples_and_labels_are_mixed_alike():
    rng = np.random.default_rng(0)
    x, y = rng.random((6, 3)).astype("float32"), np.eye(6, dtype="float32")
    ids, weights = np.full(6, 2), np.arange(6.0)
    shares = []
    for seed in range(200):
        (found, same_ids), labels, same_weights = mixed(((x, ids), y, weights), 0.2, (seed, 1))
        np.testing.assert_array_equal(same_ids, ids)
        np.testing.assert_array_equal(same_weights, weights)
        np.testing.assert_allclose(found, np.asarray(labels) @ x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.sum(labels, 1), 1, rtol=1e-6)
        shares.append(float(labels[0, 0]))
        again = mixed(((x, ids), y, weights), 0.2, (seed, 1))
        np.testing.assert_array_equal(again[1], labels)
    assert kstest(shares, beta(0.2, 0.2).cdf).pvalue > 0.01


def test_examples_of_different_tasks_are_not_mixed():
    """As in joint training: the label of one is none of the head of the other."""
    x, y, ids = np.arange(4.0)[:, None], np.eye(4), np.array([0, 0, 1, 1])
    for seed in range(5):
        (found, _), labels = mixed(((x, ids), y), 0.5, (seed, 1))
        np.testing.assert_array_equal(labels[0::2], y[0::2])
        assert np.all(np.asarray(labels)[[1, 3], [1, 3]] < 1)
        np.testing.assert_allclose(found, np.asarray(labels) @ x)


def test_inputs_that_cannot_be_mixed_are_refused():
    tasks = [("a", ((255 * x).astype("uint8"), y), (x, y)) for x, y in [images(24, 0)]]
    with pytest.raises(ValueError, match="inputs, which must be floats"):
        run_sequence(
            network, Scenario.from_tasks(tasks, outputs=3), CHEAP, recipe=Recipe(mixup=0.2)
        )


def test_methods_that_replay_train_on_whole_sequences():
    """Examples in the memory are longer than the batches that would be cut."""
    x = np.ones((4, 6), "int32")
    whole, half = (np.tile(np.arange(6.0) < n, (4, 1)).astype("float32") for n in (6, 2))
    tasks = [(str(n), (x, x, w), (x, x, w)) for n, w in enumerate((whole, half))]
    result = run_sequence(
        lambda _: keras.Sequential(
            [keras.Input((6,), dtype="int32"), keras.layers.Embedding(2, 2)]
        ),
        Scenario.from_tasks(tasks, outputs=2),
        "er",
        metrics=["loss"],
        recipe=Recipe(bucket=2),
        epochs=1,
        batch_size=4,
        compile_settings={
            "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        },
    )
    assert result.model.tasks_learned == 2


@pytest.mark.long
def test_training_examples_are_mixed_and_test_data_are_not():
    seen = []

    class Look(keras.layers.Layer):
        def call(self, x):
            tf.py_function(lambda a: seen.append(np.array(a)), [x], [])
            return x

    def build(_):
        inputs = keras.Input((2,))
        return keras.Model(inputs, keras.layers.Dense(2)(Look()(inputs)))

    x = np.eye(2, dtype="float32")[np.arange(16) % 2]
    tasks = [(str(t), (x, np.arange(16) % 2), (x[:2], np.arange(2))) for t in range(2)]
    result = run_sequence(
        build,
        Scenario.from_tasks(tasks, outputs=2),
        CHEAP,
        recipe=Recipe("adam", 0.05, mixup=0.3),
        epochs=8,
        batch_size=8,
        compile_settings={"steps_per_execution": 1, "run_eagerly": True},
    )
    batches = [a for a in seen if len(a) == 8]
    assert any(np.any((a > 0.01) & (a < 0.99)) for a in batches)
    assert all(np.array_equal(a, x[:2]) for a in seen if len(a) == 2)
    assert result.matrix.average_accuracy == 1.0


class KilledError(Exception):
    pass


class Kill(keras.callbacks.Callback):
    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise KilledError


@pytest.mark.long
@pytest.mark.parametrize("optimizer", sweep(["sgd", "adam"], "sgd"))
def test_a_run_is_resumed_bit_identical(tmp_path, optimizer):
    recipe = Recipe(optimizer, None, "cosine", 1e-3, augment=True, warmup=0.5, mixup=0.2)
    whole = run(recipe, CHEAP, sizes=(24, 20), checkpoint_dir=tmp_path / "whole")
    for steps in (5, 2):  # within the second epoch of the first task, and within the second task
        with pytest.raises(KilledError):
            run(
                recipe,
                CHEAP,
                sizes=(24, 20),
                checkpoint_dir=tmp_path / "killed",
                callbacks=[Kill(steps if steps == 5 else 3 + steps)],
            )
    resumed = run(recipe, CHEAP, sizes=(24, 20), checkpoint_dir=tmp_path / "killed")
    plain = run(recipe, CHEAP, sizes=(24, 20))  # without checkpoints
    for other in (resumed, plain):
        np.testing.assert_array_equal(whole.matrix.after, other.matrix.after)
        for a, b in zip(weights_of(whole), weights_of(other), strict=True):
            np.testing.assert_array_equal(a, b)
    last = max((tmp_path / "whole").glob("checkpoint-*"))
    settings = read_arrays(last)[1]["settings"]
    assert settings["schedule"] == "cosine"
    with pytest.raises(ValueError, match="schedule: 'cosine', asked for is None"):
        run(recipe.changed(schedule="constant"), CHEAP, checkpoint_dir=tmp_path / "whole")


def test_what_a_recipe_needs_is_checked_before_training():
    x, y = blobs(12)
    flat = Scenario.from_tasks([("flat", (x, y), (x, y))], outputs=3)
    stream = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    streams = Scenario.from_tasks([("s", stream, stream)], outputs=3)
    endless = Scenario.from_tasks([("e", stream.filter(lambda *_: True), stream)], outputs=3)
    adam = {"optimizer": keras.optimizers.Adam()}
    for given, settings, error in (
        (flat, {"recipe": Recipe(augment=True)}, r"`augment` needs images.*\(12, 6\)"),
        (streams, {"recipe": Recipe(augment=True)}, "`augment` needs tasks of arrays"),
        (streams, {"recipe": Recipe(mixup=0.2)}, "`mixup` needs tasks of arrays"),
        (
            flat,
            {"recipe": Recipe(mixup=0.2), "compile_settings": {"loss": "mse"}},
            "`mixup` mixes labels, which must be floats",
        ),
        (endless, {"recipe": Recipe(schedule="cosine")}, "does not tell its length"),
        (flat, {"recipe": Recipe(), "learning_rate": 0.1}, "`learning_rate` or `recipe`"),
        (flat, {"learning_rate": 0.1, "compile_settings": adam}, "not in both"),
    ):
        with pytest.raises(ValueError, match=error):
            run_sequence(lambda s: mlp(), given, "finetune", epochs=1, **settings)
    run_sequence(lambda s: mlp(), streams, "finetune", epochs=1, recipe=Recipe(schedule="cosine"))


# The command line.


def test_options_change_the_recipe_of_the_profile():
    options = ["--tasks", "2", "--seeds", "1", "--epochs", "1", "--methods", "finetune", "--json"]
    options += ["--optimizer", "sgd", "--schedule", "cosine", "--weight-decay", "0.001"]
    options += ["--scenario", "split:digits", "--images-per-class", "5", "--augment"]
    result = CliRunner().invoke(app, ["run", *options])
    assert result.exit_code == 0, result.output
    protocol = json.loads(result.stdout)["protocol"]
    assert protocol["optimizer"] == "SGD"
    assert protocol["learning_rate"] == 0.05
    assert protocol["schedule"] == "cosine"
    assert protocol["weight_decay"] == 0.001
    assert protocol["augment"] == "crop and flip"
    assert protocol["images_per_class"] == 5
    assert "SGD 0.05 (Nesterov momentum 0.9)" in protocol["text"]
    assert "5 training images a class" in protocol["text"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--augment"], "`augment` must be off for permuted pixels"),
        (["--optimizer", "lion"], "`optimizer` must be one of"),
        (["--schedule", "x"], "`schedule` must be one of"),
        (["--learning-rate", "-1"], "`learning_rate` must be a number"),
        (["--weight-decay", "-1"], "`weight_decay` must be a number"),
        (["--images-per-class", "0"], "`images_per_class` must be an integer >= 1"),
    ],
)
@pytest.mark.parametrize("command", sweep(["run", "tune", "ablate"], "run"))
def test_bad_options_are_one_clear_line(command, arguments, error):
    result = CliRunner().invoke(app, [command, *arguments])
    assert isinstance(result.exception, ValueError)
    assert error in str(result.exception)


def test_workers_get_the_options_too():
    import typer

    command = typer.main.get_command(app).commands["run"]
    context = command.make_context("run", ["--no-augment", "--optimizer", "sgd", "--workers", "2"])
    words = _again(context)
    again = command.make_context("run", words[words.index("run") + 1 :])
    assert again.params == context.params
    assert "--no-augment" in words
    assert "--augment" not in _again(command.make_context("run", []))


@pytest.mark.long
def test_a_rehearsal_of_the_full_profile(data_dir, tmp_path):
    options = ["--scenario", "split:cifar100", "--tasks", "10", "--seeds", "1", "--epochs", "1"]
    options += ["--profile", "full", "--images-per-class", "20", "--methods", "finetune"]
    options += ["--data-dir", str(data_dir), "--out", str(tmp_path / "full.json")]
    result = CliRunner().invoke(app, ["run", *options])
    assert result.exit_code == 0, result.output
    protocol = json.loads((tmp_path / "full.json").read_text())["protocol"]
    assert protocol["network"] == "ResNet-32"
    assert protocol["optimizer"] == "SGD"
    assert protocol["images_per_class"] == 20


@pytest.mark.long
def test_an_optimizer_can_keep_its_state_from_task_to_task(tmp_path):
    """Its steps are counted on, and a run that was resumed ends as one that was not."""
    kept, plain = Recipe(keep_state=True), Method("plain", lambda s: {"strength": 0.0})

    def ran(folder, recipe=kept, method=plain, callbacks=()):
        return run(recipe, method, checkpoint_dir=tmp_path / folder, callbacks=callbacks)

    class StoppedError(Exception):
        pass

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1 and int(self.model.optimizer.iterations) > 6:
                raise StoppedError

    whole, anew = ran("whole"), ran("anew", Recipe())
    assert whole.steps == anew.steps == int(whole.model.optimizer.iterations) == 12
    assert int(anew.model.optimizer.iterations) == 6
    with pytest.raises(StoppedError):
        ran("part", callbacks=[Stop()])
    again = ran("part")
    assert again.steps == 12
    variant = ran("variant", Recipe(), replace(plain, keep_state=True))
    for i, expected in enumerate(weights_of(whole)):
        np.testing.assert_array_equal(weights_of(again)[i], expected)
        np.testing.assert_array_equal(weights_of(variant)[i], expected)
        assert not np.array_equal(weights_of(anew)[i], expected)
    assert method_named("ewc+keep-state").keep_state
    assert str(kept) == "Adam 0.001 kept from task to task"
    assert kept.configuration() == {"learning_rate": 1e-3, "keep_state": True}
    with pytest.raises(ValueError, match="`keep_state` needs the schedule 'constant'"):
        Recipe(schedule="cosine", keep_state=True)
