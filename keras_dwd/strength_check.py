"""Warns after `fit` where the strength λ makes no sense."""

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from keras_dwd.consolidation import Consolidation
from keras_dwd.curvature.likelihood import known_loss, losses_of
from keras_dwd.learner import Learner
from keras_dwd.regularizer import DEFAULT_STRENGTH
from keras_dwd.summary import importance_by_layer
from keras_dwd.training.optimizer import form_of_pull
from keras_dwd.variables import by_path

# A penalty below this part of the loss has no noticeable effect.
_NO_SAY = 1e-3


def warn_of_strength(
    model: Learner, consolidation: Consolidation, logs: Mapping[str, Sequence[float]]
) -> None:
    """Warn if λ is so large that the task was not learned, or so small that nothing holds.

    Only what is certain is told. It takes a few operations on the state, and none in a step.

    Args:
        model: A model that has learned a task, after `fit` on another one.
        consolidation: Its state.
        logs: The logs of `fit`, by epoch.
    """
    losses = [float(loss) for loss in logs.get("loss", ())]
    strength = consolidation.regularizer.strength
    if not losses or not math.isfinite(losses[-1]) or strength <= 0:
        return
    loss = losses[-1]
    if len(losses) > 1 and _guesses(model, loss) and _step_penalty(model, consolidation) > loss:
        warnings.warn(
            f"The strength λ = {strength:g} is so large that this `fit` learned next to nothing: "
            f"its loss is {loss:.3g} after {len(losses)} epochs, no better than guessing, and a "
            "single step of the optimizer in any direction costs more than that in penalty. Lower "
            f"`model.strength`; {DEFAULT_STRENGTH:g} is usual.",
            stacklevel=3,
        )
    elif consolidation.fisher.estimator == "influence":  # of which the scale is known
        penalty = float(consolidation.penalty(model))
        if penalty < _NO_SAY * loss and penalty * DEFAULT_STRENGTH / strength > loss:
            warnings.warn(
                f"The strength λ = {strength:g} is so small that it holds nothing: the penalty is "
                f"{penalty:.2g}, less than {_NO_SAY:.1%} of the loss, though with the usual λ = "
                f"{DEFAULT_STRENGTH:g} these weights would cost more than the loss. Raise "
                "`model.strength`, or set it to 0 for fine-tuning.",
                stacklevel=3,
            )


def _guesses(model: Learner, loss: float) -> bool:
    """Whether a classifier's loss is certainly no less than that of a guess."""
    output, *others = model.outputs
    known = known_loss(losses_of(model)[0])
    if others or model.losses or known.kind not in ("sparse", "categorical"):
        return False
    return loss > math.log(output.shape[known.axis] or 1)


def _step_penalty(model: Learner, consolidation: Consolidation) -> float:
    """The penalty of a step of the size of the learning rate in each weight; 0 if unknown.

    Optimizers that take the pull in the gradient, such as Adam, make steps of about this size.
    """
    rate = getattr(model.optimizer, "learning_rate", None)
    if form_of_pull(model.optimizer) != "part of the gradient" or rate is None:
        return 0.0
    total = sum(importance_by_layer(consolidation, by_path(model)).values())
    return 0.5 * float(np.asarray(rate)) ** 2 * total
