"""Writes text with a decoder: the most probable continuations, with a cache of keys and values."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import integer
from keras_dwd.evaluation.text.decoder import attend
from keras_dwd.evaluation.text.tokenizer import END, PAD

Cache = list[tuple[tf.Tensor, tf.Tensor]]
"""Keys and values of each block, `(texts, tokens, heads, width of a head)`."""


class Generator:
    """Writes with a decoder, or with a model that wraps one.

    Args:
        model: A model with the layers of `decoder`.
        beams: Number of continuations that are followed at once; with 1 each token is the most
            probable one.
        batch_size: Number of prompts at once.

    Reference:
        [Sutskever et al., 2014](https://arxiv.org/abs/1409.3215), section 3.2, for the search with
        several beams; of these the one with the highest mean log-likelihood of a token is returned.
    """

    def __init__(self, model: keras.Model, beams: int = 1, batch_size: int = 64):
        self._layer = model.get_layer
        self._blocks = sum(layer.name.endswith("_1") for layer in model.layers if _is_norm(layer))
        self.beams = integer("beams", beams, 1)
        self.batch_size = integer("batch_size", batch_size, 1)
        signature = [tf.TensorSpec((None, None), "int32"), tf.TensorSpec((), "int32")]
        self._write = tf.function(self._continuations, signature, autograph=False)

    def __call__(self, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
        """Continue prompts.

        Args:
            prompts: The tokens of each.
            steps: The largest number of tokens to write.

        Returns:
            The tokens that are written for each, without the one at the end.

        Raises:
            ValueError: If a prompt and what may be written are longer than the model takes.
        """
        longest = max(map(len, prompts), default=0) + integer("steps", steps, 1)
        length = self._layer("position").input_dim
        if longest > length:
            raise ValueError(
                f"`prompts` and `steps` must be at most {length} tokens together, which the model "
                f"takes. Received: {longest}"
            )
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        written: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            width = max(len(prompts[i]) for i in chosen)
            batch = np.full((len(chosen), width), PAD, "int32")
            for row, i in zip(batch, chosen, strict=True):
                row[width - len(prompts[i]) :] = prompts[i]
            for i, tokens in zip(chosen, self._write(batch, steps).numpy(), strict=True):
                written[i] = [int(t) for t in tokens if t not in (PAD, END)]
        return written

    # Graph code.

    def _continuations(self, prompts: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
        """What follows each prompt, `(prompts, steps)`; the prompts are padded at the start."""
        prompt_mask = prompts != PAD
        lengths = tf.reduce_sum(tf.cast(prompt_mask, "int32"), 1)
        logits, cache = self._read(prompts, prompt_mask)
        scores, last = tf.math.top_k(tf.nn.log_softmax(logits), self.beams)
        written = tf.pad(last[..., None], [[0, 0], [0, 0], [0, steps - 1]])
        empty = [(k[:, :0], v[:, :0]) for k, v in cache]
        own = [tuple(tf.repeat(t, self.beams, 0) for t in pair) for pair in empty]
        first = _Beams(tf.constant(1), scores, last, written, own)
        follow = self._following(cache, prompt_mask, lengths)
        shapes = tf.nest.map_structure(lambda t: t.shape, first)
        unknown = tf.TensorShape((None, None, *cache[0][0].shape[2:]))
        invariants = shapes._replace(cache=[(unknown, unknown)] * self._blocks)
        (beams,) = tf.while_loop(
            lambda b: (b.step < steps) & tf.reduce_any((b.last != END) & (b.last != PAD)),
            lambda b: (follow(b),),
            (first,),
            (invariants,),
        )
        count = tf.reduce_sum(tf.cast(beams.written != PAD, "float32"), -1)
        best = tf.argmax(beams.scores / count, 1, "int32")
        return tf.gather(beams.written, best, axis=1, batch_dims=1)

    def _following(self, cache: Cache, prompt_mask: tf.Tensor, lengths: tf.Tensor) -> Any:
        """A function that adds a token to the beams of all prompts."""

        def follow(beams: _Beams) -> _Beams:
            count = tf.shape(prompt_mask)[0]
            positions = tf.repeat(lengths + beams.step - 1, self.beams)[:, None]
            logits, own = self._next(
                tf.reshape(beams.last, (-1, 1)), positions, cache, beams.cache, prompt_mask
            )
            logits = tf.reshape(logits, (count, self.beams, -1))
            tokens = logits.shape[-1] or tf.shape(logits)[-1]
            done = (beams.last == END) | (beams.last == PAD)
            # What has ended goes on with padding, which costs nothing.
            padding = tf.where(tf.range(tokens) == PAD, 0.0, -np.inf)
            gains = tf.where(done[..., None], padding, tf.nn.log_softmax(logits))
            all_scores = tf.reshape(beams.scores[..., None] + gains, (count, -1))
            scores, chosen = tf.math.top_k(all_scores, self.beams)
            parents, last = chosen // tokens, chosen % tokens
            written = tf.gather(beams.written, parents, axis=1, batch_dims=1)
            at_step = tf.range(tf.shape(written)[-1]) == beams.step
            written = tf.where(at_step, last[..., None], written)
            rows = tf.reshape(tf.range(count)[:, None] * self.beams + parents, (-1,))
            own = [(tf.gather(k, rows), tf.gather(v, rows)) for k, v in own]
            scores = tf.ensure_shape(scores, beams.scores.shape)
            return _Beams(beams.step + 1, scores, last, written, own)

        return follow

    def _read(self, prompts: tf.Tensor, prompt_mask: tf.Tensor) -> tuple[tf.Tensor, Cache]:
        """The logits of the first token to write, and keys and values of the prompts."""
        positions = tf.maximum(tf.cumsum(tf.cast(prompt_mask, "int32"), 1) - 1, 0)
        columns = tf.range(tf.shape(prompts)[1])
        allowed = (columns[:, None] >= columns[None]) & prompt_mask[:, None, None, :]
        cache: Cache = []

        def attention(block: int, query: Any, key: Any, value: Any) -> Any:
            cache.append((key, value))
            return attend(query, key, value, allowed)

        x = self._layer("token")(prompts) + self._layer("position")(positions)
        return self._through(x, attention)[:, -1], cache

    def _next(
        self,
        last: tf.Tensor,
        positions: tf.Tensor,
        cache: Cache,
        own: Cache,
        prompt_mask: tf.Tensor,
    ) -> tuple[tf.Tensor, Cache]:
        """The logits of the token after `last`, and keys and values of what was written."""
        longer: Cache = []

        def attention(block: int, query: Any, key: Any, value: Any) -> Any:
            of_prompt, of_own = cache[block], own[block]
            longer.append((tf.concat([of_own[0], key], 1), tf.concat([of_own[1], value], 1)))
            keys, values = longer[-1]
            # All beams of a prompt attend to the same keys of the prompt, which are not copied.
            together = tf.reshape(query, (-1, self.beams, *query.shape[2:]))
            early = tf.einsum("bqhd,bkhd->bqhk", together, of_prompt[0])
            early = tf.where(prompt_mask[:, None, None], early, -1e9)
            late = tf.einsum("bqhd,bkhd->bqhk", query, keys)
            late = tf.reshape(late, tf.concat([tf.shape(early)[:3], tf.shape(late)[3:]], 0))
            scores = tf.concat([early, late], -1) * query.shape[-1] ** -0.5
            shares = tf.nn.softmax(scores)
            split = tf.shape(prompt_mask)[1]
            y = tf.einsum("bqhk,bkhd->bqhd", shares[..., :split], of_prompt[1])
            of_late = tf.reshape(shares[..., split:], (-1, 1, y.shape[2], tf.shape(keys)[1]))
            return tf.reshape(y, tf.shape(query)) + tf.einsum("bqhk,bkhd->bqhd", of_late, values)

        x = self._layer("token")(last) + self._layer("position")(positions)
        return self._through(x, attention)[:, -1], longer

    def _through(self, x: Any, attention: Any) -> Any:
        """The logits at each position, with another function for the attention."""
        layer = self._layer
        for i in range(self._blocks):
            y = layer(f"attention_{i}_in")(layer(f"norm_{i}_1")(x))
            y = attention(i, *layer(f"attention_{i}").split(y))
            y = tf.reshape(y, tf.shape(x))
            x = x + layer(f"attention_{i}_out")(tf.ensure_shape(y, x.shape))
            y = layer(f"dense_{i}_in")(layer(f"norm_{i}_2")(x))
            x = x + layer(f"dense_{i}_out")(y)
        return layer("next")(layer("norm")(x[:, -1:]))


class _Beams(NamedTuple):
    """What was written: scores and last tokens `(prompts, beams)`, tokens, keys and values."""

    step: tf.Tensor
    scores: tf.Tensor
    last: tf.Tensor
    written: tf.Tensor
    cache: Any


def _is_norm(layer: keras.Layer) -> bool:
    return layer.name.startswith("norm_")
