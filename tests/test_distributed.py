"""Several workers, in real processes, give the same results as one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import workers as script
from cases import blobs, compiled, sweep
from typer.testing import CliRunner

from keras_dwd import Communicator, DiagonalFisher, DWDOptimizer, cli
from keras_dwd.callbacks import LearningRateWarmup
from keras_dwd.distributed import data
from keras_dwd.distributed.launch import launch
from keras_dwd.distributed.workers import Workers
from keras_dwd.groupings import LayerGrouping
from keras_dwd_command.app import app

if not os.environ.get("KERAS_DWD_REQUIRE_HOROVOD"):  # `make test` requires Horovod
    pytest.importorskip("horovod", reason="Horovod is not installed")

# Shorter than the defaults, so that stalled workers are detected while the test runs.
IMPATIENT = {
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "5",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "10",
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "10",
}


def command(name, folder):
    return [sys.executable, str(Path(script.__file__)), name, str(folder)]


def run_workers(names, folder, count, **environment):
    """The results of each worker, by rank; of several programs of one job, by their names."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    assert launch(command(names, folder), count, quiet | environment) == 0
    results = {name: [] for name in names.split(",")}
    for name, found in results.items():
        for rank in range(count):
            with np.load(folder / f"{name}.{rank}.npz") as file:
                found.append({key: file[key] for key in file.files})
    return results if len(results) > 1 else results[names]


def failing(name, folder, count, **environment):
    """The exit code and output of workers that fail, and the seconds until they ended."""
    program = (
        "import sys; from keras_dwd.distributed.launch import launch;"
        f"sys.exit(launch({command(name, folder)!r}, {count}))"
    )
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | quiet | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


def assert_close(found, expected, tolerance=1e-5):
    for key, value in found.items():
        scale = max(1.0, float(np.abs(expected[key]).max(initial=0)))
        np.testing.assert_allclose(value, expected[key], atol=tolerance * scale, err_msg=key)


# Jobs of several workers: their number, programs, and the cases that are compared with one worker.
JOBS = {
    "two": (2, "agree,share,behaves", ["sharded"]),
    "two, all cases": (2, "agree,bytes_sent,different_graph", [*script.CASES, "sequence"]),
    "four": (4, "agree,share,not_a_number", ["sharded"]),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What a single worker finds for a case, in this process."""
    known = {}

    def of(name):
        other = script.ALIKE.get(name, name)
        if other not in known:
            known[other] = script.agreed([other], tmp_path_factory.mktemp("one"))
        found = known[other]
        if name == other:
            return found
        if not script.CASES[name].get("validate"):
            found = {k: v for k, v in found.items() if "/val_" not in k and "/test/" not in k}
        return {key.replace(other, name, 1): value for key, value in found.items()}

    return of


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """What the workers of a job find, by program and rank, and the folder of the job."""
    known = {}

    def of(job):
        if job not in known:
            folder = tmp_path_factory.mktemp("several")
            count, programs, cases = JOBS[job]
            settings = {"CASES": ",".join(cases), "HOROVOD_TIMELINE": "DYNAMIC"}
            found = run_workers(programs, folder, count, **settings)
            known[job] = found if "," in programs else {programs: found}, folder
        return known[job]

    return of


@pytest.mark.parametrize("job", sweep(JOBS, "two"))
def test_several_workers_find_what_one_finds(job, one, several):
    """Weights, Fisher information, factors, groups, anchors, penalties and metrics."""
    count, _, cases = JOBS[job]
    results = several(job)[0]["agree"]
    # The order of shuffled examples differs from that of Keras with one worker.
    expected = {k: v for case in cases if case != "shuffled" for k, v in one(case).items()}
    assert set(expected) <= {key for found in results for key in found}
    for rank, found in enumerate(results):
        loose = ("shuffled", "half", "elements")
        assert_close({k: v for k, v in found.items() if k.split("/")[0] not in loose}, expected)
        # Half precision changes the direction of Adam's step for some of the smallest gradients.
        halves = {k: v for k, v in found.items() if k.startswith(("half/weight", "half/val"))}
        assert_close(halves, expected, 0.05)
        for key in (k for k in found if k.startswith("elements/group")):
            assert abs(found[key] - expected[key]) <= 3  # of 143; borders of groups may differ
        for key in set(found) & set(results[0]):
            np.testing.assert_allclose(found[key], results[0][key], rtol=1e-5, atol=1e-6)
        sharded = [key for key in found if key.startswith("sharded/pull/")]
        assert (len(sharded) < 6) == (count > 1), rank


@pytest.mark.long
def test_the_square_of_the_mean_gradient_is_told_apart_from_the_fisher_information(one):
    """The tolerance of the test above is small enough to detect this difference."""
    model = script.made(fisher=DiagonalFisher("batch", every=1))
    x, y = script.data(0)
    script.fit(model, x, y, epochs=3, shuffle=False)
    model.consolidate()
    x, y = script.data(1)
    script.fit(model, x, y, epochs=3, shuffle=False)
    for path in ("hidden/kernel", "second/kernel", "head/kernel"):
        name = f"diagonal/online/fisher/{path}"
        squared_means = np.asarray(model.fisher.slots[f"fisher/{path}"]) / 8
        with pytest.raises(AssertionError):
            assert_close({name: squared_means}, one("diagonal"))


@pytest.mark.long
def test_a_killed_run_goes_on_with_another_number_of_workers(one, tmp_path):
    """Two workers are killed in the second task, and the newest file is damaged as well."""
    kept = {"CHECKPOINTS": str(tmp_path / "kept"), "SHARDED": "1"}
    code, said, _ = failing("sequence", tmp_path, 2, DIE_AT="[1, 1, 1]", **kept)
    ended = time.time()
    assert code == 128 + signal.SIGKILL
    assert "Worker 1 was ended by signal 9" in said
    assert not list(tmp_path.glob("*.npz"))
    files = sorted((tmp_path / "kept").iterdir())
    assert ended - files[-1].stat().st_mtime < 60  # it was written shortly before the end
    files[-1].write_bytes(files[-1].read_bytes()[:-100])
    found = script.sequence(kept["CHECKPOINTS"], sharded=True)
    assert_close({f"sequence/{key}": value for key, value in found.items()}, one("sequence"))


@pytest.mark.parametrize("job", sweep(["two", "four"], "two"))
def test_each_worker_keeps_its_share_of_the_state(job, several):
    whole = script.share(sharded=False)
    for name in ("kronecker", "diagonal"):
        parts = [int(found[name]) for found in several(job)[0]["share"]]
        assert max(parts) <= (1 / JOBS[job][0] + 0.05) * whole[name]
        assert sum(parts) == whole[name]


def sent(timeline):
    """Number of calls of each collective, by name, from Horovod's timeline."""
    text = timeline.read_text().rstrip().rstrip(",")
    events = json.loads(text if text.endswith("]") else text + "]")
    names = {
        event["pid"]: event["args"]["name"] for event in events if "name" in event.get("args", {})
    }
    counts = {}
    for event in events:
        if event.get("name") in ("ALLREDUCE", "ALLGATHER") and event.get("ph") == "B":
            name = names[event["pid"]]
            counts[name] = counts.get(name, 0) + 1
    return counts


@pytest.mark.long
def test_the_pull_of_sharded_workers_sends_nothing_more(several):
    _, folder = several("two, all cases")
    plain, pulled = (sent(folder / f"{name}.json") for name in ("plain", "pulled"))
    steps = 12  # 96 examples in batches of 8
    gradients = {name for name in plain if "gradients" in name}
    assert len(gradients) == 6  # one for each variable
    assert all(plain[name] == steps for name in gradients)
    # Besides the gradients it sends only one Fisher update.
    assert all(pulled[name] == steps for name in gradients)
    others = {n: c for n, c in pulled.items() if n not in plain and n not in gradients}
    within = {name: c for name, c in others.items() if "fisher" in name or "residuals" in name}
    assert within
    assert max(within.values()) == 1
    assert all("described" in n or "total" in n for n in set(others) - set(within)), others


def test_files_averages_and_callbacks(several):
    found, folder = several("two")
    results = found["behaves"]
    assert (folder / "log.0.csv").exists()
    assert not (folder / "log.1.csv").exists()
    assert (folder / "best.keras").exists()
    rates = results[0]["rates"]
    steps = len(rates) // 4
    np.testing.assert_allclose(rates[0], 0.01)
    np.testing.assert_allclose(rates[steps], 0.015)
    np.testing.assert_allclose(rates[2 * steps :], 0.02)
    assert np.all(np.diff(rates) >= 0)
    for key in set(results[0]) - {"kept"}:
        np.testing.assert_allclose(results[0][key], results[1][key], rtol=1e-5, atol=1e-6)
    for found in results:
        assert found["first_tasks"] == 1
        assert found["first_steps"] == 7 + 3
        assert found["first_penalty"] > 0
        assert found["penalty"] > 0
        np.testing.assert_allclose(found["loaded"], found["penalty"], rtol=1e-5)
        assert found["sharded"]
    assert sum(int(found["kept"]) for found in results) == 4  # hidden, γ, β, head
    one = keras.saving.load_model(folder / "saved.keras")
    assert len(one.regularizer.precisions) == 4
    assert float(one.penalty()) == pytest.approx(float(results[0]["penalty"]), rel=1e-5)


@pytest.mark.long
def test_what_differs_on_one_worker_is_named_on_all(several):
    for found in several("two, all cases")[0]["different_graph"]:
        said = str(found["said"])
        assert "Worker 1 has built another model than worker 0" in said
        assert "more/kernel" in said


@pytest.mark.long
def test_a_loss_that_is_not_a_number_is_named_with_its_worker(several):
    for found in several("four")[0]["not_a_number"]:
        expected = "The loss of worker 1, or its gradient, became NaN or infinite at step 5"
        assert expected in str(found["said"])


@pytest.mark.long
def test_what_fails_one_worker_fails_all_and_is_named(tmp_path):
    code, said, seconds = failing("failing_data", tmp_path, 2, **IMPATIENT)
    assert code
    assert "must be finite" in said
    assert "Worker 1 failed with ValueError" in said
    assert seconds < 60


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_stalls_ends_the_job(rank, tmp_path):
    def strike():
        file = tmp_path / f"pid.{rank}"
        while not file.exists() or not file.read_text():
            time.sleep(0.1)
        nonlocal struck
        struck = time.monotonic()
        os.kill(int(file.read_text()), signal.SIGSTOP)

    struck = 0.0
    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    code, said, _ = failing("endless", tmp_path, 2, **IMPATIENT)
    thread.join()
    assert time.monotonic() - struck < 60
    assert code
    assert f"Worker {rank} had stalled and was ended" in said


@pytest.mark.long
def test_a_message_that_one_worker_does_not_answer_is_named(tmp_path):
    code, said, seconds = failing("left_alone", tmp_path, 2, **IMPATIENT)
    assert code
    assert "1!: [keras_dwd.asked.lengths]" in said
    assert seconds < 60


def test_the_command_line_without_horovod_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "horovod.runner.common.util.hosts", None)
    monkeypatch.delenv("HOROVOD_RANK", raising=False)
    result = CliRunner().invoke(app, ["run", "--workers", "2"])
    assert isinstance(result.exception, ModuleNotFoundError)
    assert "build_horovod.py" in str(result.exception)


@pytest.mark.long
def test_the_command_line_runs_workers_and_resumes(tmp_path):
    base = ["run", "--scenario", "split:digits"]
    base += ["--tasks", "2", "--epochs", "1", "--seeds", "1", "--methods", "dwd-online", "--json"]
    base += ["--checkpoint-dir", str(tmp_path / "kept")]
    first = subprocess.run(
        [sys.executable, "-m", "keras_dwd", *base, "--workers", "2", "--sharded"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert first.returncode == 0, first.stderr
    again = CliRunner().invoke(app, base)
    assert "--resume" in str(again.exception)
    resumed = CliRunner().invoke(app, [*base, "--resume"])
    assert resumed.exit_code == 0, resumed.output
    matrices = [
        json.loads(done.stdout)["methods"]["dwd-online"]["accuracy_matrices"]
        for done in (first, resumed)
    ]
    assert matrices[0] == matrices[1]


class Several(Communicator):
    """A communicator that receives its own messages in place of those of other workers."""

    def __init__(self, rank=0, size=2):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("count", sweep([1, 5, 8, 16, 17, 61], 1, 17))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [None, 3])
def test_parts_of_arrays_make_up_the_batches_of_one(count, size, seed):
    x = np.arange(count, dtype="float32")
    parts = [data.TrainingArrays((x, x), 4, rank, size, seed) for rank in range(size)]
    for epoch in range(2):
        for part in parts:
            part.on_epoch_begin(epoch)
        steps = [list(part.batches) for part in parts]
        assert {len(s) for s in steps} == {-(-count // (4 * size))}
        seen = []
        for batches in zip(*steps, strict=True):
            sums, total = 0.0, np.zeros(count)
            for _, y, *weights in batches:
                w = np.asarray(weights[0]) if weights else np.ones(len(y))
                np.add.at(total, np.asarray(y, int), w / len(y) / size)
                sums += w.sum() / len(y) / size
            assert sums == pytest.approx(1)
            present = np.flatnonzero(total)
            np.testing.assert_allclose(total[present], 1 / len(present), rtol=1e-6)
            seen += present.tolist()
        assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_datasets(size):
    whole = tf.data.Dataset.range(23).map(lambda i: (i, i)).batch(4)
    for rank in range(size):
        steps = list(data.training_dataset(whole, rank, size))
        assert len(steps) == -(-23 // (4 * size))
    tested = [
        int(i) for rank in range(size) for x, _ in data.own_batches(whole, rank, size) for i in x
    ]
    assert sorted(tested) == list(range(23))
    own = data.as_own(whole)
    assert data.own_batches(own, 1, 2) is own


def test_blocks_are_divided_by_their_bytes_and_stay_where_they_are():
    workers = Workers(Several(size=3), sharded=True)
    workers.divide({"a": 60, "b": 50, "c": 40, "d": 30, "e": 20})
    assert workers.owners == {"a": 0, "b": 1, "c": 2, "d": 2, "e": 1}
    workers.divide({"a": 60, "b": 50, "c": 40, "d": 30, "e": 20, "new": 5})
    assert workers.owners["new"] == 0
    assert workers.keeps("a")
    assert not workers.keeps("b")


EXACT = {"fisher": DiagonalFisher("empirical")}


@pytest.mark.parametrize(
    ("settings", "compile_settings", "said"),
    [
        ({}, {"jit_compile": True}, "jit_compile"),
        ({}, {"loss": keras.losses.MeanSquaredError(reduction="sum")}, "reduction"),
        ({}, {"sharded": True}, "estimator 'batch'"),
        (EXACT | {"grouping": LayerGrouping("budget")}, {"sharded": True}, "budget"),
    ],
)
def test_what_workers_cannot_do_is_refused(settings, compile_settings, said):
    model = compiled(**settings)
    before = model.workers
    given = {"optimizer": "sgd", "loss": "mse"} | compile_settings
    with pytest.raises(ValueError, match=said):
        model.compile(communicator=Several(), **given)
    assert model.workers is before


def test_generators_and_batches_that_do_not_divide_are_refused():
    model = compiled()
    model.compile("sgd", "mse", communicator=Several())
    with pytest.raises(ValueError, match=r"must be arrays or a `tf.data.Dataset`"):
        model.fit(iter([]))
    endless = tf.data.Dataset.from_tensor_slices(blobs()).batch(8).filter(lambda x, y: True)
    with pytest.raises(ValueError, match="`steps_per_epoch` is needed"):
        model.fit(endless)


def test_workers_run_the_command_that_was_given(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "launch", lambda command, workers: seen.append(command) or 0)
    monkeypatch.delenv("HOROVOD_RANK", raising=False)
    given = ["run", "--class-order-seed", "0", "--workers", "2", "--sharded", "--tasks", "2"]
    assert CliRunner().invoke(app, given).exit_code == 0
    words = seen[0]
    assert words[1:4] == ["-m", "keras_dwd_command", "run"]
    assert words[words.index("--class-order-seed") + 1] == "0"
    assert "--sharded" in words
    assert "--resume" not in words


def test_warmup_leaves_one_worker_alone_and_refuses_schedules():
    x, y = blobs()
    model = compiled()
    rate = float(model.optimizer.learning_rate)
    model.fit(x, y, verbose=0, callbacks=[LearningRateWarmup()])
    assert float(model.optimizer.learning_rate) == rate
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    for optimizer in (keras.optimizers.SGD(schedule), DWDOptimizer(keras.optimizers.SGD(schedule))):
        model = compiled(optimizer=optimizer)
        with pytest.raises(ValueError, match="schedule"):
            model.fit(x, y, verbose=0, callbacks=[LearningRateWarmup()])


def several_learner(base=None, rate=0.1):
    """The first of two workers, which hears nothing but itself of the other."""
    keras.utils.set_random_seed(0)
    model = compiled(base, fisher=DiagonalFisher("batch"), grouping=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate), loss, communicator=Several())
    return model


@pytest.mark.parametrize("as_dataset", sweep([False, True], True))
def test_class_weights_are_weights_of_examples(as_dataset):
    x, y = blobs(32)
    given = np.linspace(0.5, 1.5, 32).astype("float32") if as_dataset else np.ones(32, "float32")
    by_class = np.array([2.0, 1.0, 0.25], "float32")[y]  # the second has none of its own
    found = []
    for weights, settings in (
        (given, {"class_weight": {0: 2.0, 2: 0.25}}),
        (given * by_class, {}),
        (given, {}),
    ):
        model = several_learner()
        if as_dataset:
            data = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(8)
            model.fit(data, verbose=0, **settings)
        else:
            if not settings:
                settings = {"sample_weight": weights}
            model.fit(x, y, batch_size=8, shuffle=False, verbose=0, **settings)
        found.append(np.concatenate([np.ravel(w) for w in model.get_weights()]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert np.abs(found[0] - found[2]).max() > 1e-4


def test_the_last_examples_are_held_back_for_validation():
    x, y = blobs(40)
    model = several_learner(rate=0.0)
    history = model.fit(x, y, batch_size=4, validation_split=0.2, verbose=0).history
    mine = slice(32, 36)  # of the last 8 the half of the first worker
    logits = model.predict(x[mine], verbose=0).astype("float64")
    chosen = logits[np.arange(4), y[mine]]
    expected = np.mean(np.log(np.exp(logits).sum(1)) - chosen)
    assert history["val_loss"] == pytest.approx([expected], rel=1e-4)


def test_warmup_sets_the_learning_rate_back():
    model = several_learner(rate=0.1)
    seen = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(float(self.model.optimizer.learning_rate))

    model.fit(
        *blobs(), batch_size=4, epochs=2, verbose=0, callbacks=[LearningRateWarmup(1), Rates()]
    )
    assert seen[-1] == pytest.approx(0.2)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.1)


def test_moving_averages_of_workers_are_averaged():
    class Alike(Several):
        """Of two workers that have the same."""

        def total(self, arrays, name):
            return [2 * np.asarray(array, "float64") for array in arrays]

    base = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.BatchNormalization(momentum=0.9, name="norm"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    model = several_learner(base, rate=0.0)
    model.compile(keras.optimizers.SGD(0.0), model.loss, communicator=Alike())
    x, y = blobs(32)
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    mine = x[:16].astype("float64")
    norm = model.get_layer("norm")
    np.testing.assert_allclose(norm.moving_mean, 0.1 * mine.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm.moving_variance, 0.9 + 0.1 * mine.var(0), rtol=1e-4)
