"""Closed forms of per-example gradients, one rule per type of layer."""

import string
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_dwd.curvature.rules import LayerIO, Rule, RuledLayer, register_rule
from keras_dwd.precision.matrix_form import MatrixForm


class MatrixRule(Rule):
    """Layers that multiply rows built from their input by a matrix, and may add a bias."""

    variables = ("kernel", "bias")

    def matrix(self, layer: keras.Layer) -> MatrixForm | None:
        shape = tuple(layer.kernel.shape)
        bias = None if layer.bias is None else tuple(layer.bias.shape)
        fan_out = shape[-1]
        fan_in = int(np.prod(shape[:-1]))
        return MatrixForm((fan_in, fan_out), shape, tuple(range(len(shape))), bias)

    def squares(
        self, layer: keras.Layer, flows: list[LayerIO], weights: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        form = self.matrix(layer)
        assert form is not None
        a, g = RuledLayer(layer, self, {}).all_rows(flows)
        if a.shape[1] == 1:  # one position: the square of a product is the product of squares
            squared = tf.matmul(a[:, 0] ** 2, g[:, 0] ** 2 * weights[:, None], transpose_a=True)
        else:
            per_example = tf.matmul(a, g, transpose_a=True)
            squared = tf.tensordot(weights, per_example**2, axes=1)
        if form.bias_shape is not None:
            bias = tf.tensordot(weights, tf.reduce_sum(g, 1) ** 2, axes=1)
            squared = tf.concat([squared, bias[None]], 0)
        return dict(zip(("kernel", "bias"), form.split(squared), strict=False))


@register_rule(layers.Dense)
class _DenseRule(MatrixRule):
    def over_time(self, layer: keras.Layer) -> bool:
        return len((layer.get_build_config() or {}).get("input_shape", ())) > 2

    def rows(self, layer: keras.Layer, flow: LayerIO) -> tuple[tf.Tensor, tf.Tensor]:
        (x,), g = flow.inputs, flow.gradient
        return as_rows(x), as_rows(g)


@register_rule(layers.Conv1D, layers.Conv2D, layers.Conv3D)
class _ConvRule(MatrixRule):
    def supports(self, layer: keras.Layer) -> bool:
        return bool(layer.groups == 1) and _uses_its_bias(layer)

    def rows(self, layer: keras.Layer, flow: LayerIO) -> tuple[tf.Tensor, tf.Tensor]:
        x, g = _channels_last(layer, flow)
        patches = _patches(layer, x, g)
        fan_in = int(np.prod(layer.kernel.shape[:-1]))
        return tf.reshape(patches, (tf.shape(x)[0], -1, fan_in)), as_rows(g)


@register_rule(layers.DepthwiseConv1D, layers.DepthwiseConv2D)
class _DepthwiseRule(Rule):
    variables = ("kernel", "bias")

    def supports(self, layer: keras.Layer) -> bool:
        return _uses_its_bias(layer)

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        x, g = _channels_last(layer, flow)
        gradients = {"kernel": _depthwise_gradient(layer, layer.kernel, x, g)}
        if layer.bias is not None:
            gradients["bias"] = tf.reduce_sum(as_rows(g), 1)
        return gradients


@register_rule(layers.SeparableConv1D, layers.SeparableConv2D)
class _SeparableRule(Rule):
    variables = ("depthwise_kernel", "pointwise_kernel", "bias")

    def supports(self, layer: keras.Layer) -> bool:
        return _uses_its_bias(layer)

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        x, g = _channels_last(layer, flow)
        depthwise, pointwise = layer.depthwise_kernel, layer.pointwise_kernel
        between = keras.ops.depthwise_conv(
            x,
            tf.cast(depthwise.value, "float32"),
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format="channels_last",
        )
        mixing = tf.reshape(tf.cast(pointwise.value, "float32"), pointwise.shape[-2:])
        g_between = tf.tensordot(g, mixing, axes=[[-1], [1]])
        mixed = tf.matmul(as_rows(between), as_rows(g), transpose_a=True)
        gradients = {
            "depthwise_kernel": _depthwise_gradient(layer, depthwise, x, g_between),
            "pointwise_kernel": tf.reshape(mixed, (-1, *pointwise.shape)),
        }
        if layer.bias is not None:
            gradients["bias"] = tf.reduce_sum(as_rows(g), 1)
        return gradients


@register_rule(layers.EinsumDense)
class _EinsumRule(MatrixRule):
    """Equations that sum over axes of the input: `ab…,kernel->ac…`, with `a` the batch axis."""

    def supports(self, layer: keras.Layer) -> bool:
        return keeps_examples_apart(layer)

    def matrix(self, layer: keras.Layer) -> MatrixForm | None:
        x, kernel, y = einsum_axes(layer)
        if set(kernel) & set(x) & set(y):  # each position has its own matrix
            return None
        fan_in, fan_out = [a for a in kernel if a in x], [a for a in kernel if a in y]
        size = dict(zip(kernel, layer.kernel.shape, strict=True))
        bias = None
        if (
            layer.bias is not None
            and int(np.prod(layer.bias.shape)) == np.prod([size[a] for a in fan_out])
            and [a for a in y if a in fan_out] == fan_out
        ):
            bias = tuple(layer.bias.shape)
        return MatrixForm(
            (int(np.prod([size[a] for a in fan_in])), int(np.prod([size[a] for a in fan_out]))),
            tuple(layer.kernel.shape),
            tuple(kernel.index(a) for a in (*fan_in, *fan_out)),
            bias,
        )

    def over_time(self, layer: keras.Layer) -> bool:
        x, _, y = einsum_axes(layer)
        return bool(set(x[1:]) & set(y))

    def rows(self, layer: keras.Layer, flow: LayerIO) -> tuple[tf.Tensor, tf.Tensor]:
        (inputs,), g = flow.inputs, flow.gradient
        x, kernel, y = einsum_axes(layer)
        form = self.matrix(layer)
        assert form is not None
        shared = [a for a in x[1:] if a in y]
        ordered = []
        for tensor, axes, matrix_axes, width in (
            (inputs, x, [a for a in kernel if a in x], form.shape[0]),
            (g, y, [a for a in kernel if a in y], form.shape[1]),
        ):
            extra = [a for a in axes[1:] if a not in shared and a not in matrix_axes]
            if extra:  # summed over or broadcast: the same at every position
                tensor = tf.einsum(f"{axes}->{''.join(a for a in axes if a not in extra)}", tensor)
                axes = "".join(a for a in axes if a not in extra)
            order = [axes.index(a) for a in (axes[0], *shared, *matrix_axes)]
            moved = tf.transpose(tensor, order)
            ordered.append(tf.reshape(moved, (tf.shape(tensor)[0], -1, width)))
        return ordered[0], ordered[1]

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        (inputs,), g = flow.inputs, flow.gradient
        x, kernel, y = einsum_axes(layer)
        gradients = {"kernel": tf.einsum(f"{x},{y}->{x[0]}{kernel}", inputs, g)}
        if layer.bias is not None:
            gradients["bias"] = bias_gradient(layer, g)
        return gradients

    squares = Rule.squares  # outputs may share a bias, which the matrix form cannot express


def keeps_examples_apart(layer: keras.Layer) -> bool:
    """Whether the equation of an `EinsumDense` has a batch axis, and sums over the input alone."""
    if layer.input_spec is None or layer.input_spec.ndim is None:
        return False
    x, kernel, y = einsum_axes(layer)
    batch, distinct = x[0], all(len(set(s)) == len(s) for s in (x, kernel, y))
    return distinct and y[0] == batch and batch not in kernel and set(kernel) <= set(x + y)


def bias_gradient(layer: keras.Layer, g: tf.Tensor) -> tf.Tensor:
    """The gradients of a bias, which spans the last axes of the output, some of them of size one.

    Args:
        layer: A `Dense` or `EinsumDense` layer.
        g: The gradients at its output.
    """
    shape = layer.bias.shape
    missing = len(g.shape) - 1 - len(shape)
    summed = [1 + i for i in range(missing)]
    summed += [
        1 + missing + i
        for i, size in enumerate(shape)
        if size == 1 and g.shape[1 + missing + i] != 1
    ]
    return tf.reshape(tf.reduce_sum(g, summed), (-1, *shape))


@register_rule(layers.Embedding)
class _EmbeddingRule(Rule):
    variables = ("embeddings",)
    table = "embeddings"

    def squares(
        self, layer: keras.Layer, flows: list[LayerIO], weights: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        ids = tf.concat([ids_of(flow) for flow in flows], 1)
        g = tf.concat([as_rows(flow.gradient) for flow in flows], 1)
        return {"embeddings": squared_lookups(ids, g, weights, layer.input_dim)}

    def row_factors(
        self, layer: keras.Layer, flows: list[LayerIO], weights: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        ids = tf.concat([ids_of(flow) for flow in flows], 1)
        ids, g = summed_lookups(ids, tf.concat([as_rows(flow.gradient) for flow in flows], 1))
        energies = weights[:, None] * tf.reduce_sum(g**2, -1)
        rows = tf.math.unsorted_segment_sum(flat(energies), ids, layer.input_dim)
        half = as_columns(tf.sqrt(weights)[:, None, None] * g)
        return rows, half, half


def as_columns(x: tf.Tensor) -> tf.Tensor:
    """Reshape and transpose `(batch, positions, n)` to `(n, batch · positions)`."""
    return tf.transpose(tf.reshape(x, (-1, x.shape[-1])))


def ids_of(flow: LayerIO) -> tf.Tensor:
    """The rows that a call of an embedding looks up, `(batch, positions)`."""
    return flat(tf.cast(flow.inputs[0], "int32"))


def squared_lookups(ids: tf.Tensor, g: tf.Tensor, weights: tf.Tensor, vocabulary: int) -> tf.Tensor:
    """Σ_b w_b D_b², where row v of D_b is the sum of the gradients at which v was looked up.

    Args:
        ids: `(batch, positions)`, the rows that are looked up.
        g: `(batch, positions, dimensions)`, the gradients.
        weights: `(batch,)`, the weights w_b.
        vocabulary: The number of rows.
    """
    ids, g = summed_lookups(ids, g)
    rows = weights[:, None, None] * g**2
    return tf.math.unsorted_segment_sum(
        tf.reshape(rows, (-1, g.shape[-1])), tf.reshape(ids, (-1,)), vocabulary
    )


def summed_lookups(ids: tf.Tensor, g: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The ids of each example in order, and the sum of the gradients where each begins, else 0."""
    # Sorted by id, all occurrences of an id in an example are next to each other.
    order = tf.argsort(ids, axis=1)
    ids, g = (tf.gather(t, order, batch_dims=1) for t in (ids, g))
    differs = tf.cast(ids[:, 1:] != ids[:, :-1], "int32")
    starts = tf.concat([tf.ones_like(ids[:, :1]), differs], 1)
    run = tf.cumsum(tf.reshape(starts, (-1,))) - 1
    rows = tf.reshape(g, (-1, g.shape[-1]))
    summed = tf.gather(tf.math.unsorted_segment_sum(rows, run, tf.size(ids)), run)
    return ids, tf.reshape(summed, tf.shape(g)) * tf.cast(starts, "float32")[..., None]


@register_rule(layers.BatchNormalization)
class _BatchNormalizationRule(Rule):
    variables = ("gamma", "beta", "moving_mean", "moving_variance")

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        x, g = flow.inputs[0], flow.gradient
        axis = layer.axis % len(x.shape)
        others = [i for i in range(1, len(x.shape)) if i != axis]
        shape = [1] * len(x.shape)
        shape[axis] = x.shape[axis]
        mean, variance = (
            tf.reshape(tf.cast(v.value, "float32"), shape)
            for v in (layer.moving_mean, layer.moving_variance)
        )
        normalized = (x - mean) * tf.math.rsqrt(variance + layer.epsilon)
        return _scale_and_shift_gradients(layer, normalized, g, others)


@register_rule(layers.LayerNormalization)
class _LayerNormalizationRule(Rule):
    variables = ("gamma", "beta")

    def supports(self, layer: keras.Layer) -> bool:
        return not getattr(layer, "rms_scaling", False)

    def gradients(self, layer: keras.Layer, flow: LayerIO) -> dict[str, tf.Tensor]:
        x, g = flow.inputs[0], flow.gradient
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        axes = [axis % len(x.shape) for axis in axes]
        others = [i for i in range(1, len(x.shape)) if i not in axes]
        mean, variance = tf.nn.moments(x, axes, keepdims=True)
        normalized = (x - mean) * tf.math.rsqrt(variance + layer.epsilon)
        return _scale_and_shift_gradients(layer, normalized, g, others)


def _scale_and_shift_gradients(
    layer: keras.Layer, normalized: tf.Tensor, g: tf.Tensor, axes: list[int]
) -> dict[str, tf.Tensor]:
    gradients = {}
    if layer.scale:
        gradients["gamma"] = tf.reduce_sum(normalized * g, axes)
    if layer.center:
        gradients["beta"] = tf.reduce_sum(g, axes)
    return gradients


def _uses_its_bias(layer: keras.Layer) -> bool:
    """Whether the layer adds the bias that it has: not if `use_bias` was set to False since."""
    return layer.use_bias or getattr(layer, "bias", None) is None


def flat(x: tf.Tensor) -> tf.Tensor:
    """Flatten each example: `(batch, …)` becomes `(batch, elements)`."""
    return tf.reshape(x, (tf.shape(x)[0], -1))


def as_rows(x: tf.Tensor) -> tf.Tensor:
    """Reshape `(batch, …, n)` to `(batch, positions, n)`, with static positions where known."""
    between = x.shape[1:-1]
    positions = int(np.prod(between)) if None not in between else -1
    return tf.reshape(x, (tf.shape(x)[0], positions, x.shape[-1]))


def _channels_last(layer: keras.Layer, flow: LayerIO) -> tuple[tf.Tensor, tf.Tensor]:
    x, g = flow.inputs[0], flow.gradient
    if layer.data_format == "channels_first":
        order = [0, *range(2, len(x.shape)), 1]
        x, g = tf.transpose(x, order), tf.transpose(g, order)
    return x, g


def _patches(layer: keras.Layer, x: tf.Tensor, g: tf.Tensor) -> tf.Tensor:
    """The input patch of each output position: `(batch, *positions, kernel places, channels)`."""
    spans = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
    sizes = tf.shape(g)[1:-1]
    padding = [[0, 0]]
    for axis, (span, stride) in enumerate(zip(spans, layer.strides, strict=True)):
        needed = tf.maximum((sizes[axis] - 1) * stride + span - tf.shape(x)[axis + 1], 0)
        before = {"same": needed // 2, "causal": span - 1, "valid": 0}[layer.padding]
        padding.append([before, needed - before if layer.padding == "same" else 0])
    x = tf.pad(x, [*padding, [0, 0]])
    if len(spans) == 2 and max(layer.strides) > 1:  # several times faster than strided slices
        settings = ([1, *t, 1] for t in (layer.kernel_size, layer.strides, layer.dilation_rate))
        patches = tf.image.extract_patches(x, *settings, padding="VALID")
        return tf.reshape(patches, (*tf.unstack(tf.shape(patches)[:-1]), -1, x.shape[-1]))
    places = []
    for offset in np.ndindex(*layer.kernel_size):
        window: list[Any] = [slice(None)]
        for axis, place in enumerate(offset):
            start, stride = place * layer.dilation_rate[axis], layer.strides[axis]
            window.append(slice(start, start + (sizes[axis] - 1) * stride + 1, stride))
        places.append(x[tuple(window)])
    return tf.stack(places, axis=-2)


def _depthwise_gradient(
    layer: keras.Layer, kernel: keras.Variable, x: tf.Tensor, g: tf.Tensor
) -> tf.Tensor:
    """Per-example gradients, `(batch, *places, channels, multiplier)`, in the kernel's shape."""
    channels, multiplier = kernel.shape[-2:]
    places = int(np.prod(kernel.shape[:-2]))
    batch = tf.shape(x)[0]
    patches = tf.reshape(_patches(layer, x, g), (batch, -1, places, channels))
    by_channel = tf.reshape(g, (batch, -1, channels, multiplier))
    return tf.reshape(tf.einsum("bpkc,bpcm->bkcm", patches, by_channel), (-1, *kernel.shape))


def einsum_axes(layer: keras.Layer) -> tuple[str, str, str]:
    """One letter per axis of the input, kernel and output, with the ellipsis expanded."""
    inputs, output = layer.equation.replace(" ", "").split("->")
    x, kernel = inputs.split(",")
    if "..." in x:
        count = layer.input_spec.ndim - len(x.replace("...", ""))
        unused = [c for c in string.ascii_letters if c not in layer.equation][:count]
        x, output = (s.replace("...", "".join(unused)) for s in (x, output))
    return x, kernel, output
