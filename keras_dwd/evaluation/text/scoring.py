"""Measures a model on test data of text: what it writes, and how likely it finds the targets."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.distributed.data import cut
from keras_dwd.evaluation.text.encoding import Encoding, tokens_of
from keras_dwd.evaluation.text.metrics import METRICS
from keras_dwd.evaluation.text.programs import passed
from keras_dwd.evaluation.text.tasks import Row, TextTask

Write = Callable[[Sequence[Sequence[int]], int], list[list[int]]]
"""Continues prompts, given as tokens, by a number of tokens at most."""

PASSED = "passed"
_BATCH = 32


class Scorer:
    """A function of a model and the test data of a task, for `TaskMetric`.

    Args:
        tasks: The tasks, whose rows know all references and tests, each with what made its data.
        names: Names of `METRICS`, and `passed`; `token_accuracy` and `loss` are always measured.
        writer: Makes what continues prompts with a model.
    """

    def __init__(
        self,
        tasks: Iterable[tuple[TextTask, Encoding]],
        names: Sequence[str],
        writer: Callable[[keras.Model], Write],
    ):
        self.names = tuple(names)
        self._rows: dict[bytes, tuple[Row, Encoding]] = {}
        for task, encoding in tasks:
            rows = [*task.train, *task.validation, *task.test]
            inputs, _, weights = encoding.examples(rows)
            for row, tokens, where in zip(rows, inputs, weights, strict=True):
                self._rows[_key(tokens, where)] = row, encoding
        self._writer = writer
        self._made: tuple[Any, Any, Any] = (lambda: None, None, None)

    def __call__(self, model: keras.Model, data: Any) -> dict[str, float]:
        """The values of all metrics.

        Args:
            model: A model of the data's tokens.
            data: Some of the tasks' examples, as `Encoding.examples` or `masked` makes them.
        """
        of, write, likelihood = self._made
        if of() is not model:
            write, likelihood = self._writer(model), _likelihood(model, data)
            self._made = weakref.ref(model), write, likelihood
        rows, texts = self.written(write, data)
        references = [row.references for row in rows]
        scores = {
            name: passed(texts, rows) if name == PASSED else METRICS[name](texts, references)
            for name in self.names
        }
        return {**scores, **likelihood(data)}

    def written(self, write: Write, data: Any) -> tuple[list[Row], list[str]]:
        """The rows of the data, and what is written for each."""
        inputs, weights = tokens_of(data[0]), np.asarray(data[2])
        known = [self._rows[_key(x, w)] for x, w in zip(inputs, weights, strict=True)]
        counts = np.argmax(weights > 0, 1) + 1
        prompts = [x[:count].tolist() for x, count in zip(inputs, counts, strict=True)]
        encoding = known[0][1]
        texts = encoding.tokenizer.decode(write(prompts, encoding.target))
        return [row for row, _ in known], texts


def _key(tokens: np.ndarray, weights: np.ndarray) -> bytes:
    """An example without its padding."""
    return bytes(tokens[: int(np.flatnonzero(weights)[-1]) + 1].astype("int32").tobytes())


def _likelihood(model: keras.Model, like: Any) -> Callable[[Any], dict[str, float]]:
    """A function that gives `token_accuracy` and `loss`, means over all tokens of the targets.

    Args:
        model: The model.
        like: Examples of the same structure as those that the function gets.
    """

    @tf.function(
        input_signature=tf.nest.map_structure(
            lambda a: tf.TensorSpec((None, None), np.asarray(a).dtype), tuple(like)
        ),
        autograph=False,
    )
    def sums(inputs: Any, following: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        inputs, following, weights = cut((inputs, following, weights), 16)
        logits = tf.cast(of()(inputs, training=False), "float32")
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(following, logits)
        right = tf.cast(tf.argmax(logits, -1, "int32") == following, "float32")
        return tf.stack(
            [tf.reduce_sum(t * weights) for t in (right, losses, tf.ones_like(weights))]
        )

    of: Any = weakref.ref(model)

    def measured(data: Any) -> dict[str, float]:
        total = np.zeros(3)
        for start in range(0, len(data[2]), _BATCH):
            rows = slice(start, start + _BATCH)
            total += sums(*tf.nest.map_structure(lambda a: np.asarray(a)[rows], data)).numpy()  # noqa: B023
        return {
            "token_accuracy": float(total[0] / total[2]),
            "loss": float(total[1] / total[2]),
        }

    return measured
