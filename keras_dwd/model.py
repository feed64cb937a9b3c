"""The model that learns task after task."""

from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_dwd import optimizer
from keras_dwd.checks import check_fit, check_weights
from keras_dwd.curvature.boundary_pass import BoundaryPass
from keras_dwd.curvature.fisher import Block, Fisher, Statistics
from keras_dwd.curvature.kronecker import KroneckerFisher
from keras_dwd.distributed.communicator import Communicator
from keras_dwd.distributed.model import arguments
from keras_dwd.distributed.workers import block_sizes
from keras_dwd.gradients import all_finite, data_gradients, loss_scale
from keras_dwd.grouping.gmm import GaussianMixtureGrouping
from keras_dwd.grouping.grouping import Grouped, Grouping, Learned, Summary
from keras_dwd.layers.task_heads import HeadGate, check_task_ids
from keras_dwd.regularizer import DWDRegularizer, Folded
from keras_dwd.saving import SavedModel, cloned_settings
from keras_dwd.tasks.task_graph import TaskGraph
from keras_dwd.variables import Arrays, Variables, by_path, digest_of, kinds_of
from keras_dwd.wrapping import copied, wrapped


@keras.saving.register_keras_serializable("keras_dwd")
class DWDModel(SavedModel):
    """A Keras model that keeps what it knew while `fit` trains it on the next task.

    Train it as any Keras model. After each task call `consolidate`: the Fisher information of the
    task, grouped and weighted, is folded into a quadratic pull towards the task's parameters,
    which every later training step adds to its gradient. Nothing else changes: losses, metrics,
    optimizers, callbacks and saving are those of Keras.

    Fine-tuning, EWC and online EWC are settings of the same model:

    | method | settings |
    | --- | --- |
    | fine-tuning | `strength=0` |
    | EWC | `regularizer=DWDRegularizer(λ, anchor="folded")`, `grouping=None`, \
    `fisher=DiagonalFisher("exact", gamma=None)` |
    | online EWC | the same, with `regularizer=DWDRegularizer(λ, decay=0.9)` |
    | DWD | the defaults |

    Args:
        *args: `inputs, outputs` of a functional model. For any other model see `from_model`.
        strength: λ ≥ 0, short for `regularizer=DWDRegularizer(strength)`.
        regularizer: A `DWDRegularizer`, the penalty with its own settings.
        fisher: A `KroneckerFisher` (the default) or `DiagonalFisher`: how the importance of
            parameters is estimated.
        grouping: A `Grouping`, `"gmm"` for the default `GaussianMixtureGrouping`, or `None`: one
            strength for all parameters.
        task_graph: A `TaskGraph`, to pull towards tasks that resemble the current one.
        **kwargs: Of `keras.Model`.

    Example:

    ```python
    model = DWDModel.from_model(keras.Sequential([...]))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    for x, y in tasks:
        model.fit(x, y, epochs=10)
        model.consolidate((x, y))
    ```
    """

    def __init__(
        self,
        *args: Any,
        strength: float | None = None,
        regularizer: DWDRegularizer | None = None,
        fisher: Fisher | None = None,
        grouping: Grouping | Literal["gmm"] | None = "gmm",
        task_graph: TaskGraph | None = None,
        **kwargs: Any,
    ):
        if not (args or "inputs" in kwargs):
            raise TypeError(
                "DWDModel is built from `inputs` and `outputs`. "
                "Use `DWDModel.from_model(model)` for a sequential or subclassed model."
            )
        clone = cloned_settings(args[1:])
        if clone:
            regularizer, fisher, grouping, task_graph = (
                clone[name] for name in ("regularizer", "fisher", "grouping", "task_graph")
            )
        if strength is not None:
            if regularizer is not None:
                raise ValueError("Give `strength` or `regularizer`, not both.")
            regularizer = DWDRegularizer(strength)
        made_regularizer = copied("regularizer", regularizer, DWDRegularizer)
        made_fisher = copied("fisher", fisher, Fisher)
        default = GaussianMixtureGrouping() if grouping == "gmm" else grouping
        made_grouping = copied("grouping", default, Grouping)
        made_graph = copied("task_graph", task_graph, TaskGraph)
        super().__init__(*args, **kwargs)
        self.regularizer: DWDRegularizer = made_regularizer or DWDRegularizer()
        self.fisher: Fisher = made_fisher or KroneckerFisher()
        self.supports_jit = self.fisher.supports_jit
        self.grouping: Grouping | None = made_grouping
        self.task_graph: TaskGraph | None = made_graph
        if self.regularizer.anchor == "folded" and isinstance(self.fisher, KroneckerFisher):
            raise ValueError(
                "`anchor` 'folded' is the exact sum over tasks, which only a diagonal has. Use "
                "`fisher=DiagonalFisher(...)` with it."
            )
        self.tasks_learned = 0
        # Of the last boundary.
        self.groups: Summary = []
        self.assignments: Arrays = {}
        # The weights at the last boundary, as a digest: nothing to fold before they change.
        self.weights_digest = b""
        self.head_gate = HeadGate()
        self._pass = BoundaryPass()
        variables = by_path(self)  # fails on ambiguous names while it is still cheap to mend
        if isinstance(grouping, Grouping):
            grouping.check(variables)

    @classmethod
    def from_model(cls, model: keras.Model, inputs: Any = None, **settings: Any) -> "DWDModel":
        """A `DWDModel` around an existing model, sharing its layers and weights.

        Args:
            model: Functional, sequential or subclassed, built; possibly trained already: then
                `consolidate(its data)` makes what it knows the first task.
            inputs: For a subclassed model, `keras.Input`s to call it on. Made from the shapes it
                was built with where left out, as float32.
            **settings: Of `DWDModel`.

        Raises:
            ValueError: If the model is not built, has a training step of its own, or is a
                subclassed one that cannot tell its inputs.
        """
        return wrapped(cls, model, inputs, settings)

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.fit`, which first refuses arrays that are empty, with NaN or wrong labels.

        Of datasets only what they say of themselves is looked at: a pass over them may be
        expensive, or not repeatable.
        """
        given = arguments(keras.Model.fit, x, y, *args, **kwargs)
        check_fit(self, given)
        held_out = given.get("validation_data")
        for data in (x, held_out[0] if isinstance(held_out, (tuple, list)) else None):
            check_task_ids(self, data)
        if self.task_graph is not None:
            self.task_graph.check(self)
            given["callbacks"] = self.task_graph.with_update(self, given.get("callbacks"))
        return super().fit(**given)

    def make_train_function(self, force: bool = False) -> Any:
        """Create the slots the training step updates, then trace as Keras does."""
        if self.train_function is not None and not force:
            return self.train_function
        if self._learns_online:
            self.fisher.forget_all_but(self.fisher.shapes(self, by_path(self)))
            shapes = self.kept(self.fisher.shapes(self, self._pulled_variables()))
            self.fisher.build(shapes, optimizer.find(self.optimizer))
        self.head_gate.build(self._trainable_by_path())
        return super().make_train_function(force)

    def train_step(self, data: Any) -> dict[str, Any]:
        """`keras.Model.train_step`, with the pull added and the Fisher updated.

        The gradient of the loss is exactly Keras' own. Before the first boundary it goes to the
        optimizer untouched.
        """
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise RuntimeError(
                "DWDModel does not train under a tf.distribute strategy with several replicas."
            )
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        fisher = self.fisher if self._learns_online else None
        trainable = self._trainable_by_path()
        variables = list(trainable.values())
        with tf.GradientTape(persistent=True) as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred, sample_weight, training=True)
            added = [tf.reduce_sum(tf.cast(term, loss.dtype)) for term in self.losses]
            added_loss = tf.add_n(added) if added else None
            scaled_loss = self.optimizer.scale_loss(loss)
        examples = tf.shape(next(t for t in tf.nest.flatten(x) if t is not None))[0]
        self._loss_tracker.update_state(loss, sample_weight=examples)

        gradients = tape.gradient(scaled_loss, variables)
        # 1 unless the optimizer scales the loss (mixed precision): gradients carry that factor.
        scale = self.optimizer.scale_loss(tf.ones(())) if scaled_loss is not loss else None
        workers, communicator = self.workers, self.workers.communicator
        if workers.sharded:
            # Each pull is that of one worker, and the mean of all is taken: no more to send.
            pulls = self.head_gate.within(self.regularizer.gradients(by_path(self)))
            named = dict(zip(trainable, gradients, strict=True))
            times = communicator.size * (tf.ones(()) if scale is None else scale)
            gradients = self.regularizer.added(pulls, trainable, named, times)
        step = self.optimizer.iterations
        gradients = workers.averaged(gradients, loss, step, scaled=scale is not None)
        examples *= communicator.size

        from_data = gradients
        if added_loss is not None or scale is not None:
            from_added = [None] * len(variables)
            if added_loss is not None:
                from_added = tape.gradient(added_loss, variables)
            from_data = data_gradients(gradients, from_added, scale)
        del tape

        if fisher is not None:
            if fisher.estimator == "adam":
                fisher.note(examples)
            else:
                batch: Any = (x, y, sample_weight)
                if fisher.estimator == "batch":  # at no cost: the gradient is there
                    batch = dict(zip(trainable, from_data, strict=True)), examples
                due = tf.convert_to_tensor(self.optimizer.iterations) % fisher.every == 0
                due |= fisher.weight.value == 0  # the first step of a task
                # Workers that wait for each other do so in one order.
                with tf.control_dependencies([g for g in gradients if g is not None]):
                    tf.cond(due, lambda: self._learn_fisher(batch, scale), _nothing)

        if variables:
            kept = self.head_gate.open(trainable, from_data)
            self._apply(trainable, gradients, scale)
            self.head_gate.close(kept)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def consolidate(self, data: Any = None, batch_size: int = 32) -> None:
        """End the current task: protect what it learned from the tasks to come.

        Args:
            data: The task's training data, to estimate its Fisher information in one pass:
                `(x, y)` or `(x, y, sample_weight)` of arrays, a batched `tf.data.Dataset`, or any
                iterable of such batches. Class weights given to `fit` are not known here: give
                sample weights. `None` uses the online estimate that training kept.
            batch_size: Examples per batch of that pass; memory decides where it is too large.

        Raises:
            ValueError: If the weights did not change since the last boundary, if data is empty,
                not finite, of other shapes than the model's inputs or labelled outside its
                outputs, or if there is no estimate to use. The model is then as before.
        """
        if not self.compiled:
            raise ValueError("Compile the model first: its loss defines the Fisher information.")
        weights = {id(v) for v in self.weights}  # not the states of random generators
        digest = digest_of({p: v for p, v in by_path(self).items() if id(v) in weights})
        if self.tasks_learned and digest == self.weights_digest:
            raise ValueError(
                "The weights are those of the last boundary: train the model on the next task "
                "before consolidating again."
            )
        if self.task_graph is not None:
            self.task_graph.check(self)
        variables = self._pulled_variables()
        check_weights(variables)
        grouped = Grouped({}, [], {})
        folded: list[Folded] = []
        if variables:
            if data is None:
                kept = {path: v for path, v in variables.items() if self.workers.keeps(path)}
                statistics = self.fisher.value(optimizer.find(self.optimizer), kept)
            else:
                statistics = self._estimate(data, batch_size)
            self.fisher.check(statistics)
            blocks = self.fisher.blocks(self, variables, statistics)
            if self.grouping is not None:
                grouped = self.grouping.apply(self._learned(blocks))
                blocks = grouped.blocks
            folded = self.regularizer.folded(by_path(self), blocks)
        if self.task_graph is not None:
            self.task_graph.add(self, digest)
        # From here on nothing can fail.
        layout = self.regularizer.layout()
        for part in folded:
            self.regularizer.hold(*part)
        if self.grouping is not None and self.grouping.budget is not None:
            groups = grouped.groups
            self.regularizer.follow({key: g["group"] for g in groups for key in g["layers"]})
            for g in groups:
                g["strength"] = float(self.regularizer.levels[g["group"]])
        self.fisher.reset()
        self.head_gate.reset()
        self.tasks_learned += 1
        self.groups, self.assignments = grouped.groups, grouped.assignments
        self.weights_digest = digest
        if self.grouping is not None:
            self.grouping.commit()
        try:
            self.weigh_tasks()
        finally:
            if self.regularizer.layout() != layout:
                self.retrace()

    def weigh_tasks(self) -> None:
        """Weigh the edges of the task graph to the current task, and move its anchor by them."""
        if self.task_graph is not None and self.regularizer.strength > 0:
            weights = self.task_graph.weights_to(self)
            self.regularizer.tie_to(*self.task_graph.center(weights, by_path(self)))

    def penalty(self) -> tf.Tensor:
        """The current penalty ½ Σ Λ (θ − c)², a float32 scalar.

        It is not part of the reported loss: its value would cost a pass over all weights a step.
        `PenaltyLogger` reports it once an epoch.
        """
        return self.workers.total(self.regularizer.value(by_path(self)))

    def get_config(self) -> dict[str, Any]:
        """Configuration of the model, its settings included; its state is next to the weights."""
        serialize = keras.saving.serialize_keras_object
        return super().get_config() | {
            "regularizer": serialize(self.regularizer),
            "fisher": serialize(self.fisher),
            "grouping": None if self.grouping is None else serialize(self.grouping),
            "task_graph": None if self.task_graph is None else serialize(self.task_graph),
        }

    # Below: how it is done.

    def retrace(self) -> None:
        """Make the training step anew: the one traced so far knows nothing of new slots.

        Within a `fit` that goes on, which a callback may have called this from, the next step
        takes the new function.
        """
        if self.train_function is not None:
            self.make_train_function(force=True)

    @property
    def _learns_online(self) -> bool:
        return self.fisher.online and bool(self._pulled_variables())

    def _trainable_by_path(self) -> Variables:
        """Trainable variables, in the order of `trainable_variables`."""
        paths = {id(v): path for path, v in by_path(self).items()}
        return {paths[id(v)]: v for v in self.trainable_variables}

    def _pulled_variables(self) -> Variables:
        trainable = self._trainable_by_path().items()
        return {path: v for path, v in trainable if self.regularizer.strength_of(v) > 0}

    def data_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        """The loss of the data alone: no penalty, no regularisation. Graph code."""
        loss = self.compute_loss(x, y, y_pred, sample_weight, training=False)
        # Subtracting the added losses again leaves a gradient of exactly zero for them.
        added = [tf.reduce_sum(tf.cast(term, loss.dtype)) for term in self.losses]
        return loss - tf.add_n(added) if added else loss

    def _learn_fisher(self, batch: Any, scale: tf.Tensor | None) -> tf.Tensor:
        """Update the online estimate, from a batch or, for `batch`, from gradients and a count."""
        if self.fisher.estimator == "batch":
            gradients, count = batch[0], tf.cast(batch[1], "float32")
            statistics = {
                f"fisher/{path}": count * tf.square(tf.cast(tf.convert_to_tensor(g), "float32"))
                for path, g in gradients.items()
                if g is not None
            }
        else:
            variables = self._pulled_variables()
            statistics = self.statistics(variables, batch, self.workers.communicator)
            statistics = self.workers.reduced(statistics)
        known = {name: value for name, value in statistics.items() if name in self.fisher.slots}
        valid = all_finite(statistics.values()) if scale is not None else None
        self.fisher.update(known, valid)
        return _nothing()

    def statistics(
        self, variables: Variables, batch: Any, communicator: Communicator | None = None
    ) -> Statistics:
        """F̂ of one batch, a part of one of all workers; graph code.

        The loss that it computes is in no report.
        """
        reported = [v for metric in self.metrics for v in metric.variables]
        before = [tf.identity(v.value) for v in reported]
        scale, others = loss_scale(self), communicator or Communicator()
        statistics = self.fisher.of_batch(self, variables, batch, scale, others)
        for variable, value in zip(reported, before, strict=True):
            variable.assign(value)
        return statistics

    def _apply(self, variables: Variables, gradients: list[Any], scale: tf.Tensor | None) -> None:
        """Let the optimizer update the variables, with the pull in it if there is one."""
        named = dict(zip(variables, gradients, strict=True))
        budget = self.grouping.budget if self.grouping is not None else None
        pulls = self.regularizer.pulls and not self.workers.sharded  # else it is in there
        decoupled = optimizer.find(self.optimizer) if pulls else None
        if not pulls:
            self.optimizer.apply_gradients(zip(gradients, variables.values(), strict=True))
            return
        if decoupled is None:
            pulled = self.regularizer.with_pull(by_path(self), named, scale, budget)
            self.optimizer.apply_gradients(zip(pulled, variables.values(), strict=True))
            return

        def pull(stiffness: dict[int, tf.Tensor]) -> None:
            known = {path: stiffness[id(v)] for path, v in variables.items() if id(v) in stiffness}
            self.regularizer.pull(by_path(self), known)

        if budget is not None:
            self.regularizer.balance(
                self.regularizer.gradients(by_path(self)), named, scale, budget
            )
        with decoupled.pulling(pull):
            self.optimizer.apply_gradients(zip(gradients, variables.values(), strict=True))

    def _estimate(self, data: Any, batch_size: int) -> Arrays:
        communicator = self.workers.communicator
        looked = int(np.asarray(self.fisher.looked))
        try:
            found = self._pass(self, self._pulled_variables(), data, batch_size, communicator)
        finally:
            self.fisher.start(looked)  # also where the pass fails: then nothing has changed
        return self.kept(found)

    def kept(self, of_blocks: dict[str, Any]) -> dict[str, Any]:
        """Of all statistics, by `kind/PATH`, those of blocks that this worker keeps."""
        variables = self._pulled_variables()
        self.workers.divide(block_sizes(self.fisher.shapes(self, variables), variables))
        kept = {name: name.partition("/")[2] for name in of_blocks}
        return {name: of_blocks[name] for name, path in kept.items() if self.workers.keeps(path)}

    def _learned(self, blocks: dict[str, Block]) -> Learned:
        values = {path: np.asarray(v) for path, v in by_path(self).items()}
        anchors = {path: np.asarray(v) for path, v in self.regularizer.anchors.items()}
        exchange = self.workers.exchange
        return Learned(blocks, values, anchors, kinds_of(self), self.groups, exchange)


def _nothing() -> tf.Tensor:
    """What both branches of a conditional return that are there for their effect."""
    return tf.zeros(())
