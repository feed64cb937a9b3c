import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from scipy.stats import t as student
from threadpoolctl import threadpool_info
from typer.testing import CliRunner

from keras_dwd.evaluation import AccuracyMatrix, ablation, tuning
from keras_dwd.evaluation.methods import METHODS, VARIANTS, method_named
from keras_dwd.evaluation.runner import SequenceResult
from keras_dwd.evaluation.tuning import UNTOUCHED, grid_around, tune
from keras_dwd_command.app import app

SETTINGS = {"scenario": "split:digits", "tasks": 2, "epochs": 1}


@pytest.fixture
def runs(monkeypatch):
    """The runs that tuning asks for, which are not made: a fixed accuracy stands for each."""
    asked = []

    def result(given, method, seed, strength):
        asked.append((method, seed, strength, given.get("validation")))
        accuracy = 0.5 + 0.1 * (strength == 30.0) + 0.01 * seed
        matrix = AccuracyMatrix(np.full((2, 2), accuracy), np.full(2, 0.5))
        return SequenceResult(matrix, 6, [1.0, 1.0], [0.1, 0.1], 2**27, None)

    monkeypatch.setattr(tuning, "_run", result)
    monkeypatch.setattr(
        tuning, "ProcessPoolExecutor", lambda count, *_, **__: ThreadPoolExecutor(count)
    )
    return asked


def test_tuning_keeps_to_validation_data_and_goes_on_where_it_was(tmp_path, runs):
    out, said = tmp_path / "tuned.json", []

    def tuned(methods, grid=(1.0, 30.0)):
        said.clear()
        runs.clear()
        return tune(
            SETTINGS,
            methods,
            grid=lambda name: grid,
            seeds=2,
            out=out,
            processes=1,
            say=said.append,
        )

    results = tuned(["finetune", "dwd", f"dwd{UNTOUCHED}"])
    assert json.loads(out.read_text())["methods"].keys() == results["methods"].keys()
    validation = results["tuning"]["validation_accuracy"]
    assert list(validation) == ["dwd"]
    best = max(validation["dwd"], key=validation["dwd"].get)
    assert best == 30.0
    strengths = {n: m["settings"]["regularizer"]["strength"] for n, m in results["methods"].items()}
    assert strengths == {"finetune": 0.0, "dwd": best, f"dwd{UNTOUCHED}": 200.0}
    assert results["protocol"]["validation"] is None
    assert all(
        len(m["metrics"]["average_accuracy"]["per_seed"]) == 2 for m in results["methods"].values()
    )
    tuning_seed = results["tuning"]["seeds"][0]
    held_back = results["tuning"]["validation_fraction"]
    assert set(runs) == {
        *(("dwd", tuning_seed, strength, held_back) for strength in (1.0, 30.0)),
        *(("finetune", seed, 0.0, None) for seed in range(2)),
        *(("dwd", seed, strength, None) for seed in range(2) for strength in (30.0, 200.0)),
    }
    assert sum("validation" in line for line in said) == 2
    # Nothing is run twice: only additional values of λ are.
    again = tuned(["finetune", "dwd"])
    assert said == [f"best λ of dwd: {best}, an end of its grid"]
    assert not runs
    assert again["methods"] == json.loads(json.dumps(results["methods"]))
    tuned(["dwd"], grid=(1.0, 30.0, 100.0))
    assert next(line for line in said if "validation" in line).startswith("dwd, λ=100")
    assert runs == [("dwd", tuning_seed, 100.0, held_back)]


@pytest.mark.long
def test_a_run_that_fails_loses_no_other(tmp_path):
    out = tmp_path / "out.json"
    with pytest.raises(ValueError, match="not finite"):
        tune(
            SETTINGS,
            ["finetune", "ewc", f"ewc{UNTOUCHED}"],
            grid=lambda name: (1e38,),  # a penalty that makes the weights overflow
            seeds=1,
            out=out,
            processes=1,
            say=lambda line: None,
        )
    assert list(json.loads(out.read_text())["methods"]) == ["finetune", f"ewc{UNTOUCHED}"]
    with pytest.raises(ValueError, match="holds results of other protocol"):
        tune(SETTINGS | {"epochs": 2}, ["finetune"], grid=lambda name: (1.0,), out=out)


@pytest.mark.long
def test_of_runs_side_by_side_each_has_one_thread():
    # With a thread per core in each process, most time would be spent on threads that spin idly.
    start = tuning._one_of_several
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=start) as pool:
        libraries = pool.submit(threadpool_info).result()
    assert {library["num_threads"] for library in libraries} == {1}


def test_unknown_methods_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="Unknown method 'x'"):
        tune(SETTINGS, ["finetune", "x"], grid=lambda name: (1.0,), out=tmp_path / "out.json")
    with pytest.raises(ValueError, match="Unknown variant 'x'"):
        method_named("dwd+x")
    with pytest.raises(ValueError, match="Unknown method 'finetune\\+graph'"):
        method_named("finetune+graph")


def test_every_method_gets_as_many_values_around_its_default():
    assert grid_around(30.0, 7) == (0.03, 0.3, 3.0, 30.0, 300.0, 3000.0, 30000.0)
    assert grid_around(100.0, 3) == (0.1, 100.0, 100000.0)
    assert grid_around(7.0, 1) == (7.0,)


def test_each_variant_is_another_configuration():
    plain = METHODS["dwd-online"].configuration(30.0)
    seen = [plain]
    for name in VARIANTS:
        method = method_named(f"dwd-online+{name}")
        changed = method.configuration(30.0)
        assert method.name == f"dwd-online+{name}"
        assert changed not in seen
        if not name.startswith("decay"):
            assert changed["regularizer"] == plain["regularizer"]
        seen.append(changed)
    both = method_named("dwd-online:exact+evidence+gamma-0.9").configuration(1.0)
    assert both["fisher"]["estimator"] == "empirical"
    assert both["fisher"]["gamma"] == 0.9
    assert both["grouping"]["strengths"]["class_name"] == "Evidence"
    for base in ("dwd-online", "ewc"):
        plain = METHODS[base].configuration(7.0)["regularizer"]
        less = method_named(f"{base}+decay-0.8").configuration(7.0)["regularizer"]
        assert less == plain | {"decay": 0.8}


def results_of(**per_seed):
    return {
        "methods": {
            name: {"metrics": {"average_accuracy": {"per_seed": values}}}
            for name, values in per_seed.items()
        }
    }


def test_the_comparison_is_a_paired_test():
    ewc, dwd = [0.5, 0.6, 0.55], [0.6, 0.72, 0.63]
    found = ablation.compare(results_of(ewc=ewc, dwd=dwd, same=ewc))
    difference = np.subtract(dwd, ewc)
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(3))
    assert found["dwd"]["difference"] == pytest.approx(0.1)
    assert found["dwd"]["std"] == pytest.approx(difference.std(ddof=1))
    assert found["dwd"]["p"] == pytest.approx(2 * student.sf(t, 2))
    assert np.isnan(found["same"]["p"])
    with pytest.raises(ValueError, match="`baseline` must be one of dwd"):
        ablation.compare(results_of(dwd=dwd))


def test_parts_by_words():
    assert set(ablation.parts(["budget"]).values()) == {
        f"dwd-online+budget{UNTOUCHED}",
        f"dwd-online+one-budget{UNTOUCHED}",
    }
    assert ablation.parts() == ablation.PARTS
    with pytest.raises(ValueError, match="No part is called 'x1'"):
        ablation.parts(["x1"])
    for name in ablation.PARTS.values():
        method_named(name.removesuffix(UNTOUCHED))


@pytest.mark.long
def test_the_commands(tmp_path):
    options = ["--scenario", "split:digits", "--tasks", "2", "--epochs", "1", "--seeds", "2"]
    options += ["--points", "1", "--processes", "1", "--out", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, ["ablate", *options, "--parts", "graph"])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out.json").read_text())
    graph = f"dwd-online+graph{UNTOUCHED}"
    assert list(content["methods"]) == ["finetune", "ewc", graph, "joint"]
    assert content["methods"][graph]["settings"]["task_graph"] == 0.001
    assert list(content["tuning"]["validation_accuracy"]["ewc"]) == ["100.0"]
    # Results that the file already has are reused.
    result = CliRunner().invoke(app, ["tune", *options, "--methods", "finetune,ewc", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["methods"]["ewc"] == content["methods"]["ewc"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["tune", "--points", "0"], "`--points`"),
        (["tune", "--processes", "0"], "`--processes`"),
        (["tune", "--tuning-seeds", "0"], "`--tuning-seeds`"),
        (["ablate", "--seeds", "0"], "`--seeds`"),
        (["ablate", "--parts", "x1"], "No part is called 'x1'"),
        (["tune", "--methods", "dwd,x"], "Unknown method 'x'"),
        (["tune", "--out", "nowhere/x.json"], "does not exist"),
    ],
)
def test_bad_options_are_one_clear_line(arguments, error):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ValueError)
    assert error in str(result.exception)
