import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, mlp, sweep
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from keras_dwd import DiagonalFisher, DWDOptimizer
from keras_dwd.evaluation import METHODS, AccuracyMatrix, Method, Scenario, run_sequence
from keras_dwd.evaluation.experiment import Experiment
from keras_dwd.evaluation.methods import method_named, strength_of
from keras_dwd.files import write_json
from keras_dwd.layers import TaskHeads, TaskNormalization
from keras_dwd_command.app import app


@settings(max_examples=50, deadline=None)
@given(tasks=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_metrics_equal_their_definitions(tasks, seed):
    rng = np.random.default_rng(seed)
    a, before = rng.uniform(0.1, 1, (tasks, tasks)), rng.uniform(size=tasks)
    matrix = AccuracyMatrix(a, before)
    last = tasks - 1
    forgetting, relative, backward, forward = [], [], [], []
    for j in range(last):
        peak = max(a[t][j] for t in range(j, last))
        forgetting.append(peak - a[last][j])
        relative.append((peak - a[last][j]) / peak)
        backward.append(a[last][j] - a[j][j])
        forward.append(a[j][j + 1] - before[j + 1])

    def mean(values):
        return sum(values) / len(values) if values else 0.0

    assert matrix.average_accuracy == pytest.approx(mean(list(a[last])))
    assert matrix.learning_accuracy == pytest.approx(mean([a[j][j] for j in range(tasks)]))
    assert matrix.forgetting == pytest.approx(mean(forgetting))
    assert matrix.relative_forgetting == pytest.approx(mean(relative))
    assert matrix.backward_transfer == pytest.approx(mean(backward))
    assert matrix.forward_transfer == pytest.approx(mean(forward))


def cheap(strength):
    """The settings whose step is traced fastest."""
    return {"strength": strength, "fisher": DiagonalFisher("batch"), "grouping": None}


def scenario(as_dataset=False):
    def data(seed):
        x, y = blobs(48, seed=seed)
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(16) if as_dataset else (x, y)

    tasks = [(f"task {t}", data(t), data(t)) for t in range(3)]
    return Scenario.from_tasks(tasks, outputs=3)


@pytest.mark.parametrize(
    ("method", "as_dataset"),
    sweep([(method, False) for method in METHODS], "dwd", "joint")
    + sweep([(m, True) for m in ("ewc", "dwd-online", "joint")], "dwd-online"),
)
def test_every_method_runs(method, as_dataset):
    result = run_sequence(lambda s: mlp(), scenario(as_dataset), method, epochs=4)
    assert result.matrix.after.shape == (3, 3)
    assert not np.isnan(result.matrix.after[-1]).any()
    # 48 examples per task in batches of 32, or of 16 for the dataset; 4 epochs.
    assert result.steps == (36 if as_dataset else 20 if method == "joint" else 24)
    metrics = result.metrics()
    assert metrics["steps_per_second"] >= metrics["steps_per_second_with_boundaries"] > 0
    assert metrics["peak_memory_mb"] > 50
    assert len(result.train_seconds) == (1 if method == "joint" else 3)


@pytest.mark.long
def test_a_run_repeats_itself():
    runs = [run_sequence(lambda s: mlp(), scenario(), "dwd", epochs=2, seed=3) for _ in "ab"]
    np.testing.assert_array_equal(runs[0].matrix.after, runs[1].matrix.after)


def test_the_optimizer_is_fresh_for_each_task():
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            variables = self.model.optimizer.variables
            rate = self.model.optimizer.learning_rate
            seen.append([float(np.sum(v)) for v in variables if v is not rate])

    run_sequence(
        lambda s: mlp(), scenario(), "finetune", epochs=1, callbacks=lambda t, task: [Look()]
    )
    assert len(seen) == 3
    assert np.all(np.array(seen) == 0)


def test_unknown_method():
    with pytest.raises(ValueError, match="Known: finetune, ewc"):
        run_sequence(lambda s: mlp(), scenario(), "sgd")
    method = Method("mine", cheap, strength=2.0)
    assert (
        run_sequence(lambda s: mlp(), scenario(), method, epochs=1).model.regularizer.strength == 2
    )


@pytest.mark.parametrize(
    "name", sweep(["ewc:batch", "dwd:sampled", "dwd-online:exact", "ewc:adam"], "ewc:batch")
)
def test_methods_take_another_estimator(name):
    result = run_sequence(lambda s: mlp(), scenario(), name, strength=1.0, epochs=1)
    estimator = name.partition(":")[2]
    present_name = {"exact": "empirical", "sampled": "mc"}.get(estimator, estimator)
    assert result.model.fisher.get_config()["estimator"] == present_name
    assert isinstance(result.model.optimizer, DWDOptimizer) == (estimator == "adam")
    assert result.model.tasks_learned == 3
    for variable in result.model.trainable_variables:
        before = float(result.model.penalty())
        variable.assign_add(0.1 * tf.ones(variable.shape))
        assert float(result.model.penalty()) != before


@pytest.mark.parametrize(
    "name", ["joint:exact", "finetune:exact", "sgd:exact", "dwd:", "dwd:batch"]
)
def test_estimators_that_a_method_has_not(name):
    with pytest.raises(ValueError, match=r"Unknown method|`estimator`"):
        run_sequence(lambda s: mlp(), scenario(), name)


def test_files_are_whole_or_untouched(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises((TypeError, ValueError)):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


# Tests of the command line.


def invoke(*arguments):
    return CliRunner().invoke(app, ["run", *arguments])


def test_run_writes_and_prints(tmp_path):
    out = tmp_path / "results.json"
    result = invoke(
        *("--tasks", "2", "--seeds", "2", "--epochs", "1", "--methods", "finetune,dwd"),
        *("--out", str(out)),
    )
    assert result.exit_code == 0, result.output
    assert "permuted:digits, 2 tasks" in result.output
    assert "finetune" in result.output
    content = json.loads(out.read_text())
    assert set(content) == {"protocol", "versions", "methods"}
    assert content["protocol"]["seeds"] == [0, 1]
    assert content["methods"]["dwd"]["settings"]["regularizer"]["strength"] == 200
    assert content["methods"]["dwd"]["settings"]["fisher"]["estimator"] == "influence"
    assert content["methods"]["finetune"]["settings"]["regularizer"]["strength"] == 0
    for method in ("finetune", "dwd"):
        entry = content["methods"][method]
        metric = entry["metrics"]["average_accuracy"]
        assert metric["mean"] == pytest.approx(np.mean(metric["per_seed"]))
        assert metric["std"] == pytest.approx(np.std(metric["per_seed"], ddof=1))
        assert np.shape(entry["accuracy_matrices"]) == (2, 2, 2)
        assert np.mean(entry["accuracy_matrices"][0][-1]) == pytest.approx(metric["per_seed"][0])


@pytest.mark.long
def test_json_is_all_that_is_printed():
    command = [sys.executable, "-m", "keras_dwd_command", "run", "--json"]
    command += ["--scenario", "split:digits"]
    command += ["--tasks", "2", "--seeds", "1", "--epochs", "1", "--methods", "finetune"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["protocol"]["setting"] == "task"
    # TensorFlow's start-up messages begin so: none of them is on the first screen.
    lines = done.stderr.splitlines()
    assert not [line for line in lines if re.match("[IWE]0000|WARNING: All log|To enable", line)]


def test_the_command_holds_back_known_start_up_messages_only():
    code = (
        "import os, keras_dwd_command as c\n"
        "with c.without_noise():\n"
        "    os.write(2, b'I0000 00:00 1 cudart_stub.cc:31] no drivers\\nthe disk is full\\n')\n"
        "    print('shown', flush=True)\n"
        "os.write(2, b'afterwards')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "shown\n"
    assert done.stderr == "the disk is full\nafterwards"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--scenario", "rotated:digits"], "Known: split:NAME, permuted:NAME"),
        (["--scenario", "split:"], "Unknown scenario 'split:'"),
        (["--scenario", "split:nothing"], "Known here: digits"),
        (["--scenario", "split:mnist", "--data-dir", "nowhere"], "does not exist"),
        (["--methods", "dwd,x"], "Unknown method 'x'"),
        (["--strength", "-1"], "`strength`"),
        (["--strength", "much"], "`--strength` must be a number or METHOD=NUMBER"),
        (["--strength", "ewc:exact=1"], "`--strength` names 'ewc:exact'"),
        (["--seeds", "0"], "`--seeds`"),
        (["--epochs", "0"], "`epochs`"),
        (["--profile", "x"], "`profile` must be one of cpu, full"),
        (["--setting", "x"], "`setting` must be one of"),
        (["--tasks", "3", "--scenario", "split:digits"], "must divide"),
        (["--out", "nowhere/x.json"], "does not exist"),
        (["--out", "."], "must be a file"),
    ],
)
def test_bad_options_are_one_clear_line(arguments, error, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    result = invoke(*arguments)
    assert isinstance(result.exception, (ValueError, FileNotFoundError))
    assert error in str(result.exception)


@pytest.mark.long
def test_each_method_can_have_its_own_strength():
    options = ["--scenario", "split:digits", "--tasks", "2", "--seeds", "1", "--epochs", "1"]
    result = invoke(*options, "--methods", "ewc,online-ewc", "--strength", "2,ewc=1e3", "--json")
    methods = json.loads(result.stdout)["methods"]
    found = {name: m["settings"]["regularizer"]["strength"] for name, m in methods.items()}
    assert found == {"ewc": 1000, "online-ewc": 2}


def test_what_is_compared_must_be_measured():
    with pytest.raises(ValueError, match="a metric called 'accuracy'"):
        run_sequence(lambda s: mlp(), scenario(), "finetune", compile_settings={"metrics": []})


def test_inputs_may_be_a_list():
    x, y = blobs(48)
    task = ("both", ([x, x], y), ([x, x], y))

    def build(_):
        inputs = [keras.Input((6,)), keras.Input((6,))]
        return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Add()(inputs)))

    result = run_sequence(build, Scenario.from_tasks([task]), "dwd", epochs=1)
    right = np.argmax(result.model.predict([x, x], verbose=0), 1) == y
    assert result.matrix.average_accuracy == pytest.approx(right.mean())


def test_errors_have_no_traceback():
    command = [sys.executable, "-m", "keras_dwd", "run", "--scenario", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Unknown scenario 'x'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_split_cifar100_by_the_command_line(data_dir, tmp_path):
    result = invoke(
        *("--scenario", "split:cifar100", "--tasks", "10", "--methods", "finetune", "--seeds", "1"),
        *("--epochs", "1", "--data-dir", str(data_dir), "--out", str(tmp_path / "c.json")),
    )
    assert result.exit_code == 0, result.output
    protocol = json.loads((tmp_path / "c.json").read_text())["protocol"]
    assert protocol["class_order_seed"] == 1993
    assert protocol["images_per_class"] == 200


@pytest.mark.long
def test_forgetting_is_plain_on_permuted_digits():
    experiment = Experiment(epochs=5, tasks=3)
    finetune, dwd = (experiment.run(m).metrics() for m in ("finetune", "dwd"))
    assert finetune["forgetting"] > 0.2
    assert dwd["forgetting"] < 0.7 * finetune["forgetting"]
    assert dwd["average_accuracy"] > finetune["average_accuracy"] + 0.05


@pytest.mark.parametrize("backend", ["numpy", "jax", "torch"])
def test_other_backends_are_refused(backend):
    done = subprocess.run(
        [sys.executable, "-c", "import keras_dwd"],
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"but the backend is '{backend}'" in done.stderr


def test_another_seed_is_another_run():
    results = [
        run_sequence(lambda s: mlp(), scenario(), "finetune", epochs=1, seed=seed)
        for seed in (0, 3)
    ]
    kernels = [np.array(result.model.get_layer("hidden").kernel) for result in results]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01


def test_the_compared_methods_are_what_they_are_called():
    """The settings of the published methods, as the documentation of `DWDModel` has them."""
    found = {}
    for name in ("finetune", "ewc", "online-ewc"):
        found[name] = METHODS[name].configuration(7.0)
    assert found["finetune"]["regularizer"]["strength"] == 0
    assert found["ewc"]["regularizer"] == {"strength": 7.0, "decay": 1.0, "anchor": "folded"}
    assert found["online-ewc"]["regularizer"] == {"strength": 7.0, "decay": 0.9, "anchor": "latest"}
    for name in ("ewc", "online-ewc"):
        assert found[name]["fisher"]["estimator"] == "empirical"
        assert found[name]["fisher"]["gamma"] is None
        assert found[name]["grouping"] is None
        assert found[name]["boundary_pass"]


@pytest.mark.long
def test_the_network_of_a_method_can_keep_the_statistics_of_each_task():
    def build(scenario):
        x, task = keras.Input((6,)), keras.Input((), dtype="int32", name="task")
        h = keras.layers.BatchNormalization(name="norm")(keras.layers.Dense(4)(x))
        return keras.Model([x, task], TaskHeads(3, 3)(h, task))

    tasks = []
    for t in range(3):
        x, y = blobs(48, seed=t)
        tasks.append((f"task {t}", *[((x, np.full(48, t, "int32")), y)] * 2))
    given = Scenario.from_tasks(tasks, outputs=3, setting="task")
    method = replace(method_named("dwd-online+task-norm"), settings=cheap)
    assert method.configuration(1.0)["task_norm"] is True
    result = run_sequence(build, given, method, epochs=2)
    norm = result.model.get_layer("norm")
    assert isinstance(norm, TaskNormalization)
    assert len(np.unique(norm.moving_mean, axis=0)) == 3
    with pytest.raises(ValueError, match=r"in the setting 'task'.*Received: 'domain'"):
        run_sequence(build, scenario(), method)
    for name in ("finetune+task-norm", "joint+task-norm"):
        result = run_sequence(build, given, name, epochs=1)
        means = result.model.get_layer("norm").moving_mean
        assert len(np.unique(means, axis=0)) == 3


def test_distillation_is_a_method_of_its_own_and_a_variant_of_others():
    distillation = {"weight": 1.0, "temperature": 2.0}
    lwf = method_named("lwf")
    found = lwf.configuration(3.0)
    assert found["regularizer"]["strength"] == 0
    assert found["distillation"] == distillation | {"weight": 3.0}
    assert (lwf.strength, strength_of(found)) == (1.0, 3.0)
    for name in ("dwd+distill", "dwd-online+distill"):
        found = method_named(name).configuration(7.0)
        assert found["distillation"] == distillation
        assert strength_of(found) == found["regularizer"]["strength"] == 7.0
    with pytest.raises(ValueError, match=r"Unknown method 'lwf\+graph'"):
        method_named("lwf+graph")
