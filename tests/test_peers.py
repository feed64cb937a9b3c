import inspect
import re
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, mlp, sweep
from scipy.stats import chi2

from keras_dwd import Communicator, DWDModel, FileError
from keras_dwd.evaluation import (
    METHODS,
    Method,
    Scenario,
    Technique,
    held_by_importance,
    run_sequence,
)
from keras_dwd.evaluation.methods import method_named, strength_of
from keras_dwd.evaluation.peers import (
    L2,
    AveragedGEM,
    DarkExperienceReplay,
    ExperienceReplay,
    Freezing,
    MemoryAwareSynapses,
    RiemannianWalk,
    SynapticIntelligence,
    projected,
)
from keras_dwd.evaluation.replay import Reservoir
from keras_dwd.evaluation.technique import GivenImportance, TechniqueModel
from keras_dwd.layers import TaskHeads
from keras_dwd.variables import trainable_by_path


def learner(technique, network=None, optimizer="sgd", loss=None, **settings):
    """A compiled model with a technique."""
    model = TechniqueModel.from_model(
        mlp() if network is None else network, **(held_by_importance(1.0) | settings)
    )
    model.technique = technique
    model.compile(optimizer, loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.optimizer.build(model.trainable_variables)
    return model


def scenario(count=24):
    tasks = [(f"task {t}", blobs(count, seed=t), blobs(12, seed=10 + t)) for t in range(2)]
    return Scenario.from_tasks(tasks, outputs=3)


# Importances.


def test_mas_is_the_mean_of_absolute_gradients_of_single_examples():
    x, y = blobs(20)
    technique = MemoryAwareSynapses()
    model = learner(technique)
    found = technique.importance(model, (x, y))
    w1, b1, w2, b2 = (np.array(v, "float64") for v in model.trainable_variables)
    sums = [np.zeros_like(w) for w in (w1, b1, w2, b2)]
    for example in x.astype("float64"):
        h = np.tanh(example @ w1 + b1)
        g = 2 * (h @ w2 + b2)
        gh = (w2 @ g) * (1 - h**2)
        for total, part in zip(sums, (np.outer(example, gh), gh, np.outer(h, g), g), strict=True):
            total += np.abs(part)
    for values, total in zip(found, sums, strict=True):
        np.testing.assert_allclose(values, total / 20, rtol=1e-4, atol=1e-6)


def test_si_is_the_path_integral_also_where_the_pull_moves_the_weights():
    """Two tasks of a linear model by SGD, against a loop in float64."""
    inputs = keras.Input((2,))
    outputs = keras.layers.Dense(1, use_bias=False)(inputs)
    technique = SynapticIntelligence(damping=0.5)
    rate, strength = 0.1, 3.0
    model = learner(
        technique,
        keras.Model(inputs, outputs),
        keras.optimizers.SGD(rate),
        "mean_squared_error",
        **held_by_importance(strength),
    )
    rng = np.random.default_rng(0)
    theta = np.array(model.trainable_variables[0], "float64")
    precision, anchor = np.zeros_like(theta), theta.copy()
    for _ in range(2):
        x, y = rng.normal(size=(8, 2)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")
        technique.begin_task(model)
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        model.end_task((x, y), (x, y), rng)
        found = model.fisher.importance_by_path
        start, work = theta.copy(), np.zeros_like(theta)
        for _ in range(2):
            for part in (slice(0, 4), slice(4, 8)):
                before = theta
                g = 2 / 4 * x[part].T @ (x[part] @ theta - y[part])
                theta = (theta - rate * g + rate * precision * anchor) / (1 + rate * precision)
                work -= g * (theta - before)
        expected = np.maximum(work, 0) / ((theta - start) ** 2 + 0.5)
        assert expected.max() > 0.01
        np.testing.assert_allclose(next(iter(found.values())), expected, rtol=1e-4, atol=1e-7)
        model.consolidate()
        precision, anchor = precision + strength * expected, theta.copy()
        (block,) = model.regularizer.precisions.values()
        np.testing.assert_allclose(block.importances(), precision, rtol=1e-4, atol=1e-7)


def test_l2_holds_all_that_the_task_has_trained():
    inputs, task = keras.Input((6,)), keras.Input((), dtype="int32")
    hidden = keras.layers.Dense(4, name="hidden")(inputs)
    network = keras.Model([inputs, task], TaskHeads(2, 3, name="heads")(hidden, task))
    technique = L2()
    model = learner(technique, network, **METHODS["l2"].settings(7.0))
    x, y = blobs(8)
    for t in range(2):
        data = (x, np.full(8, t, "int32")), y
        model.fit(*data, verbose=0)
        model.end_task(data, data, np.random.default_rng(0))
        model.consolidate()
        for path, block in model.regularizer.precisions.items():
            values = block.importances()
            if path.startswith("heads"):
                assert np.all(values[t] == 7)
                assert np.all(values[1 - t] == 0)
            else:
                assert np.all(values == 7)


# Replay.


def test_the_reservoir_is_a_uniform_sample():
    size, total, trials = 10, 50, 300
    counts = np.zeros(total)
    for trial in range(trials):
        reservoir, rng = Reservoir(size), np.random.default_rng(trial)
        for part in np.split(np.arange(total), [7, 30]):
            reservoir.add([part, -part.astype("float32")], rng)
        numbers = np.array(reservoir.slots[0])
        assert len(set(numbers.tolist())) == size
        np.testing.assert_array_equal(reservoir.slots[1], -numbers)
        counts[numbers] += 1
    expected = trials * size / total
    # The draws of a trial are without replacement, which makes the statistic smaller.
    assert np.sum((counts - expected) ** 2 / expected) < chi2.ppf(0.99, total - 1)
    assert reservoir.seen == total


def test_the_reservoir_keeps_all_while_there_is_place_and_draws_from_these_only():
    reservoir = Reservoir(10)
    reservoir.add([np.arange(1, 5, dtype="int32")], np.random.default_rng(0))
    (drawn,) = reservoir.draw(200, tf.constant([1, 2], "int64"))
    assert set(np.array(drawn).tolist()) == {1, 2, 3, 4}
    (same,) = reservoir.draw(200, tf.constant([1, 2], "int64"))
    np.testing.assert_array_equal(drawn, same)
    other = Reservoir(10)
    other.prepare_state(reservoir.state())()
    (again,) = other.draw(200, tf.constant([1, 2], "int64"))
    np.testing.assert_array_equal(drawn, again)
    for size, state in ((5, reservoir.state()), (10, {"x": np.zeros(2)}), (10, {})):
        with pytest.raises(FileError, match=f"not those of a memory of {size}"):
            Reservoir(size).prepare_state(state)
    with pytest.raises(ValueError, match="`size` must be an integer >= 1"):
        ExperienceReplay(0)


def replaying(technique, count=30, seed=1):
    """A model whose technique has learned one task, and the data of this task."""
    model = learner(technique)
    x, y = blobs(count, seed=seed)
    technique.start(3)
    technique.end_task(model, (x, y), np.random.default_rng(0))
    return model, x, y


def test_er_trains_on_the_batch_and_as_many_earlier_examples():
    technique = ExperienceReplay(20)
    model = learner(technique)
    x, y = (tf.constant(a) for a in blobs(8, seed=5))
    assert technique.batch(model, (x, y)) == (x, y)  # nothing to replay in the first task
    model, old_x, old_y = replaying(technique)
    seen = set()
    for step in range(3):
        model.optimizer.iterations.assign(step)
        both_x, both_y = technique.batch(model, (x, y[:, None]))
        assert both_x.shape == (16, 6)
        assert both_y.shape == (16, 1)
        assert both_y.dtype == y.dtype
        np.testing.assert_array_equal(both_x[:8], x)
        np.testing.assert_array_equal(both_y[:8, 0], y)
        for example, label in zip(np.array(both_x)[8:], both_y[8:, 0], strict=True):
            (number,) = np.flatnonzero((old_x == example).all(1))
            assert old_y[number] == label
            seen.add(int(number))
    assert 8 < len(seen) <= 20
    weights = technique.batch(model, (x, y, tf.fill((8,), 0.5)))[2]
    np.testing.assert_array_equal(weights, [0.5] * 8 + [1.0] * 8)
    weighed = ExperienceReplay(20)
    given = np.arange(30, dtype="float32")
    weighed.end_task(model, (old_x, old_y, given), np.random.default_rng(0))
    both_x, _, weights = weighed.batch(model, (x, y, tf.fill((8,), 0.5)))
    for example, weight in zip(np.array(both_x)[8:], weights[8:], strict=True):
        assert (old_x == example).all(1)[int(weight)]
    with pytest.raises(ValueError, match=r"'der\+\+' does not work with sample weights"):
        DarkExperienceReplay().end_task(model, (old_x, old_y, given), np.random.default_rng(0))
    technique.augment = lambda x, seed: -x
    changed, _ = technique.batch(model, (x, y))
    np.testing.assert_array_equal(changed[:8], x)
    assert all((old_x == -example).all(1).any() for example in np.array(changed)[8:])


def test_der_adds_the_distance_to_earlier_outputs_and_the_loss_of_earlier_labels():
    technique = DarkExperienceReplay(alpha=0.3, beta=0.7, size=20)
    model, old_x, _ = replaying(technique)
    before = model.predict(old_x, verbose=0)
    for variable in model.trainable_variables:
        variable.assign_add(0.1 * tf.ones(variable.shape))
    data = (*(tf.constant(a) for a in blobs(8, seed=5)), None)
    found = technique.gradients(model, data, {})
    first, _, noted = technique.replayed(model, data, 8)
    noted = [np.array(z, "float64") for z in noted]
    second, labels, _ = technique.replayed(model, data, 8, draw=1)
    assert not np.array_equal(first, second)
    for example, outputs in zip(np.array(first), noted[0], strict=True):
        (number,) = np.flatnonzero((old_x == example).all(1))
        np.testing.assert_allclose(outputs, before[number], atol=1e-5)

    def loss(weights):
        w1, b1, w2, b2 = weights
        f, g = (np.tanh(np.array(a, "float64") @ w1 + b1) @ w2 + b2 for a in (first, second))
        entropy = np.log(np.exp(g).sum(1)) - g[np.arange(8), np.array(labels)]
        return 0.3 * ((noted[0] - f) ** 2).sum(1).mean() + 0.7 * entropy.mean()

    values = [np.array(v, "float64") for v in model.trainable_variables]
    for i, gradient in enumerate(found.values()):
        for at in list(np.ndindex(values[i].shape))[:5]:
            sides = []
            for sign in (1, -1):
                moved = [v.copy() for v in values]
                moved[i][at] += sign * 1e-5
                sides.append(loss(moved))
            assert float(gradient[at]) == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-4)
    one = technique.gradients(model, data, dict.fromkeys(found, tf.constant(1.0)))
    for path, gradient in found.items():
        np.testing.assert_allclose(one[path], gradient + 1, atol=1e-5)


def test_a_gem_removes_what_opposes_the_gradient_of_earlier_examples():
    rng = np.random.default_rng(0)
    g, r = ({k: rng.normal(size=s) for k, s in (("a", (3, 2)), ("b", (4,)))} for _ in "gr")
    for sign in (1, -1):
        reference = {k: sign * a for k, a in r.items()}
        dot = sum((g[k] * reference[k]).sum() for k in g)
        found = projected(
            {k: tf.constant(a) for k, a in g.items()},
            {k: tf.constant(a) for k, a in reference.items()},
        )
        for k in g:
            squares = sum((a**2).sum() for a in r.values())
            expected = g[k] - min(dot, 0) / squares * reference[k]
            np.testing.assert_allclose(found[k], expected)
        after = sum((np.array(found[k]) * reference[k]).sum() for k in g)
        assert after == pytest.approx(max(dot, 0), abs=1e-9)


def test_a_gem_projects_by_the_loss_of_the_memory():
    technique = AveragedGEM(20, sample=8)
    model, _, _ = replaying(technique)
    data = (*(tf.constant(a) for a in blobs(8, seed=5)), None)
    x, y, _ = technique.replayed(model, data, tf.constant(8))
    with tf.GradientTape() as tape:
        loss = model.loss(y, model(x))
    paths = list(trainable_by_path(model))
    reference = dict(zip(paths, tape.gradient(loss, model.trainable_variables), strict=True))
    opposed = technique.gradients(model, data, {k: -a for k, a in reference.items()})
    kept = technique.gradients(model, data, reference)
    for path in paths:
        np.testing.assert_allclose(opposed[path], tf.zeros_like(opposed[path]), atol=1e-5)
        np.testing.assert_allclose(kept[path], reference[path])


def linear(technique, **settings):
    """A linear model of two inputs without bias, with a technique, trained by SGD."""
    inputs = keras.Input((2,))
    outputs = keras.layers.Dense(2, use_bias=False)(inputs)
    optimizer = keras.optimizers.SGD(0.1)
    network = keras.Model(inputs, outputs)
    return learner(technique, network, optimizer, "mean_squared_error", **settings)


def test_rwalk_is_the_walk_of_a_loop_in_float64():
    """Two tasks of eight steps with an interval of three, with the pull towards the first."""
    technique = RiemannianWalk(alpha=0.6, interval=3)
    strength, rate = 2.0, 0.1
    model = linear(technique, **held_by_importance(strength, decay=0.0))
    rng = np.random.default_rng(1)
    theta = np.array(model.trainable_variables[0], "float64")
    fisher, earlier, omega, anchor = (np.zeros((2, 2)) for _ in range(4))
    for task in range(2):
        x, y = (rng.normal(size=(16, 2)).astype("float32") for _ in "xy")
        model.optimizer.iterations.assign(0)
        technique.begin_task(model)
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        model.end_task((x, y), (x, y), rng)
        score, work, start = np.zeros((2, 2)), np.zeros((2, 2)), theta.copy()
        for step in range(8):
            part = slice(4 * (step % 4), 4 * (step % 4) + 4)
            before = theta
            g = x[part].T.astype("float64") @ (x[part] @ theta - y[part]) / 4
            theta = (theta - rate * g + rate * strength * omega * anchor) / (
                1 + rate * strength * omega
            )
            fisher = 0.6 * g**2 + 0.4 * fisher
            work -= g * (theta - before)
            if step % 3 == 2:
                score += work / (0.5 * fisher * (theta - start) ** 2 + np.finfo("float32").eps)
                work, start = np.zeros((2, 2)), theta.copy()
        earlier = score if task == 0 else (earlier + score) / 2
        assert earlier.max() > 0
        positive = np.maximum(earlier, 0)
        omega, anchor = fisher / fisher.max() + positive / positive.max(), theta.copy()
        np.testing.assert_allclose(model.trainable_variables[0], theta, rtol=1e-4)
        np.testing.assert_allclose(
            next(iter(model.fisher.importance_by_path.values())), omega, rtol=2e-3
        )
        model.consolidate()


def test_freezing_keeps_the_largest_of_the_free_parameters():
    technique = Freezing(share=0.5)
    model = linear(technique, **held_by_importance(0.0))
    rng = np.random.default_rng(0)
    (kernel,) = model.trainable_variables
    kernel.assign([[4.0, 0.1], [-0.3, -2.0]])
    x, y = (rng.normal(size=(8, 2)).astype("float32") for _ in "xy")

    def learned():
        technique.begin_task(model)
        model.fit(x, y, epochs=1, verbose=0)
        return np.array(kernel)

    technique.begin_task(model)
    technique.end_task(model, (x, y), rng)
    after = learned()
    held = np.array([[True, False], [False, True]])  # by |4| and |−2|
    np.testing.assert_array_equal(after[held], np.array([4.0, -2.0], "float32"))
    assert np.all(after[~held] != np.array([0.1, -0.3], "float32"))
    technique.end_task(model, (x, y), rng)
    held.ravel()[1 if abs(after[0, 1]) > abs(after[1, 0]) else 2] = True  # half of two more
    then = learned()
    np.testing.assert_array_equal(then[held], after[held])
    assert np.all(then[~held] != after[~held])
    other = Freezing(share=0.5)
    other.prepare_state(technique.state())()
    np.testing.assert_array_equal(other.slots["frozen"][0], held)


# Runs.

PEERS = ("l2", "mas", "si", "rwalk", "freeze", "er", "der++", "a-gem", "ewc+er")


@pytest.mark.parametrize("name", sweep(PEERS, "er"))
def test_every_peer_runs(name):
    result = run_sequence(lambda s: mlp(), scenario(), name, epochs=2, batch_size=8)
    assert not np.isnan(result.matrix.after[-1]).any()
    assert result.steps == 12
    assert result.model.tasks_learned == 2
    if name in ("l2", "mas", "si", "rwalk"):
        assert float(result.model.penalty()) == 0
        for variable in result.model.trainable_variables:
            variable.assign_add(0.1 * tf.ones(variable.shape))
        assert float(result.model.penalty()) > 0


@pytest.mark.long
def test_replay_retains_what_fine_tuning_forgets():
    forgetting = {}
    for name in ("finetune", "er"):
        result = run_sequence(lambda s: mlp(), scenario(96), name, epochs=20, learning_rate=0.01)
        forgetting[name] = result.metrics()["forgetting"]
    assert forgetting["er"] < 0.5 * forgetting["finetune"]


def test_a_peer_leaves_a_model_like_others(tmp_path):
    result = run_sequence(lambda s: mlp(), scenario(), "er", epochs=1)
    result.model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, DWDModel)
    x, y = blobs(8)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), result.model.predict(x, verbose=0))
    loaded.fit(x, y, verbose=0)


def test_the_example_of_a_method_of_your_own():
    code = re.search(r"```python\n(.*?)```", inspect.getdoc(Technique), re.S).group(1)
    names = {
        "np": np,
        "Technique": Technique,
        "Method": Method,
        "held_by_importance": held_by_importance,
        "run_sequence": run_sequence,
        "build": lambda s: mlp(),
        "scenario": scenario(),
    }
    assert len(code.strip().splitlines()) <= 20
    exec(textwrap.dedent(code), names)
    model = names["result"].model
    assert model.tasks_learned == 2
    assert all((block.importances() >= 0).all() for block in model.regularizer.precisions.values())


def test_a_technique_may_change_all_parts_of_a_step():
    seen = []

    class Doubled(Technique):
        name = "doubled"

        def batch(self, model, data):
            return data[0][:4], data[1][:4]

        def gradients(self, model, data, gradients):
            return {path: 2 * g for path, g in gradients.items()}

        def moved(self, model, gradients, moves):
            seen.append((gradients, moves, model.optimizer.learning_rate))

    model = learner(Doubled(), strength=0.0, fisher=None, regularizer=None)
    x, y = blobs(8)
    before = [np.array(v) for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        loss = model.loss(y[:4], model(x[:4]))
    expected = tape.gradient(loss, model.trainable_variables)
    model.run_eagerly = True
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    ((gradients, moves, rate),) = seen
    for value, variable, e, g, move in zip(
        before, model.trainable_variables, expected, gradients.values(), moves.values(), strict=True
    ):
        np.testing.assert_allclose(g, 2 * e, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(move, -rate * g, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(variable, value + move, rtol=1e-5, atol=1e-6)


# What is refused.


def test_methods_that_do_not_combine():
    for name, error in (
        ("mas:mc", "'mas' has no estimator to choose"),
        ("si+er", "'si' has a technique of its own"),
        ("er+no-groups", "Unknown method"),
        ("der++:mc", "Unknown method"),
        ("der", "Unknown method 'der'"),
        ("l3", "Unknown method 'l3'"),
    ):
        with pytest.raises(ValueError, match=error):
            method_named(name)
    assert method_named("der++").name == "der++"
    assert method_named("dwd+er").configuration(3.0)["technique"] == {"name": "er", "size": 200}


def test_an_importance_that_cannot_be():
    class Wrong(Technique):
        name = "wrong"
        values = np.zeros((6, 8))

        def importance(self, model, data):
            return [self.values, *(np.zeros(v.shape) for v in model.trainable_variables[1:])]

    technique = Wrong()
    model = learner(technique)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="No importance was given"):
        model.consolidate()
    for values, error in (
        (np.full((6, 8), -1.0), "at least 0"),
        (np.full((6, 8), np.nan), "at least 0"),
        (np.ones(6), "an array for each of `model.trainable_variables`, in its shape"),
    ):
        technique.values = values
        with pytest.raises(ValueError, match=error):
            model.end_task(None, None, rng)
    assert not model.fisher.importance_by_path
    other = learner(Wrong(), fisher=None)
    with pytest.raises(ValueError, match="must be `held_by_importance`"):
        other.end_task(None, None, rng)
    with pytest.raises(FileError, match="which 'wrong' has not"):
        technique.prepare_state({"x": np.zeros(1)})
    with pytest.raises(FileError, match="is not one of 'si'"):
        SynapticIntelligence().prepare_state({"work/0": np.zeros(1)})


def test_several_workers_are_refused():
    class Two(Communicator):
        rank, size = 0, 2

    with pytest.raises(ValueError, match="'er' works with one worker only"):
        run_sequence(lambda s: mlp(), scenario(), "er", compile_settings={"communicator": Two()})


def test_a_scaled_loss_is_refused():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    with pytest.raises(ValueError, match="does not work with a scaled loss"):
        run_sequence(
            lambda s: mlp(), scenario(), "er", epochs=1, compile_settings={"optimizer": optimizer}
        )


# Tuning and reports.


def test_the_strength_of_each_peer_is_in_its_settings():
    for name in PEERS:
        method = method_named(name)
        configuration = method.configuration(0.25)
        assert strength_of(configuration) == 0.25
        assert configuration["technique"]["name"] == name.removeprefix("ewc+")
    assert {name for name in PEERS if not method_named(name).strength} == {"er", "a-gem"}
    assert METHODS["der++"].configuration(0.25)["technique"]["alpha"] == 0.25
    assert METHODS["mas"].configuration(0.25)["regularizer"]["strength"] == 0.25
    assert strength_of(METHODS["ewc"].configuration(3.0)) == 3.0
    copy = GivenImportance.from_config(GivenImportance().get_config())
    assert isinstance(copy, GivenImportance)
