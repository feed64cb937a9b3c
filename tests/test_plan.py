"""The planned memory is what real processes use."""

import json
from functools import partial

import keras
import numpy as np
import pytest
from test_distributed import run_workers
from typer.testing import CliRunner

from keras_dwd.curvature.diagonal import DiagonalFisher
from keras_dwd.curvature.kronecker import KroneckerFisher
from keras_dwd.evaluation import plan
from keras_dwd_command.app import app


def dense(width, layers):
    return keras.Sequential(
        [keras.Input((width,)), *(keras.layers.Dense(width) for _ in range(layers))]
    )


@pytest.mark.long
def test_the_memory_of_workers_is_as_planned(tmp_path):
    results = run_workers("memory", tmp_path, 2)
    made = plan.plan(partial(plan.of_model, dense(1500, 6)), 2, "diagonal")
    transient = sum(made.memory[name] for name in ("gradients", "statistics", "communication"))
    for found in results:
        # Each worker stores three of the six blocks, half of the state.
        assert found["variables"] == pytest.approx(made.total - transient, rel=0.01)
        # Memory that a step needs may be gone again, or not yet.
        assert made.total - transient < found["resident"] < 1.1 * made.total


@pytest.mark.parametrize("curvature", plan.CURVATURES)
def test_state_is_divided_by_the_number_of_workers(curvature):
    one, four = (plan.plan(partial(plan.of_model, dense(64, 4)), n, curvature) for n in (1, 4))
    for name in ("fisher", "precision", "anchor"):
        assert four.memory[name] == pytest.approx(one.memory[name] / 4, abs=4)
    for name in ("parameters", "gradients", "optimizer", "statistics"):
        assert four.memory[name] == one.memory[name]
    assert one.step_bytes == 0
    assert four.step_bytes == pytest.approx(1.5 * 4 * one.parameters, abs=1)


def test_numbers_of_a_model_are_those_of_its_matrices():
    parameters, statistics, precision = plan.of_model(dense(10, 1), KroneckerFisher())
    assert parameters == 110
    assert statistics == 11 * 11 + 10 * 10 + 1  # plus one for the margin
    assert precision == (11 * 11 + 11 + 1) + (10 * 10 + 10 + 1)
    assert plan.of_model(dense(10, 1), DiagonalFisher("empirical")) == (110, 110, 110)


@pytest.mark.parametrize("parameters", [10**6, 10**9, 175 * 10**9])
def test_transformers_of_any_size(parameters):
    made = plan.plan(
        partial(plan.of_transformer, parameters), 64, link=1e10, bandwidth=1e11, optimizer="adam"
    )
    assert made.memory["parameters"] == 4 * parameters
    assert made.memory["optimizer"] == 8 * parameters
    assert 0 < made.memory["fisher"] < made.memory["parameters"]
    assert made.step_seconds > made.step_bytes / 1e10
    assert made.boundary_seconds > 0


def test_the_command_line_prints_a_plan():
    given = ["plan", "--params", "1.75e11", "--workers", "1024", "--link", "2.5e10"]
    result = CliRunner().invoke(app, [*given, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["workers"] == 1024
    assert found["total"] == sum(found["memory"].values())
    result = CliRunner().invoke(app, ["plan", "--model", "resnet18_like", "--link", "1e9"])
    assert "11,220,132 parameters" in result.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["plan"], "--model"),
        (["plan", "--model", "vgg"], "vgg"),
        (["plan", "--params", "nan"], "--params"),
        (["plan", "--params", "1e6", "--curvature", "full"], "curvature"),
    ],
)
def test_plans_of_nothing_are_refused(given, said):
    result = CliRunner().invoke(app, given)
    assert isinstance(result.exception, ValueError)
    assert said in str(result.exception)


@pytest.mark.long
def test_links_and_bandwidths_are_measured():
    assert 1e7 < plan.measured_link() < 1e12
    assert 1e8 < plan.measured_bandwidth(2**22) < 1e13
    assert np.isfinite(plan.measured_bandwidth(2**20))


def test_what_is_sent_is_that_of_a_ring():
    """Of each byte 2 (n − 1) / n is sent; sums over a pass are in double precision."""
    made = plan.plan(partial(plan.of_model, dense(10, 1)), 4, "diagonal")
    assert made.parameters == 110
    assert made.step_bytes == made.fisher_bytes == 1.5 * 4 * 110
    assert made.boundary_bytes == 1.5 * 8 * 110
