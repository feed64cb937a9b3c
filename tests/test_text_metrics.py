import math

import pytest

from keras_dwd.evaluation.text import metrics, programs
from keras_dwd.evaluation.text.tasks import Row


def test_rouge_l_equals_a_calculation_by_hand():
    pytest.importorskip("rouge_score")
    # The longest common subsequence has two words: P = 2/3, R = 2/4.
    assert metrics.rouge_l(["The cat sat."], [["the cat ran away"]]) == pytest.approx(4 / 7)
    # Accents are parts of words: one word of two is the same.
    assert metrics.rouge_l(["están aquí"], [["están allí"]]) == pytest.approx(0.5)
    both = metrics.rouge_l(["a b", "x"], [["c", "a b c d"], ["y"]])
    assert both == pytest.approx((2 * 1 * 0.5 / 1.5 + 0) / 2)  # the closest reference, the mean


def test_bleu_equals_a_calculation_by_hand():
    pytest.importorskip("sacrebleu")
    # Runs of one to four words: 5/5, 3/4, 2/3, 1/2 are right; 5 words instead of 6.
    expected = math.exp(1 - 6 / 5) * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    got = metrics.bleu(["the cat sat on mat"], [["the cat sat on the mat"]])
    assert got == pytest.approx(expected)
    assert metrics.bleu(["a b c d", "e f g h"], [["x", "a b c d"], ["e f g h"]]) == pytest.approx(1)


def test_chrf_equals_a_calculation_by_hand():
    pytest.importorskip("sacrebleu")
    # One of two characters, no pair of characters: P = R = (1/2 + 0) / 2.
    assert metrics.chrf(["ab"], [["ac"]]) == pytest.approx(0.25)
    # P = (2/2 + 1/1) / 2, R = (2/3 + 1/2) / 2 of one and two characters; three are in no text.
    p, r = 1.0, (2 / 3 + 1 / 2) / 2
    assert metrics.chrf(["ab"], [["abc"]]) == pytest.approx(5 * p * r / (4 * p + r))


def test_answers_are_compared_without_case_articles_and_punctuation():
    assert (
        metrics.exact_match(["The Cat!", "a dog", ""], [["x", "cat"], ["dogs"], ["the"]]) == 2 / 3
    )
    # P = 1/3, R = 1; nothing in common; a word that occurs twice counts once.
    got = metrics.f1(["in Paris, France", "x", "b b"], [["Paris"], ["y"], ["b c"]])
    assert got == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert metrics.f1([""], [["x", "the"]]) == 1


def test_no_texts_are_worth_nothing():
    assert metrics.exact_match([], []) == metrics.f1([], []) == programs.passed([], []) == 0


GOOD = "def f(x):\n    return 2 * x"


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        (GOOD, True),
        ("import math, re, collections, itertools\n" + GOOD, True),
        ("def f(x):\n    return x", False),
        ("def f(x:", False),
        ("print('all tests passed')\nraise SystemExit(0)", False),
        ("import os\nos._exit(0)", False),
        ("import socket\nsocket.socket().connect(('127.0.0.1', 9))\n" + GOOD, False),
        ("import subprocess\nsubprocess.run(['true'])\n" + GOOD, False),
        ("import os\nos.system('true')\n" + GOOD, False),
        ("open('written', 'w')\n" + GOOD, False),
        ("x = bytearray(2**30)\n" + GOOD, False),
        ("while True: pass", False),
    ],
)
def test_programs_pass_by_their_tests_alone(program, passes, monkeypatch):
    monkeypatch.setattr(programs, "SECONDS", 2)
    row = Row("", "", ("",), tests="assert f(2) == 4")
    assert programs.passed([program], [row]) == passes


def test_a_program_that_has_begun_is_gone_on_with():
    tests = "def check(g):\n    assert g(1) == 2\ncheck(g)"
    row = Row("", "", ("",), program="def g(x):\n", tests=tests)
    rows = [row, row, Row("", "", ("",))]
    assert programs.passed(["    return x + 1", "    return x", "x = 1"], rows) == 1 / 3
