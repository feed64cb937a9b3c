"""The Fisher statistics of a batch, by one graph for all training steps and boundary passes."""

from typing import Any

import tensorflow as tf

from keras_dwd.communicator import Communicator
from keras_dwd.curvature.examples import carried_states, kept, map_leaves
from keras_dwd.curvature.fisher import Fisher, Statistics
from keras_dwd.keras_private import loss_metric
from keras_dwd.learner import Learner
from keras_dwd.training.gradients import loss_scale
from keras_dwd.variables import Variables


class BatchStatistics:
    """Computes the statistics of batches with a graph that is reused from task to task.

    Tracing it takes longer than tracing the rest of a training step. The training step, which is
    traced again after a boundary, calls the graph that there is, and so does the pass at a boundary
    with all its batches, the smaller last one included.
    """

    def __init__(self) -> None:
        self._graphs: dict[bool, tuple[Any, Any, Any]] = {}

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
            with kept([v for metric in model.metrics for v in metric.variables]):
                return fisher.batch_statistics(
                    model, variables, batch, loss_scale(model), communicator
                )

        if model.run_eagerly:
            return compute(batch)
        # `compile` creates a new loss, for which the graph must be traced again.
        objects = [fisher, loss_metric(model), communicator, *variables.values(), *model.metrics]
        key = [*variables, *map(id, objects)]
        several = communicator.size > 1
        known = self._graphs.get(several)
        if known is None or known[0] != key:
            graph = tf.function(compute, reduce_retracing=True, autograph=False)  # as in `fit`
            # The objects are kept, so that no others get their ids.
            known = self._graphs[several] = key, objects, graph
        *_, graph = known
        if any(map(tf.is_symbolic_tensor, _traced(graph, model, batch).captured_inputs)):
            return compute(batch)  # of the calling step, which another one cannot access
        return graph(batch)


def _traced(graph: Any, model: Learner, batch: Any) -> Any:
    """The concrete function for a batch: for any batch size, if the model can be traced so."""
    fixed = any(i.shape[0] is not None for i in model.inputs or ()) or carried_states(model)
    if not fixed:
        try:
            return graph.get_concrete_function(map_leaves(_of_any_size, batch))
        except Exception:  # which is raised again below, unless it was for want of the size
            pass
    return graph.get_concrete_function(batch)


def _of_any_size(leaf: Any) -> Any:
    if not isinstance(leaf, tf.Tensor) or not leaf.shape.rank:
        return tf.type_spec_from_value(leaf)
    return tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype)
