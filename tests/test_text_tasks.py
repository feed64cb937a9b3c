import json
import os
from pathlib import Path

import numpy as np
import pytest

from keras_dwd.evaluation.text.encoding import Encoding
from keras_dwd.evaluation.text.tasks import Row, load, names_in
from keras_dwd.evaluation.text.tokenizer import END, PAD, SEPARATOR, BPETokenizer, ByteTokenizer


def write(path, *entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")


def pair(i=0, **more):
    return {"prompt": f"say {i}", "target": f"{i} said", **more}


def test_a_task_is_a_folder_or_files_with_its_name(tmp_path):
    write(tmp_path / "one" / "train.jsonl", pair(1), pair(2))
    write(tmp_path / "one" / "test.jsonl", {"input": "say 3", "target": "a\r\nb"})
    write(tmp_path / "two.train.jsonl", pair())
    write(tmp_path / "two.dev.jsonl", pair(references=["0 said", "nothing"]))
    write(tmp_path / "two.test.jsonl", pair())
    write(tmp_path / "three.train.jsonl", pair())
    assert names_in(tmp_path) == ["one", "two"]
    one, two = load("one", tmp_path), load("two", tmp_path)
    assert [row.prompt for row in one.train] == ["one: say 1", "one: say 2"]
    assert [row.source for row in one.train] == ["say 1", "say 2"]
    assert one.validation == ()
    assert one.test[0].target == "a\nb"
    assert two.validation[0].references == ("0 said", "nothing")
    assert load(str(tmp_path / "one")).train == one.train


def test_short_names_find_the_first_task_of_their_kind(tmp_path):
    for name in ("qa_closed", "qa_context_x", "translation_en_es"):
        write(tmp_path / f"{name}.train.jsonl", pair())
        write(tmp_path / f"{name}.test.jsonl", pair())
    assert load("qa", tmp_path).name == "qa_context_x"
    translate = load("translate", tmp_path)
    assert translate.train[0].prompt == "translate: say 0"
    assert translate.metrics == ("chrf", "bleu")


def test_a_folder_may_have_its_own_prompt(tmp_path):
    write(tmp_path / "own" / "train.jsonl", pair(level="easy"))
    write(tmp_path / "own" / "test.jsonl", pair(level="hard"))
    (tmp_path / "own" / "template.txt").write_text("{level}? {prompt} =\n")
    assert load("own", tmp_path).test[0].prompt == "hard? say 0 ="


def test_tasks_of_code_have_tests(tmp_path):
    begun = {"prompt": "def f(x):\n", "target": " return 1", "test": "def check(f): ..."}
    write(tmp_path / "code.train.jsonl", pair(test_list=["assert a", "assert b"]))
    write(tmp_path / "code.test.jsonl", {**begun, "entry_point": "f"})
    task = load("code", tmp_path)
    assert task.train[0].prompt == "code: say 0\nassert a"
    assert task.train[0].tests == "assert a\nassert b"
    assert task.test[0].program == "def f(x):\n"
    assert task.test[0].tests == "def check(f): ...\ncheck(f)"


@pytest.mark.parametrize(
    "line", ["{", '{"prompt": "a"}', '["a", "b"]', '{"prompt": 1, "target": 2}']
)
def test_lines_that_are_no_examples(tmp_path, line):
    write(tmp_path / "bad" / "test.jsonl", pair())
    (tmp_path / "bad" / "train.jsonl").write_text(json.dumps(pair()) + "\n" + line)
    with pytest.raises(ValueError, match=r"Line 2 of .*train.jsonl.* must be a JSON object"):
        load("bad", tmp_path)


def test_tasks_that_do_not_exist(tmp_path):
    write(tmp_path / "one" / "train.jsonl", pair())
    with pytest.raises(FileNotFoundError, match=r"no file test\.jsonl"):
        load("one", tmp_path)
    write(tmp_path / "one" / "test.jsonl", pair())
    with pytest.raises(FileNotFoundError, match=r"no task 'two' in .*: one\."):
        load("two", tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load("one", tmp_path / "nowhere")


def test_limits_leave_a_fifth_of_the_training_rows(tmp_path):
    write(tmp_path / "one" / "train.jsonl", *map(pair, range(10)))
    write(tmp_path / "one" / "test.jsonl", *map(pair, range(5)))
    for limit, count in ((3, 3), (100, 8)):
        task, rest = load("one", tmp_path).limited(limit, 2)
        assert (len(task.train), len(rest), len(task.test)) == (count, 10 - count, 2)
        assert not set(task.train) & set(rest)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokenizers_return_every_text(kind):
    tokenizer = ByteTokenizer()
    if kind == "bpe":
        pytest.importorskip("tokenizers")
        tokenizer = BPETokenizer.learn(["the cat sat on the mat " * 9], 280)
        tokenizer = BPETokenizer(tokenizer.serialized())
        assert len(tokenizer.encode(["the cat"])[0]) < len("the cat")
    texts = ["the cat", "", " ¿Qué?\n\tx = 語 <eos> </s>[PAD]"]
    tokens = tokenizer.encode(texts)
    assert all(2 < token < tokenizer.size for each in tokens for token in each)
    assert tokenizer.decode([[SEPARATOR, *each, END, PAD] for each in tokens]) == texts


def test_examples_weigh_the_target_alone():
    encoding = Encoding(ByteTokenizer(), prompt=4, target=3)
    rows = [Row("abcdef", "xyz", ("xyz",)), Row("a", "", ("",))]
    inputs, following, weights = encoding.examples(rows)
    a, x = ord("a") + 3, ord("x") + 3
    # Of a prompt that is too long, the beginning and the end.
    np.testing.assert_array_equal(inputs[0], [a, a + 1, a + 5, SEPARATOR, x, x + 1])
    np.testing.assert_array_equal(following[0], [a + 1, a + 5, SEPARATOR, x, x + 1, END])
    np.testing.assert_array_equal(weights[0], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(inputs[1], [a, SEPARATOR, PAD, PAD, PAD, PAD])
    np.testing.assert_array_equal(following[1], [SEPARATOR, END, PAD, PAD, PAD, PAD])
    np.testing.assert_array_equal(weights[1], [0, 1, 0, 0, 0, 0])
    assert encoding.cut(rows) == 0.5


def test_an_encoding_fits_nearly_all_targets():
    rows = [Row("", "x" * n, ("",)) for n in range(1, 102)]
    assert Encoding.fitted(ByteTokenizer(), rows, 300).target == 97
    assert Encoding.fitted(ByteTokenizer(), rows, 100).target == 50
    assert Encoding.fitted(ByteTokenizer(), rows, 100).length == 100


@pytest.mark.skipif(
    not os.environ.get("KERAS_DWD_TEXT_DIR"), reason="KERAS_DWD_TEXT_DIR names no folder of tasks"
)
def test_real_tasks_are_read():
    folder = Path(os.environ["KERAS_DWD_TEXT_DIR"])
    for name in ("summarize", "translate", "code", "qa"):
        task = load(name, folder)
        assert len(task.train) > 400
        assert all(row.prompt and row.target in (row.target, *row.references) for row in task.test)
    assert all(row.tests for row in load("code", folder).test)
