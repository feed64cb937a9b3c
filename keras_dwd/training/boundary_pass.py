"""Estimates the Fisher information of a task in one pass over its data at the boundary."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.communicator import Communicator
from keras_dwd.curvature.examples import carried_states, count_of, states_of
from keras_dwd.curvature.fisher import Fisher
from keras_dwd.learner import Learner
from keras_dwd.training.batch_statistics import BatchStatistics
from keras_dwd.training.data import batches, check_batch, check_task_ids, examples_in
from keras_dwd.variables import Arrays, Variables
from keras_dwd.words import counted

_ALONE = Communicator()


class BoundaryPass:
    """Computes mean statistics over data.

    Args:
        statistics: Computes those of a batch.

    Attributes:
        examples: The number of examples of the last pass.
    """

    def __init__(self, statistics: BatchStatistics) -> None:
        self.statistics = statistics
        self.examples = 0

    def __call__(
        self,
        model: Learner,
        fisher: Fisher,
        variables: Variables,
        data: Any,
        batch_size: int,
        communicator: Communicator,
        verbose: int = 0,
    ) -> Arrays:
        """The mean statistics over `data`, from one pass in inference mode.

        Args:
            model: A compiled model.
            fisher: The estimate that computes the statistics of a batch.
            variables: The variables to differentiate with respect to, by path.
            data: See `DWDModel.consolidate`.
            batch_size: The largest number of examples per batch.
            communicator: The workers that share the batches; each of them has all of the data.
            verbose: See `DWDModel.consolidate`.

        Returns:
            The statistics by `NAME/PATH`.
        """
        sums: dict[str, tf.Tensor] = {}
        examples = 0
        chunk = fisher.chunk(variables, batch_size)
        states = states_of(model)
        if carried_states(model):  # of as many examples as the batches of the model have
            chunk = next(size for i in model.inputs if (size := i.shape[0]) is not None)
        restored = (
            fisher.examples_seen,
            fisher.coupling,
            fisher.contradiction,
            *states,
        )
        before = [np.array(v) for v in restored]
        alone = communicator if communicator.size == 1 else _ALONE  # each batch is one worker's
        bar = None
        if verbose == 1:
            bar = keras.utils.Progbar(examples_in(data), unit_name="example")
        try:
            fisher.coupling.assign(0.0)
            fisher.contradiction.assign(0.0)
            with communicator.fail_together("pass"):
                for index, (x, y, sample_weight) in enumerate(batches(data, chunk)):
                    count = int(count_of((x, y)))
                    if index % communicator.size == communicator.rank:
                        check_batch(model, x, y, sample_weight)
                        check_task_ids(model, x)
                        fisher.set_examples_seen(examples)
                        batch = (x, y, sample_weight)
                        try:
                            estimate = self.statistics(model, fisher, variables, batch, alone)
                        except Exception as error:
                            if fisher.takes_any_loss:
                                error.add_note(fisher.without_examples(error))
                            raise
                        sums = {n: count * e + sums.get(n, 0.0) for n, e in estimate.items()}
                    examples += count
                    if bar is not None:
                        bar.update(examples, finalize=False)
                if not examples:
                    raise ValueError("`x` is empty: there is nothing to estimate the Fisher from.")
                if fisher.compares_examples:
                    fisher.refuse_coupling()
                if fisher.contradicts:
                    fisher.refuse_rules()
            if bar is not None:
                bar.update(examples, finalize=True)
            elif verbose:
                print(f"Fisher information of {counted(examples, 'example')}")
        finally:  # also if the pass fails
            for variable, value in zip(restored, before, strict=True):
                variable.assign(value)
        self.examples = examples
        if communicator.size > 1:  # there may be fewer batches than workers
            shapes = fisher.shapes(model, variables)
            names = communicator.gather_dicts({name: np.zeros(()) for name in sums}, "pass.names")
            parts = [np.asarray(sums.get(n, np.zeros(shapes[n]))) for n in sorted(names)]
            sums = dict(zip(sorted(names), communicator.total(parts, "pass.sums"), strict=True))
        return {name: np.asarray(total, "float32") / examples for name, total in sums.items()}
