"""Experimental features, which have shown no benefit so far and may change without notice.

The page "What each part is worth" of the documentation has the measurements.
"""

from keras_dwd.groupings.policy import GroupingPolicy
from keras_dwd.groupings.strength import Budget, Evidence

__all__ = ["Budget", "Evidence", "GroupingPolicy"]
