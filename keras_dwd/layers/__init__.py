"""Layers for continual-learning models."""

from keras_dwd.layers.converting import with_task_normalization
from keras_dwd.layers.k_winners import KWinners
from keras_dwd.layers.task_heads import TaskHeads
from keras_dwd.layers.task_normalization import TaskNormalization

__all__ = ["KWinners", "TaskHeads", "TaskNormalization", "with_task_normalization"]
