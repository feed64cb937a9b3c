"""The quadratic penalty ½ (θ − c)ᵀ Λ (θ − c), with anchor c and precision Λ."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import number
from keras_dwd.files import FileError
from keras_dwd.groupings.strength import Budget
from keras_dwd.precision.block import Block, Place
from keras_dwd.precision.blocks import NAMES as BLOCK_ARRAYS
from keras_dwd.precision.blocks import arrays_by_path, block_from
from keras_dwd.state import UNCHANGED, Commit, refuse
from keras_dwd.variables import Arrays, Variables, untracked

Anchor = Literal["folded", "latest"]
NAMES = {"anchor", "center", "level", *BLOCK_ARRAYS}
"""The names of the regularizer's arrays in files, each of which is about a variable."""
SCALARS = {"tie"}
"""The names of its other arrays, scalars."""

# λ_k that are adjusted while training stay between 1 / `_LEVELS` and `_LEVELS`.
_LEVELS = 1000.0


@keras.saving.register_keras_serializable("keras_dwd")
class DWDRegularizer(keras.regularizers.Regularizer):
    """Pulls the trainable variables towards an anchor, weighted by a precision.

    The penalty on the parameters θ is `½ (θ − c)ᵀ Λ (θ − c)`. All tasks learned so far are folded
    into the anchor c and the precision Λ, so neither the memory nor the cost of a training step
    grows with the number of tasks. Task t adds `a_t = strength · λ_k · F_t` to the precision. Like
    the Fisher information F_t, the precision is diagonal, diagonal with a low-rank correction, or
    Kronecker-factored. With `anchor="folded"` and a diagonal, the penalty is exactly the sum of one
    penalty per task:

        Σ_t ½ a_t (θ − θ*_t)²  =  ½ Λ (θ − c)² + const,   Λ = Σ_t a_t,   c = Σ_t a_t θ*_t / Λ

    A `DWDModel` has one regularizer for all its variables. It adds the gradient `Λ (θ − c)` to the
    gradient of the loss in closed form, without differentiating the penalty.

    As the `kernel_regularizer` (or `bias_regularizer`, …) of a layer in a `DWDModel`, it sets the
    strength of that variable in place of the model's strength; 0 excludes the variable. Outside a
    `DWDModel` it has no effect.

    Args:
        strength: λ ≥ 0, the weight of the penalty relative to the loss of the new task. 0 switches
            the penalty off: the model then trains as any Keras model does.
        decay: In [0, 1], the factor by which the precision of earlier tasks is multiplied at each
            boundary. 1 keeps the sum over all tasks (EWC); a smaller value is the γ of online EWC.
        anchor: `"latest"` moves the anchor to the newest parameters. The penalties of earlier tasks
            have already influenced these, so their optima do not pull a second time. `"folded"`
            keeps the exact sum over tasks of EWC as first published.

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
        # For λ_k that are adjusted while training: λ_k by group, and the group of each block.
        self.group_strengths: dict[int, keras.Variable] = {}
        self.group_of: dict[str, int] = {}
        # For the task graph: one weight for all variables, and the anchor of each variable.
        self.task_weight = untracked(np.zeros(()), "tie")
        self.task_anchors: dict[str, keras.Variable] = {}

    @property
    def pulls(self) -> bool:
        """Whether there is any precision or task-graph anchor to pull with."""
        return bool(self.precisions or self.task_anchors)

    def __call__(self, x: Any) -> Any:
        """Zero: the pull enters the training step as a gradient, never through the loss."""
        return tf.zeros(())

    def strength_of(self, variable: keras.Variable) -> float:
        """The strength for `variable`: from its own `DWDRegularizer`, else that of the model."""
        own = getattr(variable, "regularizer", None)
        return own.strength if isinstance(own, DWDRegularizer) else self.strength

    def prepare_task(
        self,
        variables: Variables,
        blocks: Mapping[str, Block],
        adjusted: Mapping[str, int] | None = None,
    ) -> Commit:
        """Fold one more task into precision and anchor, without changing anything yet.

        Args:
            variables: Variables of the model, by path; their values are the task's θ*.
            blocks: The Fisher information, already multiplied by the strengths λ_k of its groups.
            adjusted: The group of each block whose λ_k is adjusted while training.

        Returns:
            A function that applies the result and cannot fail.

        Raises:
            ValueError: If the Fisher information has another type than that of earlier tasks.
        """
        folded: list[tuple[str, Block, Arrays]] = []
        for key, block in blocks.items():
            strengths = {path: self.strength_of(variables[path]) for path in block.paths}
            if not any(strengths.values()):
                continue
            new = block.scale_variables(strengths)
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
                diagonal = total.importances()
                share = np.divide(
                    new.importances(), diagonal, out=np.ones_like(diagonal), where=diagonal > 0
                )
                anchors[path] = center + share * (anchors[path] - center)
            folded.append((key, total, anchors))

        def commit() -> None:
            for key, block, anchors in folded:
                self.assign_slots(key, block, anchors)
            self.add_budget_groups(adjusted or {})

        return commit

    def assign_slots(self, key: str, block: Block, anchors: Arrays) -> None:
        """Assign a precision and its anchors to slots, creating slots where shapes are new."""
        slots = self.precisions[key].arrays() if key in self.precisions else {}
        arrays = block.arrays()
        if {n: v.shape for n, v in slots.items()} != {n: v.shape for n, v in arrays.items()}:
            slots = {name: untracked(array, name) for name, array in arrays.items()}
            _insert(self.precisions, key, block.with_arrays(slots))
        for name, array in arrays.items():
            slots[name].assign(array)
        for path, anchor in anchors.items():
            if path not in self.anchors:
                _insert(self.anchors, path, untracked(anchor, "anchor"))
            self.anchors[path].assign(anchor)

    def layout(self) -> Any:
        """The shapes of all slots; if they change, the training step must be traced again."""
        return {n: tuple(array.shape) for n, array in self._slots().items()}, dict(self.group_of)

    def gradients(self, variables: Variables) -> dict[str, tf.Tensor]:
        """The pull Λ (θ − c) by path, in the shape of each variable that is pulled. Graph code."""
        total: dict[str, tf.Tensor] = {}
        for key, block in self.precisions.items():
            differences = self._differences(block, variables)
            pulls = zip(block.paths, block.matvec(differences), strict=True)
            strength = self._group_strength(key)
            for path, pull in pulls:
                if self.strength_of(variables[path]):
                    pull = pull if strength is None else strength * pull
                    # Two blocks may cover a bias: first in a layer's matrix, later on its own.
                    total[path] = total[path] + pull if path in total else pull
        for path, distance in self._from_task_anchors(variables).items():
            pull = self.task_weight.value * distance
            total[path] = total[path] + pull if path in total else pull
        return total

    def pull_to_tasks(self, weight: float, anchors: Arrays) -> None:
        """Set the penalty of the task graph, ½ weight ‖θ − anchor‖², regardless of precision.

        Args:
            weight: The weight for all variables, ≥ 0.
            anchors: The values that variables are pulled towards, by path.
        """
        for path, anchor in anchors.items():
            if path not in self.task_anchors:
                _insert(self.task_anchors, path, untracked(anchor, "task_anchor"))
            self.task_anchors[path].assign(anchor)
        self.task_weight.assign(weight)

    def added(
        self,
        pulls: Mapping[str, tf.Tensor],
        variables: Variables,
        gradients: Mapping[str, Any],
        scale: tf.Tensor | None,
    ) -> list[Any]:
        """Gradients plus `scale` times the pulls, for variables that have both. Graph code."""
        total = []
        for path, gradient in gradients.items():
            if path in pulls and gradient is not None:
                pull = tf.cast(pulls[path], variables[path].dtype)
                pull = pull if scale is None else pull * tf.cast(scale, pull.dtype)
                gradient = tf.convert_to_tensor(gradient) + pull
            total.append(gradient)
        return total

    def add_budget_groups(self, group_of: Mapping[str, int]) -> None:
        """Create a λ_k of 1 for each new group of blocks that is adjusted while training."""
        for key, group in group_of.items():
            _insert(self.group_of, key, group)
            if group not in self.group_strengths:
                _insert(self.group_strengths, group, untracked(np.ones(()), "group_strength"))

    def balance(
        self,
        pulls: Mapping[str, tf.Tensor],
        gradients: Mapping[str, Any],
        scale: tf.Tensor | None,
        budget: Budget,
    ) -> None:
        """Adjust λ_k by the share of the pull in the total gradient of each group. Graph code.

        Args:
            pulls: The pull by path, see `gradients`.
            gradients: Gradients of the loss by path, each a tensor or `None`.
            scale: The loss scale, if the loss was scaled before differentiation.
            budget: The rule, with the share to aim for.
        """
        blocks = self.precisions.items()
        groups = {path: self.group_of.get(key) for key, block in blocks for path in block.paths}
        for group, strength in self.group_strengths.items():
            squares = [tf.zeros(()), tf.zeros(())]
            for path, gradient in gradients.items():
                if groups.get(path) == group and path in pulls and gradient is not None:
                    for i, part in enumerate((pulls[path], tf.convert_to_tensor(gradient))):
                        squares[i] += tf.reduce_sum(tf.cast(part, "float32") ** 2)
            pull, gradient = tf.sqrt(squares[0]), tf.sqrt(squares[1])
            gradient = gradient if scale is None else gradient / tf.cast(scale, "float32")
            share = tf.math.divide_no_nan(pull, pull + gradient)
            adjusted = strength.value * tf.exp(budget.rate * (budget.share - share))
            adjusted = tf.clip_by_value(adjusted, 1 / _LEVELS, _LEVELS)
            # Keep λ_k where nothing pulls, and in a step that overflowed and will be skipped.
            valid = (pull > 0) & tf.math.is_finite(pull) & tf.math.is_finite(gradient)
            strength.assign(tf.where(valid, adjusted, strength.value))

    def proximal_step(self, variables: Variables, stiffness: Mapping[str, tf.Tensor]) -> None:
        """The proximal step θ ← θ − (stiffness + Λ)⁻¹ Λ (θ − c). Graph code.

        Args:
            variables: Variables of the model, by path.
            stiffness: d/η of the variables to move, by path, in the shape of each or as a scalar.
        """
        for key, block in self.precisions.items():
            strength = self._group_strength(key)
            free = [p for p in block.paths if not self.strength_of(variables[p])]
            moving = {p: stiffness[p] for p in block.paths if p in stiffness and p not in free}
            if moving:
                if strength is not None:  # (d + mΛ)⁻¹ mΛ = (d/m + Λ)⁻¹ Λ
                    moving = {path: d / strength for path, d in moving.items()}
                moves = block.proximal_correction(
                    self._differences(block, variables), list(moving.values())
                )
                for path, move in zip(block.paths, moves, strict=True):
                    if path in moving:
                        variables[path].assign_sub(tf.cast(move, variables[path].dtype))
        for path, distance in self._from_task_anchors(variables).items():
            if path in stiffness:
                move = (
                    self.task_weight.value / (stiffness[path] + self.task_weight.value) * distance
                )
                variables[path].assign_sub(tf.cast(move, variables[path].dtype))

    def value(self, variables: Variables) -> tf.Tensor:
        """The penalty ½ (θ − c)ᵀ Λ (θ − c), a float32 scalar, for reporting."""
        total = tf.zeros(())
        for key, block in self.precisions.items():
            strength = self._group_strength(key)
            differences = self._differences(block, variables)
            pulls = zip(block.paths, differences, block.matvec(differences), strict=True)
            for path, difference, pull in pulls:
                if self.strength_of(variables[path]):
                    part = 0.5 * tf.reduce_sum(difference * pull)
                    total += part if strength is None else strength * part
        for distance in self._from_task_anchors(variables).values():
            total += 0.5 * self.task_weight.value * tf.reduce_sum(distance**2)
        return total

    def _from_task_anchors(self, variables: Variables) -> dict[str, tf.Tensor]:
        """θ − anchor by path, for the variables that the task graph pulls."""
        return {
            path: tf.cast(variables[path].value, "float32") - anchor.value
            for path, anchor in self.task_anchors.items()
            if variables[path].trainable and self.strength_of(variables[path])
        }

    def _group_strength(self, key: str) -> tf.Tensor | None:
        """λ_k of a block's group, or `None` if it is not adjusted while training."""
        return self.group_strengths[self.group_of[key]].value if key in self.group_of else None

    def _differences(self, block: Block, variables: Variables) -> list[tf.Tensor]:
        return [self._difference(variables[path], self.anchors[path]) for path in block.paths]

    @staticmethod
    def _difference(variable: keras.Variable, anchor: keras.Variable) -> tf.Tensor:
        if not keras.backend.is_float_dtype(variable.dtype):  # quantized: not trained any more
            return tf.zeros_like(anchor.value)
        return tf.cast(variable.value, "float32") - anchor.value

    def state(self) -> Arrays:
        """All slots as arrays, by `NAME/PATH`; `level` holds the group's number and its λ_k."""
        levels = {
            f"level/{key}": np.array([group, float(self.group_strengths[group])])
            for key, group in self.group_of.items()
        }
        slots = {name: np.asarray(v) for name, v in self._slots().items()}
        return slots | levels | {"tie": np.asarray(self.task_weight)}

    def prepare_state(
        self,
        state: Arrays,
        places: Mapping[str, Place],
        rank: int,
        correction: int,
        keeps: Callable[[str], bool],
    ) -> Commit:
        """Check a state, as returned by `state` for any model, without changing anything yet.

        Args:
            state: The arrays by `NAME/PATH`, with names from `NAMES`, and `tie`.
            places: Places in the model, by path; see `places_of`.
            rank: See `block_from`.
            correction: See `block_from`.
            keeps: Whether this worker keeps the block of a path.

        Returns:
            A function that applies the state and cannot fail.

        Raises:
            FileError: If an array does not fit the model.
        """
        weight = float(state["tie"])
        arrays = {key: array for key, array in state.items() if key != "tie"}
        anchors: Arrays = {}
        task_anchors: Arrays = {}
        levels: Arrays = {}
        block_arrays: Arrays = {}
        for key, array in arrays.items():
            name, _, path = key.partition("/")
            shape = places[path].shapes[0]
            if name in BLOCK_ARRAYS:
                block_arrays[key] = array
                continue
            if array.shape != ((2,) if name == "level" else shape):
                refuse(name, path, array)
            if name == "level" and array[0] != np.floor(array[0]):
                raise FileError(f"The saved {key!r} has numbers that cannot be. {UNCHANGED}")
            {"anchor": anchors, "center": task_anchors, "level": levels}[name][path] = array
        blocks: dict[str, Block] = {}
        for path, arrays_of_block in arrays_by_path(block_arrays).items():
            try:
                blocks[path] = block_from(arrays_of_block, places[path], rank, correction)
            except ValueError:
                refuse(*next((name, path, array) for name, array in arrays_of_block.items()))
            missing = [p for p in blocks[path].paths if p not in anchors]
            if missing:
                raise FileError(f"The saved precision of {missing[0]!r} has no anchor. {UNCHANGED}")

        def commit() -> None:
            for slots in (self.precisions, self.anchors, self.group_strengths, self.group_of):
                slots.clear()
            self.task_anchors.clear()
            for path, block in blocks.items():
                if keeps(path):
                    self.assign_slots(path, block, {p: anchors[p] for p in block.paths})
            self.pull_to_tasks(weight, task_anchors)
            for key, (group, level) in levels.items():
                self.add_budget_groups({key: int(group)})
                self.group_strengths[int(group)].assign(level)

        return commit

    def _slots(self) -> Variables:
        slots = {
            f"{name}/{key}": array
            for key, block in self.precisions.items()
            for name, array in block.arrays().items()
        }
        slots |= {f"center/{path}": v for path, v in self.task_anchors.items()}
        return slots | {f"anchor/{path}": v for path, v in self.anchors.items()}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"strength": self.strength, "decay": self.decay, "anchor": self.anchor}


def _insert(entries: dict[Any, Any], key: Any, value: Any) -> None:
    """Insert into a dictionary that is kept in the order of its keys.

    Graphs built from it are then the same in any order of insertion, for example after loading,
    and sums in them agree to the last bit.
    """
    entries[key] = value
    ordered = sorted(entries.items())
    entries.clear()
    entries.update(ordered)
