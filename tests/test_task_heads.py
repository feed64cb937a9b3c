import keras
import numpy as np
import pytest
from cases import blobs, long, state_of
from keras import layers

from keras_dwd import DiagonalFisher, Distillation, DWDModel, KroneckerFisher
from keras_dwd.layers import TaskHeads
from keras_dwd.training.head_gate import HeadGate

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def heads_model(tasks=3, units=2, optimizer=None, kernel_regularizer=None, **settings):
    settings = {"fisher": DiagonalFisher("batch"), "grouping": None} | settings
    features, task = keras.Input((6,)), keras.Input((), dtype="int32")
    x = layers.Dense(8, activation="tanh", name="hidden")(features)
    model = DWDModel(
        [features, task],
        TaskHeads(tasks, units, kernel_regularizer=kernel_regularizer, name="heads")(x, task),
        **settings,
    )
    model.compile(optimizer or keras.optimizers.AdamW(0.01, weight_decay=0.1), LOSS)
    return model


def task_data(task, seed=0):
    x, y = blobs(32, classes=2, seed=seed)
    return (x, np.full(32, task, "int32")), y


def test_outputs_are_those_of_each_examples_own_head():
    model = heads_model()
    x, _ = blobs(9)
    task = np.arange(9, dtype="int32") % 3
    kernel, bias = (np.array(v) for v in model.get_layer("heads").weights)
    hidden = np.tanh(x @ np.array(model.get_layer("hidden").kernel))
    expected = [hidden[i] @ kernel[task[i]] + bias[task[i]] for i in range(9)]
    np.testing.assert_allclose(model.predict((x, task), verbose=0), expected, rtol=1e-4, atol=1e-6)
    column = model.get_layer("heads")(model.get_layer("hidden")(x), task[:, None])
    np.testing.assert_allclose(column, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("strength", "accumulation", "fisher"),
    [
        long(0.0, None, DiagonalFisher),
        (10.0, 3, DiagonalFisher),
        (10.0, None, KroneckerFisher),
        long(0.0, 3, KroneckerFisher),
    ],
)
def test_other_heads_are_neither_trained_nor_pulled(strength, accumulation, fisher):
    optimizer = keras.optimizers.AdamW(
        0.01, weight_decay=0.1, gradient_accumulation_steps=accumulation
    )
    model = heads_model(
        strength=strength, optimizer=optimizer, kernel_regularizer="l2", fisher=fisher()
    )
    kernel = model.get_layer("heads").kernel
    for task in range(3):
        before = np.array(kernel)
        model.fit(*task_data(task, seed=task), epochs=3, batch_size=8, verbose=0)
        model.consolidate()
        after = np.array(kernel)
        for head in range(3):
            assert np.array_equal(after[head], before[head]) == (head != task)


def test_a_step_that_overflows_opens_no_head():
    gate, kernel = HeadGate(), keras.Variable(np.zeros((2, 3, 2), "float32"))
    kernel.per_task = True
    gate.build({"k": kernel})
    gradient = np.zeros((2, 3, 2), "float32")
    gate.mark_active({"k": kernel}, [gradient * np.nan])
    np.testing.assert_array_equal(gate.in_use["k"], [False, False])
    gradient[1, 0, 0] = 1e-6
    gate.mark_active({"k": kernel}, [gradient])
    np.testing.assert_array_equal(gate.in_use["k"], [False, True])


def test_all_heads_train_on_mixed_batches():
    model = heads_model(strength=1.0)
    before = np.array(model.get_layer("heads").kernel)
    x, y = blobs(60, classes=2)
    model.fit((x, np.arange(60, dtype="int32") % 3), y, epochs=2, verbose=0)
    changed = np.any(before != np.array(model.get_layer("heads").kernel), axis=(1, 2))
    assert changed.all()


@pytest.mark.parametrize("estimator", ["batch", "empirical"])
def test_heads_of_other_tasks_have_no_fisher(estimator):
    model = heads_model(strength=1.0, fisher=DiagonalFisher(estimator))
    model.fit(*task_data(1), verbose=0)
    model.consolidate(task_data(1) if estimator == "empirical" else None)
    precision = np.array(model.regularizer.precisions["heads/kernel"].values)
    assert np.all(precision[[0, 2]] == 0)
    assert np.all(precision[1] > 0)


def test_file_round_trip(tmp_path):
    model = heads_model(strength=1.0)
    model.fit(*task_data(0), verbose=0)
    model.save(tmp_path / "heads.keras")
    again = keras.models.load_model(tmp_path / "heads.keras")
    x = task_data(2)[0]
    np.testing.assert_array_equal(model.predict(x, verbose=0), again.predict(x, verbose=0))
    np.testing.assert_array_equal(state_of(again)["in_use/heads/kernel"], [True, False, False])


def test_each_head_is_initialised_on_its_own():
    layer = TaskHeads(2, 50)
    layer(np.zeros((1, 300), "float32"), np.zeros(1, "int32"))
    kernel = np.array(layer.kernel)
    limit = (6 / 350) ** 0.5  # limit of Glorot uniform for 300 inputs and 50 outputs
    assert not np.array_equal(kernel[0], kernel[1])
    assert 0.95 * limit < np.abs(kernel).max() <= limit


def test_config_and_bad_arguments():
    layer = TaskHeads(2, 3, activation="softmax", kernel_regularizer="l2")
    assert TaskHeads.from_config(layer.get_config()).get_config() == layer.get_config()
    for arguments in ({"tasks": 0, "units": 2}, {"tasks": 2, "units": 1.5}):
        with pytest.raises(ValueError, match="must be an integer >= 1"):
            TaskHeads(**arguments)
    with pytest.raises(ValueError, match=r"\(batch, features\)"):
        TaskHeads(2, 3)(np.zeros((1, 2, 3), "float32"), np.zeros(1, "int32"))


@pytest.mark.parametrize("ids", [-1, 3])
def test_ids_of_no_head_are_refused(ids):
    x, y = task_data(0)
    features, given = x
    model = heads_model()
    bad = (features, np.full_like(given, ids))
    with pytest.raises(ValueError, match=r"Task ids must be in \[0, 3\)"):
        model.fit(bad, y, verbose=0)
    with pytest.raises(ValueError, match=r"Task ids must be in \[0, 3\)"):
        model.consolidate((bad, y))


@pytest.mark.parametrize(
    "fisher", [DiagonalFisher("empirical", None), KroneckerFisher("empirical", None, correction=2)]
)
def test_the_fisher_information_of_heads_is_that_of_a_float64_loop(fisher):
    model = heads_model(strength=1.0, fisher=fisher, grouping=None)
    x, y = blobs(12, classes=2)
    task = np.arange(12, dtype="int32") % 2  # the third has no examples
    model.consolidate(((x, task), y))
    kernel, bias = (np.array(v, "float64") for v in model.get_layer("heads").weights)
    hidden = np.tanh(x.astype("float64") @ np.array(model.get_layer("hidden").kernel, "float64"))
    expected = [np.zeros((3, 8, 2)), np.zeros((3, 2))]
    for h, t, label in zip(hidden, task, y, strict=True):
        logits = np.exp(h @ kernel[t] + bias[t])
        g = logits / logits.sum() - np.eye(2)[label]
        expected[0][t] += np.outer(h, g) ** 2 / 12
        expected[1][t] += g**2 / 12
    for name, values in zip(("kernel", "bias"), expected, strict=True):
        block = model.regularizer.precisions[f"heads/{name}"]
        np.testing.assert_allclose(block.importances(), values, rtol=1e-3, atol=1e-7)


def test_the_default_strength_is_lower_with_heads_and_distillation():
    def strength(layer, **settings):
        inputs, task = keras.Input((6,)), keras.Input((), dtype="int32")
        if not isinstance(layer, TaskHeads):
            return DWDModel(inputs, layer(inputs), **settings).strength
        outputs = layer(inputs, task)
        return DWDModel([inputs, task], outputs, **settings).strength

    heads, shared = TaskHeads(2, 2), layers.Dense(2)
    assert strength(heads) == strength(shared) == strength(shared, distillation=Distillation())
    assert strength(heads, distillation=Distillation()) == 20.0 < strength(heads)
    assert strength(heads, distillation=Distillation(), strength=7.0) == 7.0
