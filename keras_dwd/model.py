"""`DWDModel`, a Keras model that learns one task after another."""

import copy
import inspect
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import keras
import tensorflow as tf

from keras_dwd.checks import integer
from keras_dwd.communicator import Communicator
from keras_dwd.consolidation import Consolidation
from keras_dwd.curvature.fisher import Fisher
from keras_dwd.curvature.kronecker import KroneckerFisher
from keras_dwd.distillation import Distillation
from keras_dwd.distributed.fitting import (
    check_compile,
    metrics_result,
    share_evaluation,
    share_fit,
)
from keras_dwd.distributed.horovod import detect_communicator
from keras_dwd.distributed.workers import Workers
from keras_dwd.export import SAVED_MODEL, export
from keras_dwd.groupings.gmm import GaussianMixtureGrouping
from keras_dwd.groupings.grouping import Grouping, Summary
from keras_dwd.hub_tasks import for_hub_tasks
from keras_dwd.keras_private import (
    CloneAware,
    evaluates_within_fit,
    layers_within,
    own_metrics,
    set_dtype_policy,
    within_hdf5,
)
from keras_dwd.layers.task_heads import TaskHeads
from keras_dwd.regularizer import DEFAULT_STRENGTH, DWDRegularizer
from keras_dwd.saving import (
    as_plain,
    cloned_settings,
    deep_copy,
    keep_in_files,
    mark_clone,
    subclassed_within,
)
from keras_dwd.strength_check import warn_of_strength
from keras_dwd.summary import ConsolidationSummary, summary_of
from keras_dwd.task_graph.graph import TaskGraph
from keras_dwd.training.consolidate_data import batch_size_of, data_of, first_batches, verbosity
from keras_dwd.training.data import build_state, check_fit, check_task_ids
from keras_dwd.training.step import TrainingStep
from keras_dwd.variables import Arrays, by_path
from keras_dwd.words import nearest
from keras_dwd.wrapping import copied, warn_of_logits, warn_of_nothing_held, was_trained, wrapped

# Arguments of a functional Keras model.
_OF_FUNCTIONAL = {"inputs", "outputs", "name", "trainable", "dtype"}


@keras.saving.register_keras_serializable("keras_dwd")
class DWDModel(CloneAware):
    """A Keras model that retains earlier tasks while `fit` trains it on the next task.

    Train it like any Keras model and call `consolidate` after each task. This folds the Fisher
    information of the task, grouped and weighted, into a quadratic penalty with the task's
    parameters as its anchor. Later training steps add the gradient of this penalty, the pull, to
    the gradient of the loss. Losses, metrics, optimizers, callbacks and saving are those of Keras.

    Fine-tuning, EWC and online EWC are settings of the same model, see `ewc`, `online_ewc` and
    `dwd`:

    | method | settings |
    | --- | --- |
    | fine-tuning | `strength=0` |
    | EWC | `**keras_dwd.ewc(λ)` |
    | online EWC | `**keras_dwd.online_ewc(λ)` |
    | DWD | the defaults |
    | Learning without Forgetting | `strength=0, distillation=Distillation()` |

    The pull is part of the training step, not of the loss: neither `model.losses` nor `evaluate`
    has it. Where you write the training loop yourself, call `train_on_batch` or `train_step`, which
    do as `fit` does; or `apply_gradients`, which does so with gradients; or differentiate
    `loss + model.penalty()`, which is the same pull. The last two make no online estimate, so pass
    data to `consolidate`. A `tf.function` of yours has to be made anew after each `consolidate`:
    with `train_step` or `apply_gradients` in it, it raises an error otherwise. The package cannot
    notice a loop that leaves the pull out.

    A `.keras` file is loaded by `keras.models.load_model` after `import keras_dwd`. Without the
    import Keras says that it "Could not locate class 'DWDModel'".

    Args:
        *args: `inputs, outputs` of a functional model. For other models use `from_model`.
        strength: λ ≥ 0, how strongly earlier tasks hold; 0 is fine-tuning. Short for
            `regularizer=DWDRegularizer(strength)`. The default is 200; with `distillation` and
            `TaskHeads` it is 20, as both then hold the same. Outputs that tasks share need the
            200 with distillation too.
        regularizer: A `DWDRegularizer`: the penalty and its settings.
        fisher: A `KroneckerFisher` (the default) or a `DiagonalFisher`: the estimate of the Fisher
            information, that is, of the importance of parameters.
        grouping: A `Grouping`, which gives groups of parameters their strengths; `"gmm"` for the
            default `GaussianMixtureGrouping`, `None` for one strength for all parameters.
        task_graph: A `TaskGraph`, which pulls towards tasks that resemble the current one.
        distillation: A `Distillation`, which keeps the outputs for earlier tasks close to those of
            the model at the last boundary; `None`, the default, for none.
        **kwargs: Arguments of `keras.Model`. `dtype` is the dtype policy of the model, by which
            `compile` decides whether to scale the loss; by default the global one.

    Example:

    ```python
    model = DWDModel.from_model(network)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    for x, y in tasks:
        model.fit(x, y, epochs=10)
        model.consolidate(x, y)
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
        distillation: Distillation | None = None,
        **kwargs: Any,
    ):
        if not (args or "inputs" in kwargs):
            raise TypeError(
                "DWDModel is built from `inputs` and `outputs`. "
                "Use `DWDModel.from_model(model)` for a sequential or subclassed model."
            )
        if len(args) == 1 and isinstance(args[0], keras.Model):
            raise TypeError(
                f"DWDModel is built from `inputs` and `outputs`. Received the model "
                f"{args[0].name!r}: use `DWDModel.from_model(model)`."
            )
        unknown = sorted(set(kwargs) - _OF_FUNCTIONAL)  # which a functional model would ignore
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no argument {', '.join(map(repr, unknown))}. "
                f"{' '.join(filter(None, (_hint(type(self), name) for name in unknown)))} Its "
                "settings are strength, regularizer, fisher, grouping, task_graph and "
                "distillation.".replace("  ", " ")
            )
        clone = cloned_settings(args[1:])
        if clone:
            regularizer, fisher, grouping, task_graph, distillation = (
                clone[name]
                for name in ("regularizer", "fisher", "grouping", "task_graph", "distillation")
            )
            kwargs["dtype"] = clone["dtype"]
        if strength is not None:
            if regularizer is not None:
                raise ValueError("Give `strength` or `regularizer`, not both.")
            regularizer = DWDRegularizer(strength)
        own_regularizer = copied("regularizer", regularizer, DWDRegularizer)
        own_fisher = copied("fisher", fisher, Fisher)
        default = GaussianMixtureGrouping() if grouping == "gmm" else grouping
        own_grouping = copied("grouping", default, Grouping)
        own_graph = copied("task_graph", task_graph, TaskGraph)
        own_distillation = copied("distillation", distillation, Distillation)
        dtype = kwargs.pop("dtype", None)
        super().__init__(*args, **kwargs)
        if dtype is not None:
            set_dtype_policy(self, dtype)
        self._consolidation = Consolidation(
            own_regularizer or DWDRegularizer(_default_strength(self, own_distillation)),
            own_fisher or KroneckerFisher(),
            own_grouping,
            own_graph,
            own_distillation,
        )
        keep_in_files(self, self._consolidation)
        self._in_step = False
        self.supports_jit = self.fisher.supports_jit
        self._sharded_in_file = False
        self._checks_strength = True
        self._wraps_trained: bool | None = None  # of a model that is wrapped and not yet trained
        if isinstance(grouping, Grouping):
            grouping.check(by_path(self))

    @classmethod
    def from_model(
        cls,
        model: keras.Model,
        inputs: Any = None,
        *,
        strength: float | None = None,
        regularizer: DWDRegularizer | None = None,
        fisher: Fisher | None = None,
        grouping: Grouping | Literal["gmm"] | None = "gmm",
        task_graph: TaskGraph | None = None,
        distillation: Distillation | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """A `DWDModel` around an existing model, sharing its layers and weights.

        Args:
            model: A functional, sequential or subclassed model that is built. If it is already
                trained, call `consolidate` with its data, or inputs alone, to make this the first
                task.
            inputs: For a subclassed model, `keras.Input`s to call it on. By default they are
                created from the shapes it was built with, as float32, in the structure of its
                first argument: one input, or a list or dictionary of inputs.
            strength: See `DWDModel`.
            regularizer: See `DWDModel`.
            fisher: See `DWDModel`.
            grouping: See `DWDModel`.
            task_graph: See `DWDModel`.
            distillation: See `DWDModel`.
            name: Name of the new model; by default the name of `model`.
            **kwargs: Arguments of `keras.Model`, or of the subclass of `DWDModel`. The default of
                `dtype` is the dtype policy of `model`.

        Returns:
            A model of the class that this is called on. Around a task model of KerasHub, such as
            `GemmaCausalLM`, it also has the methods of that model, such as `generate`; `fit`,
            `consolidate` and the like take what its preprocessor takes, and `compile` has its
            arguments and defaults.

        Raises:
            ValueError: If the model is not built, overrides the training step, or is a subclassed
                model whose inputs are unknown or may not be exact as float32.
        """
        if isinstance(model, DWDModel):
            raise ValueError(
                f"`model` is a DWDModel already: {model.name!r}. Wrapping it would lose its state."
            )
        if not isinstance(model, keras.Layer):  # as models of Keras' own tests are
            raise TypeError(
                "`model` must be a keras.Model; load one from a file by `keras.models.load_model`. "
                f"Received: {model!r}"
            )
        if isinstance(inputs, (int, float)):
            raise TypeError(
                f"`inputs` must be `keras.Input`s. Received: {inputs!r}. The strength λ of the "
                "penalty is `strength`, given by its name."
            )
        settings = {
            "strength": strength,
            "regularizer": regularizer,
            "fisher": fisher,
            "grouping": grouping,
            "task_graph": task_graph,
            "distillation": distillation,
            "name": name or model.name,
        }
        wrapper = wrapped(cls, model, inputs, settings | kwargs)
        wrapper._wraps_trained = was_trained(model)
        return wrapper

    # Settings and consolidation state.

    @property
    def strength(self) -> float:
        """λ, how strongly earlier tasks hold.

        A value assigned here is that of all tasks learned so far, and takes effect at the next
        training step. Variables of layers with a `DWDRegularizer` of their own have its strength.

        Raises:
            ValueError: If the value is no number ≥ 0, or if it is raised from 0 after tasks were
                consolidated, for which nothing was estimated then.
        """
        return self.regularizer.strength

    @strength.setter
    def strength(self, strength: float) -> None:
        self.regularizer.strength = strength

    @property
    def regularizer(self) -> DWDRegularizer:
        """The penalty: its settings, precision and anchor."""
        return self._consolidation.regularizer

    @property
    def fisher(self) -> Fisher:
        """The estimate of the Fisher information."""
        return self._consolidation.fisher

    @property
    def grouping(self) -> Grouping | None:
        """The grouping, which gives groups of parameters their strengths λ_k, or `None`."""
        return self._consolidation.grouping

    @property
    def task_graph(self) -> TaskGraph | None:
        """The task graph, which holds the similarity of tasks, or `None`."""
        return self._consolidation.task_graph

    @task_graph.setter
    def task_graph(self, task_graph: TaskGraph | None) -> None:
        if task_graph is None:  # the next step pulls no more
            self.regularizer.pull_to_tasks(0.0, {})
        elif not isinstance(task_graph, TaskGraph):
            raise ValueError(f"`task_graph` must be a TaskGraph or None. Received: {task_graph!r}")
        self._consolidation.task_graph = task_graph

    @property
    def distillation(self) -> Distillation | None:
        """The distillation from the model at the last boundary, or `None`."""
        return self._consolidation.distillation

    @property
    def tasks_learned(self) -> int:
        """The number of tasks consolidated so far."""
        return self._consolidation.tasks_learned

    @property
    def groups(self) -> Summary:
        """The groups of the last boundary: number, size, strength λ_k and layers of each."""
        return self._consolidation.groups

    @property
    def assignments(self) -> Arrays:
        """The group of each parameter at the last boundary, by block."""
        return self._consolidation.assignments

    @property
    def consolidation(self) -> ConsolidationSummary:
        """What the model retains of earlier tasks: `print` it to read it in words.

        ```
        >>> print(model.consolidation)
        1 task consolidated: 9,642 of 9,642 trainable parameters are held with λ = 200 (…).
        The pull is part of the gradient.
        layer   parameters  importance  may move
        …
        ```
        """
        return summary_of(self, self._consolidation)

    @property
    def workers(self) -> Workers:
        """The workers that train this model together."""
        return self._consolidation.workers

    def consolidate(
        self,
        x: Any = None,
        y: Any = None,
        sample_weight: Any = None,
        batch_size: int = 32,
        *,
        steps: int | None = None,
        verbose: Literal["auto"] | int = "auto",
        data: Any = None,
    ) -> ConsolidationSummary:
        """End the current task, so that training on later tasks preserves what it learned.

        Called without data it uses the online estimate from training, which only `fit` and
        `train_step` make. With data it estimates the Fisher information in one pass over it. So a
        model that someone else trained becomes the first task, even without labels:

        ```python
        model = DWDModel.from_model(pretrained)
        model.compile("adam", "sparse_categorical_crossentropy")
        model.consolidate(x)
        model.fit(new_x, new_y)
        ```

        Args:
            x: The task's training data, as in `fit`: arrays, with `y`; or, with the labels in it,
                a batched `tf.data.Dataset`, a `PyDataset`, a generator, or another iterable of
                batches. `(x, y)` and `(x, y, sample_weight)` of arrays may be one
                argument. Any of them may also give inputs alone (several inputs as a list or a
                dictionary). The labels are then drawn from the model's own predictions, for each
                output on its own, which takes cross-entropies or mean squared errors as losses.
                Every estimator takes these labels in place of true ones: `"empirical"` becomes
                `"mc"`. Padding is then left out by a mask or by weights: no given label is of the
                `ignore_class` of a loss.
            y: The labels, if there are any and they are not in `x`.
            sample_weight: A weight for each example, with the inputs as `x`. The class weights of
                `fit` are not known here: pass sample weights instead.
            batch_size: The largest number of examples per batch in this pass; it is reduced where
                memory requires it. An integer in place of `y` or `sample_weight` is taken for it.
            steps: The number of batches to take from a dataset or generator; all by default, for
                which it must end.
            verbose: Whether to show a progress bar while the data is passed over: 0 for none, 1 for
                a bar, 2 for one line, `"auto"` for 1, or for 0 where Keras' interactive logging
                is off.
            data: An earlier name of `x`.

        Returns:
            What the model retains now, which tells in words what was found: `print` it.

        Raises:
            ValueError: If the weights have not changed since the last boundary; if the data is
                empty, not finite, does not fit the model's inputs, or has labels outside the
                model's outputs; if there are no labels and a loss is no log-likelihood; or if
                there is no online estimate. The model is not changed then.
        """
        if data is not None:
            if x is not None:
                raise ValueError("Give `x` or `data`, which mean the same, not both.")
            x = data
        if batch_size_of(y, sample_weight) is not None:
            batch_size = batch_size_of(y, sample_weight)
            y, sample_weight = (
                None if batch_size_of(g) is not None else g for g in (y, sample_weight)
            )
        batch_size = integer("batch_size", batch_size, 1)
        if not self.compiled:
            raise ValueError("Compile the model first: its loss defines the Fisher information.")
        task_data = (x, y, sample_weight)
        whole = None if all(part is None for part in task_data) else data_of(self, *task_data)
        shown = verbosity(verbose)
        self._consolidation.add_task(self, first_batches(whole, steps), batch_size, shown)
        return self.consolidation

    def penalty(self) -> tf.Tensor:
        """The current penalty ½ (θ − c)ᵀ Λ (θ − c), a float32 scalar.

        Its gradient is the pull, so a training loop of your own may add it to the loss; but with
        sharded state it is a constant. It is not part of the reported loss, because computing it at
        each step would cost a pass over all weights. `PenaltyLogger` reports it once per epoch.
        """
        return self._consolidation.penalty(self)

    def inherit(
        self,
        previous: "DWDModel",
        renamed: Mapping[str, str] | None = None,
        dropped: Sequence[str] = (),
    ) -> None:
        """Take over the weights and the consolidation state of a smaller model.

        For a model that has grown: with more layers, more heads or more classes. Variables are
        matched by path, that is, by the names of their layers and their own. A variable may be
        larger along any axis: the old values come first and are pulled as before. New elements are
        not pulled (in matrices of more than 4,096 rows, hardly). If `previous` has an unfinished
        task, its online estimate restarts. The state of this model is replaced.

        Args:
            previous: A `DWDModel`, which is not changed. It may share layers with this one.
            renamed: New paths by old paths, of layers (`{"head": "head_1"}`) or variables.
            dropped: Patterns of paths of variables of `previous` to drop, in which `*` matches
                anything: `["old_head/*"]`.

        Raises:
            ValueError: If a variable of `previous` has no counterpart in this model and was not
                dropped, or if a model has a task graph. Neither model is changed then.

        Example:

        ```python
        larger = DWDModel.from_model(larger_network)
        larger.inherit(model)
        larger.compile("adam", loss)
        ```
        """
        if not isinstance(previous, DWDModel) or previous is self:
            raise ValueError(f"`previous` must be another DWDModel. Received: {previous!r}")
        learned = previous._consolidation
        self._wraps_trained = None
        self._consolidation.inherit(self, previous, learned, renamed or {}, dropped)

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """`keras.Model.summary`, with what is consolidated, its size, and how it pulls."""
        super().summary(*args, **kwargs)
        shown = _by_name(keras.Model.summary, *args, **kwargs).get("print_fn") or print
        shown("\n".join(self.consolidation.lines()))

    # Training and evaluation.

    def compile(
        self,
        *args: Any,
        communicator: Communicator | None = None,
        sharded: bool = False,
        **kwargs: Any,
    ) -> None:
        """`keras.Model.compile`, for one worker or several.

        Args:
            *args: Arguments of `keras.Model.compile`.
            communicator: The communicator that connects the workers. By default a
                `HorovodCommunicator` if `horovodrun` has started this process, else one worker.
            sharded: Whether each worker keeps only its share of the Fisher information, precision
                and anchor. All workers must then call `save` together.
            **kwargs: Arguments of `keras.Model.compile`.
        """
        reached = detect_communicator() if communicator is None else communicator
        workers = Workers(reached, sharded, self.workers.owners)
        arguments = _by_name(keras.Model.compile, *args, **kwargs)
        check_compile(self._consolidation, workers, arguments)
        super().compile(**arguments)
        warn_of_logits(self)
        self.fisher.forget_loss()
        self._consolidation.divide(self, workers)

    def get_compile_config(self) -> Any:
        """`keras.Model.get_compile_config`; a plain model can be compiled from it too."""
        config = super().get_compile_config()
        return config and dict(config)  # a copy: saving to HDF5 removes the optimizer

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile like a saved model, with the current workers."""
        arguments = {"sharded": self._sharded_in_file} | config
        self.compile(**keras.saving.deserialize_keras_object(arguments))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.fit`, after a check of arrays for missing data, NaN and invalid labels.

        The contents of datasets are not checked: a pass over them may be expensive, or impossible
        to repeat. With several workers, `batch_size` is the batch size of each.
        """
        arguments = _by_name(keras.Model.fit, x, y, *args, **kwargs)
        check_fit(self, arguments)
        validation = arguments.get("validation_data")
        for data in (x, validation[0] if isinstance(validation, (tuple, list)) else None):
            check_task_ids(self, data)
        consolidation = self._consolidation
        self._notice_nothing_held()
        if self.task_graph is not None:
            self.task_graph.check(self, consolidation.tasks_learned, consolidation.weights_digest)
            update = lambda: consolidation.update_task_graph(self)  # noqa: E731
            arguments["callbacks"] = self.task_graph.with_update(update, arguments.get("callbacks"))
        if self.workers.several:
            share_fit(self, consolidation, arguments)
        build_state(self, arguments)
        with _without_length(self.workers):
            history = super().fit(**arguments)
        if self._checks_strength and consolidation.has_learned and not self.workers.several:
            warn_of_strength(self, consolidation, history.history)
        return history

    def _notice_nothing_held(self) -> None:
        """Warn at the first `fit` if the wrapped model knows something that nothing holds."""
        trained, self._wraps_trained = self._wraps_trained, None
        consolidation = self._consolidation
        new = not consolidation.has_learned and self.compiled and not was_trained(self)
        holds = consolidation.pulled_variables(self) or self.distillation is not None
        if trained is not None and new and holds and self.workers.leads:
            warn_of_nothing_held(self, trained)

    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.evaluate`; workers share the examples and all return the same results."""
        arguments = _by_name(keras.Model.evaluate, x, y, *args, **kwargs)
        if self.workers.several and not evaluates_within_fit(arguments):
            share_evaluation(self.workers, arguments)
        with _without_length(self.workers):
            return super().evaluate(**arguments)

    def make_train_function(self, force: bool = False) -> Any:
        """Create the slots that the training step updates, then the train function of Keras."""
        current = self._consolidation.is_built(self)
        if self.train_function is not None and not force and current:
            return self.train_function
        self._consolidation.build(self)
        return super().make_train_function(force or not current)

    @tf.autograph.experimental.do_not_convert  # by a `tf.function` of the user: it takes seconds
    def train_step(self, data: Any) -> dict[str, Any]:
        """`keras.Model.train_step`, plus the pull and the update of the Fisher information.

        The gradient of the loss is exactly that of Keras. Before the first boundary the optimizer
        gets it unchanged; after it there is that of the distillation as well, if there is one.
        """
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise RuntimeError(
                "DWDModel does not train under a tf.distribute strategy with several replicas."
            )
        return self._prepare_step()(self, data)

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self, gradients: Sequence[Any]) -> None:
        """Update the weights by gradients of the loss and by the pull, as `fit` does.

        For a training loop of your own, in place of `optimizer.apply_gradients`. It does with the
        gradients what `fit` does, to the last bit: it averages them over the workers, and pulls in
        the gradient or by a proximal step, whichever suits the optimizer. It makes no online
        estimate: pass data to `consolidate`. A `tf.function` that calls this has to be made anew
        after each `consolidate`; else it raises an error.

        Args:
            gradients: The gradient of the loss for each of `model.trainable_variables`, or `None`.
                With mixed precision, that of `optimizer.scale_loss(loss)`.

        Raises:
            ValueError: If the model is not compiled, if the number of gradients is wrong, or if the
                model distils, which takes the data: call `train_on_batch` or `train_step` then.

        Example:

        ```python
        for x, y in task:
            with tf.GradientTape() as tape:
                loss = model.compute_loss(x, y, model(x, training=True))
            model.apply_gradients(tape.gradient(loss, model.trainable_variables))
        model.consolidate(task)
        ```
        """
        if not self.compiled:
            raise ValueError("Compile the model first: its optimizer updates the weights.")
        gradients = list(gradients)
        if len(gradients) != len(self.trainable_variables):
            raise ValueError(
                "`gradients` must hold one for each of `model.trainable_variables`, "
                f"{len(self.trainable_variables)}. Received: {len(gradients)}"
            )
        if self.distillation is not None:
            raise ValueError(
                "`apply_gradients` does not distil, as it has no data. Call `train_on_batch` or "
                "`train_step` in your loop instead."
            )
        self._prepare_step().update(self, gradients)

    def _prepare_step(self) -> TrainingStep:
        """The training step for a loop of the user's own, or for `fit`."""
        if not self._consolidation.is_built(self):
            with tf.init_scope():
                self._consolidation.build(self)
        self._consolidation.check_traced()
        return self._training_step()

    def _training_step(self) -> TrainingStep:
        return self._consolidation.training_step(self)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """`keras.Model.metrics`, and those that a wrapped subclassed model owns.

        Keras would ignore these, as those of any model within a model.
        """
        metrics = super().metrics
        inner = subclassed_within(self)
        if inner is None:
            return metrics
        of_layers = {id(m) for layer in inner.layers for m in layer.metrics}
        compiled = [m for m in metrics if id(m) not in of_layers]
        return [*compiled, *own_metrics(inner), *(m for m in metrics if id(m) in of_layers)]

    added_losses_hidden = False  # while the data loss alone is computed

    @property
    def losses(self) -> list[Any]:
        """`keras.Model.losses`."""
        return [] if self.added_losses_hidden else super().losses

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """`keras.Model.compute_metrics`; the results within a step are those of this worker."""
        self._in_step = True
        try:
            return super().compute_metrics(x, y, y_pred, sample_weight)
        finally:
            self._in_step = False

    def get_metrics_result(self) -> Any:
        """`keras.Model.get_metrics_result`, over the examples of all workers."""
        if self._in_step or not self.workers.several:
            return super().get_metrics_result()
        return metrics_result(self, self.workers, super().get_metrics_result)

    # Files and copies: files and deep copies include the state, clones do not.

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.save` to a `.keras` file, which includes the consolidation state.

        With several workers rank 0 writes; with sharded state all of them must call it.
        """
        if os.fspath(filepath).endswith((".h5", ".hdf5")):
            self._refuse_hdf5()
        if not self.workers.leads:
            return self._give_state()
        return super().save(filepath, *args, **kwargs)

    def save_weights(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.save_weights` with the state, which a plain model ignores when loading.

        With several workers rank 0 writes; with sharded state all of them must call it.
        """
        if not self.workers.leads:
            return self._give_state()
        with as_plain(self) as plain:
            if plain is self:
                return super().save_weights(*args, **kwargs)
            return plain.save_weights(*args, **kwargs)

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """`keras.Model.load_weights`; weights of a plain model leave the state unchanged."""
        with as_plain(self) as plain:
            if plain is self or os.fspath(filepath).endswith(".keras"):
                super().load_weights(filepath, *args, **kwargs)
            else:
                plain.load_weights(filepath, *args, **kwargs)

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = SAVED_MODEL,
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """`keras.Model.export` of the plain model, without the parts that only training needs.

        A SavedModel has the endpoint `serve`, which is also its default signature. It takes batches
        of any size, by the names of the model's inputs, and needs only TensorFlow. The file is as
        large as the weights. Existing content at `filepath` is replaced after everything is
        written, and is kept if writing fails. With several workers rank 0 exports.

        Args:
            filepath: A new or empty folder, or the folder of a SavedModel to replace; a file for
                other formats.
            format: `"tf_saved_model"`, or another format of Keras (`"onnx"`, `"litert"`, …).
            verbose: Whether to print the location of the exported model; true by default.
            input_signature: A `keras.InputSpec` for each input, instead of the shapes and dtypes of
                the model's inputs.
            **kwargs: Arguments for other formats, see `keras.Model.export`.

        Raises:
            ValueError: If `filepath` holds anything else, or if `format` or `input_signature` is
                invalid.

        Example:

        ```python
        model.export("saved", verbose=False)
        served = tf.saved_model.load("saved").signatures["serving_default"]
        outputs = served(pixels=x)["output_0"]  # by the names of the model's inputs
        ```
        """
        if self.workers.leads:
            export(self, filepath, format, verbose, input_signature, **kwargs)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """`keras.Model.quantize`; quantized variables do not change any more afterwards."""
        arguments = _by_name(keras.Model.quantize, *args, **kwargs)
        mode = arguments.get("mode") or getattr(arguments.get("config"), "mode", None)
        if mode != "int8" and self.tasks_learned:
            raise ValueError(
                "`mode` must be 'int8' for a model that has learned tasks: others replace what "
                "these are about. Quantise a clone with the same weights, to be used and not "
                f"trained. Received: {mode!r}"
            )
        super().quantize(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The configuration of the model, including its settings but not its state."""
        if within_hdf5():  # by `keras.saving.save_model`
            self._refuse_hdf5()
        # Not in the configuration of `compile`, which a plain model must accept.
        sharded = {"sharded": True} if self.workers.sharded else {}
        return super().get_config() | self._settings() | sharded

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """A model from the result of `get_config`."""
        config = dict(config)
        sharded = config.pop("sharded", False)
        of_graph = config["layers"] if "input_layers" in config else ()
        names = [layer["name"] for layer in of_graph if layer["inbound_nodes"]]
        model = super().from_config(config, custom_objects)
        model._sharded_in_file = sharded
        inner = subclassed_within(model)
        if inner is not None and len(names) == 1:
            inner.name = names[0]  # a subclassed model may not have its name in its configuration
        return model

    def _settings(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "regularizer": serialize(self.regularizer),
            "fisher": serialize(self.fisher),
            "grouping": None if self.grouping is None else serialize(self.grouping),
            "task_graph": None if self.task_graph is None else serialize(self.task_graph),
            "distillation": None if self.distillation is None else serialize(self.distillation),
        }

    def _refuse_hdf5(self) -> None:
        if self._consolidation.has_learned:
            raise ValueError(
                "`filepath` must end in '.keras': the older HDF5 format has no place for the "
                "consolidation state. Received a path that ends in '.h5' or '.hdf5'."
            )

    def _give_state(self) -> None:
        """Take part in saving a state that is divided among the workers."""
        self._consolidation.save(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model, as if saved and loaded, that shares nothing with the original."""
        return deep_copy(self, memo)

    def __copy__(self) -> Any:
        """A deep copy: a model cannot have copies that share its layers."""
        return copy.deepcopy(self)

    def _prepare_clone(self, outputs: list[keras.KerasTensor]) -> None:
        """Attach the settings to the outputs of a clone: `clone_model` does not pass them on."""
        mark_clone(outputs, self._settings())


def _default_strength(model: keras.Model, distillation: Distillation | None) -> float:
    """λ for a model that is given none."""
    heads = any(isinstance(layer, TaskHeads) for layer in layers_within(model))
    return 20.0 if distillation is not None and heads else DEFAULT_STRENGTH


def _hint(kind: type, name: str) -> str:
    """Where a setting that a model does not have may belong, or what it may be a typo of."""
    if re.match(r"lam|.*lambda|.*lmb|importance$", name.lower()):
        return "The strength λ of the penalty is `strength`."
    for part, owner in (("regularizer", DWDRegularizer), ("fisher", KroneckerFisher)):
        if name in inspect.signature(owner).parameters:
            return f"Pass `{part}={owner.__name__}({name}=…)`."
    parameters = [p for c in kind.__mro__ if issubclass(c, DWDModel) for p in _parameters(c)]
    return nearest(name, [*parameters, *_OF_FUNCTIONAL]).strip()


def _parameters(kind: type) -> list[str]:
    """The keyword arguments of a class."""
    parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _by_name(method: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a method of `keras.Model` by name, without `self`."""
    arguments = inspect.signature(method).bind(None, *args, **kwargs).arguments
    arguments.pop("self")
    return arguments | arguments.pop("kwargs", {})


@contextmanager
def _without_length(workers: Workers) -> Iterator[None]:
    """Suppress Keras' warning on datasets of unknown length, which several workers use."""
    if not workers.several:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        yield


for_hub_tasks(DWDModel)  # files name its class
