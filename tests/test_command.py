"""The subcommands of `keras-dwd`, their help, what an interruption leaves, and own data."""

import json
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from scipy import stats
from test_report import results
from typer.main import get_command
from typer.testing import CliRunner

from keras_dwd import __version__
from keras_dwd.evaluation import datasets
from keras_dwd.evaluation.comparison import compared, differing
from keras_dwd.evaluation.experiment import Experiment
from keras_dwd.evaluation.matrix import AccuracyMatrix
from keras_dwd.evaluation.methods import METHODS, VARIANTS
from keras_dwd.evaluation.plan import CURVATURES
from keras_dwd.evaluation.profiles import NETWORKS
from keras_dwd.evaluation.recipe import OPTIMIZERS
from keras_dwd.evaluation.report import cell
from keras_dwd.evaluation.runner import SequenceResult
from keras_dwd.words import counted
from keras_dwd_command import options
from keras_dwd_command.app import app

COMMANDS = get_command(app).commands


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_options_name_what_the_package_has():
    assert set(options.METHODS) == set(METHODS)
    assert set(options.VARIANTS) == set(VARIANTS)
    assert set(options.OPTIMIZERS) == set(OPTIMIZERS)
    assert set(options.NETWORKS) == set(NETWORKS)
    assert set(options.CURVATURES) == set(CURVATURES)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_help_has_an_example_that_can_be_parsed(name):
    text = " ".join(invoke(name, "--help").output.split())
    words = re.search(rf"Example: keras-dwd {name}(.*)$", text).group(1).split()
    COMMANDS[name].make_context(name, words)


def test_help_and_version_load_no_tensorflow():
    code = (
        "import sys; from keras_dwd_command.app import app\n"
        "for words in (['--help'], ['run', '--help'], ['--version']):\n"
        "    try: app(words)\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert not {'tensorflow', 'keras', 'keras_dwd', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"keras-dwd {__version__}" in done.stdout
    assert "--class-order-seed" in done.stdout


def test_info():
    found = json.loads(invoke("info", "--json").stdout)
    assert found["keras"] == keras.__version__
    assert any("CPU" in device for device in found["devices"])
    text = invoke("info").stdout
    assert re.search(r"horovod +\S", text)
    assert keras.__version__ in text


def test_a_dry_run_tells_sizes_and_trains_nothing(monkeypatch):
    monkeypatch.setattr(Experiment, "run", lambda *a, **k: pytest.fail("it ran"))
    arguments = ["--scenario", "split:digits", "--methods", "finetune,ewc", "--seeds", 1]
    shown = " ".join(invoke("run", *arguments, "--dry-run").output.split())
    assert "ewc (λ = 100)" in shown
    assert "2 runs of" in shown
    assert "seed 0;" in shown
    built = Experiment(scenario="split:digits")
    for task in built.built.tasks:
        assert str(len(task.train[1])) in shown
    assert f"{built.protocol.build(built.built).count_params():,} parameters" in shown
    assert "runs of" in " ".join(invoke("tune", *arguments, "--dry-run").output.split())
    one = invoke("run", *arguments[:2], "--methods", "dwd", "--seeds", 1, "--dry-run").output
    assert "1 method: dwd (λ = 200); 1 seed, 1 run of" in " ".join(one.split())


@pytest.mark.parametrize("command", ["run", "tune"])
@pytest.mark.parametrize("given", [("--seeds", 0), ("--methods", ",")])
def test_a_dry_run_refuses_what_the_run_would(command, given):
    refused = invoke(command, "--scenario", "split:digits", *given, "--dry-run")
    assert isinstance(refused.exception, ValueError)
    assert f"`{given[0]}` must" in str(refused.exception)


def test_a_slow_rate_is_not_shown_as_zero():
    rates = [{"mean": mean, "per_seed": [mean]} for mean in (1234.4, 9.6, 0.0512)]
    assert [cell("steps_per_second_with_boundaries", r) for r in rates] == ["1234", "9.6", "0.051"]


# An interruption.


def measured(accuracy):
    matrix = AccuracyMatrix(np.full((5, 5), accuracy), np.zeros(5))
    return SequenceResult(matrix, 10, [1.0] * 5, [0.1] * 5, 2**20, None)


def test_an_interruption_leaves_what_was_finished(monkeypatch, tmp_path):
    done = []

    def run(self, method, seed, *rest):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((method, seed))
        return measured(0.5 + 0.1 * seed)

    monkeypatch.setattr(Experiment, "run", run)
    out, folder = tmp_path / "r.json", tmp_path / "with space"
    given = ["--methods", "ewc,dwd", "--seeds", 2, "--out", out, "--checkpoint-dir", folder]
    ended = invoke("run", *given)
    assert ended.exit_code == 130
    assert done == [("ewc", 0), ("ewc", 1), ("dwd", 0)]
    content = json.loads(out.read_text())
    assert content["unfinished"] == 1
    assert content["methods"]["ewc"]["metrics"]["average_accuracy"]["per_seed"] == [0.5, 0.6]
    assert len(content["methods"]["dwd"]["accuracy_matrices"]) == 1
    said = " ".join(ended.output.split())
    assert f"Finished: 3 runs, written to {out}" in said
    again = said.split("To go on: keras-dwd run ")[1]
    assert f"--checkpoint-dir '{folder}'" in again
    assert "--resume" in again
    # What goes on is a command with the same options.
    import shlex

    words = shlex.split(again)
    context = COMMANDS["run"].make_context("run", words)
    assert context.params["methods"] == "ewc,dwd"
    assert context.params["resume"]


def test_an_interruption_before_anything_is_finished(monkeypatch):
    def run(self, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(Experiment, "run", run)
    ended = invoke("run", "--methods", "ewc")
    assert ended.exit_code == 130
    assert "Finished: 0 runs" in ended.output
    assert "--checkpoint-dir" in ended.output


def test_a_run_writes_results_and_report(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(Experiment, "run", lambda self, method, seed, *rest: measured(0.5))
    out, page = tmp_path / "r.json", tmp_path / "r.html"
    ended = invoke("run", "--methods", "ewc", "--seeds", 1, "--out", out, "--report", page)
    assert ended.exit_code == 0, ended.output
    assert "unfinished" not in json.loads(out.read_text())
    assert "50.0" in page.read_text()
    assert "±" not in ended.output
    assert "seeds 0–0" not in ended.output
    again = tmp_path / "again.html"
    assert invoke("report", out, "--out", again).exit_code == 0
    assert again.read_text() == page.read_text()
    ended = invoke("run", "--report", tmp_path / "no" / "r.html")
    assert "`--report`: the folder" in str(ended.exception)


# Comparing two files.


def test_a_comparison_is_paired_where_the_protocol_is_the_same(tmp_path):
    one, other = results(seeds=4), results(seeds=4)
    values = one["methods"]["ewc"]["metrics"]["average_accuracy"]["per_seed"]
    shift = np.array([0.1, 0.12, 0.08, 0.12])
    other["methods"]["ewc"]["metrics"]["average_accuracy"]["per_seed"] = (values + shift).tolist()
    found = {each.method: each for each in compared(one, other)}["ewc"]
    assert found.paired
    assert found.difference == pytest.approx(shift.mean())
    assert found.p == pytest.approx(stats.ttest_1samp(shift, 0).pvalue)
    other["protocol"]["tasks"] = ["a", "b", "c"]
    unpaired = {each.method: each for each in compared(one, other)}["ewc"]
    assert not unpaired.paired
    assert unpaired.p > found.p
    assert list(differing(one, other)) == ["tasks"]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(paths, (one, other), strict=True):
        path.write_text(json.dumps(content))
    shown = invoke("compare", *paths)
    assert f"{100 * shift.mean():+.1f}" in shown.output
    assert "The protocols differ in tasks" in shown.output
    printed = json.loads(invoke("compare", *paths, "--json").stdout)
    assert {each["method"] for each in printed} == set(one["methods"])
    assert "one of" in str(invoke("compare", *paths, "--metric", "x").exception)


def test_one_seed_has_no_p_and_other_methods_are_refused():
    assert compared(results(seeds=1), results(seeds=1))[0].p is None
    assert compared(results(), results())[0].p == 1
    with pytest.raises(ValueError, match="no method in common"):
        compared(results(names=("ewc",)), results(names=("dwd",)))


# Data of one's own.


def examples(count=40):
    rng = np.random.default_rng(0)
    return rng.normal(3, 2, (count, 4)).astype("float32"), np.arange(count) % 4


def test_own_arrays(tmp_path):
    x, y = examples()
    np.savez(tmp_path / "a.npz", x=x, y=np.array(list("abcd"))[y])
    data = datasets.load(str(tmp_path / "a.npz"))
    assert data.classes == 4
    assert len(data.x_train) == 32
    for label in range(4):
        assert (data.y_test == label).sum() == 2
    both = np.concatenate([data.x_train, data.x_test])
    np.testing.assert_array_equal(np.sort(both, 0), np.sort(x, 0))
    np.savez(tmp_path / "b.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    built = Experiment(scenario=f"split:{tmp_path / 'b.npz'}", tasks=2)
    (values, ids), labels = built.built.tasks[1].train
    np.testing.assert_array_equal(values, x[y >= 2])  # not divided by 255
    assert set(ids) == {1}
    assert set(labels) == {0, 1}
    assert built.protocol.build(built.built).count_params()


def test_an_own_table(tmp_path):
    x, y = examples()
    lines = ["a,label,b,c,d"]
    lines += [f"{r[0]},{'xyzw'[k]},{r[1]},{r[2]},{r[3]}" for r, k in zip(x, y, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = datasets.load(str(tmp_path / "t.csv"))
    assert data.classes == 4
    np.testing.assert_allclose(data.x_train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(data.x_train.std(0), 1, atol=1e-5)
    whole = np.concatenate([data.x_train, data.x_test])
    assert np.corrcoef(np.sort(whole[:, 0]), np.sort(x[:, 0]))[0, 1] == pytest.approx(1)


def test_own_images(tmp_path):
    for label, shade in (("cat", 10), ("dog", 200)):
        (tmp_path / label).mkdir()
        for i in range(5):
            image = np.full((12, 20, 3), shade, "uint8")
            keras.utils.save_img(tmp_path / label / f"{i}.png", image, scale=False)
    data = datasets.load(str(tmp_path))
    assert data.x_train.shape == (8, 12, 20, 3)
    assert data.x_train.dtype == "uint8"
    for x, y in zip(data.x_test, data.y_test, strict=True):
        assert (x == (10, 200)[y]).all()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.npz", {"z": np.zeros(3)}, "must have the arrays x and y"),
        ("a.npz", {"x": np.zeros((3, 2)), "y": np.zeros(2)}, "one label for each example"),
        ("a.npz", {"x": np.array([["a"]]), "y": np.zeros(1)}, "of numbers. Received"),
        ("a.csv", "a,label\n1,x\n?,y", "Line 3 of"),
        ("a.csv", "a,label\n1,x\n2", "Line 3 of"),
        ("a.csv", "", "must have a line of names"),
        ("a.csv", "a,label\n1,x\n2,y", "two examples at least"),
        ("no.csv", None, "There is no file"),
        ("a.npz", "text", r"a\.npz' must be a file that `numpy.savez`"),
        ("a.npz", "PK\x03\x04 cut", r"a\.npz' must be a file that `numpy.savez`"),
        ("a.npz", {"x": np.array([{}]), "y": np.zeros(1)}, r"a\.npz' must be.*numbers"),
        ("nofolder", None, "'nofolder': it is neither prepared here nor a folder"),
        ("digit", None, r"Did you mean 'digits'\?"),
    ],
)
def test_own_data_that_cannot_be_read_is_refused(tmp_path, name, content, error):
    if isinstance(content, dict):
        np.savez(tmp_path / name, **content)
    elif content is not None:
        (tmp_path / name).write_text(content)
    elsewhere = "." in name  # else it is no path
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        datasets.load(str(tmp_path / name) if elsewhere else name, tmp_path)


def test_images_that_cannot_be_read_are_refused_by_name(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
    keras.utils.save_img(tmp_path / "cat" / "1.png", np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"dog' must hold images of its class.*none"):
        datasets.load(str(tmp_path))
    (tmp_path / "dog" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2\.png' must be an image"):
        datasets.load(str(tmp_path))


def test_counts_in_words():
    assert [counted(n, "epoch") for n in (1, 2, 0.5, 1.0)] == [
        "1 epoch",
        "2 epochs",
        "0.5 epochs",
        "1 epoch",
    ]
    told = Experiment(scenario="split:digits", tasks=1, epochs=1, images_per_class=1).describe(1)
    assert "1 task," in told["title"]
    assert "1 epoch a task, 1 training image a class" in told["text"]
    assert "classes in their own order" in told["text"]
    told = Experiment(class_order_seed=3).describe(2)
    assert "permutations of seed 3" in told["text"]


# Options from a file.


def parsed(name, *words):
    return COMMANDS[name].make_context(name, list(map(str, words))).params


def test_options_of_a_file_and_of_set(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        'seeds = 5\ntasks = 2\nmethods = ["ewc", "dwd"]\nlearning-rate = 1\naugment = false\n'
        'strength = 30\njson = true\nout = "r.json"\n'
    )
    found = parsed("run", "--set", "tasks=4", "--config", file, "--seeds", 2, "--set", "epochs=3")
    assert (found["seeds"], found["tasks"], found["epochs"]) == (2, 4, 3)
    assert (found["methods"], found["strength"]) == ("ewc,dwd", "30")
    assert (found["learning_rate"], found["augment"], found["as_json"]) == (1.0, False, True)
    assert str(found["out"]) == "r.json"
    assert "config" not in found  # the command that resumes needs no file
    left = parsed("run")
    assert found.keys() == left.keys()
    assert {n for n in found if found[n] != left[n]} == {
        *("seeds", "tasks", "epochs", "methods", "strength", "learning_rate", "augment"),
        *("as_json", "out"),
    }
    assert parsed("tune", "--set", "tuning-seeds=3")["tuning_seeds"] == 3
    assert parsed("ablate", "--set", "parts=groups")["parts"] == "groups"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("taks = 3", r"'taks', which is no option of this command. Did you mean 'tasks'"),
        ("x = 3", "'x', which is no option of this command. Known: scenario, "),
        ("tasks = 2.5", "'tasks' in .*must be an integer. Received: 2.5"),
        ("tasks = true", "'tasks' in .*must be an integer. Received: True"),
        ("augment = 1", "'augment' in .*must be true or false. Received: 1"),
        ("methods = [[1]]", "'methods' in .*must be text"),
        ("out = 1", "'out' in .*must be a path"),
        ("[run]", "'run', which is no option"),
        ("tasks =", "cannot be read as TOML"),
        (None, "cannot be read as TOML: .*No such file"),
    ],
)
def test_a_file_of_options_is_checked_before_anything_runs(tmp_path, content, error):
    file = tmp_path / "c.toml"
    if content is not None:
        file.write_text(content)
    refused = invoke("run", "--config", file)
    assert refused.exit_code == 2
    assert re.search(error.replace(" ", r"[\s│]+"), refused.output), refused.output


@pytest.mark.parametrize("given", ["taks=1", "tasks", "tasks=x"])
def test_set_is_checked(given):
    refused = invoke("run", "--set", given)
    assert refused.exit_code == 2
    assert given.partition("=")[0] in refused.output


# A trained model.


def classifier(activation=None):
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, activation)])


def test_the_first_task_is_what_a_trained_model_knows(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(80) % 4
    x = (np.eye(4)[y] + 0.1 * rng.normal(size=(80, 4))).astype("float32")
    np.savez(tmp_path / "old.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    np.savez(tmp_path / "new.npz", x_train=x[:, ::-1], y_train=y, x_test=x[:8, ::-1], y_test=y[:8])
    network = classifier()
    network.layers[0].kernel.assign(9 * np.eye(4))
    network.save(tmp_path / "m.keras")
    given = {
        "scenario": f"split:{tmp_path / 'new.npz'}",
        "tasks": 1,
        "epochs": 1,
        "model": tmp_path / "m.keras",
        "consolidate_on": str(tmp_path / "old.npz"),
    }
    experiment = Experiment(**given)
    assert "m.keras, " in experiment.describe(1)["text"]
    assert "as loaded 100.0 % accurate" in experiment.describe(1)["text"]
    result = experiment.run("ewc", strength=1e6)
    assert result.matrix.after[0, 0] == 1  # as it was: nothing was trained in this task
    assert result.steps == 3
    assert result.train_seconds[0] < 0.1 < result.train_seconds[1]
    # A strength as large as this holds the weights where the file has them.
    held = result.model.get_layer(network.layers[0].name).kernel
    np.testing.assert_allclose(held, network.layers[0].kernel, atol=0.01)


def test_a_model_that_cannot_be_used_is_refused(tmp_path):
    x, y = examples()
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.savez(tmp_path / "b.npz", x=x[:, :3], y=y)
    classifier("softmax").save(tmp_path / "m.keras")
    given = {"model": tmp_path / "m.keras", "consolidate_on": str(tmp_path / "a.npz")}
    made = Experiment(scenario=f"split:{tmp_path / 'a.npz'}", tasks=2, **given).protocol
    assert not made.compiled()["loss"].get_config()["from_logits"]
    inputs = keras.Input((4,))
    code = keras.Model(inputs, keras.layers.Lambda(lambda x: x)(inputs))
    code.save(tmp_path / "code.keras")
    keras.Model(inputs, [inputs + 1, inputs + 2]).save(tmp_path / "two.keras")
    (tmp_path / "broken.keras").write_text("x")

    def message(model="m.keras", known="a.npz", **changed):
        given = {"scenario": f"split:{tmp_path / 'a.npz'}", "tasks": 2} | changed
        with pytest.raises(ValueError) as error:  # noqa: PT011
            Experiment(
                **given,
                model=model and tmp_path / model,
                consolidate_on=known and str(tmp_path / known),
            )
        return str(error.value)

    assert "need each other" in message(model=None)
    assert "need each other" in message(known=None)
    assert "must be domain" in message(setting="class")
    assert "must be a file that ends in .keras" in message("no.keras")
    assert "must be a file that ends in .keras" in message("a.npz")
    assert "broken.keras' cannot be loaded" in message("broken.keras")
    assert "code.keras' cannot be loaded" in message("code.keras")
    assert "must be a functional or sequential classifier" in message("two.keras")
    assert "takes examples of shape (4,)" in message(known="b.npz")
    assert "no setting of 'text'" in message(scenario="text:x", tasks=5)
