"""Continual learning for Keras 3: a model that learns task after task without forgetting."""

import importlib
import warnings
from typing import Any

from keras_dwd import backend_check as backend_check  # first: checks the Keras backend
from keras_dwd import callbacks as callbacks
from keras_dwd import experimental as experimental
from keras_dwd import groupings as groupings
from keras_dwd import layers as layers
from keras_dwd.communicator import Communicator
from keras_dwd.curvature.diagonal import DiagonalFisher
from keras_dwd.curvature.kronecker import KroneckerFisher
from keras_dwd.curvature.rules import LayerIO, Rule, register_rule
from keras_dwd.distillation import Distillation
from keras_dwd.distributed.horovod import HorovodCommunicator
from keras_dwd.files import FileError
from keras_dwd.model import DWDModel
from keras_dwd.regularizer import DWDRegularizer
from keras_dwd.settings import dwd, ewc, online_ewc
from keras_dwd.stripping import strip_dwd
from keras_dwd.task_graph.graph import TaskGraph
from keras_dwd.training.optimizer import DWDOptimizer
from keras_dwd.version import __version__

# Modules are left out: `from keras_dwd import *` must not overwrite a user's `layers`.
__all__ = [
    "Communicator",
    "DWDModel",
    "DWDOptimizer",
    "DWDRegularizer",
    "DiagonalFisher",
    "Distillation",
    "FileError",
    "HorovodCommunicator",
    "KroneckerFisher",
    "LayerIO",
    "Rule",
    "TaskGraph",
    "__version__",
    "dwd",
    "ewc",
    "online_ewc",
    "register_rule",
    "strip_dwd",
]

# Names that version 0.1 had in `keras_dwd` itself, and the module that defines each of them now.
_MOVED = {
    "LearningRateWarmup": "callbacks",
    "PenaltyLogger": "callbacks",
    "AccuracyMatrix": "evaluation",
    "METHODS": "evaluation",
    "Method": "evaluation",
    "Scenario": "evaluation",
    "SequenceResult": "evaluation",
    "Task": "evaluation",
    "linear_cka": "evaluation",
    "run_sequence": "evaluation",
    "Budget": "experimental",
    "Evidence": "experimental",
    "GroupingPolicy": "experimental",
    "FixedGrouping": "groupings",
    "GaussianMixtureGrouping": "groupings",
    "Grouping": "groupings",
    "Importance": "groupings",
    "LayerGrouping": "groupings",
    "Partition": "groupings",
    "Responsibilities": "groupings",
    "SingleGroup": "groupings",
    "SpectralGrouping": "groupings",
    "Strength": "groupings",
    "KWinners": "layers",
    "TaskHeads": "layers",
}
# Modules that are imported when they are first used.
_LATER = ("evaluation", "plots")
# Old names of classes, and their new names.
_RENAMED = {"Flow": "LayerIO"}


def __dir__() -> list[str]:
    return sorted([*__all__, *_LATER, "callbacks", "experimental", "groupings", "layers"])


def __getattr__(name: str) -> Any:
    """Import what takes long on first use, and resolve deprecated names with a warning."""
    if name in _LATER:
        return importlib.import_module(f"keras_dwd.{name}")
    if name in _MOVED:
        module = f"keras_dwd.{_MOVED[name]}"
        new, value = f"{module}.{name}", getattr(importlib.import_module(module), name)
    elif name in _RENAMED:
        new, value = f"keras_dwd.{_RENAMED[name]}", globals()[_RENAMED[name]]
    else:
        raise AttributeError(f"module 'keras_dwd' has no attribute {name!r}")
    warnings.warn(
        f"`keras_dwd.{name}` is deprecated and will be removed in 0.3: use `{new}`.",
        DeprecationWarning,
        stacklevel=2,
    )
    return value
