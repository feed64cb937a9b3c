"""The task graph: which earlier tasks the current one has much in common with."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import check_inputs, integer, number
from keras_dwd.curvature.taps import Taps
from keras_dwd.files import ArrayFile, FileError, read_arrays, read_json, write_arrays, write_json
from keras_dwd.tasks.similarity import linear_cka
from keras_dwd.variables import Arrays, Variables, by_path

_INDEX = "graph.json"
_PROBE = "probe.safetensors"


@keras.saving.register_keras_serializable("keras_dwd")
class TaskGraph:
    """Pulls a model towards what it was after those earlier tasks that resemble the current one.

    Tasks are the nodes of a graph. The weight w_ij of an edge says how much tasks i and j have in
    common: the linear CKA of what the model makes of one set of probe inputs after task i,
    and now, while it learns task j. It adds to the penalty

        R = μ/2 · Σ_{i<j} w_ij ‖θ − θ*_i‖²

    which is folded into one further anchor, Σ_i w_ij θ*_i / Σ_i w_ij, and one number, μ Σ_i w_ij:
    a training step costs the same for any number of tasks. The weights are computed at a boundary
    and anew at the end of each epoch. What that needs of earlier tasks, θ*_i and the representation
    of the probe inputs, is in files in `folder`, read piece by piece. Heads of `TaskHeads` have no
    part in it.

    Args:
        folder: Where these files are; made if it is not there. It belongs to one model, and is
            needed again with a model that is loaded.
        probe: Inputs of the model, unlabelled: an array, or a tuple or dictionary of them as the
            model takes them. A few hundred are enough. `None` where `folder` has them already, or
            with `weights`.
        strength: μ ≥ 0.
        layer: Name of the layer whose input is the representation; by default the last layer that
            has weights.
        weights: w_ij ≥ 0 given by you, of shape `(tasks, tasks)`, instead of CKA.
        batch_size: Of CKA and of the pass over `probe`.
        unbiased: Of `linear_cka`.

    Example:

    ```python
    graph = TaskGraph("graph", probe=x[:500], strength=0.001)
    model = DWDModel.from_model(network, task_graph=graph)
    ```
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        probe: Any = None,
        strength: float = 0.001,
        layer: str | None = None,
        weights: Any = None,
        batch_size: int = 256,
        unbiased: bool = False,
    ):
        self.folder = Path(folder)
        self.strength = number("strength", strength, 0)
        self.layer = layer
        self.batch_size = integer("batch_size", batch_size, 4)
        self.unbiased = bool(unbiased)
        self.given = None if weights is None else np.asarray(weights, "float64")
        if self.given is not None:
            square = self.given.ndim == 2 and self.given.shape[0] == self.given.shape[1]
            if not (square and np.isfinite(self.given).all() and (self.given >= 0).all()):
                raise ValueError(
                    "`weights` must be a square matrix of numbers >= 0, a row and a column for "
                    f"each task. Received: {weights!r}"
                )
            if not np.allclose(self.given, self.given.T):
                raise ValueError(f"`weights` must be symmetric. Received: {weights!r}")
        self._weights: list[list[float]] = []
        self._digests: list[str] = []  # of the model's weights after each task
        if (self.folder / _INDEX).exists():
            self._weights, self._digests = self._read_index()
        self._there = list(self._digests)  # in the folder, when last seen
        if probe is not None:
            self._keep_probe(probe)
        elif self.given is None and not (self.folder / _PROBE).exists():
            raise ValueError(
                f"`probe` is needed: {str(self.folder)!r} holds no probe inputs, and no `weights` "
                "are given."
            )

    @property
    def matrix(self) -> np.ndarray:
        """w_ij of all tasks learned so far, symmetric with ones on the diagonal."""
        found = np.eye(len(self._weights))
        for j, row in enumerate(self._weights):
            found[j, :j] = found[:j, j] = row
        return found

    @property
    def tasks(self) -> int:
        """The number of tasks learned so far."""
        return len(self._weights)

    def check(self, model: Any) -> None:
        """Raise `ValueError` if these settings, or what is in `folder`, do not fit a model."""
        learned = model.tasks_learned
        if (self.folder / _INDEX).exists() and self._read_index()[1] != self._there:
            raise ValueError(
                f"`folder` {str(self.folder)!r} holds other tasks than when this graph was made: "
                "another model has gone on in it. Each needs a folder of its own."
            )
        if 0 < learned < self.tasks and self._digests[learned - 1] == model.weights_digest.hex():
            # The model is an earlier one, saved before tasks that were learned and lost.
            self.rewind(learned)
        if self.tasks != learned:
            raise ValueError(
                f"`folder` {str(self.folder)!r} holds {self.tasks} tasks, but the model has "
                f"learned {model.tasks_learned}: it belongs to another model."
            )
        if self.layer is not None and self.layer not in {x.name for x in _layers(model)}:
            known = ", ".join(layer.name for layer in _layers(model))
            raise ValueError(f"`layer` must be one of {known}. Received: {self.layer!r}")
        if self.given is not None and self.tasks >= len(self.given):
            raise ValueError(
                f"`weights` must have a row for each task. Received {len(self.given)} rows, and "
                f"task {self.tasks + 1}."
            )
        if self.given is None:
            try:
                batch = next(self._pieces())
                check_inputs(model, batch)
                self._represented(model, batch)
            except (ValueError, TypeError) as error:
                raise FileError(f"`probe` in {str(self.folder)!r}: {error}") from None

    def rewind(self, tasks: int) -> None:
        """Forget all but the first tasks: those after them were lost with the model."""
        del self._weights[tasks:], self._digests[tasks:]

    def add(self, model: keras.Model, digest: bytes) -> None:
        """Keep what a task has left: it is an earlier one from now on.

        Args:
            model: As it is after the task.
            digest: Of its weights.
        """
        row = self.weights_to(model).tolist()
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {
            f"weights/{path}": np.asarray(variable, "float32")
            for path, variable in _shared(by_path(model)).items()
        }
        if self.given is None:
            kept["representation"] = self.representation(model)
        write_arrays(self._path(self.tasks), kept, {})
        weights, digests = [*self._weights, row], [*self._digests, digest.hex()]
        index = {"version": 1, "weights": weights, "digests": digests}
        write_json(self.folder / _INDEX, index)
        self._weights, self._digests = weights, digests
        self._there = list(digests)

    def weights_to(self, model: keras.Model) -> np.ndarray:
        """w_ij between each earlier task and what the model is now, of shape `(tasks,)`."""
        if self.given is not None:
            last = self.tasks >= len(self.given)  # nothing comes after it
            return np.zeros(self.tasks) if last else self.given[: self.tasks, self.tasks]
        if not self.tasks:
            return np.zeros(0)
        now = self.representation(model)
        found = []
        for i in range(self.tasks):
            then = self._kept(self._file(i), "representation", (len(now), None))
            cka = linear_cka(then, now, batch_size=self.batch_size, unbiased=self.unbiased)
            found.append(max(cka, 0.0))
        return np.array(found)

    def with_update(self, model: Any, callbacks: Any) -> Any:
        """The callbacks of a `fit`, and one that weighs the edges anew at the end of each epoch."""
        update = _Update(model)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            if not any(isinstance(each, _Update) for each in callbacks.callbacks):
                callbacks.callbacks.append(update)
            return callbacks
        if callbacks is None:
            return [update]
        return [update, *(callbacks if isinstance(callbacks, (list, tuple)) else [callbacks])]

    def center(self, weights: np.ndarray, variables: Variables) -> tuple[float, Arrays]:
        """μ Σ w and Σ w θ* / Σ w by path, of the variables that are shared by the tasks."""
        if not self.strength or not self.tasks:
            return 0.0, {}
        total = float(weights.sum())
        shares = weights / total if total else weights
        centers: Arrays = {}
        trainable = {path: v for path, v in _shared(variables).items() if v.trainable}
        for i, share in enumerate(shares):
            file = self._file(i)
            for path, variable in trainable.items():
                shape = tuple(variable.shape)
                then = share * self._kept(file, f"weights/{path}", shape).astype("float64")
                centers[path] = centers[path] + then if i else then
        return self.strength * total, centers

    def _kept(self, file: ArrayFile, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """What a task has left, of a known shape."""
        array = file[name]
        fits = len(array.shape) == len(shape) and all(
            expected in (None, size) for size, expected in zip(array.shape, shape, strict=True)
        )
        if not (fits and array.dtype == "float32" and np.isfinite(array).all()):
            raise FileError(
                f"`folder`: {str(file.path)!r} has {name!r} as {array.dtype} of shape "
                f"{array.shape}. Expected are finite float32 of {shape}."
            )
        return array

    def _file(self, task: int) -> ArrayFile:
        return ArrayFile(self._path(task))

    def _path(self, task: int) -> Path:
        return self.folder / f"task_{task}.safetensors"

    def representation(self, model: keras.Model) -> np.ndarray:
        """What the model makes of the probe inputs, `(n, d)`, in inference mode."""
        return np.concatenate([self._represented(model, batch) for batch in self._pieces()])

    def graph(self) -> Any:
        """The graph as a `networkx.Graph`, tasks as nodes, `weight` of edges; needs networkx."""
        import networkx

        made = networkx.Graph()
        made.add_nodes_from(range(self.tasks))
        for j, row in enumerate(self._weights):
            made.add_weighted_edges_from((i, j, weight) for i, weight in enumerate(row))
        return made

    def write_graphml(self, path: str | os.PathLike[str]) -> None:
        """Write the graph as GraphML; needs networkx."""
        import networkx

        networkx.write_graphml(self.graph(), path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the matrix to an image file; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.subplots()
        image = axes.imshow(self.matrix, vmin=0, vmax=1)
        axes.set(xlabel="task", ylabel="task", title="w, what tasks have in common")
        figure.colorbar(image)
        figure.savefig(path)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments; the probe inputs are in `folder`."""
        return {
            "folder": str(self.folder),
            "strength": self.strength,
            "layer": self.layer,
            "weights": None if self.given is None else self.given.tolist(),
            "batch_size": self.batch_size,
            "unbiased": self.unbiased,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TaskGraph":
        """The inverse of `get_config`."""
        return cls(**config)

    def _represented(self, model: keras.Model, batch: Any) -> np.ndarray:
        named = [layer for layer in _layers(model) if layer.name == self.layer]
        layer = (named or _layers(model))[-1]
        with Taps([layer]) as taps:
            model(batch, training=False)
        calls = taps.calls(layer)
        if not calls or not calls[0].inputs:
            raise ValueError(
                f"What goes into the layer {layer.name!r} cannot be followed: name another `layer`."
            )
        inputs = np.asarray(calls[0].inputs[0], "float32")
        return inputs.reshape(len(inputs), -1)

    def _keep_probe(self, probe: Any) -> None:
        parts = probe if isinstance(probe, Mapping) else dict(enumerate(_as_tuple(probe)))
        sizes = {len(part) for part in parts.values()}
        if len(sizes) != 1 or min(sizes) < 4:
            raise ValueError(
                f"`probe` must have at least 4 examples, of each input as many. Received: {sizes}"
            )
        for part in parts.values():
            if not np.isfinite(np.asarray(part)).all():
                raise ValueError("`probe` must be finite. It has values that are NaN or Inf.")
        named = {str(name): np.asarray(part) for name, part in parts.items()}
        if self.tasks and self.given is None:
            held, _ = read_arrays(self.folder / _PROBE)
            if held.keys() != named.keys() or any(
                not np.array_equal(held[name], named[name]) for name in held
            ):
                raise ValueError(
                    f"`probe` differs from that in `folder` {str(self.folder)!r}, by which "
                    f"{self.tasks} tasks are represented: leave it out, or take another folder."
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_arrays(self.folder / _PROBE, named, {})

    def _probe(self) -> Any:
        """The probe inputs, in the structure that the model takes."""
        parts, _ = read_arrays(self.folder / _PROBE)
        sizes = {part.shape[:1] for part in parts.values()}
        if len(sizes) != 1 or sizes & {(), (0,)}:
            raise FileError(f"`folder`: {str(self.folder / _PROBE)!r} holds no probe inputs.")
        if all(name.isdigit() for name in parts):
            ordered = tuple(parts[str(i)] for i in range(len(parts)))
            return ordered[0] if len(ordered) == 1 else ordered
        return parts

    def _pieces(self) -> Iterator[Any]:
        """The probe inputs, batch by batch."""
        probe = self._probe()
        for start in range(0, len(tf.nest.flatten(probe)[0]), self.batch_size):
            yield tf.nest.map_structure(
                lambda a, start=start: tf.constant(a[start : start + self.batch_size]), probe
            )

    def _read_index(self) -> tuple[list[list[float]], list[str]]:
        try:
            index = read_json(self.folder / _INDEX)
            weights = [[number("w", w, 0) for w in row] for row in index["weights"]]
            digests = [bytes.fromhex(digest).hex() for digest in index["digests"]]
            lengths = [len(row) for row in weights]
            if index["version"] != 1 or lengths != list(range(len(digests))):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise FileError(
                f"`folder`: {str(self.folder / _INDEX)!r} is no index of a task graph."
            ) from None
        return weights, digests


class _Update(keras.callbacks.Callback):
    """Weighs the edges of a model's task graph at the end of each epoch."""

    def __init__(self, model: Any):
        super().__init__()
        self.learner = model  # a `CallbackList` made before gives callbacks no model

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.learner.weigh_tasks()


def _layers(model: keras.Model) -> list[keras.Layer]:
    """The layers that have weights of their own, in order."""
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if layer._trainable_variables or layer._non_trainable_variables
    ]


def _shared(variables: Variables) -> Variables:
    """Variables of numbers that all tasks share."""
    return {
        path: v
        for path, v in variables.items()
        if "float" in v.dtype and not getattr(v, "per_task", False)
    }


def _as_tuple(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)
