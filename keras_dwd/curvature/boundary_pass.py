"""The Fisher information of a task, from one pass over its data at the boundary."""

from typing import Any

import numpy as np
import tensorflow as tf

from keras_dwd.checks import batches, check_batch
from keras_dwd.curvature.fisher import Statistics
from keras_dwd.distributed.communicator import Communicator
from keras_dwd.layers.task_heads import check_task_ids
from keras_dwd.variables import Arrays, Variables


class BoundaryPass:
    """Means of statistics over data, by a graph that is kept from task to task."""

    def __init__(self) -> None:
        self._traced: Any = None

    def __call__(
        self,
        model: Any,
        variables: Variables,
        data: Any,
        batch_size: int,
        communicator: Communicator,
    ) -> Arrays:
        """The statistics over `data`, one pass in inference mode.

        Args:
            model: A compiled `DWDModel`.
            variables: What to differentiate by, by path.
            data: As of `DWDModel.consolidate`.
            batch_size: Examples per batch.
            communicator: The workers that share the batches, each of which has all data.
        """
        sums: dict[str, tf.Tensor] = {}
        examples = 0
        chunk = model.fisher.chunk(variables, batch_size)
        with communicator.together("pass"):
            for index, (x, y, sample_weight) in enumerate(batches(data, chunk)):
                count = len(tf.nest.flatten(y)[0])
                if index % communicator.size == communicator.rank:
                    check_batch(model, x, y, sample_weight)
                    check_task_ids(model, x)
                    model.fisher.start(examples)
                    estimate = self._of_batch(model, variables)((x, y, sample_weight))
                    sums = {name: count * e + sums.get(name, 0.0) for name, e in estimate.items()}
                examples += count
            if not examples:
                raise ValueError("`data` is empty: there is nothing to estimate the Fisher from.")
        if communicator.size > 1:  # there may be fewer batches than workers
            shapes = model.fisher.shapes(model, variables)
            names = communicator.of_all({name: np.zeros(()) for name in sums}, "pass.names")
            parts = [np.asarray(sums.get(n, np.zeros(shapes[n]))) for n in sorted(names)]
            sums = dict(zip(sorted(names), communicator.total(parts, "pass.sums"), strict=True))
        return {name: np.asarray(total, "float32") / examples for name, total in sums.items()}

    def _of_batch(self, model: Any, variables: Variables) -> Any:
        # The loss is made anew by `compile`.
        key = (model.fisher, model._compile_loss, tuple(variables), len(model.metrics))
        if self._traced is None or self._traced[0] != key:

            @tf.function(reduce_retracing=True)
            def of_batch(batch: Any) -> Statistics:
                return model.statistics(variables, batch)

            self._traced = (key, of_batch)
        return self._traced[1]
