"""Metrics other than accuracy: what they are called, which direction is better, and all runs."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, mlp
from typer.testing import CliRunner

from keras_dwd import DiagonalFisher
from keras_dwd.evaluation import (
    AccuracyMatrix,
    Method,
    MetricMatrix,
    Scenario,
    TaskMetric,
    run_sequence,
)
from keras_dwd.evaluation.metric import Evaluator, recorded, task_metrics
from keras_dwd.evaluation.report import columns
from keras_dwd_command.app import app


def cheap(strength):
    """The settings whose step is traced fastest."""
    return {"strength": strength, "fisher": DiagonalFisher("batch"), "grouping": None}


CHEAP = Method("mine", cheap, strength=1.0)


def test_of_errors_lower_is_better():
    """By hand, for an error of three tasks; what is not measured is NaN."""
    after = np.array([[0.2, 0.9, np.nan], [0.1, 0.3, 0.8], [0.4, 0.5, 0.2]])
    matrix = MetricMatrix(after, np.array([1.0, 1.1, 1.2]), "mae", higher_is_better=False)
    assert matrix.average == pytest.approx((0.4 + 0.5 + 0.2) / 3)
    assert matrix.learning == pytest.approx((0.2 + 0.3 + 0.2) / 3)
    # Task 1 was best after task 2, at 0.1; task 2 right after it was learned, at 0.3.
    assert matrix.forgetting == pytest.approx((0.3 + 0.2) / 2)
    assert matrix.relative_forgetting == pytest.approx((0.3 / 0.1 + 0.2 / 0.3) / 2)
    assert matrix.backward_transfer == pytest.approx(-(0.2 + 0.2) / 2)  # both became worse
    assert matrix.forward_transfer == pytest.approx(((1.1 - 0.9) + (1.2 - 0.8)) / 2)
    assert set(matrix.metrics()) >= {"average_mae", "learning_mae", "forgetting"}
    assert set(matrix.metrics(first=False)) >= {"average_mae", "mae_forgetting"}
    assert not hasattr(matrix, "average_accuracy")


def test_values_below_zero_and_zero():
    """R² may be negative, an error may be zero."""
    r2 = MetricMatrix(np.array([[-0.5, 0.0], [-2.0, 0.4]]), np.zeros(2), "r2_score")
    assert r2.forgetting == pytest.approx(1.5)
    assert r2.relative_forgetting == pytest.approx(1.5 / 0.5)
    for last, expected in ((0.0, 0.0), (0.1, np.inf)):
        after = np.array([[0.0, 1.0], [last, 0.0]])
        assert MetricMatrix(after, np.ones(2), "mae", False).relative_forgetting == expected


def test_a_negated_metric_forgets_as_much():
    rng = np.random.default_rng(0)
    a, before = rng.uniform(size=(4, 4)), rng.uniform(size=4)
    one, other = MetricMatrix(a, before), MetricMatrix(-a, -before, "loss", False)
    for name in ("forgetting", "relative_forgetting", "backward_transfer", "forward_transfer"):
        assert getattr(one, name) == pytest.approx(getattr(other, name))


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        *[("accuracy", True), ("acc", True), ("loss", False), ("mae", False), ("AUC", True)],
        *[("first_mae", False), ("second_out_accuracy", True), ("first_loss", False)],
        (keras.metrics.R2Score(name="fit"), True),
    ],
)
def test_directions_that_keras_knows(metric, higher):
    (made,) = task_metrics([metric])
    assert made.higher_is_better is higher


@pytest.mark.parametrize(
    ("metrics", "error"),
    [
        ("mae", "`metrics` must be a list"),
        ([], "`metrics` must be a list"),
        (["no_such_thing"], "Say whether higher values of 'no_such_thing' are better"),
        ([keras.metrics.Mean(name="m")], "Say whether higher values of 'm' are better"),
        ([lambda model, data: 1.0], "`metrics` must hold metrics of Keras"),
        (["mae", "mae"], "different names"),
    ],
)
def test_metrics_that_are_refused(metrics, error):
    with pytest.raises(ValueError, match=error):
        task_metrics(metrics)
    with pytest.raises(ValueError, match="Say whether higher values of 'f' are better"):
        TaskMetric("f", lambda model, data: 1.0)
    with pytest.raises(ValueError, match="`name` must be that of the metric, 'other'"):
        TaskMetric("f", keras.metrics.MeanSquaredError(name="other"))


def lines(seed, slope, count=40):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 2)).astype("float32")
    return x, (slope * x[:, 0] - x[:, 1] / 2).astype("float32")


def network(scenario):
    inputs = keras.Input((2,))
    hidden = keras.layers.Dense(8, "tanh")(inputs)
    return keras.Model(inputs, keras.layers.Dense(scenario.outputs)(hidden))


def regression():
    tasks = [(f"slope {s}", lines(0, s), lines(1, s)) for s in (1, -2)]
    return Scenario.from_tasks(tasks)


def test_regression_is_measured_by_its_error():
    """The matrices are those of predictions; forgetting is above 0 where the error grew."""
    given, seen = regression(), []

    def largest(model, data):
        x, y = data
        errors = np.abs(model.predict(x, verbose=0)[:, 0] - y)
        seen.append(len(x))
        return {"largest": errors.max(), "mean": errors.mean()}

    metrics = [
        "mae",
        TaskMetric("largest", largest, higher_is_better=False),
        TaskMetric("mean", largest, higher_is_better=False),
        "loss",
    ]
    result = run_sequence(
        network,
        given,
        CHEAP,
        metrics=metrics,
        strength=0.0,
        epochs=30,
        learning_rate=0.02,
        compile_settings={"loss": "mse"},
    )
    assert given.outputs == 1
    assert list(result.matrices) == ["mae", "largest", "mean", "loss"]
    np.testing.assert_allclose(result.matrices["mean"].after, result.matrix.after, rtol=1e-5)
    for t, task in enumerate(given.tasks):
        x, y = task.test
        errors = result.model.predict(x, verbose=0)[:, 0] - y
        assert result.matrix.after[-1, t] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
        assert result.matrices["loss"].after[-1, t] == pytest.approx(np.mean(errors**2), rel=1e-5)
    assert result.matrix.forgetting > 0.5
    assert result.matrix.backward_transfer < -0.5
    assert result.metrics()["loss_forgetting"] == result.matrices["loss"].forgetting
    # Once for each of the two tasks, before training and after each task, for both metrics at once.
    assert len(seen) == 6


def test_the_default_loss_needs_class_numbers():
    with pytest.raises(ValueError, match=r"labels of task 'slope 1' are no class numbers.*loss"):
        run_sequence(network, regression(), CHEAP, metrics=["mae"])


def test_what_a_function_must_return():
    for found, error in (
        (float("nan"), "must be a finite number"),
        ("high", "must be a finite number"),
        ({"other": 1.0}, "must give a metric called 'f'"),
    ):
        evaluate = Evaluator(
            [TaskMetric("f", lambda m, d, f=found: f, higher_is_better=True)], [None]
        )
        with pytest.raises(ValueError, match=error):
            evaluate(None)


@pytest.mark.long
def test_multi_label_data_and_sample_weights():
    """Examples of weight 0 count for nothing, in training and in what is measured."""

    def data(seed):
        x, _ = blobs(40, seed=seed)
        y = (x[:, :2] > 0).astype("float32")
        weights = np.repeat([1.0, 0.0], 20).astype("float32")
        return x, np.where(weights[:, None] > 0, y, 1 - y), weights

    given = Scenario.from_tasks([(str(t), data(t), data(t)) for t in range(2)], outputs=2)

    def build(scenario):
        inputs = keras.Input((6,))
        return keras.Model(inputs, keras.layers.Dense(scenario.outputs, "sigmoid")(inputs))

    compiled = {
        "loss": "binary_crossentropy",
        "metrics": [],
        "weighted_metrics": ["binary_accuracy"],
    }
    result = run_sequence(
        build,
        given,
        CHEAP,
        metrics=["binary_accuracy"],
        strength=0.0,
        epochs=40,
        learning_rate=0.05,
        compile_settings=compiled,
    )
    x, y, weights = given.tasks[1].test
    right = (result.model.predict(x, verbose=0) > 0.5) == (y > 0.5)
    expected = np.average(right.mean(axis=1), weights=weights)
    assert result.matrix.after[1, 1] == pytest.approx(expected)
    assert expected > 0.9


@pytest.mark.long
def test_several_outputs():
    x, y = blobs(48)
    targets = {"kind": y, "size": x[:, :1]}

    def build(scenario):
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(8, "tanh")(inputs)
        outputs = {n: keras.layers.Dense(k, name=n)(hidden) for n, k in (("kind", 3), ("size", 1))}
        return keras.Model(inputs, outputs)

    given = Scenario.from_tasks([(str(t), (x, targets), (x, targets)) for t in range(2)])
    loss = {"kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "size": "mse"}
    result = run_sequence(
        build,
        given,
        CHEAP,
        metrics=["kind_accuracy", "size_mae"],
        epochs=2,
        compile_settings={"loss": loss, "metrics": {"kind": ["accuracy"], "size": ["mae"]}},
    )
    predicted = result.model.predict(x, verbose=0)
    right = (np.argmax(predicted["kind"], 1) == y).mean()
    assert result.matrix.after[-1, 0] == pytest.approx(right)
    error = np.abs(predicted["size"] - targets["size"]).mean()
    assert result.matrices["size_mae"].after[-1, 0] == pytest.approx(error, rel=1e-5)
    assert result.matrices["size_mae"].higher_is_better is False


@pytest.mark.long
def test_a_run_with_several_metrics_is_resumed(tmp_path):
    """From a checkpoint in the middle; one of other metrics is refused."""

    class StoppedError(Exception):
        pass

    def stop(t, task):
        if t == 1:
            raise StoppedError
        return []

    def ran(metrics=("mae", "loss"), **settings):
        return run_sequence(
            network,
            regression(),
            CHEAP,
            metrics=metrics,
            epochs=2,
            compile_settings={"loss": "mse"},
            checkpoint_dir=tmp_path / settings.pop("folder"),
            **settings,
        )

    whole = ran(folder="whole")
    with pytest.raises(StoppedError):
        ran(folder="part", callbacks=stop)
    with pytest.raises(ValueError, match="run with other settings"):
        ran(metrics=("mae",), folder="part")
    again = ran(folder="part")
    for name, matrix in whole.matrices.items():
        np.testing.assert_array_equal(again.matrices[name].after, matrix.after)
        np.testing.assert_array_equal(again.matrices[name].before, matrix.before)


def test_tables_name_the_metric_and_its_direction(tmp_path):
    assert list(columns({}).values())[:2] == ["accuracy %", "forgetting %"]
    out = tmp_path / "out.json"
    options = ["--scenario", "split:digits", "--tasks", "2", "--epochs", "1", "--seeds", "1"]
    options += ["--methods", "finetune", "--metrics", "loss,accuracy", "--out", str(out)]
    result = CliRunner().invoke(app, ["run", *options], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "loss (lower is better)" in result.output
    content = json.loads(out.read_text())
    first, second = recorded(content["protocol"])
    assert (first.name, first.higher_is_better) == ("loss", False)
    assert (second.name, second.higher_is_better, second.percent) == ("accuracy", True, True)
    row = content["methods"]["finetune"]
    after = np.array(row["loss_matrices"], dtype="float")[0]
    assert row["metrics"]["average_loss"]["mean"] == pytest.approx(after[-1].mean())
    assert row["metrics"]["forgetting"]["mean"] == pytest.approx(after[1, 0] - after[0, 0])
    assert {"accuracy_matrices", "untrained_accuracies", "untrained_loss"} <= row.keys()
    assert "accuracy_forgetting" in row["metrics"]


def test_results_of_accuracy_alone_are_as_they_were():
    """An accuracy is what its matrix is called by, and protocols do not name it."""
    x, y = blobs(48)
    task = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    given = Scenario.from_tasks([("a", task, task)], outputs=3)
    result = run_sequence(lambda s: mlp(), given, CHEAP, epochs=1)
    assert isinstance(result.matrix, AccuracyMatrix)
    assert result.matrix.average_accuracy == result.matrix.average == result.matrix.after[0, 0]
    assert list(result.metrics())[:2] == ["average_accuracy", "learning_accuracy"]
    assert recorded({})[0] == TaskMetric("accuracy")
