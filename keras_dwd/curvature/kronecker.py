"""The Kronecker-factored precision: how much the directions of a layer's matrix matter, jointly."""

from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import integer, number
from keras_dwd.curvature.factor import Factor
from keras_dwd.curvature.fisher import Block, Estimator, Fisher, Statistics
from keras_dwd.curvature.low_rank import LowRank
from keras_dwd.curvature.rules import Flow, MatrixForm, Rule, RuledLayer, ruled_layers
from keras_dwd.variables import Arrays, Variables


@dataclass(frozen=True)
class Kronecker:
    """A ⊗ G over the weights of a layer: A about its inputs, G about its outputs.

    With the weights as a matrix W (fan_in × fan_out, a bias as its last row), Λ δ is A δ G.

    Attributes:
        paths: Of the kernel and, where the matrix has it, the bias.
        form: How the variables are a matrix.
        a: A, of fan_in × fan_in.
        g: G, of fan_out × fan_out.
        rank: The most directions that a factor keeps when tasks are merged.
        rows: Indices of those rows of the matrix that A is about, where all others are zero: inputs
            that were never active. `None` if it is about all.

    Reference:
        [Martens & Grosse, 2015](https://arxiv.org/abs/1503.05671), for dense layers;
        [Grosse & Martens, 2016](https://arxiv.org/abs/1602.01407), for convolutions.
    """

    paths: tuple[str, ...]
    form: MatrixForm
    a: Factor
    g: Factor
    rank: int
    rows: Any = None

    def leaves(self) -> dict[str, Any]:
        """Its arrays by name."""
        a = {f"input_{name}": leaf for name, leaf in self.a.leaves().items()}
        rows = {} if self.rows is None else {"input_rows": self.rows}
        return a | rows | {f"output_{name}": leaf for name, leaf in self.g.leaves().items()}

    def with_leaves(self, leaves: dict[str, Any]) -> "Kronecker":
        """The same with other arrays, or with the variables that hold them.

        Raises:
            ValueError: If they do not fit the layer.
        """
        leaves = dict(leaves)
        rows = leaves.pop("input_rows", None)
        parts = [
            Factor.from_leaves({n.removeprefix(p): v for n, v in leaves.items() if n.startswith(p)})
            for p in ("input_", "output_")
        ]
        sizes = (parts[0].size, parts[1].size)
        height = self.form.rows if rows is None else rows.shape[0]
        if sizes != (height, self.form.shape[1]) or height > self.form.rows:
            raise ValueError(
                f"Factors of {sizes} rows do not fit a matrix of {height} x {self.form.shape[1]}."
            )
        return replace(self, a=parts[0], g=parts[1], rows=rows)

    def multiply(self, differences: list[Any]) -> list[Any]:
        """Λ δ in the training step, by variable."""
        x = self.a.product(self._held(self.form.join(*differences)))
        return self.form.split(self._spread(self.g.product(x, from_right=True)))

    def _held(self, matrix: Any) -> Any:
        """The rows that A is about."""
        if self.rows is None:
            return matrix
        if tf.is_tensor(matrix):
            return tf.gather(matrix, tf.cast(self.rows, "int32"))
        return matrix[np.asarray(self.rows, int)]

    def _spread(self, held: Any) -> Any:
        """The inverse of `_held`, zero in all other rows."""
        if self.rows is None:
            return held
        shape = (self.form.rows, self.form.shape[1])
        return tf.scatter_nd(tf.cast(self.rows, "int32")[:, None], held, shape)

    def _over(self, rows: np.ndarray | None) -> "Kronecker":
        """The same about more rows, the rest of the same trace over them."""
        if self.rows is None or (rows is not None and len(rows) == len(self.rows)):
            return self
        height = self.form.rows if rows is None else len(rows)
        held = np.asarray(self.rows, int)
        at = held if rows is None else np.searchsorted(rows, held)
        directions = self.a.vectors.shape[1]
        vectors = np.zeros((height, directions))
        vectors[at] = self.a.vectors
        rest = self.a.rest * (len(held) - directions) / max(height - directions, 1)
        return replace(self, a=replace(self.a, vectors=vectors, rest=rest), rows=rows)

    def shrink(self, differences: list[Any], stiffness: list[Any]) -> list[Any]:
        """(d + Λ)⁻¹ Λ δ in the training step, by variable, with d the mean stiffness."""
        sizes = [tf.cast(tf.size(s), "float32") for s in stiffness]
        d = tf.add_n([tf.reduce_sum(s) for s in stiffness]) / tf.add_n(sizes)

        def function(eigenvalues: Any) -> Any:
            return eigenvalues / (d + eigenvalues)

        u, v = (tf.convert_to_tensor(factor.vectors) for factor in (self.a, self.g))
        s, t = (tf.convert_to_tensor(factor.values) for factor in (self.a, self.g))
        p, q = (tf.convert_to_tensor(factor.rest) for factor in (self.a, self.g))
        # Four parts of the space: within and outside of U, within and outside of V.
        both, rows = function(s[:, None] * t), function(s * q)[:, None]
        columns, neither = function(p * t), function(p * q)
        x = self._held(self.form.join(*differences))
        left, right = tf.matmul(u, x, transpose_a=True), tf.matmul(x, v)
        middle = (both - rows - columns + neither) * tf.matmul(left, v)
        y = neither * x
        y += tf.matmul((columns - neither) * right, v, transpose_b=True)
        inside = (rows - neither) * left + tf.matmul(middle, v, transpose_b=True)
        return self.form.split(self._spread(y + tf.matmul(u, inside)))

    def weighted(self, strengths: dict[str, float]) -> "Kronecker":
        """Times the strength of each of its variables."""
        rows = np.full(self.form.rows, np.sqrt(strengths[self.paths[0]]))
        if len(self.paths) == 2:
            rows[-1] = np.sqrt(strengths[self.paths[1]])
        return replace(self, a=self.a.scaled(self._held(rows)))

    def merged(self, new: "Kronecker", decay: float) -> "Kronecker":
        """One Kronecker product for decay · this + new.

        Each factor is the mean of both, weighted by their traces, so that the trace of the sum
        stays. The nearest product in the Frobenius norm would drop directions of whichever task
        has the smaller Fisher information; this one keeps those of every task.
        """
        leaves = self.leaves().items()
        old = self.with_leaves({name: np.asarray(leaf, "float64") for name, leaf in leaves})
        traces = [f.trace for f in (old.a, old.g, new.a, new.g)]
        before, added = decay * traces[0] * traces[1], traces[2] * traces[3]
        if before == 0:
            return new
        if added == 0:
            return replace(old, a=old.a.times(decay))
        either = old.rows is None or new.rows is None
        rows = None if either else np.union1d(old.rows, new.rows)
        old, new = old._over(rows), new._over(rows)
        total = before + added
        a = old.a.combine(before / traces[0], new.a, added / traces[2], self.rank)
        g = old.g.combine(
            before / (total * traces[1]), new.g, added / (total * traces[3]), self.rank
        )
        return replace(self, a=a, g=g, rows=rows)._balanced()

    def _balanced(self) -> "Kronecker":
        """The same product with factors of equal trace, far from the ends of float32."""
        ratio = float(np.sqrt(self.g.trace / self.a.trace))
        return replace(self, a=self.a.times(ratio), g=self.g.times(1 / ratio))

    def spectrum(self) -> np.ndarray:
        """The eigenvalues, of `(eigenvectors of A, eigenvectors of G)`."""
        return np.multiply.outer(self.a.values, self.g.values)

    def coordinates(self, values: Arrays) -> np.ndarray:
        """The parameters along the eigenvectors."""
        matrix = self._held(self.form.join(*(values[path] for path in self.paths)))
        return self.a.vectors.T @ matrix @ self.g.vectors

    def scaled(self, strengths: np.ndarray) -> "Kronecker":
        """With each eigenvalue multiplied by the strength of its group.

        The result is the nearest one that is a Kronecker product again, with the same eigenvectors.
        """
        u, s, v = np.linalg.svd(strengths * self.spectrum(), full_matrices=False)
        root = np.sqrt(s[0])
        factors = []
        for factor, values in ((self.a, root * np.abs(u[:, 0])), (self.g, root * np.abs(v[0]))):
            total = factor.values.sum()
            change = values.sum() / total if total > 0 else 1.0
            factors.append(Factor(factor.vectors, values, change * factor.rest))
        return replace(self, a=factors[0], g=factors[1])


# Of each example's gradient as a matrix D, at most this many directions of a side are looked along.
_LOOKS = 8


def _products(
    rows: tf.Tensor, other: tf.Tensor, weights: tf.Tensor, first: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Two matrices L and R with L Rᵀ = Σ_b w_b D_b D_bᵀ, for D_b = rows_bᵀ other_b.

    With many positions and many columns in D an unbiased estimate of it: each example's D is seen
    along a few directions of its columns only, other ones for its neighbours in the batch.

    Args:
        rows: `(batch, positions, n)`.
        other: `(batch, positions, m)`.
        weights: `(batch,)`.
        first: How many examples came before these.
    """
    n, m, positions = rows.shape[2], other.shape[2], rows.shape[1]
    if positions is None or positions > _LOOKS:
        if m > 2 * _LOOKS:
            other = _look(other, first)
        if positions is None or positions > other.shape[2]:  # D is smaller than its parts
            d = tf.matmul(rows * tf.sqrt(weights)[:, None, None], other, transpose_a=True)
            d = tf.reshape(tf.transpose(d, (1, 0, 2)), (n, -1))
            return d, d
    overlaps = tf.matmul(other * weights[:, None, None], other, transpose_b=True)
    left, right = tf.matmul(overlaps, rows), rows
    return tuple(tf.transpose(tf.reshape(x, (-1, n))) for x in (left, right))


def _product(left: tf.Tensor, right: tf.Tensor, probe: tf.Tensor | None) -> tf.Tensor:
    """L Rᵀ, `(n, n)`, or what a probe of `(n, r)` makes of it, `(n, r)`."""
    if probe is not None:
        right = tf.matmul(probe, right, transpose_a=True)
    return tf.matmul(left, right, transpose_b=True)


def _product_of_active(left: tf.Tensor, right: tf.Tensor, probe: tf.Tensor | None) -> tf.Tensor:
    """The same, of those rows only in which one of the two is not zero, where these are few."""
    n = left.shape[0]
    rows = tf.where(tf.reduce_any((left != 0) | (right != 0), 1))

    def of_few() -> tf.Tensor:
        parts = [None if x is None else tf.gather(x, rows[:, 0]) for x in (left, right, probe)]
        small = _product(*parts)
        if probe is None:  # columns first, then rows: a scatter along one axis each
            tall = tf.scatter_nd(rows, tf.transpose(small), (n, tf.shape(rows)[0]))
            small = tf.transpose(tall)
        return tf.scatter_nd(rows, small, (n, n if probe is None else probe.shape[1]))

    few = tf.shape(rows)[0] <= int(KroneckerFisher.FEW * n)
    return tf.cond(few, of_few, lambda: _product(left, right, probe))


def _probe(size: int, columns: int) -> np.ndarray:
    """What a large matrix is multiplied with, instead of being formed: the same each time."""
    normal = np.random.default_rng(size).normal(size=(size, columns))
    return np.linalg.qr(normal)[0].astype("float32")


def _look(x: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
    """Each example's columns, `(batch, positions, m)`, along `_LOOKS` directions of its group."""
    m = x.shape[2]
    group = (tf.range(tf.shape(x)[0]) + first) % _groups(m)
    return tf.matmul(x, _signs(m, group)[:, :, None] * tf.one_hot(tf.range(m) % _LOOKS, _LOOKS))


def _signs(m: int, group: tf.Tensor) -> tf.Tensor:
    """`(groups, m)`: the signs with which columns c, c + 8, … add up to a group's direction c.

    Those of a Hadamard matrix, with the columns' own at random: over all groups the directions
    are orthogonal, so that all are looked along alike, and none has to be kept in memory.
    """
    overlap = tf.bitwise.bitwise_and(group[:, None], tf.range(m)[None] // _LOOKS)
    odd = tf.cast(tf.raw_ops.PopulationCount(x=overlap) % 2, "float32")
    return (1 - 2 * odd) * np.random.default_rng(m).choice((-1.0, 1.0), m).astype("float32")


def _groups(m: int) -> int:
    return 1 << (-(-m // _LOOKS) - 1).bit_length()


@keras.saving.register_keras_serializable("keras_dwd")
class KroneckerFisher(Fisher):
    """Estimates the Fisher information with Kronecker factors for all layers that are a matrix.

    For dense layers, convolutions and projections (`EinsumDense`) the Fisher information of the
    weights is taken as A ⊗ G. It knows which *directions* of the weights matter, which a diagonal
    cannot. With D the gradient of one example as a matrix of fan_in × fan_out, the bias as its
    last row, A = E[D Dᵀ] and G = E[Dᵀ D] / tr A. For a dense layer, D is a gᵀ of its input and the
    gradient at its output. That is one step towards the nearest Kronecker product, with the exact
    trace; it needs no assumption on how gradients at different positions of a convolution
    correlate, and no D is formed where there are few positions. All other variables have the
    diagonal, by the same estimator.

    Args:
        estimator: `"influence"`, `"exact"`, `"sampled"` or `"negated"`, as of `DiagonalFisher`. The
            first makes the scale nearly the same for all tasks and data sets.
        gamma: γ in [0, 1) of the online estimate; `None` switches it off, `consolidate` then needs
            data.
        every: The online estimate is updated at every n-th training step.
        rank: The most directions that are kept of each factor, the rest only as their mean. Of a
            factor with more than `4 * rank` rows the full matrix is never formed.
        damping: In [0, 1]: the share of G that is the same for all outputs of a layer. The
            gradients of a few classes span few directions; what is learned later turns the others.
        correction: Variables that are no part of a matrix (normalisation, heads per task, layers
            without a rule) have a diagonal; with this above 0, and a correction to it of this rank.
        sparsity: Whether to look for inputs of a layer that are zero: those that are in a whole
            batch are left out of the estimate, and where at most half of a layer's inputs were
            ever active on a task, only their weights are pulled, with less work and memory. For
            activations such as `KWinners`; not with `jit_compile`, whose shapes are fixed.

    Reference:
        [Morwani et al., 2024](https://arxiv.org/abs/2406.17748), on A and G as a power iteration;
        [Martens & Grosse, 2015](https://arxiv.org/abs/1503.05671);
        [Ritter et al., 2018](https://arxiv.org/abs/1805.07810), for continual learning.
    """

    # The share of active inputs up to which it pays to leave the others out.
    FEW = 0.5

    def __init__(
        self,
        estimator: Estimator = "influence",
        gamma: float | None = 0.95,
        every: int = 20,
        rank: int = 256,
        damping: float = 0.3,
        correction: int = 0,
        sparsity: bool = False,
    ):
        if estimator in ("batch", "adam"):
            raise ValueError(
                f"`estimator` must be one of single examples: {estimator!r} has no Kronecker "
                "factors."
            )
        super().__init__(estimator, gamma, every)
        self.rank = integer("rank", rank, 1)
        self.damping = number("damping", damping, 0, 1)
        self.correction = integer("correction", correction, 0)
        self.sparsity = bool(sparsity)

    def _shapes(self, model: keras.Model, variables: Variables) -> dict[str, tuple[int, ...]]:
        """The shape of each statistic, by `kind/PATH`."""
        shapes = super()._shapes(model, variables)
        for ruled in ruled_layers(model):
            if ruled.form is not None and ruled.trains(variables):
                for path in ruled.matrix_paths:
                    shapes.pop(f"fisher/{path}", None)
                for side, size in (("input", ruled.form.rows), ("output", ruled.form.shape[1])):
                    if size > 4 * self.rank:
                        shapes[f"{side}_trace/{ruled.kernel}"] = ()
                    shapes[f"{side}/{ruled.kernel}"] = (size, min(size, self._columns(size)))
            elif self._corrects(ruled):
                for path in set(ruled.paths.values()) & set(variables):
                    size = int(np.prod(variables[path].shape))
                    shapes[f"sketch/{path}"] = (size, min(size, self.correction))
        return shapes

    def layer_statistics(
        self, ruled: RuledLayer, flows: list[Flow], weights: tf.Tensor
    ) -> Statistics:
        """The factors of one layer, or its squares where it has none; graph code."""
        if ruled.form is None:
            found = super().layer_statistics(ruled, flows, weights)
            return found | (self._sketches(ruled, flows, weights) if self._corrects(ruled) else {})
        # A bias that is no row of the matrix stays diagonal.
        found = super().layer_statistics(ruled, flows, weights) if ruled.beside else {}
        a, g = ruled.all_rows(flows)
        if ruled.form.bias_shape is not None:
            a = tf.concat([a, tf.ones_like(a[..., :1])], 2)
        for side, rows, other in (("input", a, g), ("output", g, a)):
            name, size = f"{side}/{ruled.kernel}", rows.shape[2]
            left, right = _products(rows, other, weights, flows[0].first)
            probe = None
            if size > 4 * self.rank:
                found[f"{side}_trace/{ruled.kernel}"] = tf.reduce_sum(left * right)
                probe = tf.constant(_probe(size, self.rank))
            product = _product_of_active if self.sparsity else _product
            found[name] = product(left, right, probe)
        return found

    def _blocks(
        self, model: keras.Model, variables: Variables, statistics: Arrays
    ) -> dict[str, Block]:
        """Diagonal and Kronecker-factored blocks."""
        found = super()._blocks(model, variables, statistics)
        for ruled in ruled_layers(model):
            if ruled.form is None or f"input/{ruled.kernel}" not in statistics:
                continue
            if not ruled.trains(variables):  # frozen since
                continue
            rows = self._active(np.asarray(statistics[f"input/{ruled.kernel}"]))
            a = self._factor("input", ruled.kernel, statistics, rows)
            g = self._factor("output", ruled.kernel, statistics)
            trace = a.trace
            g = g.damped(self.damping).times(1 / trace if trace > 0 else 1.0)
            form = ruled.form
            found[ruled.kernel] = Kronecker(ruled.matrix_paths, form, a, g, self.rank, rows)
        for name, sketch in statistics.items():
            kind, _, path = name.partition("/")
            if kind == "sketch" and path in found and np.any(sketch):
                diagonal = found[path].spectrum()
                probe = _probe(len(sketch), sketch.shape[1]).astype("float64")
                factor = Factor.from_sketch(sketch.astype("float64"), probe, float(diagonal.sum()))
                found[path] = LowRank.around(path, diagonal, factor, self.correction)
        return found

    def _corrects(self, ruled: RuledLayer) -> bool:
        """Whether the layer's variables have a correction of low rank."""
        known = type(ruled.rule).gradients is not Rule.gradients
        return bool(self.correction) and ruled.form is None and known

    def _sketches(self, ruled: RuledLayer, flows: list[Flow], weights: tf.Tensor) -> Statistics:
        """Σ_b w_b g_b g_bᵀ of each variable, times a probe."""
        found: Statistics = {}
        parts = [ruled.rule.gradients(ruled.layer, flow) for flow in flows]
        for name, path in ruled.paths.items():
            if name in parts[0]:
                g = tf.add_n([part[name] for part in parts])
                g = tf.reshape(g, (tf.shape(g)[0], int(np.prod(g.shape[1:]))))
                probe = _probe(g.shape[1], min(g.shape[1], self.correction))
                along = weights[:, None] * tf.matmul(g, probe)
                found[f"sketch/{path}"] = tf.matmul(g, along, transpose_a=True)
        return found

    def _active(self, statistic: np.ndarray) -> np.ndarray | None:
        """The rows of A that are not zero, where these are few and it is asked for."""
        rows = np.flatnonzero(statistic.any(1))
        few = 0 < len(rows) <= self.FEW * len(statistic)
        return rows if self.sparsity and few else None

    def _factor(
        self, side: str, kernel: str, statistics: Arrays, rows: np.ndarray | None = None
    ) -> Factor:
        matrix = np.asarray(statistics[f"{side}/{kernel}"], "float64")
        trace = statistics.get(f"{side}_trace/{kernel}")
        held = slice(None) if rows is None else rows
        if trace is None:
            return Factor.from_matrix(matrix[held][:, held], self.rank)
        probe = _probe(len(matrix), self.rank).astype("float64")
        return Factor.from_sketch(matrix[held], probe[held], float(trace))

    def _columns(self, size: int) -> int:
        return size if size <= 4 * self.rank else self.rank

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {
            "rank": self.rank,
            "damping": self.damping,
            "correction": self.correction,
            "sparsity": self.sparsity,
        }
