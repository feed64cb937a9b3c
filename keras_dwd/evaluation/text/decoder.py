"""A small transformer that writes text: a decoder as in GPT-2."""

from dataclasses import asdict, dataclass
from typing import Any

import keras
from keras import layers, ops

from keras_dwd.checks import integer


@dataclass(frozen=True)
class DecoderSize:
    """The size of a decoder.

    Attributes:
        width: Numbers for each token between the layers.
        blocks: Pairs of attention and a network of two layers.
        heads: Of each attention; must divide `width`.
        length: The largest number of tokens of a text.
    """

    width: int = 128
    blocks: int = 4
    heads: int = 4
    length: int = 256

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            integer(name, value, 1)
        if self.width % self.heads:
            raise ValueError(f"`heads` must divide `width`, {self.width}. Received: {self.heads}")


def decoder(tokens: int, size: DecoderSize) -> keras.Model:
    """A model that predicts the next token: logits `(batch, length, tokens)`.

    All its weights are in layers that closed forms of their Fisher information are known for.
    Padding at the end of a text has no effect on what comes before.

    Args:
        tokens: Number of tokens of the tokenizer.
        size: Its size.

    Reference:
        [Radford et al., 2019](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf).
    """
    inputs = keras.Input((None,), dtype="int32", name="tokens")
    positions = ops.cumsum(ops.ones_like(inputs), axis=1) - 1
    x = layers.Embedding(tokens, size.width, name="token")(inputs)
    x = x + layers.Embedding(size.length, size.width, name="position")(positions)
    for i in range(size.blocks):
        y = layers.LayerNormalization(name=f"norm_{i}_1")(x)
        y = layers.Dense(3 * size.width, name=f"attention_{i}_in")(y)
        y = CausalAttention(size.heads, name=f"attention_{i}")(y)
        x = x + layers.Dense(size.width, name=f"attention_{i}_out")(y)
        y = layers.LayerNormalization(name=f"norm_{i}_2")(x)
        y = layers.Dense(4 * size.width, activation="gelu", name=f"dense_{i}_in")(y)
        x = x + layers.Dense(size.width, name=f"dense_{i}_out")(y)
    x = layers.LayerNormalization(name="norm")(x)
    return keras.Model(inputs, layers.Dense(tokens, name="next")(x), name="decoder")


@keras.saving.register_keras_serializable("keras_dwd")
class CausalAttention(layers.Layer):
    """Each token attends to itself and to those before it; it has no weights.

    Args:
        heads: Number of heads.
    """

    def __init__(self, heads: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.heads = heads

    def split(self, x: Any) -> list[Any]:
        """Queries, keys and values, each `(batch, length, heads, width of a head)`."""
        batch, length, width = ops.shape(x)
        shape = (batch, length, 3, self.heads, width // (3 * self.heads))
        return ops.unstack(ops.reshape(x, shape), 3, axis=2)

    def call(self, x: Any) -> Any:
        query, key, value = self.split(x)
        length = ops.arange(ops.shape(x)[1])
        y = attend(query, key, value, length[:, None] >= length[None])
        return ops.reshape(y, (*ops.shape(x)[:2], x.shape[-1] // 3))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape[:-1], input_shape[-1] // 3)

    def compute_output_spec(self, x: Any) -> keras.KerasTensor:
        return keras.KerasTensor(self.compute_output_shape(x.shape), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads}


def attend(query: Any, key: Any, value: Any, allowed: Any) -> Any:
    """Attention.

    Args:
        query: `(batch, queries, heads, width)`.
        key: `(batch, keys, heads, width)`.
        value: `(batch, keys, heads, width)`.
        allowed: Which keys each query attends to, to be broadcast to
            `(batch, heads, queries, keys)`.
    """
    scores = ops.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    shares = ops.softmax(ops.where(allowed, scores, -1e9), axis=-1)
    return ops.einsum("bhqk,bkhd->bqhd", shares, value)
