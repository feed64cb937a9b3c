"""Continual learning for Keras 3: a model that learns task after task without forgetting."""

from keras_dwd import backend_check as backend_check  # first: it may refuse the import
from keras_dwd.callbacks import PenaltyLogger as PenaltyLogger
from keras_dwd.curvature.fisher import DiagonalFisher as DiagonalFisher
from keras_dwd.curvature.kronecker import KroneckerFisher as KroneckerFisher
from keras_dwd.curvature.rules import Flow as Flow
from keras_dwd.curvature.rules import Rule as Rule
from keras_dwd.curvature.rules import register_rule as register_rule
from keras_dwd.evaluation.matrix import AccuracyMatrix as AccuracyMatrix
from keras_dwd.evaluation.methods import METHODS as METHODS
from keras_dwd.evaluation.methods import Method as Method
from keras_dwd.evaluation.runner import SequenceResult as SequenceResult
from keras_dwd.evaluation.runner import run_sequence as run_sequence
from keras_dwd.grouping.fixed import FixedGrouping as FixedGrouping
from keras_dwd.grouping.fixed import LayerGrouping as LayerGrouping
from keras_dwd.grouping.fixed import SingleGroup as SingleGroup
from keras_dwd.grouping.gmm import GaussianMixtureGrouping as GaussianMixtureGrouping
from keras_dwd.grouping.grouping import Grouping as Grouping
from keras_dwd.grouping.grouping import Partition as Partition
from keras_dwd.grouping.policy import GroupingPolicy as GroupingPolicy
from keras_dwd.grouping.spectral import SpectralGrouping as SpectralGrouping
from keras_dwd.grouping.strength import Budget as Budget
from keras_dwd.grouping.strength import Evidence as Evidence
from keras_dwd.grouping.strength import Importance as Importance
from keras_dwd.grouping.strength import Strength as Strength
from keras_dwd.layers.k_winners import KWinners as KWinners
from keras_dwd.layers.task_heads import TaskHeads as TaskHeads
from keras_dwd.model import DWDModel as DWDModel
from keras_dwd.optimizer import DWDOptimizer as DWDOptimizer
from keras_dwd.regularizer import DWDRegularizer as DWDRegularizer
from keras_dwd.tasks.scenario import Scenario as Scenario
from keras_dwd.tasks.scenario import Task as Task
from keras_dwd.tasks.similarity import linear_cka as linear_cka
from keras_dwd.tasks.task_graph import TaskGraph as TaskGraph
from keras_dwd.version import __version__ as __version__
