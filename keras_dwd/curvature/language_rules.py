"""Closed forms for the layers of language models: those of Keras and, by name, of KerasHub.

Rotary embeddings and attention have no variables of their own, or only projections.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras
import tensorflow as tf

from keras_dwd.curvature.closed_forms import (
    as_columns,
    as_rows,
    ids_of,
    squared_lookups,
    summed_lookups,
)
from keras_dwd.curvature.rules import LayerIO, Rule, register_rule

_HUB = "keras_hub.src"
REVERSIBLE = "keras.src.layers.core.reversible_embedding.ReversibleEmbedding"


class _RMSRule(Rule):
    """Divides by the root mean square of the last axis and multiplies by a scale, or by 1 + it."""

    variables = ("scale",)

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        x, g = flow.inputs[0], flow.gradient
        square = tf.reduce_mean(x**2, -1, keepdims=True)
        normalized = x * tf.math.rsqrt(square + getattr(layer, "epsilon", 1e-6))
        (name,) = self.variables
        return {name: tf.reduce_sum(as_rows(normalized * g), 1)}


register_rule(
    f"{_HUB}.layers.modeling.rms_normalization.RMSNormalization",
    f"{_HUB}.models.gemma.rms_normalization.RMSNormalization",
    f"{_HUB}.models.gemma3.gemma3_layers.RMSNormalization",
    f"{_HUB}.models.gpt_oss.gpt_oss_layer_norm.GptOssLayerNormalization",
    f"{_HUB}.models.llama.llama_layernorm.LlamaLayerNorm",
    f"{_HUB}.models.mistral.mistral_layer_norm.MistralLayerNormalization",
    f"{_HUB}.models.mixtral.mixtral_layer_norm.MixtralLayerNormalization",
    f"{_HUB}.models.phi3.phi3_layernorm.Phi3LayerNorm",
    f"{_HUB}.models.qwen.qwen_layernorm.QwenLayerNorm",
    f"{_HUB}.models.qwen3.qwen3_layernorm.Qwen3LayerNorm",
    f"{_HUB}.models.qwen3_moe.qwen3_moe_layernorm.Qwen3MoeLayerNorm",
    f"{_HUB}.models.qwen_moe.qwen_moe_layernorm.QwenMoeLayerNorm",
)(_RMSRule)


@register_rule(f"{_HUB}.models.t5.t5_layer_norm.T5LayerNorm")
class _T5NormRule(_RMSRule):
    variables = ("weight",)


@register_rule("keras.src.layers.normalization.rms_normalization.RMSNormalization")
class _KerasRMSRule(_RMSRule):
    def supports(self, layer: keras.Layer) -> bool:
        return list(layer.axis) == [-1]


@register_rule(f"{_HUB}.layers.modeling.position_embedding.PositionEmbedding")
class _PositionEmbeddingRule(Rule):
    """Row t of the table is the output at position t, the same for all examples."""

    variables = {"embeddings": "position_embeddings"}  # noqa: RUF012

    def takes(self, arguments: Mapping[str, Any]) -> bool:
        return not arguments  # positions that do not start at zero

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        g = flow.gradient
        g = tf.reduce_sum(g, list(range(1, len(g.shape) - 2)))
        unused = layer.sequence_length - tf.shape(g)[1]
        return {"embeddings": tf.pad(g, [[0, 0], [0, unused], [0, 0]])}


@register_rule(f"{_HUB}.models.t5.t5_multi_head_attention.T5MultiHeadAttention")
class _T5AttentionRule(Rule):
    """Adds to the score of a query and a key a number for their distance, by head."""

    variables = {"embeddings": "relative_attention_bias"}  # noqa: RUF012
    method = "compute_bias"

    def takes(self, arguments: Mapping[str, Any]) -> bool:
        return arguments.get("cache") is None

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        batch, heads, queries, keys = tf.unstack(tf.shape(flow.gradient))
        distance = tf.range(keys)[None] - tf.range(queries)[:, None]
        bucket = layer._relative_position_bucket(
            distance,
            bidirectional=not layer.is_decoder,
            num_buckets=layer.relative_attention_buckets,
            max_distance=layer.relative_attention_max_distance,
        )
        by_pair = tf.reshape(tf.transpose(flow.gradient, (2, 3, 0, 1)), (-1, batch * heads))
        summed = tf.math.unsorted_segment_sum(
            by_pair, tf.reshape(bucket, (-1,)), layer.relative_attention_buckets
        )
        return {"embeddings": tf.transpose(tf.reshape(summed, (-1, batch, heads)), (1, 0, 2))}


@dataclass(frozen=True)
class Uses:
    """What an embedding is used for in a batch, along an axis of positions: what its gradient is.

    The gradient D of an example by the table has the rows `g`, added up at the rows `ids`, and, if
    the table is also multiplied by, `by_logits`ᵀ `hidden`.

    Attributes:
        vocabulary: The number of rows of the table.
        ids: `(batch, positions)`, the rows that are looked up.
        g: `(batch, positions, dimensions)`, the gradients at what is looked up.
        hidden: What is multiplied by the transpose of the table; `None` if nothing is.
        by_logits: The gradients at the products; `None` if there are none.
        tied: Whether it is this table that is multiplied by, and not one of its own.
    """

    vocabulary: int
    ids: tf.Tensor
    g: tf.Tensor
    hidden: tf.Tensor | None = None
    by_logits: tf.Tensor | None = None
    tied: bool = False

    def squares(self, weights: tf.Tensor) -> tf.Tensor:
        """Σ_b w_b D_b²; D, as large as the table, is formed for one example at a time."""
        if not self.tied:
            return squared_lookups(self.ids, self.g, weights, self.vocabulary)
        lookups = (self.ids, self.g)
        return _squared_products(self.by_logits, self.hidden, weights, *lookups)

    def reverse_squares(self, weights: tf.Tensor) -> tf.Tensor:
        """Σ_b w_b D_b² for a separate (untied) output table."""
        return _squared_products(self.hidden, self.by_logits, weights)

    def projected(self, matrix: tf.Tensor) -> "Uses":
        """The uses whose gradient is D times a matrix."""
        hidden = None if self.hidden is None else tf.matmul(self.hidden, matrix)
        return replace(self, g=tf.matmul(self.g, matrix), hidden=hidden)


def uses_of(layer: keras.Layer, flows: list[LayerIO]) -> Uses:
    """What a layer, an embedding that may be reversible, is used for in its calls."""
    reverse = [flow for flow in flows if len(flow.inputs[0].shape) == len(flow.gradient.shape)]
    lookups = [flow for flow in flows if not any(flow is other for other in reverse)]
    batch = tf.shape(flows[0].gradient)[0]
    ids, g = tf.zeros((batch, 0), "int32"), tf.zeros((batch, 0, layer.output_dim))
    if lookups:
        ids = tf.concat([ids_of(flow) for flow in lookups], 1)
        g = tf.concat([as_rows(flow.gradient) for flow in lookups], 1)
    if not reverse:
        return Uses(layer.input_dim, ids, g)
    hidden = tf.concat([as_rows(flow.inputs[0]) for flow in reverse], 1)
    by_logits = tf.concat([as_rows(flow.gradient) for flow in reverse], 1)
    cap = layer.logit_soft_cap
    if cap is not None:  # the gradient is that by the capped logits
        table = layer.embeddings if layer.tie_weights else layer.reverse_embeddings
        table = tf.cast(tf.convert_to_tensor(table), "float32")
        logits = tf.matmul(hidden, table, transpose_b=layer.tie_weights)
        by_logits *= 1 - tf.tanh(logits / cap) ** 2
    return Uses(layer.input_dim, ids, g, hidden, by_logits, tied=layer.tie_weights)


def _squared_products(
    a: tf.Tensor, b: tf.Tensor, weights: tf.Tensor, *lookups: tf.Tensor
) -> tf.Tensor:
    """Σ_b w_b (a_bᵀ b_b)², with rows added to the products, given by their indices and values."""

    def add(total: tf.Tensor, example: Any) -> tf.Tensor:
        weight, a_of_one, b_of_one, *rows = example
        gradient = tf.matmul(a_of_one, b_of_one, transpose_a=True)
        if rows:
            gradient = tf.tensor_scatter_nd_add(gradient, rows[0][:, None], rows[1])
        return total + weight * gradient**2

    return tf.foldl(add, (weights, a, b, *lookups), tf.zeros((a.shape[-1], b.shape[-1])))


@register_rule(REVERSIBLE)
class _ReversibleEmbeddingRule(Rule):
    """Looks rows up and, called in reverse, multiplies by the transpose of the same table."""

    variables = ("embeddings", "reverse_embeddings")
    table = "embeddings"

    def squares(
        self, layer: keras.Layer, flows: list[LayerIO], weights: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        uses = uses_of(layer, flows)
        squares = {"embeddings": uses.squares(weights)}
        if uses.hidden is not None and not uses.tied:
            squares["reverse_embeddings"] = uses.reverse_squares(weights)
        return squares

    def row_factors(
        self, layer: keras.Layer, flows: list[LayerIO], weights: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        uses = uses_of(layer, flows)
        ids, s = summed_lookups(uses.ids, uses.g)
        weight = weights[:, None, None]
        energies = tf.reduce_sum(s**2, -1)
        pairs = [(weight * s, s)]
        rows = tf.zeros((layer.input_dim,))
        if uses.tied:
            h, by_logits = uses.hidden, uses.by_logits
            assert h is not None
            assert by_logits is not None
            # The rows of the product P = by_logitsᵀ h that are looked up too.
            looked_up = tf.gather(by_logits, ids, axis=2, batch_dims=1)
            p = tf.matmul(looked_up, h, transpose_a=True)
            energies += 2 * tf.reduce_sum(s * p, -1)
            overlaps = tf.matmul(h, h, transpose_b=True)
            rows = tf.einsum("b,btv,btv->v", weights, tf.matmul(overlaps, by_logits), by_logits)
            overlaps = tf.matmul(by_logits, by_logits, transpose_b=True)
            pairs += [(weight * s, p), (weight * p, s), (weight * tf.matmul(overlaps, h), h)]
        rows += tf.math.unsorted_segment_sum(weights[:, None] * energies, ids, layer.input_dim)
        left, right = zip(*pairs, strict=True)
        return rows, as_columns(tf.concat(left, 1)), as_columns(tf.concat(right, 1))
