"""What training costs in bytes and seconds, before it is begun."""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_dwd.checks import integer, number
from keras_dwd.curvature.fisher import DiagonalFisher, Fisher
from keras_dwd.curvature.kronecker import KroneckerFisher
from keras_dwd.distributed.horovod import launch

_FLOAT = 4
_MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2}
# What Horovod collects tensors in before it sends them, by default.
_FUSION = 2**27
CURVATURES = ("diagonal", "kronecker")
# Of a transformer: width per layer, as of the published GPT-3 models.
_WIDTH_PER_LAYER = 128


@dataclass(frozen=True)
class Matrix:
    """A layer's weights as a matrix, `count` times in the model."""

    rows: int
    columns: int
    count: int = 1


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds of one worker.

    Attributes:
        parameters: Number of trainable parameters.
        workers: Number of workers.
        memory: Bytes by what they are for. `gradients`, `statistics` and `communication` are there
            during a step.
        step_bytes: Sent and received at each step, per worker.
        fisher_bytes: Sent and received at each update of the online Fisher information.
        boundary_bytes: Sent and received at each boundary, by a pass over data.
        step_seconds: What sending takes at each step, Fisher updates included, and reading and
            writing the state from memory; `None` without a measured link.
        boundary_seconds: What sending takes at a boundary.
    """

    parameters: int
    workers: int
    memory: dict[str, int]
    step_bytes: int
    fisher_bytes: int
    boundary_bytes: int
    step_seconds: float | None
    boundary_seconds: float | None

    @property
    def total(self) -> int:
        """Bytes of memory of one worker."""
        return sum(self.memory.values())

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self) | {"total": self.total}


def of_model(model: Any, fisher: Fisher) -> tuple[int, int, int]:
    """Trainable parameters of a model, and the numbers of its statistics and precisions."""
    from keras_dwd.model import DWDModel

    wrapped = DWDModel.from_model(model, fisher=fisher)
    variables = wrapped._pulled_variables()
    shapes = wrapped.fisher.shapes(wrapped, variables)
    statistics = sum(int(np.prod(shape)) for shape in shapes.values())
    precision = 0
    rank = getattr(fisher, "rank", 0)
    for name, shape in shapes.items():
        kind = name.partition("/")[0]
        if kind in ("input", "output"):
            precision += _factor(shape[0], rank)
        elif kind == "fisher":
            precision += int(np.prod(shape))
    return sum(int(np.prod(v.shape)) for v in variables.values()), statistics, precision


def of_transformer(parameters: int, fisher: Fisher) -> tuple[int, int, int]:
    """The same for a transformer of about so many parameters, shaped as published ones are."""
    width = max(64, round((_WIDTH_PER_LAYER * parameters / 12) ** (1 / 3)))
    layers = max(1, round(parameters / (12 * width**2)))
    matrices = [
        Matrix(width, width, 4 * layers),
        Matrix(width, 4 * width, layers),
        Matrix(4 * width, width, layers),
    ]
    if not isinstance(fisher, KroneckerFisher):
        return parameters, parameters, parameters
    statistics = precision = 0
    for matrix in matrices:
        for size in (matrix.rows, matrix.columns):
            columns = size if size <= 4 * fisher.rank else fisher.rank
            statistics += matrix.count * size * columns
            precision += matrix.count * _factor(size, fisher.rank)
    return parameters, statistics, precision


def plan(
    counts: Callable[[Fisher], tuple[int, int, int]],
    workers: int = 1,
    curvature: str = "kronecker",
    optimizer: str = "adam",
    sharded: bool = True,
    link: float | None = None,
    bandwidth: float | None = None,
    gamma: float | None = 0.95,
) -> Plan:
    """What one worker needs.

    Args:
        counts: Gives the numbers of parameters, statistics and precisions: of a model, see
            `of_model`, or of none that is there yet, see `of_transformer`.
        workers: How many there are.
        curvature: `diagonal` or `kronecker`.
        optimizer: `sgd`, `momentum` or `adam`.
        sharded: Whether they divide the consolidation state.
        link: Bytes per second that a worker sends and receives, see `measured_link`.
        bandwidth: Bytes per second of memory, see `measured_bandwidth`.
        gamma: Of the online Fisher information, `None` for none.
    """
    integer("workers", workers, 1)
    for name, given, known in (
        ("curvature", curvature, CURVATURES),
        ("optimizer", optimizer, tuple(_MOMENTS)),
    ):
        if given not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}. Received: {given!r}")
    kind = KroneckerFisher if curvature == "kronecker" else DiagonalFisher
    fisher: Fisher = kind("exact", gamma=gamma)
    parameters, statistics, precision = counts(fisher)
    share = workers if sharded else 1

    def of_share(numbers: int) -> int:
        return math.ceil(_FLOAT * numbers / share)

    memory = {
        "parameters": _FLOAT * parameters,
        "gradients": _FLOAT * parameters,
        "optimizer": _FLOAT * parameters * _MOMENTS[optimizer],
        "fisher": of_share(statistics) if fisher.online else 0,
        "statistics": _FLOAT * statistics,
        "communication": _FLOAT * parameters + min(_FLOAT * parameters, _FUSION)
        if workers > 1
        else 0,
        "precision": of_share(precision),
        "anchor": of_share(parameters),
    }
    ring = 2 * (workers - 1) / workers  # of an allreduce, for each byte
    step_bytes = round(ring * _FLOAT * parameters)
    fisher_bytes = round(ring * _FLOAT * statistics) if fisher.online else 0
    boundary_bytes = round(ring * 2 * _FLOAT * statistics)  # sums in double precision
    step = boundary = None
    if bandwidth is not None and (link is not None or workers == 1):
        held = memory["precision"] + memory["anchor"]
        # Gradients are written and read, moments and parameters both, anchors and precision read.
        moved: float = 3 * memory["gradients"] + 2 * memory["optimizer"] + held
        every = fisher.every if fisher.online else math.inf
        moved += (2 * memory["fisher"] + memory["statistics"]) / every
        step = moved / number("bandwidth", bandwidth, 1)
        boundary = 2 * held / bandwidth
        if link is not None and workers > 1:
            step += (step_bytes + fisher_bytes / every) / number("link", link, 1)
            boundary += boundary_bytes / link
    return Plan(
        parameters, workers, memory, step_bytes, fisher_bytes, boundary_bytes, step, boundary
    )


def measured_bandwidth(size: int = 2**27) -> float:
    """Bytes per second that this machine's memory reads and writes, by copying `size` bytes."""
    source, target = np.ones(size, "uint8"), np.zeros(size, "uint8")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - started)
    return 2 * size / float(np.median(times))


def measured_link(workers: int = 2) -> float:
    """Bytes per second that workers on this machine send and receive in an allreduce.

    Raises:
        ModuleNotFoundError: If Horovod is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="keras_dwd_") as folder:
        out = Path(folder) / "link.json"
        code = launch([sys.executable, "-m", "keras_dwd.distributed.plan", str(out)], workers)
        if code:
            raise RuntimeError(f"Measuring the link failed with exit code {code}.")
        return float(json.loads(out.read_text(encoding="utf-8"))["link"])


def _factor(size: int, rank: int) -> int:
    """Numbers of a factor of a precision, at the most."""
    kept = min(size, rank)
    return size * kept + kept + 1


def _measure(out: str) -> None:
    """A worker's part of `measured_link`."""
    import tensorflow as tf

    from keras_dwd.distributed.communicator import here

    communicator = here()
    values, times = tf.ones(2**23), []
    for _ in range(6):
        started = time.perf_counter()
        communicator.mean([values], "link")
        times.append(time.perf_counter() - started)
    ring = 2 * (communicator.size - 1) / communicator.size
    if communicator.rank == 0:
        rate = ring * _FLOAT * 2**23 / float(np.median(times[1:]))
        Path(out).write_text(json.dumps({"link": rate}), encoding="utf-8")


if __name__ == "__main__":
    _measure(sys.argv[1])
