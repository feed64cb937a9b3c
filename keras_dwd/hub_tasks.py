"""Keeps what a task model of KerasHub can do, such as `generate`, when it is wrapped.

A task model of KerasHub has nothing to do with a task that is learned: it is a model with a
preprocessor, such as `GemmaCausalLM`. The package is not imported here.
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.keras_private import evaluates_within_fit, weighted_metrics

# An attribute that Keras neither tracks nor visits when it saves a model: its name begins with two
# underscores.
_TASK = "__hub_task"


def is_hub_task(model: Any) -> bool:
    """Whether a model is a task model of KerasHub."""
    return any(
        base.__name__ == "Task" and base.__module__.startswith("keras_hub.")
        for base in type(model).__mro__
    )


def hub_task_of(model: keras.Model) -> Any:
    """The task model of KerasHub that `from_model` wrapped, or `None`."""
    return vars(model).get(_TASK)


class HubTask(keras.Model):
    """The methods of a `DWDModel` around a task model of KerasHub, with which it shares its layers.

    Strings and whatever else its preprocessor takes can be passed to `fit`, `evaluate`, `predict`,
    `consolidate` and the methods for one batch. `compile` has the arguments and defaults of the
    task model. Other attributes, such as `generate`, `backbone` and `save_to_preset`, are its own.

    An array is preprocessed as a whole before `fit` begins, a `tf.data.Dataset` batch by batch.
    """

    def __getattr__(self, name: str) -> Any:
        """An attribute of the task model; called for what this model does not have."""
        task = hub_task_of(self)
        if task is not None and not name.startswith("_"):
            return getattr(task, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def preprocessor(self) -> Any:
        """The preprocessor of the task model, or `None` for data that is preprocessed already."""
        return getattr(hub_task_of(self), "preprocessor", None)

    @preprocessor.setter
    def preprocessor(self, preprocessor: Any) -> None:
        hub_task_of(self).preprocessor = preprocessor

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile with the arguments and defaults of the task model, such as `sampler`."""
        task = hub_task_of(self)
        if task is None:  # a clone
            super().compile(*args, **kwargs)
            return
        names = {"communicator", "sharded"} & kwargs.keys()
        own: dict[str, Any] = {name: kwargs.pop(name) for name in names}
        if hasattr(task, "sampler"):
            kwargs.setdefault("sampler", task.sampler)
        task.compile(*args, **kwargs)
        for name in ("optimizer", "loss"):
            own[name] = getattr(task, name)
        own["weighted_metrics"] = weighted_metrics(task)
        named = dict(zip(("optimizer", "loss"), args, strict=False))
        arguments = {n: v for n, v in (kwargs | named).items() if n != "sampler"}
        super().compile(**arguments | own)

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`fit` on what the preprocessor takes."""
        x, y, kwargs["sample_weight"] = self._prepared(x, y, kwargs.get("sample_weight"))
        validation = kwargs.get("validation_data")
        if validation is not None:
            parts = validation if isinstance(validation, (tuple, list)) else (validation,)
            prepared = self._prepared(*parts)
            whole = isinstance(prepared[0], tf.data.Dataset)
            kwargs["validation_data"] = prepared[0] if whole else prepared
        return super().fit(x, y, *args, **kwargs)

    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`evaluate` on what the preprocessor takes."""
        if not evaluates_within_fit(kwargs):  # whose data are prepared
            x, y, kwargs["sample_weight"] = self._prepared(x, y, kwargs.get("sample_weight"))
        return super().evaluate(x, y, *args, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """`predict` on what the preprocessor takes."""
        return super().predict(self._prepared(x)[0], *args, **kwargs)

    def train_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, **kw: Any) -> Any:
        """`train_on_batch` on what the preprocessor takes."""
        return super().train_on_batch(*self._prepared(x, y, sample_weight), **kw)

    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, **kw: Any) -> Any:
        """`test_on_batch` on what the preprocessor takes."""
        return super().test_on_batch(*self._prepared(x, y, sample_weight), **kw)

    def predict_on_batch(self, x: Any) -> Any:
        """`predict_on_batch` on what the preprocessor takes."""
        return super().predict_on_batch(self._prepared(x)[0])

    def consolidate(
        self, x: Any = None, y: Any = None, sample_weight: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """`DWDModel.consolidate` on what the preprocessor takes."""
        x = kwargs.pop("data", None) if x is None else x
        if x is not None:
            x, y, sample_weight = self._prepared(x, y, sample_weight)
        parent: Any = super()
        parent.consolidate(x, y, sample_weight, *args, **kwargs)

    def _prepared(self, x: Any, y: Any = None, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        """Inputs, labels and weights as the preprocessor gives them."""
        if self.preprocessor is None or x is None:
            return x, y, sample_weight
        prepare = hub_task_of(self).preprocess_samples
        if isinstance(x, tf.data.Dataset):
            return x.map(prepare, num_parallel_calls=tf.data.AUTOTUNE), None, None
        if isinstance(x, tuple):
            x, y, sample_weight = (*x, None, None)[:3]
        prepared = keras.utils.unpack_x_y_sample_weight(prepare(_as_lists(x), y, sample_weight))
        x, y, sample_weight = (
            None if part is None else keras.tree.map_structure(np.asarray, part)
            for part in prepared
        )
        return x, y, sample_weight

    def get_config(self) -> dict[str, Any]:
        """The configuration of the task model, with the settings of this one."""
        task = hub_task_of(self)
        if task is None:
            return super().get_config()
        settings: Any = self._settings()
        sharded = {"sharded": True} if self.workers.sharded else {}
        serialized: Any = keras.saving.serialize_keras_object(task)
        serialized.pop("compile_config", None)  # it is that of this model
        return {"task": serialized, **settings, **sharded}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Any:
        """A model from the result of `get_config`."""
        config = dict(config)
        if "task" not in config:
            return super().from_config(config, custom_objects)
        sharded = config.pop("sharded", False)
        task = keras.saving.deserialize_keras_object(config.pop("task"), custom_objects)
        kind: Any = cls
        model = kind.from_model(task, **config)
        model._sharded_in_file = sharded
        return model


def _as_lists(x: Any) -> Any:
    """Arrays of strings as lists, which are what tokenizers take."""
    if isinstance(x, dict):
        return {name: _as_lists(value) for name, value in x.items()}
    strings = isinstance(x, np.ndarray) and x.dtype.kind in "USO"
    return x.tolist() if strings else x


# Each model class with its subclass for KerasHub task models.
_KINDS: dict[type, type[keras.Model]] = {}


def for_hub_tasks(kind: type[keras.Model]) -> type[keras.Model]:
    """A subclass of `DWDModel`, or of a subclass of it, for task models of KerasHub."""
    if issubclass(kind, HubTask) or kind in _KINDS:
        return _KINDS.get(kind, kind)
    subclass = type(kind.__name__, (HubTask, kind), {"__module__": kind.__module__})
    name = f"{kind.__name__}OfHubTask"
    _KINDS[kind] = keras.saving.register_keras_serializable("keras_dwd", name)(subclass)
    return _KINDS[kind]


def keep_hub_task(model: keras.Model, task: keras.Model) -> None:
    """Let a model answer for the task model of KerasHub whose layers it shares."""
    vars(model)[_TASK] = task
