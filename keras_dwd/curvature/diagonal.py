"""Estimates of the diagonal of the Fisher information."""

import keras

from keras_dwd.curvature.fisher import Estimator, Fisher


@keras.saving.register_keras_serializable("keras_dwd")
class DiagonalFisher(Fisher):
    """Estimates F_i = E_x[(∂ log p_θ(x) / ∂θ_i)²], online in the training step or in one pass.

    The online estimate is an exponential moving average over training steps,
    `slot ← γ·slot + (1−γ)·F̂`, divided by `1 − γⁿ` when read (the bias correction of Adam). It is
    reset at each task boundary. Both forms use the data loss alone, without penalty, weight decay
    or regularization losses. All estimators except `"batch"` and `"adam"` use per-example gradients
    in inference mode, in closed form for layers with a rule (see `register_rule`).

    An example of weight two counts twice. With the reduction `"mean_with_sample_weight"` of a loss
    the weights are divided by their mean over the batch, as the loss divides by their sum. Weights
    of time steps are part of the loss of an example. Positions that are masked, or of the loss's
    `ignore_class`, do not count. Where `consolidate` is given no labels, every estimator takes
    labels that are drawn as for `"mc"`; `"batch"` is not biased then.

    Args:
        estimator: How F̂ is computed from a batch of B examples.
            `"batch"` is B times the squared mean gradient: free in the training step, but biased.
            The loss may be a mean over examples, as by default, or a sum.
            `"empirical"` is the mean of the squared per-example gradients with the true labels: the
            empirical Fisher information.
            `"influence"` is the same with each squared gradient multiplied by b and divided by
            (r + median(r)) · m. Here r is the squared norm of the loss gradient at the model's
            outputs, or at the logits of a cross-entropy: well-learned examples, whose gradients
            vanish, count as much as others. And m is 0.1 plus the mean squared margin of a
            cross-entropy, the distance between the two highest logits: it measures changes of the
            logits relative to those that would change the prediction. Other losses have no margin:
            a squared one of 25, as trained classifiers have, takes its place, and b is how the
            loss bends, 2 for the squared error of one value, so that the penalty grows as the loss
            does with the unit of the targets and with `loss_weights`. For a cross-entropy b is its
            `loss_weights`. With several outputs each has its own r, m and b.
            `"mc"` draws the labels from the model's predictive distribution: a Monte Carlo estimate
            of the true Fisher information, for the loss without label smoothing.
            `"negated"` takes the gradient at the negated logits. It needs a cross-entropy on a
            single output; `"mc"` needs a cross-entropy or a mean squared error on each output.
            `"adam"` is B times Adam's second moment: it costs no time and no memory, but is biased
            as `"batch"` is. It needs a `DWDOptimizer` around Adam or RMSprop, whose second moments
            do not include the pull; they do include L2 regularization and clipping. It cannot be
            computed from data passed to `consolidate`.
        gamma: γ in [0, 1) of the online estimate; 0.9 to 0.95 is recommended. `None` switches the
            online estimate off; `consolidate` then needs data.
        every: The online estimate is updated at every n-th training step. Neighbouring steps have
            similar gradients, and each update costs a pass over memory.

    Example:

    ```python
    model = DWDModel.from_model(network, fisher=DiagonalFisher("empirical"))
    ```

    Reference:
        [Kirkpatrick et al., 2017](https://arxiv.org/abs/1612.00796);
        [van de Ven, 2025](https://arxiv.org/abs/2502.11756) on the estimators;
        [EWC-DR](https://arxiv.org/abs/2603.18596) for negated logits.
    """

    def __init__(
        self, estimator: Estimator | str = "batch", gamma: float | None = 0.95, every: int = 5
    ):
        super().__init__(estimator, gamma, every)
