import json
import os
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import saved
from typer.testing import CliRunner

from keras_dwd.distributed.data import TrainingArrays
from keras_dwd.evaluation import Recipe, Scenario, run_sequence
from keras_dwd.evaluation.experiment import Experiment
from keras_dwd.evaluation.text import language, sequence
from keras_dwd.evaluation.text.decoder import DecoderSize, decoder
from keras_dwd.evaluation.text.encoding import Encoding, sequence_loss
from keras_dwd.evaluation.text.pretraining import Pretraining, cache_folder, gaps
from keras_dwd.evaluation.text.scoring import Scorer
from keras_dwd.evaluation.text.tasks import Row, TextTask
from keras_dwd.evaluation.text.tokenizer import END, SEPARATOR, ByteTokenizer
from keras_dwd_command.app import app

for needed in ("tokenizers", "rouge_score", "sacrebleu"):
    pytest.importorskip(needed)

SIZE = DecoderSize(16, 1, 2, 40)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture
def small(monkeypatch):
    """A decoder that is made in seconds, for short texts."""
    monkeypatch.setattr(language, "LENGTH", 32)
    monkeypatch.setattr(
        sequence, "Pretraining", lambda kind: Pretraining(kind, tokens=270, size=SIZE, window=24)
    )


@pytest.fixture
def folder(tmp_path):
    """Two tasks: to repeat the first of three words, or the last."""
    rng = np.random.default_rng(0)
    for name, place in (("first", 0), ("last", 2)):
        (tmp_path / name).mkdir()
        for part, count in (("train", 40), ("test", 6)):
            words = [rng.choice(WORDS, 3) for _ in range(count)]
            lines = [json.dumps({"prompt": " ".join(w), "target": w[place]}) for w in words]
            (tmp_path / name / f"{part}.jsonl").write_text("\n".join(lines))
    return tmp_path


def invoke(command, folder, *arguments):
    options = ("--scenario", "text:first,last", "--data-dir", str(folder), "--epochs", "1")
    cache = ("--cache-dir", str(folder / "cache"), "--seeds", "1")
    return CliRunner().invoke(app, [command, *options, *cache, *arguments])


@pytest.mark.long
def test_the_command_trains_on_text_and_resumes(small, folder, tmp_path):
    arguments = ["--methods", "ewc", "--checkpoint-dir", str(tmp_path / "checkpoints")]
    outs = [tmp_path / "a.json", tmp_path / "b.json"]
    first = invoke("run", folder, *arguments, "--out", str(outs[0]))
    assert first.exit_code == 0, first.output
    (kept,) = (folder / "cache").iterdir()
    at = kept.stat().st_mtime_ns
    again = invoke("run", folder, *arguments, "--resume", "--out", str(outs[1]))
    assert again.exit_code == 0, again.output
    assert kept.stat().st_mtime_ns == at
    a, b = (json.loads(out.read_text()) for out in outs)
    assert a["protocol"]["training_rows"] == [32, 32]
    assert a["protocol"]["measured_rows"] == [6, 6]
    assert [m["name"] for m in a["protocol"]["metrics"]] == ["rouge_l", "token_accuracy", "loss"]
    assert a["methods"]["ewc"]["rouge_l_matrices"] == b["methods"]["ewc"]["rouge_l_matrices"]
    assert a["methods"]["ewc"]["loss_matrices"] == b["methods"]["ewc"]["loss_matrices"]
    losses = np.array(a["methods"]["ewc"]["loss_matrices"][0], float)
    untrained = a["methods"]["ewc"]["untrained_loss"][0]
    assert losses[0, 0] < untrained[0]  # something was learned
    assert "text:first,last, 2 tasks" in first.output


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--scenario", "text:first,nothing"], "There is no task 'nothing'"),
        (["--scenario", "text:first,first"], "must not name a task twice"),
        (["--scenario", "text:"], "Unknown scenario 'text:'"),
        (["--scenario", "text:,"], "must name a task"),
        (["--tokenizer", "words"], "must be one of bpe, byte"),
        (["--beams", "0"], "`beams` must be an integer >= 1"),
        (["--profile", "full"], "`profile` must be cpu for text"),
        (["--lora", "2"], "`lora` needs a `preset`"),
        (["--preset", ".", "--lora", "0"], "`lora` must be an integer >= 1"),
        (["--preset", ".", "--tokenizer", "byte"], "`tokenizer` is no setting of a `preset`"),
        (["--preset", "gpt2_base_en"], "must be a folder with a preset"),
        (["--images-per-class", "3"], "`images_per_class` is no setting of 'text'"),
        (["--scenario", "split:digits", "--beams", "2"], "`beams` is no setting of 'split'"),
    ],
)
def test_bad_options_are_refused(folder, arguments, error):
    result = invoke("run", folder, *arguments)
    assert result.exit_code != 0
    assert error in str(result.exception)
    assert not (folder / "cache").exists()


@pytest.mark.long
def test_validation_data_are_held_back_where_there_is_no_file(small, folder):
    made = Experiment("text:first,last", data_dir=folder, cache_dir=folder, validation=0.25)
    task = made.built.tasks[0]
    assert len(task.train[0]) == 24
    assert len(task.test[0]) == 6  # no more than there are tests
    lines = (folder / "last" / "test.jsonl").read_text()
    (folder / "last" / "dev.jsonl").write_text(lines)
    again = Experiment("text:first,last", data_dir=folder, cache_dir=folder, validation=0.25)
    assert len(again.built.tasks[1].train[0]) == 32
    tests = Experiment("text:first,last", data_dir=folder, cache_dir=folder).built.tasks[1].test
    np.testing.assert_array_equal(again.built.tasks[1].test[0], tests[0])
    assert "evaluated on validation data" in again.describe(1)["text"]


@pytest.mark.long
def test_equal_pretraining_is_done_once(tmp_path):
    said = []
    made = Pretraining("byte", size=SIZE, window=24)
    texts = ["one two three four five six seven eight nine ten"] * 6
    first = made(texts, tmp_path, said.append)
    again = made(texts, tmp_path, said.append)
    assert len(said) == 1
    for a, b in zip(first[1], again[1], strict=True):
        np.testing.assert_array_equal(a, b)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])  # damaged: made again, to be the same
    repaired = made(texts, tmp_path, said.append)
    np.testing.assert_allclose(repaired[1][0], first[1][0], atol=1e-5)
    replace(made, seed=1)(texts, tmp_path, said.append)
    assert len(said) == 3
    with pytest.raises(ValueError, match="`window` must be an integer >= 24"):
        Pretraining(window=23)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_cache_is_where_such_files_belong(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "keras_dwd"


def test_gaps_are_filled_from_the_passage():
    rows = gaps([" ".join(WORDS * 5), "too short"], 20, np.random.default_rng(0))
    assert len(rows) == 20
    for row in rows:
        passage = row.prompt.removeprefix("context: ").partition(" question: ")[0]
        assert 8 <= len(passage.split()) <= 40
        assert row.target in passage
    assert gaps(["too short"], 20, np.random.default_rng(0)) == []


def written(targets):
    """A model that is certain of some tokens, and what it makes of them."""
    encoding = Encoding(ByteTokenizer(), 6, 4)
    rows = [Row(f"p{i}", t, (t, "other")) for i, t in enumerate(targets)]
    task = TextTask("t", "t", tuple(rows), (), ())
    return encoding, task, encoding.examples(rows)


def test_scores_equal_a_calculation_for_each_row():
    encoding, task, data = written(["ab", "c", "ddd"])
    keras.utils.set_random_seed(1)
    model = decoder(encoding.tokenizer.size, SIZE)
    answers = iter([["ab", "x", "other"]])

    def writer(model):
        def write(prompts, steps):
            assert [p[-1] for p in prompts] == [SEPARATOR] * 3
            assert steps == 4
            return encoding.tokenizer.encode(next(answers))

        return write

    scorer = Scorer([(task, encoding)], ["rouge_l", "exact_match"], writer=writer)
    found = scorer(model, data)
    assert found["rouge_l"] == found["exact_match"] == pytest.approx(2 / 3)
    losses, right = [], []
    for row in task.train:
        tokens = [*encoding.tokenizer.encode([row.prompt])[0], SEPARATOR]
        for token in [*encoding.tokenizer.encode([row.target])[0], END]:
            p = np.array(tf.nn.softmax(model(np.array([tokens]))[0, -1]), "float64")
            losses.append(-np.log(p[token]))
            right.append(p.argmax() == token)
            tokens.append(token)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(np.mean(right))


def test_sequences_of_similar_length_are_batched_without_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 41, 64)
    steps = np.arange(48)
    x = np.where(steps < lengths[:, None], np.arange(1, 65)[:, None], 0)
    weights = (steps < lengths[:, None]).astype("float32")
    orders = []
    for seed in (0, 0, 1):
        arrays = TrainingArrays((x, x, weights), 4, 0, 1, seed, bucket=8)
        batches = [tuple(map(np.array, batch)) for batch in arrays.batches]
        orders.append([tuple(batch[0][:, 0]) for batch in batches])
        assert sorted(i for batch in orders[-1] for i in batch) == list(range(1, 65))
        padded = 0
        for a, b, w in batches:
            longest = max(lengths[i - 1] for i in a[:, 0])
            assert a.shape == b.shape == w.shape == (4, 8 * -(-longest // 8))
            np.testing.assert_array_equal(w > 0, a > 0)
            padded += a.size - np.sum(w)
        assert padded < 0.3 * weights.sum()
    assert orders[0] == orders[1] != orders[2]
    firsts = [lengths[batch[0] - 1] for batch in orders[0]]
    assert firsts != sorted(firsts)  # the batches are in no order of length


@pytest.mark.long
def test_buckets_do_not_change_what_a_step_does():
    encoding, _, data = written(["ab", "c", "ddd", "e"])
    scenario = Scenario.from_tasks([("t", data, data)], outputs=encoding.tokenizer.size)
    runs = []
    for bucket in (1, encoding.length):
        result = run_sequence(
            lambda s: decoder(s.outputs, SIZE),
            scenario,
            "ewc",
            metrics=["loss"],
            epochs=2,
            batch_size=4,
            recipe=Recipe("sgd", 0.5, bucket=bucket),
            compile_settings={"loss": sequence_loss()},
        )
        runs.append([np.array(v) for v in result.model.weights])
        kept = map(np.array, saved(result.model).values())
        runs[-1] += [array for array in kept if array.dtype == "float32"]
    for a, b in zip(*runs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_buckets_need_weights_of_time_steps():
    x = np.zeros((4, 3), "float32")
    for data in ((x, x[:, 0]), (x, x[:, 0], x[:, 0])):
        scenario = Scenario.from_tasks([("t", data, data)], outputs=3)
        with pytest.raises(ValueError, match="`bucket` needs arrays"):
            run_sequence(lambda s: None, scenario, recipe=Recipe(bucket=2))
    with pytest.raises(ValueError, match="`bucket` must be an integer"):
        Recipe(bucket=0)


def test_of_much_text_a_part_is_used():
    texts = [str(i) * 10 for i in range(10)]
    assert Pretraining(characters=100).used(texts) == texts
    used = Pretraining(characters=39).used(texts)
    assert len(used) == len(set(used)) == 3
    assert set(used) < set(texts)
    assert used != Pretraining(characters=39, seed=1).used(texts)


@pytest.mark.long
@pytest.mark.skipif(
    not os.environ.get("KERAS_DWD_TEXT_DIR"), reason="KERAS_DWD_TEXT_DIR names no folder of tasks"
)
def test_real_tasks_are_learned_a_little(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sequence,
        "Pretraining",
        lambda kind: Pretraining(kind, 400, DecoderSize(16, 1, 2), characters=20_000),
    )
    made = Experiment(
        "text:translate,qa",
        data_dir=Path(os.environ["KERAS_DWD_TEXT_DIR"]),
        cache_dir=tmp_path,
        examples=64,
        epochs=1,
    )
    result = made.run("ewc")
    loss = result.matrices["loss"]
    assert loss.after[0, 0] < loss.before[0]
    assert loss.after[1, 1] < loss.before[1]
    assert set(result.matrices) == {
        *("rouge_l", "token_accuracy", "chrf", "bleu", "exact_match", "f1", "loss")
    }
