"""Causal language models of KerasHub as presets in a folder: to load, to tokenize, to write."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_dwd.evaluation.text.tokenizer import NEEDED, Tokenizer

_SHAPES = 32
"""Texts are padded to a multiple of this: a new length costs as much time as several texts."""


def load_preset(folder: Path, **settings: Any) -> Any:
    """The causal language model of a preset.

    Args:
        folder: The preset.
        **settings: Further arguments of `from_preset`.

    Raises:
        FileNotFoundError: If the folder has no preset.
        ValueError: If it has one of another model.
    """
    try:
        import keras_hub
    except ModuleNotFoundError:
        raise ModuleNotFoundError(NEEDED) from None
    if not (folder / "config.json").is_file():  # KerasHub would look for it in the network
        raise FileNotFoundError(
            "`preset` must be a folder with a preset of KerasHub, which has a file config.json. "
            f"Received: {str(folder)!r}"
        )
    return keras_hub.models.CausalLM.from_preset(str(folder), **settings)


class PresetTokenizer:
    """The tokenizer of a preset.

    A prompt begins with the preset's token for that, if it has one, and ends with a line break.

    Args:
        preprocessor: The preprocessor of the preset.
    """

    def __init__(self, preprocessor: Any):
        inner = self._inner = preprocessor.tokenizer
        self.size = int(inner.vocabulary_size())
        self.end = int(inner.end_token_id)
        # Padding is masked. It must not be what ends a text, which some presets pad with: KerasHub
        # would look for the end there.
        self.pad = int(self.end == 0)
        begins = preprocessor.add_start_token and inner.start_token_id is not None
        self.start: tuple[int, ...] = (int(inner.start_token_id),) if begins else ()
        self.separator: tuple[int, ...] = tuple(self.encode(["\n"])[0])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        rows = self._inner(list(texts))
        return [[int(token) for token in row] for row in getattr(rows, "to_list", lambda: rows)()]

    def decode(self, tokens: Sequence[Iterable[int]]) -> list[str]:
        """The text of each list of tokens."""
        return [self._text([int(t) for t in each]) for each in tokens]

    def _text(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        text = self._inner.detokenize(tokens)
        return text if isinstance(text, str) else np.asarray(text).item().decode(errors="replace")


class PresetWriter:
    """Writes with a model that wraps one of KerasHub, by its sampler.

    Args:
        model: The model, compiled.
        tokenizer: Its tokenizer.
        length: The most tokens that it takes.
        batch_size: Number of prompts at once.
    """

    def __init__(self, model: keras.Model, tokenizer: Tokenizer, length: int, batch_size: int = 16):
        self._generate = model.generate
        self._tokenizer, self._length, self.batch_size = tokenizer, length, batch_size

    def __call__(self, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
        """Continue prompts by at most `steps` tokens, see `Generator`."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        longest = max(map(len, prompts), default=0) + steps
        shape = self.batch_size, min(-(-longest // _SHAPES) * _SHAPES, self._length)
        written: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            tokens = np.full(shape, self._tokenizer.pad, "int32")
            mask = np.zeros(shape, "int32")
            for row in range(self.batch_size):  # the last batch is filled up by its last prompt
                prompt = prompts[chosen[min(row, len(chosen) - 1)]]
                tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
            generated = self._generate(
                {"token_ids": tokens, "padding_mask": mask},
                stop_token_ids=(self._tokenizer.end,),
            )
            for i, row in zip(chosen, generated["token_ids"], strict=False):
                own = row[len(prompts[i]) :][:steps].tolist()
                written[i] = list(itertools.takewhile(lambda t: t != self._tokenizer.end, own))
        return written
