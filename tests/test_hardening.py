"""Unusual use: invalid arguments, threads, hundreds of tasks."""

import inspect
import resource
import tempfile
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import DEFAULTS, blobs, compiled, mlp, state_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_dwd
from keras_dwd import (
    DWDModel,
    KroneckerFisher,
    TaskGraph,
    callbacks,
    evaluation,
    experimental,
    groupings,
    layers,
)
from keras_dwd.variables import by_path

NONSENSE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(
        ["", "empirical", "batch", "gmm", "element", "importance", "evidence", "latest", "bic", "λ"]
    ),
    st.lists(st.one_of(st.integers(-1, 2), st.floats(), st.text(max_size=2)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
    st.builds(lambda n: np.full(n, 0.5), st.integers(0, 3)),
)
# Arguments that Keras checks.
OF_KERAS = {
    *("kwargs", "name", "activation", "kernel_initializer", "kernel_regularizer"),
    "inner_optimizer",
}
# All public classes.
PUBLIC = {
    name: getattr(module, name)
    for module in (keras_dwd, callbacks, evaluation, experimental, groupings, layers)
    for name in module.__all__
    if inspect.isclass(getattr(module, name))
}
# Constructors, with valid values of their required arguments.
CONSTRUCTORS = {
    "AccuracyMatrix": {"after": np.eye(2), "before": np.zeros(2)},
    "Budget": {},
    "DWDOptimizer": {"inner_optimizer": "adam"},
    "DWDRegularizer": {},
    "DiagonalFisher": {},
    "Distillation": {},
    "Evidence": {},
    "FixedGrouping": {"strengths": {"hidden/*": 2.0}},
    "GaussianMixtureGrouping": {},
    "GroupingPolicy": {"groupings": [groupings.SingleGroup(), groupings.LayerGrouping()]},
    "Importance": {},
    "KWinners": {"winners": 0.5},
    "KroneckerFisher": {},
    "LayerGrouping": {},
    "LearningRateWarmup": {"epochs": 2},
    "MetricMatrix": {"after": np.eye(2), "before": np.zeros(2)},
    "Recipe": {},
    "Responsibilities": {"array": np.array([[255, 0], [55, 200]], "uint8")},
    "SingleGroup": {},
    "SpectralGrouping": {},
    "TaskHeads": {"tasks": 2, "units": 3},
    "ConsolidateEvery": {"steps": 100},
    "ConsolidateOnDrift": {},
    "TaskMetric": {"name": "loss"},
    "TaskNormalization": {"tasks": 2},
}


def test_all_constructors_are_looked_at():
    # Abstract classes, results, and classes that need a model, data or other processes.
    others = {
        *("Communicator", "DWDModel", "Grouping", "HorovodCommunicator", "Method", "Partition"),
        *("PenaltyLogger", "Rule", "Scenario", "SequenceResult", "Strength", "Task", "TaskGraph"),
        *("Technique", "ConsolidateOnTrainEnd", "EvaluatePastTasks", "StopOnForgetting"),
        *("LayerIO", "FileError", "BoundaryContext", "GroupingResult", "Parameters"),
    }
    assert set(PUBLIC) - others == set(CONSTRUCTORS)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors_take_the_arguments_that_nonsense_is_mixed_with(name):
    """Or every draw of the next test would be refused for another reason than its nonsense."""
    assert isinstance(PUBLIC[name](**CONSTRUCTORS[name]), PUBLIC[name])


@pytest.mark.parametrize("name", CONSTRUCTORS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_constructors_refuse_nonsense_or_come_back_from_their_config(name, data):
    kind = PUBLIC[name]
    names = [p for p in inspect.signature(kind).parameters if p not in OF_KERAS]
    arguments = dict(CONSTRUCTORS[name])
    for each in (
        data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)) if names else ()
    ):
        arguments[each] = data.draw(NONSENSE)
    try:
        made = kind(**arguments)
    except (ValueError, TypeError):
        return
    if not hasattr(made, "get_config"):
        return
    config = made.get_config()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(made))
    assert repr(again.get_config()) == repr(config)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["strength", "regularizer", "fisher", "grouping", "task_graph", "name"]),
        NONSENSE,
        min_size=1,
        max_size=2,
    )
)
def test_so_does_the_model(given_settings):
    try:
        model = DWDModel.from_model(mlp(), **given_settings)
    except (ValueError, TypeError):
        return
    again = DWDModel.from_config(model.get_config())
    assert again.regularizer.get_config() == model.regularizer.get_config()
    assert again.fisher.get_config() == model.fisher.get_config()


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["probe", "strength", "layer", "weights", "batch_size", "unbiased"]),
        NONSENSE,
        max_size=3,
    )
)
def test_so_does_the_task_graph(given_settings):
    with tempfile.TemporaryDirectory() as folder:
        given_settings = {"probe": np.ones((8, 6), "float32")} | given_settings
        try:
            graph = TaskGraph(folder, **given_settings)
        except (ValueError, TypeError):
            return
        again = TaskGraph.from_config(graph.get_config())
        assert again.get_config() == graph.get_config()


SHAPES = st.sampled_from([(8, 6), (8, 5), (0, 6), (8,), (8, 6, 1), (7, 6), (1, 6)])
LABELS = st.sampled_from([(8,), (8, 1), (7,), (0,), (1,), (8, 3)])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=SHAPES,
    labels=LABELS,
    fill=st.sampled_from([0.5, np.nan, np.inf, -np.inf, 1e38]),
    label=st.sampled_from([0, 2, 3, -1, 2**31]),
    dtype=st.sampled_from(["float32", "float64", "int64", "float16", "object", "str"]),
    batch_size=st.sampled_from([1, 4, 32]),
)
def test_consolidate_takes_data_or_leaves_the_model_as_it_was(
    learner, shape, labels, fill, label, dtype, batch_size
):
    with np.errstate(all="ignore"):
        x = np.full(shape, fill if np.isfinite(fill) or "int" not in dtype else 0).astype(dtype)
    y = np.full(labels, label)
    learner.fit(*blobs(16), verbose=0)
    before = state_of(learner)
    try:
        learner.consolidate((x, y), batch_size=batch_size)
    except (ValueError, TypeError):
        after = state_of(learner)
        assert before.keys() == after.keys()
        for name, array in before.items():
            np.testing.assert_array_equal(array, after[name])
        return
    for name, array in state_of(learner).items():
        assert np.isfinite(array).all(), name


@pytest.fixture(scope="module")
def learner():
    model = compiled(fisher=KroneckerFisher(gamma=None), grouping=None)
    model.fit(*blobs(), verbose=0)
    model.consolidate(blobs())
    return model


def test_steps_beyond_32_bits():
    model = compiled(strength=1.0, optimizer="adam", fisher=KroneckerFisher())
    model.optimizer.build(model.trainable_variables)
    for start in (2**31 - 2, 2**32 - 2, 2**53 - 2):
        model.optimizer.iterations.assign(start)
        model.fit(*blobs(), batch_size=16, epochs=2, verbose=0)
        assert int(model.optimizer.iterations) == start + 8
        model.consolidate()
    assert all(np.isfinite(w).all() for w in model.get_weights())
    fisher = model.fisher
    fisher.set_examples_seen(2**40 + 5)  # more examples seen than int32 holds
    assert 0 <= int(fisher.examples_seen) < 2**31


@pytest.mark.parametrize("fisher", [KroneckerFisher(every=1), KroneckerFisher("mc", every=1)])
def test_gradients_that_overflow_are_found_at_the_boundary(fisher):
    model = compiled(fisher=fisher)
    x, y = blobs()
    model.fit(x, y, verbose=0)
    kernel = model.get_layer("head").kernel
    kernel.assign(tf.fill(kernel.shape, 3e38))
    before = state_of(model)
    with pytest.raises(ValueError, match="not finite"):
        model.consolidate((x, y))
    for name, array in state_of(model).items():
        np.testing.assert_array_equal(array, before[name])
    assert model.tasks_learned == 0


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_tasks():
    model = compiled(strength=1.0, **DEFAULTS)
    # One dataset for all tasks, as Keras keeps references to each new one.
    data = tf.data.Dataset.from_tensor_slices(blobs(32)).batch(16).repeat()
    sizes = []
    for task in range(60):
        model.fit(data, steps_per_epoch=2, shuffle=False, verbose=0)
        model.consolidate()
        if task in (19, 59):
            sizes.append(resident())
    assert model.tasks_learned == 60
    assert sum(a.size for a in state_of(model).values()) < 3000
    assert sizes[1] - sizes[0] < 25, f"{sizes} MB"


def resident():
    """Resident memory of this process, in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.long
def test_predict_in_another_thread_while_fit_goes_on():
    """Also while the training step is traced, which records the layers' inputs and outputs."""
    model = compiled(fisher=KroneckerFisher(every=1), optimizer=keras.optimizers.SGD(0.0))
    x, y = blobs()
    expected = model.predict(x, verbose=0)
    copy = keras.models.clone_model(mlp())
    copy.set_weights(model.get_weights())
    wrong, runs, over = [], [], threading.Event()

    def predict():
        while not over.is_set():
            for found in (model.predict_on_batch(x), model(x).numpy()):
                runs.append(1)
                if not np.allclose(found, expected, atol=1e-5):
                    wrong.append(found)

    thread = threading.Thread(target=predict)
    thread.start()
    try:
        for _ in range(3):
            model.fit(x, y, epochs=3, shuffle=False, verbose=0)
            model._consolidation.tasks_learned = 0  # nothing moves at this learning rate
            model._consolidation.weights_digest = b""
            model.consolidate()
    finally:
        over.set()
        thread.join()
    assert not wrong
    assert len(runs) > 10
    alone = DWDModel.from_model(copy, fisher=KroneckerFisher(every=1), grouping=None)
    alone.compile(keras.optimizers.SGD(0.0), model.loss)
    alone.fit(x, y, epochs=3, shuffle=False, verbose=0)
    alone.consolidate()
    assert by_path(model).keys() == by_path(alone).keys()
    for path, anchor in alone.regularizer.anchors.items():
        np.testing.assert_allclose(anchor, model.regularizer.anchors[path])
    # What the other thread made of the layers is in none of the three estimates.
    pulls = []
    for each in (model, alone):
        for variable in each.trainable_variables:
            variable.assign_add(0.1 * keras.random.normal(variable.shape, seed=1))
        pulls.append(each.regularizer.gradients(by_path(each)))
    assert pulls[0].keys() == pulls[1].keys() == alone.regularizer.anchors.keys()
    for path, pull in pulls[1].items():
        expected = 3 * np.array(pull)
        atol = 0.01 * np.abs(expected).max()
        np.testing.assert_allclose(pulls[0][path], expected, atol=atol, err_msg=path)
