"""The training step of Keras, plus the pull, distillation and the Fisher information's update."""

import warnings
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_dwd.curvature.examples import carried_states, count_of, restored_after, states_of
from keras_dwd.curvature.fisher import Fisher, mean_gradient_statistics
from keras_dwd.distillation import Distillation
from keras_dwd.distributed.workers import Workers
from keras_dwd.groupings.strength import Budget
from keras_dwd.keras_private import loss_metric
from keras_dwd.layers.task_heads import recorded_heads
from keras_dwd.learner import Learner, added_loss, data_loss, has_own_loss, total_loss
from keras_dwd.regularizer import DWDRegularizer
from keras_dwd.training.batch_statistics import BatchStatistics
from keras_dwd.training.gradients import all_finite, data_gradients
from keras_dwd.training.head_gate import HeadGate
from keras_dwd.training.optimizer import proximal_updates, proximal_variables
from keras_dwd.variables import Variables, by_path, trainable_by_path


@dataclass
class Gradients:
    """The gradients from the backward pass of a step.

    Attributes:
        variables: The trainable variables, by path.
        total: The gradient of the whole loss, and of the distillation unless that is in
            `distilled`, with respect to each variable, or `None`.
        distilled: The gradient of the distillation, `None` where there is none or is in `total`.
        added: The sum of the losses that layers add; `None` if they add none.
        scale: The loss scale (mixed precision); `None` if the loss was not scaled.
        tape: A persistent tape that has recorded the losses.
    """

    variables: Variables
    total: list[Any]
    distilled: list[Any]
    added: tf.Tensor | None
    scale: tf.Tensor | None
    tape: tf.GradientTape

    def of_data(self) -> list[Any]:
        """The gradients of the data loss, unscaled, with the distillation that is in `total`."""
        if self.added is None and self.scale is None:
            return self.total
        from_added = [None] * len(self.total)
        if self.added is not None:
            from_added = self.tape.gradient(self.added, list(self.variables.values()))
        return data_gradients(self.total, self.scale, from_added)

    def with_distillation(self) -> None:
        """Add the gradient of the distillation to `total`."""
        self.total = [
            g
            if d is None
            else d
            if g is None
            else tf.convert_to_tensor(g) + tf.convert_to_tensor(d)
            for g, d in zip(self.total, self.distilled, strict=True)
        ]


@dataclass(frozen=True)
class TrainingStep:
    """The training step of a `DWDModel`.

    Attributes:
        regularizer: The regularizer, whose pull is added.
        fisher: The online estimate to update; `None` if there is none.
        statistics: Computes the statistics of a batch for `fisher`.
        pulled: The trainable variables with a strength above zero, by path.
        budget: The rule that adjusts λ_k, if there is one.
        head_gate: Leaves heads that are not in use unchanged.
        workers: The workers that train together.
        distillation: The distillation from the last boundary; `None` for none.
        anchors: The anchors that distillation may use as values of the teacher, by path.
    """

    regularizer: DWDRegularizer
    fisher: Fisher | None
    statistics: BatchStatistics
    pulled: Variables
    budget: Budget | None
    head_gate: HeadGate
    workers: Workers
    distillation: Distillation | None
    anchors: Variables

    def __call__(self, model: Learner, data: Any) -> dict[str, Any]:
        """`keras.Model.train_step`. Graph code."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        before = [tf.identity(v.value) for v in carried_states(model)]
        y_pred, loss, gradients = self._differentiate(model, x, y, sample_weight)
        examples = count_of(x)
        loss_metric(model).update_state(loss, sample_weight=examples)
        self._average(model, gradients, loss)
        of_data = gradients.of_data()
        if self.fisher is not None:
            batch = (x, y, sample_weight)
            total_examples = examples * self.workers.communicator.size
            self._update_fisher(
                model, self.fisher, batch, gradients, of_data, total_examples, before
            )
        gradients.with_distillation()
        if gradients.variables:
            active = self.head_gate.mark_active(gradients.variables, of_data)
            self._update_weights(model, gradients)
            self.head_gate.restore_inactive(active)
        else:  # as Keras does
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def update(self, model: Learner, gradients: list[Any]) -> None:
        """What follows the backward pass, without the Fisher information. Graph code.

        Args:
            model: A compiled model.
            gradients: The gradient of the loss, scaled if the optimizer scales it, for each of
                `model.trainable_variables`, or `None`.
        """
        one = tf.ones(())
        scale = model.optimizer.scale_loss(one)
        variables = trainable_by_path(model)
        with tf.GradientTape(persistent=True) as tape:  # of the layers' own regularizers
            added = added_loss(model, one) if self.head_gate.in_use else None
        nothing = [None] * len(gradients)
        collected = Gradients(
            variables, list(gradients), nothing, added, None if scale is one else scale, tape
        )
        self._average(model, collected, tf.zeros(()))
        active = self.head_gate.mark_active(variables, collected.of_data())
        self._update_weights(model, collected)
        self.head_gate.restore_inactive(active)

    def _differentiate(
        self, model: Learner, x: Any, y: Any, sample_weight: Any
    ) -> tuple[Any, tf.Tensor, Gradients]:
        """The outputs, loss and gradients, exactly as Keras computes them, plus distillation."""
        variables = trainable_by_path(model)
        distillation, targets = self.distillation, []
        # First, because running the model clears the losses that its layers have added.
        taught = distillation and distillation.teach(model, x, self.anchors)
        with tf.GradientTape(persistent=True) as tape:
            with recorded_heads() as calls:
                y_pred = model(x, training=True)
            loss = total_loss(model, x, y, y_pred, sample_weight, training=True)
            added = added_loss(model, loss)
            if added is not None and has_own_loss(model):
                # An own `compute_loss` may use only part of the added losses: take that part.
                added = loss - data_loss(model, x, y, y_pred, sample_weight, training=True)
            scaled_loss = model.optimizer.scale_loss(loss)
            if distillation and taught:
                distilled = distillation.loss(model, taught, y, y_pred, sample_weight, calls)
                targets.append(model.optimizer.scale_loss(distilled))
        if distillation:
            distillation.record_labels(model, y, y_pred, sample_weight, calls)
        of_distillation: list[Any] = [None] * len(variables)
        if targets and self._takes_gradients:  # which must not have distillation in them
            of_distillation = tape.gradient(targets.pop(), list(variables.values()))
        total = tape.gradient([scaled_loss, *targets], list(variables.values()))
        # `scaled_loss` is `loss` unless the optimizer scales it, which scales the gradients too.
        scale = model.optimizer.scale_loss(tf.ones(())) if scaled_loss is not loss else None
        return y_pred, loss, Gradients(variables, total, of_distillation, added, scale, tape)

    @property
    def _takes_gradients(self) -> bool:
        """Whether the online estimate is made of the gradients of this step."""
        return self.fisher is not None and self.fisher.estimator == "batch"

    def _average(self, model: Learner, gradients: Gradients, loss: tf.Tensor) -> None:
        """Average the gradients over the workers; with sharded state, add the pull first."""
        workers, scale = self.workers, gradients.scale
        if workers.sharded:
            # Each pull is computed by one worker only and multiplied by the number of workers, so
            # that averaging the gradients also distributes the pull.
            pulls = self.head_gate.of_active(self.regularizer.gradients(by_path(model)))
            proximal = self._proximal_variables(model, gradients.variables)
            pulls = {path: pull for path, pull in pulls.items() if path not in proximal}
            named = dict(zip(gradients.variables, gradients.total, strict=True))
            times = workers.communicator.size * (tf.ones(()) if scale is None else scale)
            gradients.total = self.regularizer.added(pulls, gradients.variables, named, times)
        step = model.optimizer.iterations
        both = [*gradients.total, *gradients.distilled]
        averaged = workers.averaged(both, loss, step, scaled=scale is not None)
        count = len(gradients.total)
        gradients.total, gradients.distilled = averaged[:count], averaged[count:]

    def _update_fisher(
        self,
        model: Learner,
        fisher: Fisher,
        batch: tuple[Any, Any, Any],
        gradients: Gradients,
        of_data: list[Any],
        examples: tf.Tensor,
        before: list[tf.Tensor],
    ) -> None:
        """Update the online estimate if it is due: at every n-th step, and the first of a task."""
        if fisher.estimator == "adam":
            fisher.record_batch_size(examples)
            return

        def update() -> tf.Tensor:
            if fisher.estimator == "batch":  # free: the gradient is known already
                statistics = mean_gradient_statistics(model, gradients.variables, of_data, examples)
            else:
                communicator = self.workers.communicator
                with (
                    restored_after(states_of(model)),
                    restored_after(carried_states(model), before),
                ):
                    local_statistics = self.statistics(
                        model, fisher, self.pulled, batch, communicator
                    )
                statistics = self.workers.reduced(local_statistics)
            known = {name: value for name, value in statistics.items() if name in fisher.slots}
            # With a scaled loss, gradients may overflow; such a step must not change the estimate.
            valid = None if gradients.scale is None else all_finite(statistics.values())
            fisher.update(known, valid)
            fisher.failure = ""
            return _nothing()

        due = tf.convert_to_tensor(model.optimizer.iterations) % fisher.every == 0
        due |= fisher.weight.value == 0  # the first step of a task
        # All workers must communicate in the same order: first the gradients, then the statistics.
        with tf.control_dependencies([g for g in gradients.total if g is not None]):
            try:
                tf.cond(due, update, _nothing)
            except Exception as error:
                if self.workers.several or not fisher.takes_any_loss:
                    raise
                # The model cannot be run on single examples. Keras trains it, so this does too.
                fisher.failure = fisher.without_examples(error)
                warnings.warn(f"{fisher.failure} Training goes on without it.", stacklevel=2)

    def _update_weights(self, model: Learner, gradients: Gradients) -> None:
        """Let the optimizer update the variables, with the pull if there is one."""
        variables, optimizer = gradients.variables, model.optimizer
        named = dict(zip(variables, gradients.total, strict=True))
        if not self.regularizer.pulls:
            optimizer.apply_gradients(zip(named.values(), variables.values(), strict=True))
            return
        proximal = self._proximal_variables(model, variables)
        total = self._with_pull(model, named, gradients.scale, proximal)
        unscaled = data_gradients([named[path] for path in proximal], gradients.scale)

        def pull(stiffness: dict[int, tf.Tensor]) -> None:
            by_paths = {p: stiffness[id(v)] for p, v in proximal.items() if id(v) in stiffness}
            if by_paths:
                self._proximal_step(model, by_paths)

        with proximal_updates(optimizer, list(proximal.values()), unscaled, pull):
            optimizer.apply_gradients(zip(total, variables.values(), strict=True))

    def _proximal_variables(self, model: Learner, variables: Variables) -> Variables:
        """The variables that are pulled by a proximal step, not through their gradient."""
        proximal = proximal_variables(model.optimizer, list(variables.values()))
        return {path: v for path, v in variables.items() if id(v) in proximal}

    def _with_pull(
        self, model: Learner, named: dict[str, Any], scale: tf.Tensor | None, proximal: Variables
    ) -> list[Any]:
        """The gradients by path with the pull of all but the proximal variables added."""
        # With sharded state, `_average` has added it already.
        if self.workers.sharded or (len(proximal) == len(named) and self.budget is None):
            return list(named.values())
        pulls = self.regularizer.gradients(by_path(model))
        if self.budget is not None:
            paths_of = {key: b.paths for key, b in self.regularizer.precisions.items()}
            strengths = self.regularizer.budget_strengths
            strengths.adjust(paths_of, pulls, named, scale, self.budget)
        in_gradient = {path: pull for path, pull in pulls.items() if path not in proximal}
        return self.regularizer.added(in_gradient, by_path(model), named, scale)

    def _proximal_step(self, model: Learner, stiffness: dict[str, tf.Tensor]) -> None:
        """The proximal step; with sharded state, each worker computes it for its own blocks."""
        variables = by_path(model)
        before = {path: tf.identity(variables[path].value) for path in stiffness}
        self.regularizer.proximal_step(variables, stiffness)
        if self.workers.sharded:
            moves = {path: variables[path].value - value for path, value in before.items()}
            for path, move in self.workers.summed(moves).items():
                variables[path].assign(before[path] + move)


def _nothing() -> tf.Tensor:
    """The return value of `tf.cond` branches that are run for their side effects."""
    return tf.zeros(())
