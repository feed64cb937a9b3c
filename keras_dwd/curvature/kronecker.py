"""Estimates of the Fisher information with Kronecker factors."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import integer, number
from keras_dwd.curvature.fisher import Estimator, Fisher, Statistics
from keras_dwd.curvature.rules import LayerIO, Rule, RuledLayer, ruled_layers
from keras_dwd.curvature.sketches import FEW, probe_of, product, product_of_active, products
from keras_dwd.learner import Learner
from keras_dwd.precision.block import Block
from keras_dwd.precision.factor import Factor
from keras_dwd.precision.kronecker import SIDES, Kronecker
from keras_dwd.precision.low_rank import LowRank
from keras_dwd.variables import Arrays, Variables


@keras.saving.register_keras_serializable("keras_dwd")
class KroneckerFisher(Fisher):
    """Estimates the Fisher information, with Kronecker factors for layers that have a matrix.

    For dense layers, convolutions, projections (`EinsumDense`) and recurrent layers the Fisher
    information of the weights is approximated by A ⊗ G, which, unlike a diagonal, describes which
    *directions* of the weights matter. Let D be the per-example gradient as a matrix of fan_in ×
    fan_out, with the bias as its last row. Then A = E[D Dᵀ] and G = E[Dᵀ D] / tr A. For a dense
    layer D = a gᵀ, where a is its input and g the loss gradient at its output. This is one
    power-iteration step towards the nearest Kronecker product and preserves the trace. It needs no
    assumption on how gradients at different positions of a convolution correlate, and does not form
    D where there are few positions. All other variables get a diagonal from the same estimator.

    Args:
        estimator: `"influence"`, `"empirical"`, `"mc"` or `"negated"`, as in `DiagonalFisher`.
            `"influence"` gives nearly the same scale for all tasks and data sets.
        gamma: γ in [0, 1) of the online estimate. `None` switches the online estimate off;
            `consolidate` then needs data.
        every: The online estimate is updated at every n-th training step.
        rank: The largest number of directions stored per factor; the others are stored as their
            mean. The first task stores twice the directions that hold 99.9% of the trace, later
            tasks more if they need more. The full matrix of a factor with more than `4 * rank` rows
            is never formed.
        damping: In [0, 1], the weight of the identity when G is averaged with a multiple of the
            identity of the same trace. The gradients of a few classes span few directions of the
            outputs; without damping, later tasks would change the other directions freely. In
            layers over time (recurrent layers, attention, `Dense` on sequences) A is damped too,
            with twice this weight: a few directions of the inputs, summed over time, decide about a
            task, but later tasks move the embeddings of its tokens out of these.
        correction: Rank of a low-rank correction to the diagonal of variables outside a matrix
            (normalization, heads per task, layers without a rule), except embeddings. 0 for none.
        sparsity: Whether to make use of inactive units, for activations such as `KWinners`. Units
            that are inactive in a whole batch are left out of the estimate. Where at most half of a
            layer's inputs (or outputs) were ever active on a task, only their weights are pulled,
            which takes less time and memory. The model then does not support `jit_compile`, which
            needs fixed shapes.

    Example:

    ```python
    model = DWDModel.from_model(network, fisher=KroneckerFisher(rank=64, every=5))
    ```

    Reference:
        [Morwani et al., 2024](https://arxiv.org/abs/2406.17748), on A and G as a power iteration;
        [Martens & Grosse, 2015](https://arxiv.org/abs/1503.05671);
        [Ritter et al., 2018](https://arxiv.org/abs/1805.07810), for continual learning.
    """

    def __init__(
        self,
        estimator: Estimator | str = "influence",
        gamma: float | None = 0.95,
        every: int = 20,
        rank: int = Fisher.rank,
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
        """Whether XLA can compile a training step that updates this estimate."""
        return not self.sparsity

    def _shapes(self, model: Learner, variables: Variables) -> dict[str, tuple[int, ...]]:
        """The shape of each statistic, by `NAME/PATH`."""
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
        self, ruled: RuledLayer, flows: list[LayerIO], weights: tf.Tensor
    ) -> Statistics:
        """The factors of one layer, or its squared gradients if it has no factors; graph code."""
        if self._corrects(ruled):
            return self._sketches(ruled, flows, weights)
        if ruled.form is None:
            return super().layer_statistics(ruled, flows, weights)
        # A bias that is not a row of the matrix has a diagonal.
        statistics = super().layer_statistics(ruled, flows, weights) if ruled.beside else {}
        a, g = ruled.all_rows(flows)
        if ruled.form.bias_shape is not None:
            a = tf.concat([a, tf.ones_like(a[..., :1])], 2)
        for side, rows, other in zip(SIDES, (a, g), (g, a), strict=True):
            name, size = f"{side}/{ruled.kernel}", rows.shape[2]
            left, right = products(rows, other, weights, flows[0].first)
            probe = None
            if size > 4 * self.rank:
                statistics[f"{side}_trace/{ruled.kernel}"] = tf.reduce_sum(left * right)
                probe = tf.constant(probe_of(size, self.rank))
            product_of = product_of_active if self.sparsity else product
            statistics[name] = product_of(left, right, probe)
        return statistics

    def _blocks(self, model: Learner, variables: Variables, statistics: Arrays) -> dict[str, Block]:
        """Diagonal and Kronecker-factored blocks."""
        blocks = super()._blocks(model, variables, statistics)
        for ruled in ruled_layers(model):
            if ruled.form is None or f"input/{ruled.kernel}" not in statistics:
                continue
            if not ruled.trains(variables):  # frozen since the estimate
                continue
            (a, inputs), (g, outputs) = (
                self._factor(side, ruled.kernel, statistics) for side in SIDES
            )
            if ruled.rule.over_time(ruled.layer):
                a = a.damped(min(2 * self.damping, 1.0))
            trace = a.trace
            g = g.damped(self.damping).times(1 / trace if trace > 0 else 1.0)
            rows = inputs, outputs
            blocks[ruled.kernel] = Kronecker(ruled.matrix_paths, ruled.form, a, g, self.rank, rows)
        for name, sketch in statistics.items():
            kind, _, path = name.partition("/")
            if kind == "sketch" and path in blocks:
                diagonal = blocks[path].importances()
                probe = probe_of(len(sketch), sketch.shape[1]).astype("float64")
                factor = Factor.from_sketch(sketch.astype("float64"), probe, float(diagonal.sum()))
                blocks[path] = LowRank.around(path, diagonal, factor, self.correction)
        return blocks

    def _corrects(self, ruled: RuledLayer) -> bool:
        """Whether the variables of the layer get a low-rank correction."""
        known = type(ruled.rule).gradients is not Rule.gradients
        return bool(self.correction) and ruled.form is None and known

    def _sketches(self, ruled: RuledLayer, flows: list[LayerIO], weights: tf.Tensor) -> Statistics:
        """The diagonal of Σ_b w_b g_b g_bᵀ and its product with a probe, for each variable."""
        statistics: Statistics = {}
        parts = [ruled.rule.gradients(ruled.layer, flow) for flow in flows]
        for name, path in ruled.paths.items():
            if name in parts[0]:
                g = tf.add_n([part[name] for part in parts])
                shape = g.shape[1:]
                g = tf.reshape(g, (tf.shape(g)[0], int(np.prod(shape))))
                squares = tf.linalg.matvec(g**2, weights, transpose_a=True)
                statistics[f"fisher/{path}"] = tf.reshape(squares, shape)
                probe = probe_of(g.shape[1], min(g.shape[1], self.correction))
                along = weights[:, None] * tf.matmul(g, probe)
                statistics[f"sketch/{path}"] = tf.matmul(g, along, transpose_a=True)
        return statistics

    def _active(self, statistic: np.ndarray) -> np.ndarray | None:
        """The nonzero rows of a factor if they are few and `sparsity` is set, else `None`."""
        rows = np.flatnonzero(statistic.any(1))
        few = 0 < len(rows) <= FEW * len(statistic)
        return rows if self.sparsity and few else None

    def _factor(
        self, side: str, kernel: str, statistics: Arrays
    ) -> tuple[Factor, np.ndarray | None]:
        """The factor A or G, and the indices of the rows that it covers; `None` for all."""
        matrix = np.asarray(statistics[f"{side}/{kernel}"], "float64")
        trace = statistics.get(f"{side}_trace/{kernel}")
        rows = self._active(matrix)
        selected = slice(None) if rows is None else rows
        if trace is None:
            return Factor.from_matrix(matrix[selected][:, selected], self.rank), rows
        probe = probe_of(len(matrix), self.rank).astype("float64")
        return Factor.from_sketch(matrix[selected], probe[selected], float(trace)), rows

    def _columns(self, size: int) -> int:
        """The number of columns of a statistic: that of the full matrix, or of a sketch of it."""
        return size if size <= 4 * self.rank else self.rank

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {
            "rank": self.rank,
            "damping": self.damping,
            "correction": self.correction,
            "sparsity": self.sparsity,
        }
