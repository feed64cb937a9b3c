"""The task graph: pulls a model towards its weights after similar earlier tasks."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import FixedSettings, integer, number
from keras_dwd.curvature.layer_recorder import LayerRecorder
from keras_dwd.files import ArrayFile, FileError, read_arrays, read_json, write_arrays, write_json
from keras_dwd.keras_private import layers_within, own_variables
from keras_dwd.learner import Learner
from keras_dwd.task_graph.similarity import linear_cka
from keras_dwd.training.data import check_inputs
from keras_dwd.variables import Arrays, Variables, by_path

_INDEX = "graph.json"
_PROBE = "probe.safetensors"


@keras.saving.register_keras_serializable("keras_dwd")
class TaskGraph(FixedSettings):
    """Pulls a model towards its weights after those earlier tasks that resemble the current one.

    Tasks are the nodes of a graph. The edge weight w_ij is the similarity of tasks i and j: the
    linear CKA between the model's representations of a set of probe inputs after task i and now,
    while it learns task j. The graph adds this term to the penalty:

        R = μ/2 · Σ_{i<j} w_ij ‖θ − θ*_i‖²

    The term is folded into one additional anchor, Σ_i w_ij θ*_i / Σ_i w_ij, and one number,
    μ Σ_i w_ij, so that a training step costs the same for any number of tasks. The edge weights are
    computed at each task boundary and at the end of each epoch. The weights θ*_i and the probe
    representations of earlier tasks are stored as files in `folder`. Variables of `TaskHeads` are
    excluded.

    Args:
        folder: Folder for these files, created if it does not exist. It belongs to one model and
            is needed again when that model is loaded.
        probe: Unlabelled inputs of the model: an array, or a tuple or dictionary of arrays, as the
            model takes them. A few hundred examples are enough. Not needed if `folder` has them
            already, or with `weights`.
        strength: μ ≥ 0.
        layer: Name of the layer whose input is the representation; by default the last layer with
            weights.
        weights: Fixed edge weights w_ij ≥ 0 of shape `(tasks, tasks)`, in place of CKA.
        batch_size: Batch size of the pass over `probe` and of `linear_cka`.
        unbiased: Whether `linear_cka` uses the unbiased estimate.

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
        self.fixed_weights = fixed = None if weights is None else np.asarray(weights, "float64")
        if fixed is not None:
            square = fixed.ndim == 2 and fixed.shape[0] == fixed.shape[1]
            if not (square and np.isfinite(fixed).all() and (fixed >= 0).all()):
                raise ValueError(
                    "`weights` must be a square matrix of numbers >= 0, a row and a column for "
                    f"each task. Received: {weights!r}"
                )
            if not np.allclose(fixed, fixed.T):
                raise ValueError(f"`weights` must be symmetric. Received: {weights!r}")
        self._weights: list[list[float]] = []
        self._digests: list[str] = []  # digest of the model's weights after each task
        if (self.folder / _INDEX).exists():
            self._weights, self._digests = self._read_index()
        self._digests_in_folder = list(self._digests)  # as last read or written
        if probe is not None:
            self._keep_probe(probe)
        elif self.fixed_weights is None and not (self.folder / _PROBE).exists():
            raise ValueError(
                f"`probe` is needed: {str(self.folder)!r} holds no probe inputs, and no `weights` "
                "are given."
            )

    @property
    def weights(self) -> np.ndarray | None:
        """The fixed edge weights, or `None`."""
        return self.fixed_weights

    @property
    def matrix(self) -> np.ndarray:
        """Edge weights w_ij `(tasks, tasks)`, symmetric with ones on the diagonal."""
        matrix = np.eye(len(self._weights))
        for j, row in enumerate(self._weights):
            matrix[j, :j] = matrix[:j, j] = row
        return matrix

    @property
    def tasks(self) -> int:
        """The number of tasks learned so far."""
        return len(self._weights)

    def check(self, model: Learner, learned: int, digest: bytes) -> None:
        """Raise `ValueError` if these settings, or the files in `folder`, do not fit a model.

        Args:
            model: The model.
            learned: Number of tasks the model has learned.
            digest: Digest of its weights after the last of these tasks.
        """
        if (self.folder / _INDEX).exists() and self._read_index()[1] != self._digests_in_folder:
            raise ValueError(
                f"`folder` {str(self.folder)!r} holds other tasks than when this graph was made: "
                "another model has gone on in it. Each needs a folder of its own."
            )
        if 0 < learned < self.tasks and self._digests[learned - 1] == digest.hex():
            # The model was saved before the last tasks in `folder`, and has been loaded again.
            self.rewind(learned)
        if self.tasks != learned:
            raise ValueError(
                f"`folder` {str(self.folder)!r} holds {self.tasks} tasks, but the model has "
                f"learned {learned}: it belongs to another model."
            )
        if self.layer is not None and self.layer not in {x.name for x in _layers(model)}:
            known = ", ".join(layer.name for layer in _layers(model))
            raise ValueError(f"`layer` must be one of {known}. Received: {self.layer!r}")
        if self.fixed_weights is not None and self.tasks >= len(self.fixed_weights):
            raise ValueError(
                "`weights` must have a row for each task. Received "
                f"{len(self.fixed_weights)} rows, and task {self.tasks + 1}."
            )
        if self.fixed_weights is None:
            try:
                batch = next(self._pieces())
                check_inputs(model, batch)
                self._represented(model, batch)
            except (ValueError, TypeError) as error:
                raise FileError(f"`probe` in {str(self.folder)!r}: {error}") from None

    def rewind(self, tasks: int) -> None:
        """Keep only the first `tasks` tasks: the model was reset to its state after them."""
        del self._weights[tasks:], self._digests[tasks:]

    def add(self, model: Learner, digest: bytes) -> None:
        """Add a task that was just learned: store the model's weights and representation.

        Args:
            model: The model after the task.
            digest: Digest of its weights.
        """
        row = self.weights_to(model).tolist()
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            f"weights/{path}": np.asarray(variable, "float32")
            for path, variable in _shared(by_path(model)).items()
        }
        if self.fixed_weights is None:
            arrays["representation"] = self.representation(model)
        write_arrays(self._path(self.tasks), arrays, {})
        weights, digests = [*self._weights, row], [*self._digests, digest.hex()]
        index = {"version": 1, "weights": weights, "digests": digests}
        write_json(self.folder / _INDEX, index)
        self._weights, self._digests = weights, digests
        self._digests_in_folder = list(digests)

    def weights_to(self, model: Learner) -> np.ndarray:
        """Edge weights w_ij between each earlier task and the current model, `(tasks,)`."""
        if self.fixed_weights is not None:
            last = self.tasks >= len(self.fixed_weights)  # no task follows
            return np.zeros(self.tasks) if last else self.fixed_weights[: self.tasks, self.tasks]
        if not self.tasks:
            return np.zeros(0)
        now = self.representation(model)
        weights = []
        for i in range(self.tasks):
            earlier = self._stored(self._file(i), "representation", (len(now), None))
            cka = linear_cka(earlier, now, batch_size=self.batch_size, unbiased=self.unbiased)
            weights.append(max(cka, 0.0))
        return np.array(weights)

    def with_update(self, update_graph: Callable[[], None], callbacks: Any) -> Any:
        """Add a callback that updates the edge weights at the end of each epoch.

        Args:
            update_graph: Function that updates the edge weights.
            callbacks: The argument `callbacks` of `fit`.

        Returns:
            The argument `callbacks` to use instead.
        """
        update = _Update(update_graph)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            if not any(isinstance(callback, _Update) for callback in callbacks.callbacks):
                callbacks.callbacks.append(update)
            return callbacks
        if callbacks is None:
            return [update]
        return [update, *(callbacks if isinstance(callbacks, (list, tuple)) else [callbacks])]

    def anchor(self, weights: np.ndarray, variables: Variables) -> tuple[float, Arrays]:
        """The folded penalty: μ Σ_i w_ij, and the anchor Σ_i w_ij θ*_i / Σ_i w_ij by path.

        Args:
            weights: Edge weights to the earlier tasks, `(tasks,)`.
            variables: The model's variables by path; only those that all tasks share are used.
        """
        if not self.strength or not self.tasks:
            return 0.0, {}
        total = float(weights.sum())
        shares = weights / total if total else weights
        anchors: Arrays = {}
        trainable = {path: v for path, v in _shared(variables).items() if v.trainable}
        for i, share in enumerate(shares):
            file = self._file(i)
            for path, variable in trainable.items():
                shape = tuple(variable.shape)
                term = share * self._stored(file, f"weights/{path}", shape).astype("float64")
                anchors[path] = anchors[path] + term if i else term
        return self.strength * total, anchors

    def _stored(self, file: ArrayFile, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """An array from a task's file, checked against the expected shape."""
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

    def representation(self, model: Learner) -> np.ndarray:
        """The model's representation of the probe inputs in inference mode, `(n, d)`."""
        return np.concatenate([self._represented(model, batch) for batch in self._pieces()])

    def graph(self) -> Any:
        """The graph as a `networkx.Graph`, with the edge attribute `weight`; needs networkx."""
        import networkx

        graph = networkx.Graph()
        graph.add_nodes_from(range(self.tasks))
        for j, row in enumerate(self._weights):
            graph.add_weighted_edges_from((i, j, weight) for i, weight in enumerate(row))
        return graph

    def write_graphml(self, path: str | os.PathLike[str]) -> None:
        """Write the graph to a GraphML file; needs networkx."""
        import networkx

        networkx.write_graphml(self.graph(), path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot the matrix of edge weights to an image file; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.subplots()
        image = axes.imshow(self.matrix, vmin=0, vmax=1)
        axes.set(xlabel="task", ylabel="task", title="w, what tasks have in common")
        figure.colorbar(image)
        figure.savefig(path)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, except `probe`, which is stored in `folder`."""
        return {
            "folder": str(self.folder),
            "strength": self.strength,
            "layer": self.layer,
            "weights": None if self.fixed_weights is None else self.fixed_weights.tolist(),
            "batch_size": self.batch_size,
            "unbiased": self.unbiased,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TaskGraph":
        """The inverse of `get_config`."""
        return cls(**config)

    def _represented(self, model: Learner, batch: Any) -> np.ndarray:
        named = [layer for layer in _layers(model) if layer.name == self.layer]
        layer = (named or _layers(model))[-1]
        with LayerRecorder([layer]) as recorder:
            model(batch, training=False)
        calls = recorder.calls(layer)
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
        if self.tasks and self.fixed_weights is None:
            stored, _ = read_arrays(self.folder / _PROBE)
            if stored.keys() != named.keys() or any(
                not np.array_equal(stored[name], named[name]) for name in stored
            ):
                raise ValueError(
                    f"`probe` differs from that in `folder` {str(self.folder)!r}, by which "
                    f"{self.tasks} tasks are represented: leave it out, or take another folder."
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_arrays(self.folder / _PROBE, named, {})

    def _probe(self) -> Any:
        """The stored probe inputs, in the structure that the model takes."""
        parts, _ = read_arrays(self.folder / _PROBE)
        sizes = {part.shape[:1] for part in parts.values()}
        if len(sizes) != 1 or sizes & {(), (0,)}:
            raise FileError(f"`folder`: {str(self.folder / _PROBE)!r} holds no probe inputs.")
        if all(name.isdigit() for name in parts):
            ordered = tuple(parts[str(i)] for i in range(len(parts)))
            return ordered[0] if len(ordered) == 1 else ordered
        return parts

    def _pieces(self) -> Iterator[Any]:
        """The probe inputs in batches."""
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
    """Updates the edge weights of a model's task graph at the end of each epoch."""

    def __init__(self, update_graph: Callable[[], None]):
        super().__init__()
        self._update_graph = update_graph

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._update_graph()


def _layers(model: Learner) -> list[keras.Layer]:
    """The layers that have variables of their own, in order."""
    return [layer for layer in layers_within(model) if own_variables(layer)]


def _shared(variables: Variables) -> Variables:
    """The floating-point variables that all tasks share."""
    return {
        path: v
        for path, v in variables.items()
        if "float" in v.dtype and not getattr(v, "per_task", False)
    }


def _as_tuple(parts: Any) -> tuple[Any, ...]:
    return tuple(parts) if isinstance(parts, (tuple, list)) else (parts,)
