"""Estimates of the memory, communication and time that training will need per worker."""

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
from keras_dwd.curvature.diagonal import DiagonalFisher
from keras_dwd.curvature.fisher import Fisher
from keras_dwd.curvature.kronecker import KroneckerFisher
from keras_dwd.distributed.launch import launch

_FLOAT = 4
_MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2}
# Default size of the buffer in which Horovod fuses tensors, in bytes.
_FUSION = 2**27
CURVATURES = ("diagonal", "kronecker")
# Ratio of width to number of layers in a transformer, as in the published GPT-3 models.
_WIDTH_PER_LAYER = 128


@dataclass(frozen=True)
class Matrix:
    """The weight matrix of a layer that occurs `count` times in the model."""

    rows: int
    columns: int
    count: int = 1


@dataclass(frozen=True)
class Plan:
    """What one worker needs, in bytes and seconds.

    Attributes:
        parameters: Number of trainable parameters.
        workers: Number of workers.
        memory: Bytes of memory by use. `gradients`, `statistics` and `communication` are needed
            during a step only.
        step_bytes: Bytes sent and received at each step.
        fisher_bytes: Bytes sent and received at each update of the online Fisher information.
        boundary_bytes: Bytes sent and received at each task boundary with a pass over data.
        step_seconds: Seconds per step for communication, including Fisher updates, and for reading
            and writing the state in memory; `None` if the bandwidth or the link is unknown.
        boundary_seconds: Seconds per task boundary for the same.
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
        """Bytes of memory of one worker in total."""
        return sum(self.memory.values())

    def as_json(self) -> dict[str, Any]:
        """All values as a JSON-serializable dictionary."""
        return asdict(self) | {"total": self.total}


def of_model(model: Any, fisher: Fisher) -> tuple[int, int, int]:
    """Count the trainable parameters, Fisher statistics and precision entries of a model."""
    from keras_dwd.model import DWDModel

    wrapped = DWDModel.from_model(model, fisher=fisher)
    variables = wrapped._consolidation.pulled_variables(wrapped)
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
    """The same counts for a transformer of about this many parameters, shaped like GPT-3."""
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
    """Estimate what one worker needs.

    Args:
        counts: Function that returns the number of parameters, of Fisher statistics and of
            precision entries for a Fisher estimate: `of_model` or `of_transformer` with their first
            argument bound.
        workers: Number of workers.
        curvature: `diagonal` or `kronecker`.
        optimizer: `sgd`, `momentum` or `adam`.
        sharded: Whether the workers divide the consolidation state among themselves.
        link: Bytes per second that a worker sends and receives, see `measured_link`.
        bandwidth: Bytes per second of memory, see `measured_bandwidth`.
        gamma: Decay of the online Fisher estimate, `None` for no online estimate.
    """
    integer("workers", workers, 1)
    for name, value, known in (
        ("curvature", curvature, CURVATURES),
        ("optimizer", optimizer, tuple(_MOMENTS)),
    ):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}. Received: {value!r}")
    kind = KroneckerFisher if curvature == "kronecker" else DiagonalFisher
    fisher: Fisher = kind("empirical", gamma=gamma)
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
    ring = 2 * (workers - 1) / workers  # bytes a ring allreduce sends per byte of its tensors
    step_bytes = round(ring * _FLOAT * parameters)
    fisher_bytes = round(ring * _FLOAT * statistics) if fisher.online else 0
    boundary_bytes = round(ring * 2 * _FLOAT * statistics)  # float64
    step = boundary = None
    if bandwidth is not None and (link is not None or workers == 1):
        consolidated = memory["precision"] + memory["anchor"]
        # Bytes read and written: gradients are read and written, parameters read, optimizer moments
        # read and written, anchors and precision read.
        moved: float = 3 * memory["gradients"] + 2 * memory["optimizer"] + consolidated
        every = fisher.every if fisher.online else math.inf
        moved += (2 * memory["fisher"] + memory["statistics"]) / every
        step = moved / number("bandwidth", bandwidth, 1)
        boundary = 2 * consolidated / bandwidth
        if link is not None and workers > 1:
            step += (step_bytes + fisher_bytes / every) / number("link", link, 1)
            boundary += boundary_bytes / link
    return Plan(
        parameters, workers, memory, step_bytes, fisher_bytes, boundary_bytes, step, boundary
    )


def measured_bandwidth(size: int = 2**27) -> float:
    """Measure this machine's memory bandwidth in bytes per second, by copying `size` bytes."""
    source, target = np.ones(size, "uint8"), np.zeros(size, "uint8")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - started)
    return 2 * size / float(np.median(times))


def measured_link(workers: int = 2) -> float:
    """Measure the bytes per second that workers on this machine exchange in an allreduce.

    Raises:
        ModuleNotFoundError: If Horovod is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="keras_dwd_") as folder:
        out = Path(folder) / "link.json"
        code = launch([sys.executable, "-m", "keras_dwd.evaluation.plan", str(out)], workers)
        if code:
            raise RuntimeError(f"Measuring the link failed with exit code {code}.")
        return float(json.loads(out.read_text(encoding="utf-8"))["link"])


def _factor(size: int, rank: int) -> int:
    """Maximum number of entries of a low-rank factor of a precision."""
    columns = min(size, rank)
    return size * columns + columns + 1


def _measure(out: str) -> None:
    """The program that each worker of `measured_link` runs."""
    import tensorflow as tf

    from keras_dwd.distributed.horovod import detect_communicator

    communicator = detect_communicator()
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
