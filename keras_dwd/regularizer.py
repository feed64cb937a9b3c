"""The quadratic pull towards what was learned: ½ (θ − c)ᵀ Λ (θ − c)."""

from collections.abc import Mapping
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import number
from keras_dwd.curvature.fisher import Block
from keras_dwd.variables import Arrays, Variables, untracked

Anchor = Literal["folded", "latest"]


@keras.saving.register_keras_serializable("keras_dwd")
class DWDRegularizer(keras.regularizers.Regularizer):
    """Pulls the trainable variables towards an anchor, weighted by a precision.

    The penalty on the parameters θ is `½ (θ − c)ᵀ Λ (θ − c)`. All tasks learned so far are folded
    into the anchor c and the precision Λ, so that neither the memory nor the cost of a training
    step grows with the number of tasks. Task t adds `a_t = strength · λ_k · F_t` to the precision,
    which is diagonal, with or without a correction of low rank, or has Kronecker factors, as the
    Fisher information F_t has. With
    `anchor="folded"` and a diagonal this is exactly the sum of one penalty per task:

        Σ_t ½ a_t (θ − θ*_t)²  =  ½ Λ (θ − c)² + const,   Λ = Σ_t a_t,   c = Σ_t a_t θ*_t / Λ

    `DWDModel` owns one for all its variables. It adds the
    gradient `Λ (θ − c)` to that of the loss in closed form, so nothing is differentiated for it.

    Given to a layer as `kernel_regularizer` (or `bias_regularizer`, …) of a `DWDModel` it holds no
    slots: it sets that variable's own strength in place of the model's; 0 excludes the variable.
    Outside of a `DWDModel` it has no effect.

    Args:
        strength: λ ≥ 0, the weight of the penalty against the loss of the new task. 0 switches
            all of it off: the model then trains as any Keras model does.
        decay: In [0, 1]. What an old task's precision is multiplied by at each later boundary.
            1 keeps the sum over all tasks (EWC); less is the γ of online EWC.
        anchor: `"latest"` moves the anchor to the newest parameters: they are where the sum of
            all tasks' penalties led, so that older optima do not pull twice. `"folded"` keeps the
            exact sum over tasks of EWC as first published.

    Example:

    ```python
    model = DWDModel(inputs, outputs, regularizer=DWDRegularizer(strength=30.0))
    free = keras.layers.Dense(10, kernel_regularizer=DWDRegularizer(strength=0.0))
    ```

    Reference:
        [Kirkpatrick et al., 2017](https://arxiv.org/abs/1612.00796), equation 3;
        [Huszár, 2018](https://arxiv.org/abs/1712.03847), on which anchor the sum should have;
        [Schwarz et al., 2018](https://arxiv.org/abs/1805.06370), section 4 (online EWC).
    """

    def __init__(self, strength: float = 30.0, decay: float = 1.0, anchor: Anchor = "latest"):
        if anchor not in ("folded", "latest"):
            raise ValueError(f"`anchor` must be 'folded' or 'latest'. Received: {anchor!r}")
        self.strength = number("strength", strength, 0)
        self.decay = number("decay", decay, 0, 1)
        self.anchor = anchor
        self.precisions: dict[str, Block] = {}
        self.anchors: dict[str, keras.Variable] = {}

    def __call__(self, x: Any) -> Any:
        """Zero: the pull enters the training step as a gradient, never through the loss."""
        return tf.zeros(())

    def strength_of(self, variable: keras.Variable) -> float:
        """The strength that applies to `variable`: its layer's own, else that of the model."""
        own = getattr(variable, "regularizer", None)
        return own.strength if isinstance(own, DWDRegularizer) else self.strength

    def fold(self, variables: Variables, blocks: Mapping[str, Block]) -> None:
        """Fold one more task, learned just now, into precision and anchor.

        Args:
            variables: Of the model, by path; their values are the task's θ*.
            blocks: The Fisher information, with the strengths of groups in it.

        Raises:
            ValueError: If it is of another kind than what earlier tasks left.
        """
        folded: list[tuple[str, Block, Arrays]] = []
        for key, block in blocks.items():
            strengths = {path: self.strength_of(variables[path]) for path in block.paths}
            if not any(strengths.values()):
                continue
            new = block.weighted(strengths)
            old = self.precisions.get(key)
            if old is not None and type(old) is not type(block):
                raise ValueError(
                    f"The precision of {key!r} so far is {type(old).__name__}, the new Fisher "
                    f"information {type(block).__name__}: go on with the `fisher` it was made by. "
                    "Nothing was changed."
                )
            total = new if old is None else old.merged(new, self.decay)
            anchors = {path: np.asarray(variables[path], "float64") for path in block.paths}
            if self.anchor == "folded" and old is not None:
                (path,) = block.paths
                center = np.asarray(self.anchors[path], "float64")
                # c + (new / total)(θ − c): the weighted mean, without cancellation for new << old.
                whole = total.spectrum()
                share = np.divide(new.spectrum(), whole, out=np.ones_like(whole), where=whole > 0)
                anchors[path] = center + share * (anchors[path] - center)
            folded.append((key, total, anchors))
        for key, total, anchors in folded:  # only now, with nothing left that can fail
            self.hold(key, total, anchors)

    def hold(self, key: str, block: Block, anchors: Arrays) -> None:
        """Keep a precision and its anchors in slots, new ones where the shapes are new."""
        held = self.precisions[key].leaves() if key in self.precisions else {}
        leaves = block.leaves()
        if {n: v.shape for n, v in held.items()} != {n: v.shape for n, v in leaves.items()}:
            held = {name: untracked(leaf, name) for name, leaf in leaves.items()}
            self.precisions[key] = block.with_leaves(held)
        for name, leaf in leaves.items():
            held[name].assign(leaf)
        for path, anchor in anchors.items():
            if path not in self.anchors:
                self.anchors[path] = untracked(anchor, "anchor")
            self.anchors[path].assign(anchor)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all slots: where they change, the training step must be traced anew."""
        return {name: tuple(array.shape) for name, array in self._slots().items()}

    def gradients(self, variables: Variables) -> dict[str, tf.Tensor]:
        """Λ (θ − c) by path, of the variables' shapes, where something pulls. Graph code."""
        found: dict[str, tf.Tensor] = {}
        for block in self.precisions.values():
            differences = self._differences(block, variables)
            pulls = zip(block.paths, block.multiply(differences), strict=True)
            found |= {path: pull for path, pull in pulls if self.strength_of(variables[path])}
        return found

    def pull(self, variables: Variables, stiffness: Mapping[str, tf.Tensor]) -> None:
        """The proximal step θ ← θ − (stiffness + Λ)⁻¹ Λ (θ − c). Graph code.

        Args:
            variables: Of the model, by path.
            stiffness: d/η of the variables to move, each of its shape or a scalar.
        """
        for block in self.precisions.values():
            free = [p for p in block.paths if not self.strength_of(variables[p])]
            moving = {p: stiffness[p] for p in block.paths if p in stiffness and p not in free}
            if moving:
                moves = block.shrink(self._differences(block, variables), list(moving.values()))
                for path, move in zip(block.paths, moves, strict=True):
                    if path in moving:
                        variables[path].assign_sub(tf.cast(move, variables[path].dtype))

    def value(self, variables: Variables) -> tf.Tensor:
        """The penalty ½ (θ − c)ᵀ Λ (θ − c), a float32 scalar, for reporting."""
        total = tf.zeros(())
        for block in self.precisions.values():
            differences = self._differences(block, variables)
            pulls = zip(block.paths, differences, block.multiply(differences), strict=True)
            for path, difference, pull in pulls:
                if self.strength_of(variables[path]):
                    total += 0.5 * tf.reduce_sum(difference * pull)
        return total

    def _differences(self, block: Block, variables: Variables) -> list[tf.Tensor]:
        return [
            tf.cast(variables[path].value, "float32") - self.anchors[path].value
            for path in block.paths
        ]

    def state(self) -> Arrays:
        """All slots as arrays, by `kind/PATH`."""
        return {name: np.asarray(v) for name, v in self._slots().items()}

    def _slots(self) -> Variables:
        slots = {
            f"{name}/{key}": leaf
            for key, block in self.precisions.items()
            for name, leaf in block.leaves().items()
        }
        return slots | {f"anchor/{path}": v for path, v in self.anchors.items()}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"strength": self.strength, "decay": self.decay, "anchor": self.anchor}
