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
from keras_dwd.curvature.sketches import FEW, probe_of, product, product_of_active, products
from keras_dwd.variables import Arrays, Variables

SIDES = ("input", "output")


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
        rows: Indices of those inputs that A is about, and of those outputs that G is about, where
            all others are zero: units that were never active. `None` each if it is about all.

    Reference:
        [Martens & Grosse, 2015](https://arxiv.org/abs/1503.05671), for dense layers;
        [Grosse & Martens, 2016](https://arxiv.org/abs/1602.01407), for convolutions.
    """

    paths: tuple[str, ...]
    form: MatrixForm
    a: Factor
    g: Factor
    rank: int
    rows: tuple[Any, Any] = (None, None)

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues, with those that are kept as their mean."""
        return self.a.trace * self.g.trace

    def leaves(self) -> dict[str, Any]:
        """Its arrays by name."""
        found: dict[str, Any] = {}
        for side, factor, rows in zip(SIDES, (self.a, self.g), self.rows, strict=True):
            found |= {f"{side}_{name}": leaf for name, leaf in factor.leaves().items()}
            if rows is not None:
                found[f"{side}_rows"] = rows
        return found

    def with_leaves(self, leaves: dict[str, Any]) -> "Kronecker":
        """The same with other arrays, or with the variables that hold them.

        Raises:
            ValueError: If they do not fit the layer.
        """
        leaves = dict(leaves)
        inputs, outputs = (leaves.pop(f"{side}_rows", None) for side in SIDES)
        rows = inputs, outputs
        parts = [
            Factor.from_leaves({n.removeprefix(p): v for n, v in leaves.items() if n.startswith(p)})
            for p in (f"{side}_" for side in SIDES)
        ]
        for part, held, size in zip(parts, rows, self._sizes, strict=True):
            if part.size != (size if held is None else held.shape[0]) or part.size > size:
                raise ValueError(
                    f"Factors of {parts[0].size} and {parts[1].size} rows do not fit a matrix of "
                    f"{self._sizes}."
                )
        return replace(self, a=parts[0], g=parts[1], rows=rows)

    @property
    def _sizes(self) -> tuple[int, int]:
        """The numbers of inputs and outputs."""
        return self.form.rows, self.form.shape[1]

    def multiply(self, differences: list[Any]) -> list[Any]:
        """Λ δ in the training step, by variable."""
        x = self.a.product(self._held(self.form.join(*differences)))
        return self.form.split(self._spread(self.g.product(x, from_right=True)))

    def _held(self, matrix: Any) -> Any:
        """The part that the factors are about."""
        for axis, rows in enumerate(self.rows):
            if rows is not None and tf.is_tensor(matrix):
                matrix = tf.gather(matrix, tf.cast(rows, "int32"), axis=axis)
            elif rows is not None:
                matrix = np.take(matrix, np.asarray(rows, int), axis)
        return matrix

    def _spread(self, held: Any) -> Any:
        """The inverse of `_held`, zero everywhere else."""
        height, width = self._sizes
        rows, columns = self.rows
        if columns is not None:  # a scatter is along the first axis
            across = tf.cast(columns, "int32")[:, None], tf.transpose(held)
            held = tf.transpose(tf.scatter_nd(*across, (width, tf.shape(held)[0])))
        if rows is not None:
            held = tf.scatter_nd(tf.cast(rows, "int32")[:, None], held, (height, width))
        return held

    def _over(self, rows: list[np.ndarray | None]) -> "Kronecker":
        """The same about more of the matrix."""
        factors = [
            factor if held is None else factor.among(np.asarray(held, int), more, size)
            for factor, held, more, size in zip(
                (self.a, self.g), self.rows, rows, self._sizes, strict=True
            )
        ]
        return replace(self, a=factors[0], g=factors[1], rows=(rows[0], rows[1]))

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
        held = self.rows[0]
        return replace(self, a=self.a.scaled(rows if held is None else rows[np.asarray(held, int)]))

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
        rows = [
            None if mine is None or its is None else np.union1d(mine, its)
            for mine, its in zip(old.rows, new.rows, strict=True)
        ]
        old, new = old._over(rows), new._over(rows)
        total = before + added
        a = old.a.combine(before / traces[0], new.a, added / traces[2], self.rank)
        g = old.g.combine(
            before / (total * traces[1]), new.g, added / (total * traces[3]), self.rank
        )
        return replace(self, a=a, g=g, rows=(rows[0], rows[1]))._balanced()

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

        The result is a Kronecker product again, of the same eigenvectors: that in which each of
        these has, with all of the other side, the total that it is to have. Of all products it is
        the nearest one in terms of the Kullback-Leibler divergence.
        """
        wanted = strengths * self.spectrum()
        whole = wanted.sum()
        if whole == 0:
            return replace(self, a=self.a.times(0.0))
        factors = []
        for factor, axis in ((self.a, 1), (self.g, 0)):
            values = wanted.sum(axis) / np.sqrt(whole)
            total = factor.values.sum()
            change = values.sum() / total if total > 0 else 1.0
            factors.append(Factor(factor.vectors, values, change * factor.rest))
        return replace(self, a=factors[0], g=factors[1])


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
        rank: The most directions that are kept of each factor, the rest only as their mean: of
            the first task twice as many as hold 99.9% of it, more where later ones need them. Of a
            factor with more than `4 * rank` rows the full matrix is never formed.
        damping: In [0, 1]: the share of G that is the same for all outputs of a layer. The
            gradients of a few classes span few directions; what is learned later turns the others.
        correction: Variables that are no part of a matrix (normalisation, heads per task, layers
            without a rule) have a diagonal; with this above 0, and a correction to it of this rank,
            but for embeddings.
        sparsity: Whether to look for units that are not active: those that are not in a whole
            batch are left out of the estimate, and where at most half of a layer's inputs, or
            outputs, were ever active on a task, only their weights are pulled, with less work and
            memory. For activations such as `KWinners`. Without `jit_compile`, whose shapes are
            fixed: the model is then one that does not support it.

    Reference:
        [Morwani et al., 2024](https://arxiv.org/abs/2406.17748), on A and G as a power iteration;
        [Martens & Grosse, 2015](https://arxiv.org/abs/1503.05671);
        [Ritter et al., 2018](https://arxiv.org/abs/1805.07810), for continual learning.
    """

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

    @property
    def supports_jit(self) -> bool:
        """Whether XLA can compile a step with it."""
        return not self.sparsity

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
        if self._corrects(ruled):
            return self._sketches(ruled, flows, weights)
        if ruled.form is None:
            return super().layer_statistics(ruled, flows, weights)
        # A bias that is no row of the matrix stays diagonal.
        found = super().layer_statistics(ruled, flows, weights) if ruled.beside else {}
        a, g = ruled.all_rows(flows)
        if ruled.form.bias_shape is not None:
            a = tf.concat([a, tf.ones_like(a[..., :1])], 2)
        for side, rows, other in zip(SIDES, (a, g), (g, a), strict=True):
            name, size = f"{side}/{ruled.kernel}", rows.shape[2]
            left, right = products(rows, other, weights, flows[0].first)
            probe = None
            if size > 4 * self.rank:
                found[f"{side}_trace/{ruled.kernel}"] = tf.reduce_sum(left * right)
                probe = tf.constant(probe_of(size, self.rank))
            product_of = product_of_active if self.sparsity else product
            found[name] = product_of(left, right, probe)
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
            (a, inputs), (g, outputs) = (
                self._factor(side, ruled.kernel, statistics) for side in SIDES
            )
            trace = a.trace
            g = g.damped(self.damping).times(1 / trace if trace > 0 else 1.0)
            rows = inputs, outputs
            found[ruled.kernel] = Kronecker(ruled.matrix_paths, ruled.form, a, g, self.rank, rows)
        for name, sketch in statistics.items():
            kind, _, path = name.partition("/")
            if kind == "sketch" and path in found:
                diagonal = found[path].spectrum()
                probe = probe_of(len(sketch), sketch.shape[1]).astype("float64")
                factor = Factor.from_sketch(sketch.astype("float64"), probe, float(diagonal.sum()))
                found[path] = LowRank.around(path, diagonal, factor, self.correction)
        return found

    def _corrects(self, ruled: RuledLayer) -> bool:
        """Whether the layer's variables have a correction of low rank."""
        known = type(ruled.rule).gradients is not Rule.gradients
        return bool(self.correction) and ruled.form is None and known

    def _sketches(self, ruled: RuledLayer, flows: list[Flow], weights: tf.Tensor) -> Statistics:
        """Σ_b w_b g_b g_bᵀ of each variable: its diagonal, and it times a probe."""
        found: Statistics = {}
        parts = [ruled.rule.gradients(ruled.layer, flow) for flow in flows]
        for name, path in ruled.paths.items():
            if name in parts[0]:
                g = tf.add_n([part[name] for part in parts])
                shape = g.shape[1:]
                g = tf.reshape(g, (tf.shape(g)[0], int(np.prod(shape))))
                squares = tf.linalg.matvec(g**2, weights, transpose_a=True)
                found[f"fisher/{path}"] = tf.reshape(squares, shape)
                probe = probe_of(g.shape[1], min(g.shape[1], self.correction))
                along = weights[:, None] * tf.matmul(g, probe)
                found[f"sketch/{path}"] = tf.matmul(g, along, transpose_a=True)
        return found

    def _active(self, statistic: np.ndarray) -> np.ndarray | None:
        """The rows of a factor that are not zero, where these are few and it is asked for."""
        rows = np.flatnonzero(statistic.any(1))
        few = 0 < len(rows) <= FEW * len(statistic)
        return rows if self.sparsity and few else None

    def _factor(
        self, side: str, kernel: str, statistics: Arrays
    ) -> tuple[Factor, np.ndarray | None]:
        """A or G, and which of its rows it is about."""
        matrix = np.asarray(statistics[f"{side}/{kernel}"], "float64")
        trace = statistics.get(f"{side}_trace/{kernel}")
        rows = self._active(matrix)
        held = slice(None) if rows is None else rows
        if trace is None:
            return Factor.from_matrix(matrix[held][:, held], self.rank), rows
        probe = probe_of(len(matrix), self.rank).astype("float64")
        return Factor.from_sketch(matrix[held], probe[held], float(trace)), rows

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
