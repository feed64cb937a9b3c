"""The Fisher statistics of a batch, by one graph for training steps and the boundary pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_dwd.communicator import Communicator
from keras_dwd.curvature.examples import carried_states, map_arrays, restored_after
from keras_dwd.curvature.fisher import Fisher, Statistics
from keras_dwd.keras_private import loss_metric
from keras_dwd.learner import Learner
from keras_dwd.training.gradients import loss_scale
from keras_dwd.variables import Variables


@dataclass
class _Graph:
    """A traced graph, and what it was traced for.

    Attributes:
        key: Tells whether it can be used again.
        objects: The objects whose ids are in the key; a reference keeps the ids from being reused.
        all_sizes: Whether it is traced for batches of all sizes.
        function: The `tf.function`.
    """

    key: list[Any]
    objects: list[Any]
    all_sizes: bool
    function: Any


class BatchStatistics:
    """Computes the statistics of batches with one graph.

    Tracing it takes longer than tracing the rest of a training step. The training step calls it,
    and so does the pass at a boundary with all its batches, the smaller last one included. It lasts
    as long as the traced training step, which does not see what is assigned to layers either.
    """

    def __init__(self) -> None:
        self._graphs: dict[bool, _Graph] = {}

    def forget(self) -> None:
        """Trace anew at the next call."""
        self._graphs.clear()

    def __call__(
        self,
        model: Learner,
        fisher: Fisher,
        variables: Variables,
        batch: Any,
        communicator: Communicator,
    ) -> Statistics:
        """The statistics of one batch, computed without changing the model's metrics.

        Args:
            model: A compiled model.
            fisher: The estimate that computes the statistics.
            variables: The variables to differentiate with respect to, by path.
            batch: `(x, y, sample_weight)`, tensors.
            communicator: The workers whose batches, all of the same size, form one global batch.
        """

        def compute(batch: Any) -> Statistics:
            with restored_after([v for metric in model.metrics for v in metric.variables]):
                return fisher.batch_statistics(
                    model, variables, batch, loss_scale(model), communicator
                )

        if model.run_eagerly or tf.config.functions_run_eagerly():
            return compute(batch)
        # `compile` creates a new loss, for which the graph must be traced again.
        objects = [fisher, loss_metric(model), communicator, *variables.values(), *model.metrics]
        key = [*variables, *map(id, objects)]
        several = communicator.size > 1
        if several not in self._graphs or self._graphs[several].key != key:
            fixed = any(i.shape[0] is not None for i in model.inputs or ())
            all_sizes = not fixed and not carried_states(model)
            self._graphs[several] = _Graph(key, objects, all_sizes, _function(compute))
        graph = self._graphs[several]
        traced_for = map_arrays(_of_any_size, batch) if graph.all_sizes else batch
        try:
            traced = graph.function.get_concrete_function(traced_for)
        except Exception:
            graph.function = _function(compute)  # TensorFlow cannot use the other one any more
            if not graph.all_sizes:
                raise
            graph.all_sizes = False  # a model that must know the size, or the error comes again
            return self(model, fisher, variables, batch, communicator)
        if any(map(tf.is_symbolic_tensor, traced.captured_inputs)):
            # The graph captured tensors of the step being traced, so it cannot be reused.
            return compute(batch)
        return graph.function(batch)


def _function(compute: Callable[[Any], Statistics]) -> Any:
    return tf.function(compute, reduce_retracing=True, autograph=False)  # as in `fit`


def _of_any_size(leaf: Any) -> Any:
    if not isinstance(leaf, tf.Tensor) or not leaf.shape.rank:
        return tf.type_spec_from_value(leaf)
    return tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype)
