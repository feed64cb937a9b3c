import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, dtype_policy, mlp, sweep, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dwd import DiagonalFisher, DWDModel, DWDOptimizer, DWDRegularizer, TaskGraph
from keras_dwd.evaluation import datasets, linear_cka
from keras_dwd.layers import TaskHeads
from keras_dwd.variables import trainable_by_path


def explicit_hsic(k, m, unbiased):
    """CKA by its definition, with n × n matrices in float64."""
    n = len(k)
    if not unbiased:
        h = np.eye(n) - 1 / n
        return np.trace(k @ h @ m @ h)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    return (
        np.trace(k @ m)
        + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ k @ m @ one)
    ) / (n * (n - 3))


def explicit_cka(x, y, unbiased):
    k, m = x @ x.T, y @ y.T
    across, own, others = (explicit_hsic(*p, unbiased) for p in ((k, m), (k, k), (m, m)))
    return across / np.sqrt(own * others)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(6, 40),
    d=st.integers(1, 50),
    e=st.integers(1, 20),
    unbiased=st.booleans(),
)
def test_cka_equals_its_definition_and_is_invariant(seed, n, d, e, unbiased):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) + 3
    y = x @ rng.normal(size=(d, e)) + rng.normal(size=(n, e))
    found = linear_cka(x, y, unbiased=unbiased)
    assert found == pytest.approx(explicit_cka(x, y, unbiased), abs=1e-8)
    rotation, _ = np.linalg.qr(rng.normal(size=(d, d)))
    assert linear_cka(0.01 * x @ rotation, 7 * y, unbiased=unbiased) == pytest.approx(
        found, abs=1e-8
    )
    assert linear_cka(y, x, unbiased=unbiased) == pytest.approx(found, abs=1e-12)
    assert linear_cka(x, x, unbiased=unbiased) == pytest.approx(1)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_in_batches_is_of_the_mean_over_batches(unbiased):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(40, 3))
    y[:, 0] += x[:, 0]
    parts = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 40, 10)]
    means = [
        np.mean([explicit_hsic(a @ a.T, b @ b.T, unbiased) for a, b in pairs])
        for pairs in (parts, [(a, a) for a, _ in parts], [(b, b) for _, b in parts])
    ]
    expected = means[0] / np.sqrt(means[1] * means[2])
    assert linear_cka(x, y, batch_size=10, unbiased=unbiased) == pytest.approx(expected)


def test_unbiased_cka_of_unrelated_representations_is_about_zero():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 400)), rng.normal(size=(50, 400))
    assert linear_cka(x, y) > 0.7
    assert abs(linear_cka(x, y, unbiased=True)) < 0.1


def test_cka_refuses_what_it_is_not_of():
    x = np.ones((8, 3))
    assert linear_cka(x, x) == 0
    with pytest.raises(ValueError, match="same examples"):
        linear_cka(x, x[:4])
    with pytest.raises(ValueError, match="at least 4"):
        linear_cka(x, x, batch_size=3, unbiased=True)


def learner(folder, optimizer="sgd", strength=0.5, **graph):
    graph = TaskGraph(folder, probe=blobs(32)[0], strength=strength, **graph)
    return compiled(
        optimizer=optimizer,
        strength=1.0,
        fisher=DiagonalFisher("batch", None),
        task_graph=graph,
    )


def learn(model, count, epochs=2):
    """Learn tasks one after another; returns the parameters after each, by path."""
    left = []
    for seed in range(count):
        data = blobs(seed=seed)
        model.fit(*data, epochs=epochs, verbose=0)
        left.append({p: np.array(v, "float64") for p, v in trainable_by_path(model).items()})
        model.consolidate(data)
    return left


def test_the_term_equals_the_sum_over_tasks(tmp_path):
    model = learner(tmp_path / "graph")
    left = learn(model, 3)
    for variable in model.trainable_variables:
        variable.assign_add(0.1 * keras.random.normal(variable.shape, seed=1))
    model._consolidation.update_task_graph(model)
    now = {p: np.array(v, "float64") for p, v in trainable_by_path(model).items()}
    w = model.task_graph.weights_to(model)
    assert w.shape == (3,)
    assert ((w > 0) & (w < 1)).all()
    expected = {p: 0.5 * sum(w[i] * (now[p] - left[i][p]) for i in range(3)) for p in now}
    without = {
        p: np.array(b.values) * (now[p] - np.array(model.regularizer.anchors[p]))
        for p, b in model.regularizer.precisions.items()
    }
    found = model.regularizer.gradients(trainable_by_path(model))
    for path, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[path] + without[path], atol=1e-5)
    # The value agrees up to a constant, which has no gradient.
    before = float(model.penalty())
    r_before = sum(0.25 * w[i] * ((now[p] - left[i][p]) ** 2).sum() for i in range(3) for p in now)
    model.get_layer("head").bias.assign_add([0.3, 0.0, 0.0])
    moved = now | {"head/bias": now["head/bias"] + [0.3, 0, 0]}
    r_after = sum(0.25 * w[i] * ((moved[p] - left[i][p]) ** 2).sum() for i in range(3) for p in now)
    block = np.array(model.regularizer.precisions["head/bias"].values)
    anchor = np.array(model.regularizer.anchors["head/bias"])
    own = [0.5 * (block * (v["head/bias"] - anchor) ** 2).sum() for v in (now, moved)]
    assert float(model.penalty()) - before == pytest.approx(
        r_after - r_before + own[1] - own[0], rel=1e-3
    )


def test_weights_are_cka_of_what_was_and_is(tmp_path):
    model = learner(tmp_path / "graph", layer="head")
    probe = blobs(32)[0]
    hidden = []
    for seed in range(2):
        model.fit(*blobs(seed=seed), epochs=3, verbose=0)
        hidden.append(np.array(model.get_layer("hidden")(probe), "float64"))
        model.consolidate(blobs(seed=seed))
    expected = explicit_cka(*hidden, unbiased=False)
    assert model.task_graph.matrix == pytest.approx(np.array([[1, expected], [expected, 1]]))
    np.testing.assert_allclose(model.task_graph.weights_to(model), [expected, 1], rtol=1e-5)


def test_edges_are_weighed_anew_at_each_epoch_and_the_pull_follows(tmp_path):
    model = learner(tmp_path / "graph")
    learn(model, 2)
    seen = []
    weigh = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: seen.append(model.task_graph.weights_to(model))
    )
    model.fit(*blobs(seed=7), epochs=2, verbose=0, callbacks=[weigh])
    assert not np.allclose(seen[0], seen[1])
    assert float(model.regularizer.task_weight) == pytest.approx(0.5 * seen[1].sum(), rel=1e-5)


@pytest.mark.parametrize("decoupled", sweep([False, True], False))
def test_the_pull_brings_the_model_nearer(tmp_path, decoupled):
    distances = []
    for strength in (0.0, 2.0):
        keras.utils.set_random_seed(0)
        optimizer = keras.optimizers.SGD(0.1) if decoupled else keras.optimizers.Adam(0.02)
        model = learner(tmp_path / f"{strength}", optimizer, strength)
        left = learn(model, 2)
        model.fit(*blobs(seed=9), epochs=10, verbose=0)
        now = trainable_by_path(model)
        center = {p: (left[0][p] + left[1][p]) / 2 for p in now}
        distances.append(sum(np.square(np.array(v) - center[p]).sum() for p, v in now.items()))
    assert distances[1] < 0.5 * distances[0]


def test_a_model_goes_on_with_its_graph_after_loading(tmp_path):
    model = learner(tmp_path / "graph")
    learn(model, 2)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.task_graph.matrix, model.task_graph.matrix)
    assert float(again.penalty()) == float(model.penalty())
    for each in (model, again):
        each.fit(*blobs(seed=5), epochs=2, verbose=0, shuffle=False)
    for a, b in zip(weights(model), weights(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    model.consolidate(blobs(seed=5))
    assert TaskGraph(tmp_path / "graph").tasks == 3
    # Tasks in the folder that were learned after the model was saved are dropped.
    again = keras.models.load_model(tmp_path / "model.keras")
    again.fit(*blobs(seed=6), verbose=0)
    assert again.task_graph.tasks == 2
    again.consolidate(blobs(seed=6))
    assert TaskGraph(tmp_path / "graph").tasks == 3


def test_a_folder_belongs_to_one_model(tmp_path):
    model = learner(tmp_path / "graph")
    learn(model, 2)
    other = learner(tmp_path / "graph")
    with pytest.raises(ValueError, match="holds 2 tasks, but the model has learned 0"):
        other.fit(*blobs(), verbose=0)
    with pytest.raises(ValueError, match="`probe` differs"):
        TaskGraph(tmp_path / "graph", probe=blobs(32, seed=1)[0])


def test_callbacks_in_a_list_of_keras(tmp_path):
    model = learner(tmp_path / "graph")
    learn(model, 1)
    callbacks = keras.callbacks.CallbackList([], model=model)
    before = float(model.regularizer.task_weight)
    for seed in (4, 5):
        model.fit(*blobs(seed=seed), verbose=0, callbacks=callbacks)
    assert len(callbacks.callbacks) == 1
    assert float(model.regularizer.task_weight) != before


def test_bfloat16_weights(tmp_path):
    with dtype_policy("bfloat16"):
        model = learner(tmp_path / "graph")
        learn(model, 2)
    assert float(model.regularizer.task_weight) > 0


def test_a_failing_disk_changes_nothing(tmp_path, monkeypatch):
    model = learner(tmp_path / "graph")
    learn(model, 1)
    model.fit(*blobs(seed=1), verbose=0)
    before = model.regularizer.state()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("keras_dwd.files.save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.consolidate(blobs(seed=1))
    monkeypatch.undo()
    assert model.tasks_learned == model.task_graph.tasks == 1
    for name, array in model.regularizer.state().items():
        np.testing.assert_array_equal(array, before[name])
    assert not [p for p in (tmp_path / "graph").iterdir() if p.name.startswith(".")]
    model.consolidate(blobs(seed=1))
    assert model.task_graph.tasks == 2


def test_weights_as_given(tmp_path):
    w = np.array([[1.0, 0.2, 0.7], [0.2, 1.0, 0.0], [0.7, 0.0, 1.0]])
    model = compiled(task_graph=TaskGraph(tmp_path / "graph", weights=w))
    learn(model, 2)
    np.testing.assert_array_equal(model.task_graph.matrix, w[:2, :2])
    assert float(model.regularizer.task_weight) == pytest.approx(0.001 * 0.7)
    model.fit(*blobs(seed=2), verbose=0)
    model.consolidate()
    assert float(model.regularizer.task_weight) == 0  # no task follows
    with pytest.raises(ValueError, match="a row for each task"):
        model.fit(*blobs(seed=3), verbose=0)


def test_several_inputs_and_heads_per_task(tmp_path):
    x, ids = keras.Input((6,), name="x"), keras.Input((), dtype="int32", name="task")
    hidden = keras.layers.Dense(8, "relu", name="hidden")(x)
    probe = (blobs(32)[0], np.zeros(32, "int32"))
    model = DWDModel(
        [x, ids],
        TaskHeads(tasks=2, units=3, name="heads")(hidden, ids),
        task_graph=TaskGraph(tmp_path / "graph", probe=probe),
        fisher=DiagonalFisher("batch"),
        grouping=None,
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    features, y = blobs()
    model.fit((features, np.zeros(64, "int32")), y, verbose=0)
    model.consolidate()
    assert set(model.regularizer.task_anchors) == {"hidden/kernel", "hidden/bias"}
    model.fit((features, np.ones(64, "int32")), y, verbose=0)
    model.consolidate()
    assert model.task_graph.matrix[0, 1] > 0.5


def test_the_graph_is_shown(tmp_path):
    networkx = pytest.importorskip("networkx")
    pytest.importorskip("matplotlib")
    model = learner(tmp_path / "graph")
    learn(model, 3)
    matrix = model.task_graph.matrix
    model.task_graph.write_graphml(tmp_path / "graph.graphml")
    read = networkx.read_graphml(tmp_path / "graph.graphml", node_type=int)
    assert sorted(read.nodes) == [0, 1, 2]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert read.edges[i, j]["weight"] == pytest.approx(matrix[i, j])
    model.task_graph.plot(tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "`probe` is needed"),
        ({"probe": np.ones((2, 6))}, "`probe` must have at least 4"),
        ({"probe": np.full((8, 6), np.nan)}, "`probe` must be finite"),
        ({"probe": (np.ones((8, 6)), np.ones(5))}, "`probe` must have at least 4"),
        ({"weights": [[1.0, 2.0]]}, "`weights` must be a square"),
        ({"weights": [[-1.0]]}, "`weights` must be a square"),
        ({"weights": [[1.0, 0.0], [0.5, 1.0]]}, "`weights` must be symmetric"),
        ({"probe": np.ones((8, 6)), "strength": -1}, "`strength`"),
        ({"probe": np.ones((8, 6)), "batch_size": 2}, "`batch_size`"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, named):
    with pytest.raises(ValueError, match=named):
        TaskGraph(tmp_path / "graph", **arguments)


def test_what_does_not_fit_the_model_is_refused_before_training(tmp_path):
    for name, arguments, named in (
        ("a", {"probe": np.ones((8, 5), "float32")}, "do not fit the model's input"),
        ("b", {"probe": np.ones((8, 6), "float32"), "layer": "x"}, "`layer` must be one of hidden"),
    ):
        model = compiled(task_graph=TaskGraph(tmp_path / name, **arguments))
        before = weights(model)
        with pytest.raises(ValueError, match=named):
            model.fit(*blobs(), verbose=0)
        for a, b in zip(before, weights(model), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "{}",
        '{"version": 2, "weights": [], "digests": []}',
        '{"version": 1, "weights": [[1]], "digests": ["ab"]}',
        '{"version": 1, "weights": [[]], "digests": []}',
        '{"version": 1, "weights": [[]], "digests": ["x"]}',
    ],
)
def test_a_damaged_index_is_refused(tmp_path, index):
    (tmp_path / "graph.json").write_text(index)
    with pytest.raises(ValueError, match="no index of a task graph"):
        TaskGraph(tmp_path, probe=np.ones((8, 6)))


@pytest.mark.long
def test_related_tasks_weigh_more_than_unrelated_ones(data_dir, tmp_path):
    mnist, cifar = (datasets.load(name, data_dir) for name in ("mnist", "cifar100"))
    digits = mnist.x_train[:3000].reshape(-1, 28, 28)
    moved = np.roll(digits, 1, axis=2)
    pictures = cifar.x_train[:3000].mean(-1)[:, 2:-2, 2:-2]
    labels = mnist.y_train[:3000], cifar.y_train[:3000] % 10
    probe = np.concatenate([digits[-100:], pictures[-100:]])
    found = {}
    for name, second in (("related", (moved, labels[0])), ("unrelated", (pictures, labels[1]))):
        keras.utils.set_random_seed(0)
        network = keras.Sequential(
            [
                keras.Input((28, 28)),
                keras.layers.Flatten(),
                keras.layers.Dense(64, "relu"),
                keras.layers.Dense(64, "relu"),
                keras.layers.Dense(10),
            ]
        )
        graph = TaskGraph(tmp_path / name, probe=probe, unbiased=True)
        model = compiled(network, "adam", strength=1.0, task_graph=graph)
        for x, y in ((digits, labels[0]), second):
            model.fit(x, y, epochs=3, verbose=0)
            model.consolidate()
        found[name] = model.task_graph.matrix[0, 1]
    assert found["related"] > found["unrelated"] + 0.05


def test_one_decoupled_step_is_the_proximal_formula(tmp_path):
    """First that of the precision, then that of the graph's center, in float64."""
    rate = 0.1
    model = learner(tmp_path / "graph", DWDOptimizer(keras.optimizers.SGD(rate)), strength=40.0)
    (left,) = learn(model, 1)
    for variable in model.trainable_variables:
        variable.assign_add(0.1 * keras.random.normal(variable.shape, seed=1))
    x, y = blobs(seed=4)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True))
    variables = trainable_by_path(model)
    gradients = tape.gradient(loss, [v.value for v in variables.values()])
    tie = float(model.regularizer.task_weight)
    assert tie > 1 / rate  # where a step that is not proximal would throw it out
    expected = {}
    for (path, variable), gradient in zip(variables.items(), gradients, strict=True):
        moved = np.array(variable, "float64") - rate * np.array(gradient, "float64")
        precision = np.array(model.regularizer.precisions[path].values, "float64")
        moved = (moved / rate + precision * left[path]) / (1 / rate + precision)
        expected[path] = (moved / rate + tie * left[path]) / (1 / rate + tie)
    model.train_on_batch(x, y)
    for path, variable in variables.items():
        np.testing.assert_allclose(variable, expected[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_excluded_variables_are_not_pulled_to_earlier_tasks(tmp_path):
    graph = TaskGraph(tmp_path / "graph", probe=blobs(32)[0], strength=0.5)
    model = compiled(
        mlp(bias_regularizer=DWDRegularizer(0.0)),
        strength=1.0,
        fisher=DiagonalFisher("empirical", None),
        grouping=None,
        task_graph=graph,
    )
    learn(model, 1)
    for variable in model.trainable_variables:
        variable.assign_add(tf.ones(variable.shape))
    pulls = model.regularizer.gradients(trainable_by_path(model))
    assert set(pulls) == {"hidden/kernel", "head/kernel", "head/bias"}
    before = float(model.penalty())
    model.get_layer("hidden").bias.assign_add(tf.ones((8,)))
    assert float(model.penalty()) == before > 0


def test_weights_of_the_unbiased_estimate_are_not_negative(tmp_path):
    """Of representations that have nothing in common it is about as often below zero."""
    probe = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
    graph = TaskGraph(tmp_path / "graph", probe=probe, layer="head", unbiased=True)
    fisher = DiagonalFisher("empirical", None)
    model = compiled(strength=1.0, fisher=fisher, grouping=None, task_graph=graph)
    hidden = model.get_layer("hidden")

    def of_features(used, seed):
        hidden.kernel.assign(keras.random.normal((6, 8), seed=seed) * used[:, None])
        return np.array(hidden(probe), "float64")

    then = of_features(np.repeat([1.0, 0.0], 3), 0)
    model.consolidate(blobs())
    exact = []
    for seed in range(1, 7):
        now = of_features(np.repeat([0.0, 1.0], 3), seed)
        exact.append(explicit_cka(then, now, unbiased=True))
        found = model.task_graph.weights_to(model)
        np.testing.assert_allclose(found, [max(exact[-1], 0)], atol=1e-5)
    assert min(exact) < -1e-3
