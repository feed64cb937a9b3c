"""All that an experiment needs to know of its tasks."""

from dataclasses import dataclass
from typing import Any

from keras_dwd.evaluation.metric import TaskMetric
from keras_dwd.evaluation.profiles import Profile
from keras_dwd.evaluation.scenario import Scenario


@dataclass(frozen=True)
class Prepared:
    """Tasks, and how models are trained and measured on them.

    Attributes:
        scenario: The tasks.
        profile: The model and the training protocol.
        metrics: What is measured; methods are compared by the first.
        about: Further entries of the protocol in result files.
        training_data: The training data in words, for the protocol.
        details: What else the protocol should say.
        held_back: The validation data in words.
    """

    scenario: Scenario
    profile: Profile
    metrics: tuple[TaskMetric, ...]
    about: dict[str, Any]
    training_data: str
    details: str
    held_back: str
