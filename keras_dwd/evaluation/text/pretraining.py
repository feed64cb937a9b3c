"""Pretrains the small decoder on text, and keeps it in a folder for the next time."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_dwd.checks import integer
from keras_dwd.distributed.data import TrainingArrays
from keras_dwd.evaluation.text.decoder import DecoderSize, decoder
from keras_dwd.evaluation.text.encoding import Arrays3, Encoding, sequence_loss
from keras_dwd.evaluation.text.tasks import Row
from keras_dwd.evaluation.text.tokenizer import END, BPETokenizer, ByteTokenizer, Tokenizer
from keras_dwd.files import FileError, read_arrays, write_arrays

TOKENIZERS = ("bpe", "byte")
_VERSION = 1


@dataclass(frozen=True)
class Pretraining:
    """How the small decoder is made from text. Equal settings and text make an equal decoder.

    It learns two things at once: to continue text, and to fill gaps: a passage is followed by some
    words from it with a gap, and what is missing is to be copied.

    Attributes:
        tokenizer: `"bpe"`, learned from the text, or `"byte"`.
        tokens: Number of tokens of `"bpe"`.
        size: Of the decoder.
        characters: The most text that is used; of more, a part drawn at random.
        window: Number of tokens of the pieces of text to continue.
        words_per_gap: Of the text, for each passage with a gap that is made of it.
        epochs: Passes over all.
        batch_size: Examples of a step.
        learning_rate: Of Adam after a short warm-up; it then falls nearly to 0.
        seed: Of the weights, the gaps and the order.
    """

    tokenizer: str = "bpe"
    tokens: int = 2048
    size: DecoderSize = field(default_factory=DecoderSize)
    characters: int = 2_000_000
    window: int = 128
    words_per_gap: int = 40
    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(
                f"`tokenizer` must be one of {', '.join(TOKENIZERS)}. Received: {self.tokenizer!r}"
            )
        integer("window", self.window, 24)  # room for a gap and what is around it

    def __call__(
        self,
        texts: Sequence[str],
        cache_dir: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> tuple[Tokenizer, list[np.ndarray]]:
        """The tokenizer, and the weights of `decoder(tokenizer.size, size)`.

        Args:
            texts: The text to learn from.
            cache_dir: Where to keep the result, or to find that of an earlier call; by default
                `keras_dwd` in the folder for such files, `XDG_CACHE_HOME` or `~/.cache`.
            say: Called with a message when pretraining begins.
        """
        texts = self.used(texts)
        folder = cache_folder() if cache_dir is None else cache_dir.expanduser()
        about = {"version": _VERSION, **asdict(self), "text": _digest(texts)}
        path = folder / f"decoder-{_digest([json.dumps(about, sort_keys=True)])[:16]}.safetensors"
        cached = _read(path, about)
        if cached is not None:
            return cached
        say(f"Pretraining on {sum(map(len, texts)):,} characters, once: kept as {path}")
        tokenizer: Tokenizer = ByteTokenizer()
        if self.tokenizer == "bpe":
            tokenizer = BPETokenizer.learn(texts, self.tokens)
        model = self.trained(tokenizer, texts)
        weights = {str(i): np.asarray(v) for i, v in enumerate(model.weights)}
        folder.mkdir(parents=True, exist_ok=True)
        serialized = tokenizer.serialized() if isinstance(tokenizer, BPETokenizer) else ""
        write_arrays(path, weights, {"pretraining": about, "tokenizer": serialized})
        return tokenizer, list(weights.values())

    def used(self, texts: Sequence[str]) -> list[str]:
        """The text that is used."""
        if sum(map(len, texts)) <= self.characters:
            return list(texts)
        order = np.random.default_rng(self.seed).permutation(len(texts))
        ends = np.cumsum([len(texts[i]) for i in order])
        return [texts[i] for i in order[: np.searchsorted(ends, self.characters, "right")]]

    def trained(self, tokenizer: Tokenizer, texts: Sequence[str]) -> keras.Model:
        """A new decoder, trained on text."""
        keras.utils.set_random_seed(self.seed)
        model = decoder(tokenizer.size, self.size)
        data = self.examples(tokenizer, texts)
        count = len(data[0])
        steps = self.epochs * -(-count // self.batch_size)
        rate = keras.optimizers.schedules.CosineDecay(
            0.0, steps, warmup_target=self.learning_rate, warmup_steps=max(1, steps // 20)
        )
        model.compile(
            keras.optimizers.Adam(rate, global_clipnorm=1.0),
            sequence_loss(),
            steps_per_execution=min(16, steps),
        )
        batches = TrainingArrays(data, self.batch_size, 0, 1, self.seed, bucket=16)
        model.fit(
            batches.batches, epochs=self.epochs, shuffle=False, verbose=0, callbacks=[batches]
        )
        return model

    def examples(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Arrays3:
        """Inputs, next tokens and weights: pieces of text to continue, and gaps to fill."""
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(len(texts))
        stream = [token for i in order for token in (*tokenizer.encode([texts[i]])[0], END)]
        pieces = max(1, (len(stream) - 1) // self.window)
        stream += [END] * max(0, self.window + 1 - len(stream))
        starts = self.window * np.arange(pieces)[:, None] + np.arange(self.window)
        tokens = np.array(stream, "int32")
        inputs, following = tokens[starts], tokens[starts + 1]
        whole = inputs, following, np.ones(inputs.shape, "float32")
        rows = gaps(texts, sum(len(t.split()) for t in texts) // self.words_per_gap, rng)
        if not rows:
            return whole
        encoding = Encoding(tokenizer, self.window - 15, 16)
        return tuple(  # type: ignore[return-value]
            np.concatenate(parts) for parts in zip(whole, encoding.examples(rows), strict=True)
        )


def gaps(texts: Sequence[str], count: int, rng: np.random.Generator) -> list[Row]:
    """Passages of text, each with a question that consists of words around a gap."""
    split = [words for words in (text.split() for text in texts) if len(words) >= _LEAST_WORDS]
    if not split:
        return []
    share = np.array([len(words) for words in split]) / sum(map(len, split))
    rows = []
    for i in rng.choice(len(split), count, p=share):
        length = int(rng.integers(_LEAST_WORDS, _MOST_WORDS + 1))
        first = int(rng.integers(0, max(1, len(split[i]) - length + 1)))
        words = split[i][first : first + length]
        size = int(rng.integers(1, 5))
        at = int(rng.integers(0, len(words) - size + 1))
        before, missing = words[max(0, at - 5) : at], words[at : at + size]
        after = words[at + size : at + size + 4]
        around = [word for word in (*before, "what", *after) if rng.random() < 0.85]
        prompt = f"context: {' '.join(words)} question: {' '.join(around)}?"
        target = " ".join(missing).strip(".,;:!?()\"'")
        if target:
            rows.append(Row(prompt, target, (target,)))
    return rows


_LEAST_WORDS, _MOST_WORDS = 8, 40


def cache_folder() -> Path:
    """The folder for files that can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "keras_dwd"


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _read(path: Path, about: dict[str, Any]) -> tuple[Tokenizer, list[np.ndarray]] | None:
    """What was kept in a file; `None` if there is none, or if it is damaged."""
    if not path.is_file():
        return None
    try:
        arrays, saved = read_arrays(path)
        if saved["pretraining"] != json.loads(json.dumps(about)):
            return None
        serialized = saved["tokenizer"]
    except (FileError, KeyError):
        return None
    tokenizer = BPETokenizer(serialized) if serialized else ByteTokenizer()
    return tokenizer, [arrays[str(i)] for i in range(len(arrays))]
