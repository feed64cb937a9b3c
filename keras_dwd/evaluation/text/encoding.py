"""Rows of text as arrays of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_dwd.evaluation.text.tasks import Row
from keras_dwd.evaluation.text.tokenizer import Tokenizer

Arrays3 = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Encoding:
    """How rows become arrays of tokens.

    Attributes:
        tokenizer: Makes tokens of text.
        prompt: The largest number of tokens of a prompt, with those before and after it. Of a
            longer one the beginning and the end are kept, twice as much of the beginning.
        target: The largest number of tokens of a target, with the token at its end. What is beyond
            is cut off.
    """

    tokenizer: Tokenizer
    prompt: int
    target: int

    @classmethod
    def fitted(cls, tokenizer: Tokenizer, rows: Sequence[Row], length: int) -> "Encoding":
        """An encoding of a given length, with room for 95 % of the targets of these rows.

        Targets get half of the length at most, prompts what they leave.
        """
        counts = [len(tokens) for tokens in tokenizer.encode([row.target for row in rows])]
        target = min(int(np.quantile(counts, 0.95)) + 1, length // 2)
        return cls(tokenizer, length - target + 1, target)

    @property
    def length(self) -> int:
        """The number of tokens that the arrays have room for."""
        return self.prompt + self.target - 1

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The tokens of each row's prompt, with the separator at its end."""
        tokenizer = self.tokenizer
        encoded = tokenizer.encode([row.prompt for row in rows])
        return [
            [*tokenizer.start, *self._shortened(tokens), *tokenizer.separator] for tokens in encoded
        ]

    @property
    def _room(self) -> int:
        """The largest number of tokens of a prompt alone."""
        return self.prompt - len(self.tokenizer.start) - len(self.tokenizer.separator)

    def _shortened(self, tokens: list[int]) -> list[int]:
        room = self._room
        if len(tokens) <= room:
            return tokens
        end = room // 3
        return tokens[: room - end] + tokens[len(tokens) - end :]

    def examples(self, rows: Sequence[Row]) -> Arrays3:
        """Inputs, the next tokens, and weights that are 1 for tokens of the target, else 0.

        Returns:
            Three arrays `(rows, length)`, padded at the end.
        """
        shape = (len(rows), self.length)
        inputs = np.full(shape, self.tokenizer.pad, "int32")
        following, weights = inputs.copy(), np.zeros(shape, "float32")
        targets = self.tokenizer.encode([row.target for row in rows])
        for i, (prompt, target) in enumerate(zip(self.prompts(rows), targets, strict=True)):
            tokens = [*prompt, *target[: self.target - 1], self.tokenizer.end]
            inputs[i, : len(tokens) - 1] = tokens[:-1]
            following[i, : len(tokens) - 1] = tokens[1:]
            weights[i, len(prompt) - 1 : len(tokens) - 1] = 1.0
        return inputs, following, weights

    def cut(self, rows: Sequence[Row]) -> float:
        """The share of rows whose prompt or target is cut off."""
        prompts = self.tokenizer.encode([row.prompt for row in rows])
        targets = self.tokenizer.encode([row.target for row in rows])
        longer = [
            len(p) > self._room or len(t) > self.target - 1
            for p, t in zip(prompts, targets, strict=True)
        ]
        return float(np.mean(longer))


def masked(examples: Arrays3) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Examples with inputs for a model of KerasHub, which needs to know what is padding."""
    inputs, following, weights = examples
    last = [np.flatnonzero(row)[-1] for row in weights]
    mask = np.arange(inputs.shape[1]) <= np.array(last)[:, None]
    return {"token_ids": inputs, "padding_mask": mask.astype("int32")}, following, weights


def tokens_of(inputs: Any) -> np.ndarray:
    """The tokens in the inputs of a model."""
    return np.asarray(inputs["token_ids"] if isinstance(inputs, Mapping) else inputs)


def sequence_loss() -> keras.losses.Loss:
    """The mean cross-entropy of the tokens that have a weight."""
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
