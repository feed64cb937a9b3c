"""What is different about the files, copies and clones of a model that holds a state."""

import copy
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd import growing, state
from keras_dwd.distributed.model import DistributedModel, arguments
from keras_dwd.distributed.workers import Workers
from keras_dwd.variables import Arrays

# The state's place among a model's attributes. Keras reads and writes them in order, private ones
# last: this comes after all of them, as it holds what Keras changes in saving. Files of a plain
# model have no such place, and a plain model does not look for it.
_PLACE = "~consolidation"
_SETTINGS = ("regularizer", "fisher", "grouping", "task_graph")


class _Consolidation(keras.layers.Layer):
    """The consolidation state as Keras saves and loads it: next to the layers, in none of them."""

    def __init__(self, model: "SavedModel"):
        super().__init__(name="consolidation")
        self.model = weakref.ref(model)  # weakly: Keras would walk into it again

    def save_own_variables(self, store: Any) -> None:
        state.save(self.model(), store)

    def load_own_variables(self, store: Any) -> None:
        # A file cannot be iterated over itself.
        saved = {key: np.asarray(store[key]) for key in list(store.keys())}
        if saved:
            state.restore(self.model(), saved)


class SavedModel(DistributedModel):
    """A model whose consolidation state is kept in files and deep copies, and in no clone.

    The state is no weight of the model. Weights are where a plain model has them, so that files of
    weights can be exchanged with it in both directions.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.__dict__[_PLACE] = _Consolidation(self)  # not tracked: no layer of the model

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.save`, as `.keras`, with the consolidation state."""
        if os.fspath(filepath).endswith((".h5", ".hdf5")) and state.has_learned(self):
            raise ValueError(
                "`filepath` must end in '.keras': the older HDF5 format has no place for the "
                f"consolidation state. Received: {filepath!r}"
            )
        return super().save(filepath, *args, **kwargs)

    def save_weights(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.save_weights`: a plain model can load them, and leaves the state alone."""
        with self._as_plain() as plain:
            if plain is self or not self.workers.leads:
                return super().save_weights(*args, **kwargs)
            return plain.save_weights(*args, **kwargs)

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """`keras.Model.load_weights`, of a plain model too: then the state stays as it is."""
        with self._as_plain() as plain:
            if plain is self or os.fspath(filepath).endswith(".keras"):
                super().load_weights(filepath, *args, **kwargs)
            else:
                plain.load_weights(filepath, *args, **kwargs)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """`keras.Model.quantize`; what is quantised stays as it is from then on."""
        given = arguments(keras.Model.quantize, *args, **kwargs)
        chosen = given.get("mode") or getattr(given.get("config"), "mode", None)
        if chosen != "int8" and self.tasks_learned:
            raise ValueError(
                "`mode` must be 'int8' for a model that has learned tasks: others replace what "
                "these are about. Quantise a clone with the same weights, to be used and not "
                f"trained. Received: {chosen!r}"
            )
        super().quantize(*args, **kwargs)

    def inherit(
        self,
        previous: "SavedModel",
        renamed: Mapping[str, str] | None = None,
        dropped: Sequence[str] = (),
    ) -> None:
        """Go on from another model: take over its weights and its consolidation state.

        For a model that has grown: with more layers, more heads, more classes. A variable goes
        by its path, layers and name, and may have become larger along any axis: what was there
        comes first in it and is pulled as before. All that is new is free (in matrices of more than
        4,096 rows nearly so). The online estimate of a task that `previous` has not consolidated
        starts anew. What this model has learned so far is replaced.

        Args:
            previous: A `DWDModel`, which stays as it is. It may share layers with this one.
            renamed: New paths by old ones, of layers (`{"head": "head_1"}`) or variables.
            dropped: Patterns for the paths of variables of `previous` to give up, in which `*`
                stands for anything: `["old_head/*"]`.

        Raises:
            ValueError: If a variable of `previous` has no place here and was not dropped, or
                `previous` has a task graph. Neither model is changed then.

        Example:

        ```python
        larger = DWDModel.from_model(larger_network)
        larger.inherit(model)
        larger.compile("adam", loss)
        ```
        """
        growing.inherit(self, previous, renamed or {}, dropped)

    def give_state(self) -> None:
        """Take part in saving what workers have divided."""
        state.save(self, {})

    def divide_state(self, workers: Workers) -> None:
        """Go on with other workers, each with its share of the state."""
        learned: Arrays = {}
        if self.workers.sharded != workers.sharded:
            state.save(self, learned)
        self.workers = workers
        if learned:
            state.restore(self, learned)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A model like one loaded from a file of this one; it shares nothing with it."""
        types = {type(layer).__name__: type(layer) for layer in self._flatten_layers()}
        with keras.saving.custom_object_scope(types):
            from_file: Any = self.__reduce__()  # as Keras has it: a file in memory, no pickle
            load, arguments = from_file
            memo[id(self)] = made = load(*arguments)
        return made

    def __copy__(self) -> Any:
        """The same: of a model there is no copy that shares its layers."""
        return copy.deepcopy(self)

    @contextmanager
    def _as_plain(self) -> Iterator[keras.Model]:
        """The model whose layers are where those of the plain model are, with the state in it.

        That is this one, but for a subclassed model that `from_model` wrapped.
        """
        inner = [x for x in self.layers if not isinstance(x, keras.layers.InputLayer)]
        plain = inner[0] if len(inner) == 1 else None
        if not isinstance(plain, keras.Model) or getattr(plain, "inputs", None):
            yield self
            return
        before = dict(vars(plain))
        vars(plain)[_PLACE] = self.__dict__[_PLACE]
        if self.compiled:
            vars(plain)["optimizer"] = self.optimizer
        try:
            yield plain
        finally:
            vars(plain).clear()
            vars(plain).update(before)

    def _run_through_graph(self, *args: Any, **kwargs: Any) -> Any:
        """What `keras.models.clone_model` makes a clone's outputs with: let them know whose."""
        outputs = super()._run_through_graph(*args, **kwargs)
        config = None
        for tensor in tf.nest.flatten(outputs):
            if keras.utils.is_keras_tensor(tensor) and hasattr(tensor, "_keras_history"):
                config = config or {k: v for k, v in self.get_config().items() if k in _SETTINGS}
                tensor._settings_of_clone = config
        return outputs


def cloned_settings(outputs: Any) -> dict[str, Any]:
    """The settings of the model that `outputs` are a clone of; none if they are not.

    `keras.models.clone_model` calls the class of a model with inputs and outputs alone.
    """
    found: dict[str, Any] = {}
    for tensor in tf.nest.flatten(outputs):
        found = getattr(tensor, "__dict__", {}).pop("_settings_of_clone", found)
    return found
