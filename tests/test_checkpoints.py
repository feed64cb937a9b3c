import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from cases import blobs, long, sweep
from safetensors.numpy import save_file

from keras_dwd import DiagonalFisher
from keras_dwd.evaluation import Method, Scenario, run_sequence, runner
from keras_dwd.evaluation.checkpoint import Checkpoints
from keras_dwd.files import FileError, read_arrays, write_arrays

ROOT = Path(__file__).parent.parent
TASKS, EPOCHS = 3, 2


def build(scenario):
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "tanh", name="hidden"),
            keras.layers.Dropout(0.2),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(3, name="head"),
        ]
    )


def scenario(first=0):
    seeds = range(first, first + TASKS)
    tasks = [(f"task {s - first}", blobs(60, seed=s), blobs(40, seed=10 + s)) for s in seeds]
    return Scenario.from_tasks(tasks)


# A method whose step is traced fast, for what does not depend on the method.
CHEAP = Method(
    "cheap",
    lambda strength: {"strength": strength, "fisher": DiagonalFisher("batch"), "grouping": None},
    strength=10.0,
)
WITH_GRAPH = replace(CHEAP, name="cheap+graph", graph=0.001)


class KilledError(Exception):
    """Raised to interrupt a run, in place of a signal."""


class Kill(keras.callbacks.Callback):
    def __init__(self, task, at):
        super().__init__()
        self.task, self.at, self.epoch = task, at, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.at == (self.task, self.epoch, batch):
            raise KilledError


def run(folder, method=CHEAP, at=None, shown=(), first_seed=0, **settings):
    settings = {"epochs": EPOCHS, "batch_size": 8, "strength": 10.0} | settings
    compiled = {"steps_per_execution": 1} | settings.pop("compile_settings", {})
    return run_sequence(
        build,
        scenario(first_seed),
        method,
        callbacks=lambda t, task: [Kill(t, at), *shown],
        compile_settings=compiled,
        checkpoint_dir=folder,
        **settings,
    )


def ended_with(folder):
    arrays, _ = read_arrays(max(folder.glob("checkpoint-*")))
    clocks = {"progress/train_seconds", "progress/boundary_seconds", "progress/spent"}
    # Names of random generators differ from run to run; their states are among the weights.
    clocks |= {name for name in arrays if "seed_generator" in name}
    return {name: array.tobytes() for name, array in arrays.items() if name not in clocks}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The final state and the accuracies of an uninterrupted run of a method."""
    known = {}

    def of(method=CHEAP):
        name = method if isinstance(method, str) else method.name
        if name not in known:
            folder = tmp_path_factory.mktemp("whole")
            result = run(folder, method)
            known[name] = ended_with(folder), result.matrix.after
        return known[name]

    return of


@pytest.mark.parametrize("at", [(2, 0, 5), long((0, 1, 2))])
def test_a_run_that_ends_in_the_middle_of_an_epoch_goes_on_bit_identical(tmp_path, undisturbed, at):
    with pytest.raises(KilledError):
        run(tmp_path, at=at)
    result = run(tmp_path)
    found, after = undisturbed()
    np.testing.assert_array_equal(result.matrix.after, after)
    assert ended_with(tmp_path) == found
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


@pytest.mark.parametrize(
    "method",
    sweep(
        [
            "dwd-online+graph+policy",
            "dwd-online+decoupled+distill",
            "dwd:sampled",
            "dwd-online+one-budget",
            "ewc",
            "si",
            "der++",
            "a-gem",
            "dwd+er",
        ],
    ),
)
def test_so_do_all_kinds_of_methods(tmp_path, undisturbed, method):
    with pytest.raises(KilledError):
        run(tmp_path, method, at=(1, 1, 4))
    run(tmp_path, method)
    assert ended_with(tmp_path) == undisturbed(method)[0]


@pytest.mark.long
def test_a_run_that_is_over_is_not_run_again(tmp_path, undisturbed):
    run(tmp_path)
    again = run(tmp_path, at=(2, 1, 0))
    np.testing.assert_array_equal(again.matrix.after, undisturbed()[1])


@pytest.mark.long
def test_what_was_lost_at_a_boundary_is_made_again(tmp_path, undisturbed):
    """The files of the task graph are one task ahead of the newest remaining checkpoint."""
    run(tmp_path, WITH_GRAPH)
    newest, before = sorted(tmp_path.glob("checkpoint-*"), reverse=True)
    assert "graph" in {p.name for p in tmp_path.iterdir()}
    newest.unlink()
    run(tmp_path, WITH_GRAPH)
    assert ended_with(tmp_path) == undisturbed(WITH_GRAPH)[0]
    for path in (newest, before):
        path.unlink(missing_ok=True)
    for path in tmp_path.glob("checkpoint-*"):
        path.unlink()
    run(tmp_path, WITH_GRAPH)  # starts again from the first task
    assert ended_with(tmp_path) == undisturbed(WITH_GRAPH)[0]


@pytest.mark.parametrize(
    ("of", "where", "method"),
    [
        long(runner._Progress, "boundary", WITH_GRAPH),
        (runner.DWDModel, "consolidate", CHEAP),
    ],
)
def test_a_run_that_ends_at_its_first_boundary_goes_on(tmp_path, monkeypatch, of, where, method):
    """Interrupted after the task graph is written, and after `fit` has applied weight averages."""

    def run_in(folder):
        optimizer = keras.optimizers.Adam(use_ema=True, ema_momentum=0.9)
        return run(folder, method, compile_settings={"optimizer": optimizer})

    whole = run_in(tmp_path / "whole")

    def killed(*args, **kwargs):
        raise KilledError

    monkeypatch.setattr(of, where, killed)
    with pytest.raises(KilledError):
        run_in(tmp_path / "killed")
    monkeypatch.undo()
    result = run_in(tmp_path / "killed")
    np.testing.assert_array_equal(result.matrix.after, whole.matrix.after)
    assert ended_with(tmp_path / "killed") == ended_with(tmp_path / "whole")


def test_stopping_early_is_not_undone(tmp_path, monkeypatch):
    stop = keras.callbacks.EarlyStopping("accuracy", patience=0, restore_best_weights=True)

    def killed(*args, **kwargs):
        raise KilledError

    monkeypatch.setattr(runner.DWDModel, "consolidate", killed)
    with pytest.raises(KilledError):
        run(tmp_path, shown=[stop], epochs=50)
    monkeypatch.undo()
    epochs = []
    note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch))
    with pytest.raises(KilledError):
        run(tmp_path, at=(1, 0, 0), shown=[note], epochs=50)
    assert epochs == [0]  # the first epoch of the second task


def test_other_data_are_refused(tmp_path):
    with pytest.raises(KilledError):
        run(tmp_path, at=(1, 0, 0))
    with pytest.raises(FileError, match=r"data: '\w+', asked for is '\w+'"):
        run(tmp_path, first_seed=5)


def test_a_damaged_newest_file_is_reported_and_the_one_before_it_used(
    tmp_path, undisturbed, capsys
):
    with pytest.raises(KilledError):
        run(tmp_path, at=(1, 1, 4))
    newest = max(tmp_path.glob("checkpoint-*"))
    whole = bytearray(newest.read_bytes())
    whole[len(whole) // 2] ^= 1
    newest.write_bytes(whole)
    (tmp_path / f".{newest.name}.abc.tmp").write_bytes(b"what a killed process left")
    run(tmp_path)
    assert f"{newest.name} is damaged" in capsys.readouterr().err
    assert newest.with_suffix(".damaged").read_bytes() == whole
    assert ended_with(tmp_path) == undisturbed()[0]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.long
def test_checkpoints_of_something_else_are_refused(tmp_path):
    with pytest.raises(KilledError):
        run(tmp_path, at=(1, 0, 4))
    with pytest.raises(FileError, match="other settings"):
        run(tmp_path, epochs=3)
    newest, before = sorted(tmp_path.glob("checkpoint-*"), reverse=True)
    arrays, about = read_arrays(newest)
    lacking = {n: a for n, a in arrays.items() if n != "progress/after"}
    scalar = {n: np.zeros(3) if n == "progress/task" else a for n, a in arrays.items()}
    other = {n: a[:1] if n.startswith("weights/") else a for n, a in arrays.items()}
    for changed, message in (
        (lacking, "'after' does not fit"),
        (scalar, "'task' does not fit"),
        (other, "of another model: its weights do not fit"),
    ):
        write_arrays(newest, changed, about)
        with pytest.raises(FileError, match=message):
            run(tmp_path)
    write_arrays(newest, arrays, about | {"version": 99})
    with pytest.raises(FileError, match="version 99"):
        run(tmp_path)
    for path in (newest, before):
        save_file({"w": np.zeros(2)}, path, {"about": "{}", "checksum": "0"})
    with pytest.raises(FileError, match="Every checkpoint in"):
        run(tmp_path)


def test_a_folder_that_cannot_be_written_is_found_before_training():
    trained = []
    with pytest.raises(OSError, match="/proc/"):
        run_sequence(
            build,
            scenario(),
            callbacks=lambda t, task: trained.append(t) or [],
            checkpoint_dir="/proc/no_folder_can_be_made_here",
        )
    assert not trained


@pytest.mark.long
def test_a_disk_that_is_full_ends_the_run_which_can_go_on(tmp_path, undisturbed, monkeypatch):
    saved = Checkpoints.save
    count = []

    def full(self, model, progress):
        count.append(1)
        if len(count) == 4:
            raise OSError(28, "No space left on device")
        saved(self, model, progress)

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path)
    monkeypatch.undo()
    run(tmp_path)
    assert ended_with(tmp_path) == undisturbed()[0]


@pytest.mark.long
def test_killed_by_a_signal(tmp_path):
    """Real processes and a real SIGKILL; `benchmarks/crash.py` does this 50 times."""
    out = tmp_path / "crash.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "crash.py"), "--kills", "1"]
    command += ["--methods", "dwd-online+graph", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["identical"] == 1, found["kills"]
