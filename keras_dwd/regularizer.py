"""The quadratic pull towards what was learned: ½ (θ − c)ᵀ Λ (θ − c)."""

from collections.abc import Mapping
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import number
from keras_dwd.curvature.fisher import Block
from keras_dwd.grouping.strength import Budget
from keras_dwd.variables import Arrays, Variables, untracked

Anchor = Literal["folded", "latest"]
Folded = tuple[str, Block, Arrays]
"""The key of a block, the block and its anchors by path."""

# Strengths that follow a budget stay between a thousandth of the model's and a thousand times it.
_LEVELS = 1000.0


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
    model = DWDModel(inputs, outputs, regularizer=DWDRegularizer(strength=200.0))
    free = keras.layers.Dense(10, kernel_regularizer=DWDRegularizer(strength=0.0))
    ```

    Reference:
        [Kirkpatrick et al., 2017](https://arxiv.org/abs/1612.00796), equation 3;
        [Huszár, 2018](https://arxiv.org/abs/1712.03847), on which anchor the sum should have;
        [Schwarz et al., 2018](https://arxiv.org/abs/1805.06370), section 4 (online EWC).
    """

    def __init__(self, strength: float = 200.0, decay: float = 1.0, anchor: Anchor = "latest"):
        if anchor not in ("folded", "latest"):
            raise ValueError(f"`anchor` must be 'folded' or 'latest'. Received: {anchor!r}")
        self.strength = number("strength", strength, 0)
        self.decay = number("decay", decay, 0, 1)
        self.anchor = anchor
        self.precisions: dict[str, Block] = {}
        self.anchors: dict[str, keras.Variable] = {}
        # λ_k by group and the group of each block, where they are adjusted while training.
        self.levels: dict[int, keras.Variable] = {}
        self.group_of: dict[str, int] = {}
        # Of the task graph: one weight for all variables, and where each is pulled by it.
        self.tie = untracked(np.zeros(()), "tie")
        self.centers: dict[str, keras.Variable] = {}

    @property
    def pulls(self) -> bool:
        """Whether there is anything that variables are pulled to."""
        return bool(self.precisions or self.centers)

    def __call__(self, x: Any) -> Any:
        """Zero: the pull enters the training step as a gradient, never through the loss."""
        return tf.zeros(())

    def strength_of(self, variable: keras.Variable) -> float:
        """The strength that applies to `variable`: its layer's own, else that of the model."""
        own = getattr(variable, "regularizer", None)
        return own.strength if isinstance(own, DWDRegularizer) else self.strength

    def folded(self, variables: Variables, blocks: Mapping[str, Block]) -> list[Folded]:
        """Precision and anchor with one more task in them, learned just now; `hold` keeps them.

        Args:
            variables: Of the model, by path; their values are the task's θ*.
            blocks: The Fisher information, with the strengths of groups in it.

        Raises:
            ValueError: If it is of another kind than what earlier tasks left.
        """
        folded: list[Folded] = []
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
        return folded

    def hold(self, key: str, block: Block, anchors: Arrays) -> None:
        """Keep a precision and its anchors in slots, new ones where the shapes are new."""
        held = self.precisions[key].leaves() if key in self.precisions else {}
        leaves = block.leaves()
        if {n: v.shape for n, v in held.items()} != {n: v.shape for n, v in leaves.items()}:
            held = {name: untracked(leaf, name) for name, leaf in leaves.items()}
            _insert(self.precisions, key, block.with_leaves(held))
        for name, leaf in leaves.items():
            held[name].assign(leaf)
        for path, anchor in anchors.items():
            if path not in self.anchors:
                _insert(self.anchors, path, untracked(anchor, "anchor"))
            self.anchors[path].assign(anchor)

    def layout(self) -> Any:
        """Of all slots: where it changes, the training step must be traced anew."""
        return {n: tuple(array.shape) for n, array in self._slots().items()}, dict(self.group_of)

    def gradients(self, variables: Variables) -> dict[str, tf.Tensor]:
        """Λ (θ − c) by path, of the variables' shapes, where something pulls. Graph code."""
        found: dict[str, tf.Tensor] = {}
        for key, block in self.precisions.items():
            differences = self._differences(block, variables)
            pulls = zip(block.paths, block.multiply(differences), strict=True)
            level = self._level(key)
            for path, pull in pulls:
                if self.strength_of(variables[path]):
                    pull = pull if level is None else level * pull
                    # A bias may have been in a layer's matrix first and on its own since.
                    found[path] = found[path] + pull if path in found else pull
        for path, distance in self._from_centers(variables).items():
            pull = self.tie.value * distance
            found[path] = found[path] + pull if path in found else pull
        return found

    def tie_to(self, weight: float, centers: Arrays) -> None:
        """Pull variables alike, whatever their precision: ½ weight ‖θ − center‖².

        Args:
            weight: ≥ 0.
            centers: By path.
        """
        for path, center in centers.items():
            if path not in self.centers:
                _insert(self.centers, path, untracked(center, "center"))
            self.centers[path].assign(center)
        self.tie.assign(weight)

    def with_pull(
        self,
        variables: Variables,
        gradients: Mapping[str, Any],
        scale: tf.Tensor | None,
        budget: Budget | None = None,
    ) -> list[Any]:
        """Gradients of the loss with the pull added. Graph code.

        Args:
            variables: Of the model, by path.
            gradients: By path, each a tensor or `None`.
            scale: What the loss was scaled by before it was differentiated, if it was.
            budget: The rule to adjust λ_k by, if there is one.
        """
        pulls = self.gradients(variables) if self.pulls else {}
        if budget is not None:
            self.balance(pulls, gradients, scale, budget)
        return self.added(pulls, variables, gradients, scale)

    def added(
        self,
        pulls: Mapping[str, tf.Tensor],
        variables: Variables,
        gradients: Mapping[str, Any],
        scale: tf.Tensor | None,
    ) -> list[Any]:
        """Gradients with pulls, times `scale`, added where there are both. Graph code."""
        total = []
        for path, gradient in gradients.items():
            if path in pulls and gradient is not None:
                pull = tf.cast(pulls[path], variables[path].dtype)
                pull = pull if scale is None else pull * tf.cast(scale, pull.dtype)
                gradient = tf.convert_to_tensor(gradient) + pull
            total.append(gradient)
        return total

    def follow(self, group_of: Mapping[str, int]) -> None:
        """Have a λ_k for each group of blocks that is adjusted while training, 1 at first."""
        for key, group in group_of.items():
            _insert(self.group_of, key, group)
            if group not in self.levels:
                _insert(self.levels, group, untracked(np.ones(()), "level"))

    def balance(
        self,
        pulls: Mapping[str, tf.Tensor],
        gradients: Mapping[str, Any],
        scale: tf.Tensor | None,
        budget: Budget,
    ) -> None:
        """Adjust λ_k to the share that the pull has in the gradient of each group. Graph code.

        Args:
            pulls: What `gradients` gives.
            gradients: Of the loss by path, each a tensor or `None`.
            scale: What the loss was scaled by before it was differentiated, if it was.
            budget: The rule.
        """
        blocks = self.precisions.items()
        groups = {path: self.group_of.get(key) for key, block in blocks for path in block.paths}
        for group, level in self.levels.items():
            squares = [tf.zeros(()), tf.zeros(())]
            for path, gradient in gradients.items():
                if groups.get(path) == group and path in pulls and gradient is not None:
                    for i, part in enumerate((pulls[path], tf.convert_to_tensor(gradient))):
                        squares[i] += tf.reduce_sum(tf.cast(part, "float32") ** 2)
            pull, gradient = tf.sqrt(squares[0]), tf.sqrt(squares[1])
            gradient = gradient if scale is None else gradient / tf.cast(scale, "float32")
            share = tf.math.divide_no_nan(pull, pull + gradient)
            moved = level.value * tf.exp(budget.rate * (budget.share - share))
            moved = tf.clip_by_value(moved, 1 / _LEVELS, _LEVELS)
            # Not where nothing pulls, nor in a step that overflowed and will be skipped.
            real = (pull > 0) & tf.math.is_finite(pull) & tf.math.is_finite(gradient)
            level.assign(tf.where(real, moved, level.value))

    def pull(self, variables: Variables, stiffness: Mapping[str, tf.Tensor]) -> None:
        """The proximal step θ ← θ − (stiffness + Λ)⁻¹ Λ (θ − c). Graph code.

        Args:
            variables: Of the model, by path.
            stiffness: d/η of the variables to move, each of its shape or a scalar.
        """
        for key, block in self.precisions.items():
            level = self._level(key)
            free = [p for p in block.paths if not self.strength_of(variables[p])]
            moving = {p: stiffness[p] for p in block.paths if p in stiffness and p not in free}
            if moving:
                if level is not None:  # (d + mΛ)⁻¹ mΛ = (d/m + Λ)⁻¹ Λ
                    moving = {path: each / level for path, each in moving.items()}
                moves = block.shrink(self._differences(block, variables), list(moving.values()))
                for path, move in zip(block.paths, moves, strict=True):
                    if path in moving:
                        variables[path].assign_sub(tf.cast(move, variables[path].dtype))
        for path, distance in self._from_centers(variables).items():
            if path in stiffness:
                move = self.tie.value / (stiffness[path] + self.tie.value) * distance
                variables[path].assign_sub(tf.cast(move, variables[path].dtype))

    def value(self, variables: Variables) -> tf.Tensor:
        """The penalty ½ (θ − c)ᵀ Λ (θ − c), a float32 scalar, for reporting."""
        total = tf.zeros(())
        for key, block in self.precisions.items():
            level = self._level(key)
            differences = self._differences(block, variables)
            pulls = zip(block.paths, differences, block.multiply(differences), strict=True)
            for path, difference, pull in pulls:
                if self.strength_of(variables[path]):
                    part = 0.5 * tf.reduce_sum(difference * pull)
                    total += part if level is None else level * part
        for distance in self._from_centers(variables).values():
            total += 0.5 * self.tie.value * tf.reduce_sum(distance**2)
        return total

    def _from_centers(self, variables: Variables) -> dict[str, tf.Tensor]:
        """θ − center by path, of what is pulled to one."""
        return {
            path: tf.cast(variables[path].value, "float32") - center.value
            for path, center in self.centers.items()
            if variables[path].trainable and self.strength_of(variables[path])
        }

    def _level(self, key: str) -> tf.Tensor | None:
        """λ_k of the group of a block, where it is adjusted while training."""
        return self.levels[self.group_of[key]].value if key in self.group_of else None

    def _differences(self, block: Block, variables: Variables) -> list[tf.Tensor]:
        return [self._difference(variables[path], self.anchors[path]) for path in block.paths]

    @staticmethod
    def _difference(variable: keras.Variable, anchor: keras.Variable) -> tf.Tensor:
        if not keras.backend.is_float_dtype(variable.dtype):  # quantised: it moves no more
            return tf.zeros_like(anchor.value)
        return tf.cast(variable.value, "float32") - anchor.value

    def state(self) -> Arrays:
        """All slots as arrays, by `kind/PATH`; `level` is a group's number and its λ_k."""
        levels = {
            f"level/{key}": np.array([group, float(self.levels[group])])
            for key, group in self.group_of.items()
        }
        slots = {name: np.asarray(v) for name, v in self._slots().items()}
        return slots | levels | {"tie": np.asarray(self.tie)}

    def _slots(self) -> Variables:
        slots = {
            f"{name}/{key}": leaf
            for key, block in self.precisions.items()
            for name, leaf in block.leaves().items()
        }
        slots |= {f"center/{path}": v for path, v in self.centers.items()}
        return slots | {f"anchor/{path}": v for path, v in self.anchors.items()}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"strength": self.strength, "decay": self.decay, "anchor": self.anchor}


def _insert(held: dict[Any, Any], key: Any, value: Any) -> None:
    """Into a dictionary in the order of its keys.

    Graphs made of it are the same whatever the order of insertion, as after loading, and sums in
    them the same to the last bit.
    """
    held[key] = value
    ordered = sorted(held.items())
    held.clear()
    held.update(ordered)
