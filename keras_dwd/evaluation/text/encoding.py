"""Rows of text as arrays of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np

from keras_dwd.evaluation.text.tasks import Row
from keras_dwd.evaluation.text.tokenizer import END, PAD, SEPARATOR, Tokenizer

Arrays3 = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Encoding:
    """How rows become arrays of tokens.

    Attributes:
        tokenizer: Makes tokens of text.
        prompt: The largest number of tokens of a prompt, with the separator at its end. Of a longer
            one the beginning and the end are kept, twice as much of the beginning.
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
        encoded = self.tokenizer.encode([row.prompt for row in rows])
        return [[*self._shortened(tokens), SEPARATOR] for tokens in encoded]

    def _shortened(self, tokens: list[int]) -> list[int]:
        room = self.prompt - 1
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
        inputs = np.full(shape, PAD, "int32")
        following, weights = inputs.copy(), np.zeros(shape, "float32")
        targets = self.tokenizer.encode([row.target for row in rows])
        for i, (prompt, target) in enumerate(zip(self.prompts(rows), targets, strict=True)):
            tokens = [*prompt, *target[: self.target - 1], END]
            inputs[i, : len(tokens) - 1] = tokens[:-1]
            following[i, : len(tokens) - 1] = tokens[1:]
            weights[i, len(prompt) - 1 : len(tokens) - 1] = 1.0
        return inputs, following, weights

    def cut(self, rows: Sequence[Row]) -> float:
        """The share of rows whose prompt or target is cut off."""
        prompts = self.tokenizer.encode([row.prompt for row in rows])
        targets = self.tokenizer.encode([row.target for row in rows])
        longer = [
            len(p) > self.prompt - 1 or len(t) > self.target - 1
            for p, t in zip(prompts, targets, strict=True)
        ]
        return float(np.mean(longer))


def sequence_loss() -> keras.losses.Loss:
    """The mean cross-entropy of the tokens that have a weight."""
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
