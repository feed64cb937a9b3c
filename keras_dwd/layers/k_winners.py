"""k-winners-take-all: a layer that makes activations sparse."""

from typing import Any

import keras

from keras_dwd.checks import integer, number


@keras.saving.register_keras_serializable("keras_dwd")
class KWinners(keras.layers.Layer):
    """Keeps the largest activations along the last axis and sets the others to zero.

    Tasks that activate different units do not change each other's weights. With
    `KroneckerFisher(sparsity=True)`, units that were never active on earlier tasks are left out of
    both the Fisher estimate and the penalty.

    Args:
        winners: Number of activations to keep, an integer ≥ 1, or a float in (0, 1) for a share of
            the units. Activations equal to the smallest one kept are kept as well.
        **kwargs: Arguments of `keras.layers.Layer`.

    Example:

    ```python
    x = keras.layers.Dense(500, activation="relu")(inputs)
    x = KWinners(0.1)(x)
    ```

    Reference:
        [Ahmad & Scheinkman, 2019](https://arxiv.org/abs/1903.11257), without boosting.
    """

    def __init__(self, winners: int | float, **kwargs: Any):
        super().__init__(**kwargs)
        if isinstance(winners, float):
            number("winners", winners, 0, 1, closed=False)
            if winners == 0:
                raise ValueError("`winners` must be a share in (0, 1). Received: 0.0")
        else:
            integer("winners", winners, 1)
        self.winners = winners
        self.supports_masking = True

    def call(self, inputs: Any) -> Any:
        units = inputs.shape[-1]
        share = max(1, round(self.winners * units)) if isinstance(self.winners, float) else None
        count = min(share or int(self.winners), units)
        lowest = keras.ops.top_k(inputs, count, sorted=True)[0][..., -1:]
        return keras.ops.where(inputs >= lowest, inputs, keras.ops.zeros_like(inputs))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"winners": self.winners}
