"""Training on sequences of tasks, and metrics of what was learned and forgotten."""

from keras_dwd.evaluation.matrix import AccuracyMatrix, MetricMatrix
from keras_dwd.evaluation.methods import METHODS, Method
from keras_dwd.evaluation.metric import TaskMetric
from keras_dwd.evaluation.recipe import Recipe
from keras_dwd.evaluation.runner import SequenceResult, run_sequence
from keras_dwd.evaluation.scenario import Scenario, Task
from keras_dwd.evaluation.technique import Technique, held_by_importance
from keras_dwd.task_graph.similarity import linear_cka

__all__ = [
    "METHODS",
    "AccuracyMatrix",
    "Method",
    "MetricMatrix",
    "Recipe",
    "Scenario",
    "SequenceResult",
    "Task",
    "TaskMetric",
    "Technique",
    "held_by_importance",
    "linear_cka",
    "run_sequence",
]
