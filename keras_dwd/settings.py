"""EWC, online EWC and DWD as keyword arguments of `DWDModel`."""

from typing import TypedDict

from keras_dwd.curvature.diagonal import DiagonalFisher
from keras_dwd.curvature.fisher import Fisher
from keras_dwd.curvature.kronecker import KroneckerFisher
from keras_dwd.groupings.gmm import GaussianMixtureGrouping
from keras_dwd.groupings.grouping import Grouping
from keras_dwd.regularizer import DEFAULT_STRENGTH, DWDRegularizer

__all__ = ["dwd", "ewc", "online_ewc"]


class Settings(TypedDict):
    """Keyword arguments of `DWDModel` and `DWDModel.from_model`."""

    regularizer: DWDRegularizer
    fisher: Fisher
    grouping: Grouping | None


def ewc(strength: float = 100.0) -> Settings:
    """Elastic Weight Consolidation as first published: one quadratic penalty per task.

    The sum of these penalties is stored exactly, in two numbers per parameter. `consolidate` needs
    the data of the task.

    Args:
        strength: λ ≥ 0, the weight of the penalty against the loss of the new task.

    Returns:
        Keyword arguments of `DWDModel`.

    Example:

    ```python
    model = DWDModel.from_model(network, **keras_dwd.ewc(strength=100.0))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, y)
    model.consolidate(x, y)
    ```

    Reference:
        [Kirkpatrick et al., 2017](https://arxiv.org/abs/1612.00796).
    """
    return _ewc(DWDRegularizer(strength, anchor="folded"))


def online_ewc(strength: float = 100.0, decay: float = 0.9) -> Settings:
    """Online EWC: one penalty, anchored at the newest parameters, that decays for older tasks.

    `consolidate` needs the data of the task.

    Args:
        strength: λ ≥ 0, the weight of the penalty against the loss of the new task.
        decay: Factor in [0, 1] for the precision of earlier tasks at each task boundary.

    Returns:
        Keyword arguments of `DWDModel`.

    Example:

    ```python
    model = DWDModel.from_model(network, **keras_dwd.online_ewc(strength=100.0))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, y)
    model.consolidate(x, y)
    ```

    Reference:
        [Schwarz et al., 2018](https://arxiv.org/abs/1805.06370), section 4.
    """
    return _ewc(DWDRegularizer(strength, decay=decay))


def dwd(strength: float = DEFAULT_STRENGTH, online: bool = True) -> Settings:
    """Dynamic Weight Decoupling (DWD), the defaults of `DWDModel`.

    The precision is made of Kronecker factors of the Fisher information. A Gaussian mixture divides
    their eigen-directions into groups, each with a strength λ_k of its own.

    Args:
        strength: λ ≥ 0, the weight of the penalty against the loss of the new task.
        online: Whether the Fisher information is estimated during training. If so, `consolidate`
            needs no data.

    Returns:
        Keyword arguments of `DWDModel`.

    Example:

    ```python
    model = DWDModel.from_model(network, **keras_dwd.dwd(strength=50.0))
    ```
    """
    return {
        "regularizer": DWDRegularizer(strength),
        "fisher": KroneckerFisher() if online else KroneckerFisher(gamma=None),
        "grouping": GaussianMixtureGrouping(),
    }


def _ewc(regularizer: DWDRegularizer) -> Settings:
    """An empirical diagonal from data, with one strength for all parameters."""
    fisher = DiagonalFisher("empirical", gamma=None)
    return {"regularizer": regularizer, "fisher": fisher, "grouping": None}
