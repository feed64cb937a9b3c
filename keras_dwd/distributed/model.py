"""A Keras model that several workers train together."""

import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from keras_dwd.distributed.communicator import Communicator, here
from keras_dwd.distributed.fitting import check_compile, share_evaluation, share_fit
from keras_dwd.distributed.workers import Workers
from keras_dwd.export import SAVED_MODEL, export


def arguments(method: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of a method of `keras.Model`, by name, without `self`."""
    given = inspect.signature(method).bind(None, *args, **kwargs).arguments
    given.pop("self")
    return given | given.pop("kwargs", {})


@contextmanager
def _without_length() -> Iterator[None]:
    """Without the warning of Keras that a dataset, as those evaluated on, knew no length."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        yield


class DistributedModel(keras.Model):
    """What of `keras.Model` is different with several workers, each of which runs the same script.

    `fit` and `evaluate` divide the data, metrics are of all of it, and one worker writes files.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.workers = Workers()
        self._in_step = False

    def compile(
        self,
        *args: Any,
        communicator: Communicator | None = None,
        sharded: bool = False,
        **kwargs: Any,
    ) -> None:
        """`keras.Model.compile`, for one worker or several.

        Args:
            *args: Of `keras.Model.compile`.
            communicator: How other workers are reached; by default as `horovodrun` says, if it
                started this process. See `HorovodCommunicator`.
            sharded: Whether each worker keeps only its share of the Fisher information, precision
                and anchor. All workers must then call `save` together.
            **kwargs: Of `keras.Model.compile`.
        """
        reached = here() if communicator is None else communicator
        workers = Workers(reached, sharded, self.workers.owners)
        given = arguments(keras.Model.compile, *args, **kwargs)
        check_compile(self, workers, given)
        super().compile(**given)
        self.divide_state(workers)

    def divide_state(self, workers: Workers) -> None:
        """Go on with other workers."""
        self.workers = workers

    def get_compile_config(self) -> Any:
        """That of `keras.Model`, and whether state is sharded."""
        config = super().get_compile_config()
        return config and config | {"sharded": self.workers.sharded}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as a saved model was, with the workers that there are now."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.fit`, where `batch_size` is that of each worker."""
        given = arguments(keras.Model.fit, x, y, *args, **kwargs)
        if not self.workers.several:
            return super().fit(**given)
        share_fit(self, given)
        with _without_length():
            return super().fit(**given)

    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.evaluate`; workers share the examples and have the same results."""
        given = arguments(keras.Model.evaluate, x, y, *args, **kwargs)
        if not self.workers.several or given.get("_use_cached_eval_dataset"):
            return super().evaluate(**given)
        share_evaluation(self, given)
        with _without_length():
            return super().evaluate(**given)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """`keras.Model.compute_metrics`: within a step, of this worker alone."""
        self._in_step = True
        try:
            return super().compute_metrics(x, y, y_pred, sample_weight)
        finally:
            self._in_step = False

    def get_metrics_result(self) -> Any:
        """`keras.Model.get_metrics_result`, of the examples that all workers have seen."""
        if self._in_step or not self.workers.several:
            return super().get_metrics_result()
        return self.workers.metrics_result(self, super().get_metrics_result)

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.save`, by rank 0; with sharded state all workers must call it."""
        return super().save(*args, **kwargs) if self.workers.leads else self.give_state()

    def save_weights(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.save_weights`, by rank 0; with sharded state all workers must call it."""
        return super().save_weights(*args, **kwargs) if self.workers.leads else self.give_state()

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = SAVED_MODEL,
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """`keras.Model.export`, of the plain model without anything that is for training.

        A SavedModel has the endpoint `serve`, which is also its default signature: it takes
        batches of any size, by the names of the model's inputs, and needs TensorFlow alone. Its
        size is that of the weights. What was at `filepath` is replaced once all is written, and
        left as it was if that fails. With several workers rank 0 exports.

        Args:
            filepath: A new or empty folder, or one of a SavedModel, which is replaced; a file for
                the other formats.
            format: `"tf_saved_model"`, or another that Keras knows (`"onnx"`, `"litert"`, …).
            verbose: Whether to print where the model is; yes by default.
            input_signature: A `keras.InputSpec` for each input, in place of shapes and dtypes of
                the model's own.
            **kwargs: Of the other formats, see `keras.Model.export`.

        Raises:
            ValueError: If there is something else at `filepath`, or if `format` or
                `input_signature` does not fit.

        Example:

        ```python
        model.export("saved", verbose=False)
        served = tf.saved_model.load("saved").signatures["serving_default"]
        logits = served(image=x, task=ids)["output_0"]
        ```
        """
        if self.workers.leads:
            export(self, filepath, format, verbose, input_signature, **kwargs)

    def give_state(self) -> None:
        """Take part in saving what workers have divided."""
