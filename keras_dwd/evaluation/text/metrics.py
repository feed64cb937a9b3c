"""How good written texts are, from 0 to 1."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from keras_dwd.evaluation.text.tokenizer import NEEDED

Texts = Sequence[str]
References = Sequence[Sequence[str]]
"""For each text those that are right, one at least."""


def rouge_l(texts: Texts, references: References) -> float:
    """Mean ROUGE-L: F1 of the longest common subsequence of words, with the closest reference.

    Words are runs of letters and digits of any script, in lower case.

    Reference:
        [Lin, 2004](https://aclanthology.org/W04-1013), section 3.1.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(NEEDED) from None
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(texts, references, strict=True)
    return _mean([scorer.score_multi(right, text)["rougeL"].fmeasure for text, right in pairs])


def chrf(texts: Texts, references: References) -> float:
    """The chrF of all texts together: F2 of runs of up to six characters.

    Reference:
        [Popović, 2015](https://aclanthology.org/W15-3049).
    """
    return float(_sacrebleu().corpus_chrf(list(texts), _columns(references)).score) / 100


def bleu(texts: Texts, references: References) -> float:
    """The BLEU of all texts together: precision of runs of up to four words.

    Reference:
        [Papineni et al., 2002](https://aclanthology.org/P02-1040);
        [Post, 2018](https://aclanthology.org/W18-6319).
    """
    return float(_sacrebleu().corpus_bleu(list(texts), _columns(references)).score) / 100


def exact_match(texts: Texts, references: References) -> float:
    """Share of the answers that are right, up to case, articles and punctuation.

    Reference:
        [Rajpurkar et al., 2016](https://arxiv.org/abs/1606.05250), section 6.1.
    """
    pairs = zip(texts, references, strict=True)
    return _mean([float(_plain(text) in map(_plain, right)) for text, right in pairs])


def f1(texts: Texts, references: References) -> float:
    """Mean F1 of the words of answers, with the closest reference; see `exact_match`."""
    pairs = zip(texts, references, strict=True)
    return _mean([max(_overlap(text, each) for each in right) for text, right in pairs])


METRICS: dict[str, Callable[[Texts, References], float]] = {
    "rouge_l": rouge_l,
    "chrf": chrf,
    "bleu": bleu,
    "exact_match": exact_match,
    "f1": f1,
}
"""Functions of texts and references, by name."""


class _Words:
    """Splits text into words for `rouge_score`, whose own tokenizer breaks words at accents."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ModuleNotFoundError:
        raise ModuleNotFoundError(NEEDED) from None
    return sacrebleu


def _columns(references: References) -> list[list[str | None]]:
    """References in the form that sacrebleu takes: a list for all first ones, and so on."""
    most = max(map(len, references), default=1)
    return [[r[i] if i < len(r) else None for r in references] for i in range(most)]


def _plain(text: str) -> str:
    characters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", characters).split())


def _overlap(text: str, reference: str) -> float:
    written, right = _plain(text).split(), _plain(reference).split()
    if not written or not right:
        return float(written == right)
    common = sum((Counter(written) & Counter(right)).values())
    return 2 * common / (len(written) + len(right))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
