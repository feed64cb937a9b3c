"""Layers for continual-learning models."""

from keras_dwd.layers.k_winners import KWinners
from keras_dwd.layers.task_heads import TaskHeads

__all__ = ["KWinners", "TaskHeads"]
