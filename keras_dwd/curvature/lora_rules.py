"""Closed forms for layers with LoRA, which compute with the kernel W + s A B.

With the gradient D by this sum, that by A is s D Bᵀ and that by B is s Aᵀ D. D itself is formed
only where the kernel is trained too.
"""

import abc
import string

import keras
import tensorflow as tf
from keras import layers

from keras_dwd.curvature.closed_forms import bias_gradient, einsum_axes, keeps_examples_apart
from keras_dwd.curvature.language_rules import REVERSIBLE, uses_of
from keras_dwd.curvature.rules import LayerIO, Rule, register_rule


class _LoraRule(Rule, abc.ABC):
    variables = {  # noqa: RUF012
        **{"kernel": "_kernel", "bias": "bias"},
        **{name: name for name in ("lora_kernel_a", "lora_kernel_b")},
    }

    @abc.abstractmethod
    def axes(self, layer: keras.Layer, flow: LayerIO) -> tuple[str, str, str]:
        """One letter per axis of the input, kernel and output."""

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        x, kernel, y = self.axes(layer, flow)
        rank = next(c for c in string.ascii_letters if c not in x + kernel + y)
        a, b = (tf.cast(v.value, "float32") for v in (layer.lora_kernel_a, layer.lora_kernel_b))
        inputs, g = flow.inputs[0], layer.lora_alpha / layer.lora_rank * flow.gradient
        left, right = kernel[:-1] + rank, rank + kernel[-1]
        gradients = {
            "lora_kernel_a": tf.einsum(f"{x},{y},{right}->{x[0]}{left}", inputs, g, b),
            "lora_kernel_b": tf.einsum(f"{x},{y},{left}->{x[0]}{right}", inputs, g, a),
        }
        if layer._kernel.trainable:
            product = tf.einsum(f"{x},{y}->{x[0]}{kernel}", inputs, flow.gradient)
            gradients["kernel"] = product
        if layer.bias is not None:
            gradients["bias"] = bias_gradient(layer, flow.gradient)
        return gradients


@register_rule(layers.Dense, lora=True)
class _LoraDenseRule(_LoraRule):
    def axes(self, layer: keras.Layer, flow: LayerIO) -> tuple[str, str, str]:
        positions = string.ascii_letters[: len(flow.gradient.shape) - 1]
        return f"{positions}y", "yz", f"{positions}z"


@register_rule(layers.EinsumDense, lora=True)
class _LoraEinsumRule(_LoraRule):
    def supports(self, layer: keras.Layer) -> bool:
        return keeps_examples_apart(layer)

    def axes(self, layer: keras.Layer, flow: LayerIO) -> tuple[str, str, str]:
        return einsum_axes(layer)


@register_rule(layers.Embedding, REVERSIBLE, lora=True)
class _LoraEmbeddingRule(Rule):
    variables = {  # noqa: RUF012
        **{"embeddings": "_embeddings", "reverse_embeddings": "reverse_embeddings"},
        **{name: name for name in ("lora_embeddings_a", "lora_embeddings_b")},
    }

    def squares(
        self, layer: keras.Layer, flows: list[LayerIO], weights: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        a, b = (
            tf.cast(v.value, "float32") for v in (layer.lora_embeddings_a, layer.lora_embeddings_b)
        )
        uses = uses_of(layer, flows)
        scale = layer.lora_alpha / layer.lora_rank
        by_b = scale * tf.matmul(tf.gather(a, uses.ids), uses.g, transpose_a=True)
        squares = {}
        if uses.hidden is not None and not uses.tied:
            squares["reverse_embeddings"] = uses.reverse_squares(weights)
        if uses.tied:
            by_b += scale * tf.matmul(tf.matmul(uses.by_logits, a), uses.hidden, transpose_a=True)
        return squares | {
            "lora_embeddings_a": uses.projected(scale * tf.transpose(b)).squares(weights),
            "lora_embeddings_b": tf.tensordot(weights, by_b**2, axes=1),
            **({"embeddings": uses.squares(weights)} if layer._embeddings.trainable else {}),
        }
