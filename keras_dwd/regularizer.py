"""The quadratic penalty ½ (θ − c)ᵀ Λ (θ − c), with anchor c and precision Λ."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.checks import FixedSettings, number
from keras_dwd.files import FileError
from keras_dwd.groupings.budget_strengths import BudgetStrengths
from keras_dwd.precision.block import Block, Place
from keras_dwd.precision.blocks import NAMES as BLOCK_ARRAYS
from keras_dwd.precision.blocks import arrays_by_path, block_from
from keras_dwd.precision.diagonal import Diagonal
from keras_dwd.precision.kronecker import Kronecker
from keras_dwd.precision.row_kronecker import RowKronecker
from keras_dwd.state import UNCHANGED, Commit, refuse
from keras_dwd.variables import Arrays, Variables, insert, untracked

Anchor = Literal["folded", "latest"]
DEFAULT_STRENGTH = 200.0
"""λ where none is given; measured with the estimator `influence` on many networks."""
NAMES = {"anchor", "center", "folded", "level", *BLOCK_ARRAYS}
"""The names of the regularizer's arrays in files, each of which is about a variable."""
SCALARS = {"tie"}
"""The names of its other arrays, scalars."""

# The largest and the smallest positive number that float32 holds to full precision.
_LARGEST, _SMALLEST = float(np.finfo("float32").max), float(np.finfo("float32").tiny)


@keras.saving.register_keras_serializable("keras_dwd")
class DWDRegularizer(FixedSettings, keras.regularizers.Regularizer):
    """Pulls the trainable variables towards an anchor, weighted by a precision.

    The penalty on the parameters θ is `½ (θ − c)ᵀ Λ (θ − c)`. All tasks learned so far are folded
    into the anchor c and the precision Λ, so neither the memory nor the cost of a training step
    grows with the number of tasks. Task t adds `a_t = λ · λ_k · F_t` to the precision. Like
    the Fisher information F_t, the precision is diagonal, diagonal with a low-rank correction, or
    Kronecker-factored. With `anchor="folded"` and a diagonal, the penalty is exactly the sum of one
    penalty per task:

        Σ_t ½ a_t (θ − θ*_t)²  =  ½ Λ (θ − c)² + const,   Λ = Σ_t a_t,   c = Σ_t a_t θ*_t / Λ

    A `DWDModel` has one regularizer for all its variables. It adds the gradient `Λ (θ − c)` to the
    gradient of the loss in closed form, without differentiating the penalty.

    As the `kernel_regularizer` (or `bias_regularizer`, …) of a layer in a `DWDModel`, it sets the
    strength of that variable in place of the model's strength; 0 excludes the variable. Outside a
    `DWDModel` it has no effect.

    `strength` and `decay` can be assigned at any time. A new strength is that of all tasks learned
    so far, and takes effect at the next training step, without tracing the step again. So does the
    strength of a model that loads a file or inherits: λ is not part of what a task leaves. A new
    decay takes effect at the next boundary.

    Args:
        strength: λ ≥ 0, the weight of the penalty relative to the loss of the new task. 0 switches
            the penalty off: the model then trains as any Keras model does, and its tasks leave
            nothing. Where 0 is assigned after a boundary, later tasks are still estimated.
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

    def __init__(
        self, strength: float = DEFAULT_STRENGTH, decay: float = 1.0, anchor: Anchor = "latest"
    ):
        if anchor not in ("folded", "latest"):
            raise ValueError(f"`anchor` must be 'folded' or 'latest'. Received: {anchor!r}")
        # λ as a variable, which the traced training step reads.
        self._strength_variable = untracked(np.zeros(()), "strength")
        # Whether tasks were consolidated without an estimate for some variable, as λ was zero.
        self._left_out = False
        self.strength = strength
        self.decay = decay
        self.anchor = anchor
        # The precision Λ of each block, with the λ of `folded` in it; the pull multiplies it by
        # the current λ over that one.
        self.folded: dict[str, float] = {}
        self.precisions: dict[str, Block] = {}
        self.anchors: dict[str, keras.Variable] = {}
        self.budget_strengths = BudgetStrengths()
        # For the task graph: one weight for all variables, and the anchor of each variable.
        self.task_weight = untracked(np.zeros(()), "tie")
        self.task_anchors: dict[str, keras.Variable] = {}

    @property
    def strength(self) -> float:
        """λ, for all tasks. Assigning it takes effect at once."""
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        checked = number("strength", strength, 0, _LARGEST)
        if checked and self._left_out:
            raise ValueError(
                "`strength` cannot be raised from 0: tasks were consolidated with it, for which "
                "nothing was estimated that could hold them. Train these tasks with a strength "
                f"above 0, or go on with a new DWDModel. Received: {strength!r}"
            )
        self._strength = checked
        self._strength_variable.assign(checked)

    @property
    def decay(self) -> float:
        """The factor for the precision of earlier tasks at the next boundary."""
        return self._decay

    @decay.setter
    def decay(self, decay: float) -> None:
        self._decay = number("decay", decay, 0, 1)

    @property
    def pulls(self) -> bool:
        """Whether there is any precision or task-graph anchor to pull with."""
        return bool(self.precisions or self.task_anchors)

    def __call__(self, x: Any) -> Any:
        """Zero: the pull enters the training step as a gradient, never through the loss."""
        return tf.zeros(())

    def strength_of(self, variable: keras.Variable) -> float:
        """The strength for `variable`: from its own `DWDRegularizer`, else that of the model."""
        return self.regularizer_of(variable).strength

    def holds(self, path: str, variable: keras.Variable) -> bool:
        """Whether tasks are estimated for a variable: it has a strength, or had one before."""
        return self.strength_of(variable) > 0 or path in self.folded

    def record_left_out(self, variables: Variables, tasks: int, loaded: bool = False) -> None:
        """Record which variables tasks were learned without an estimate for, as λ was zero.

        Args:
            variables: The trainable variables, by path.
            tasks: The number of tasks learned.
            loaded: Whether the tasks were loaded or inherited. Loaded tasks may lack variables that
                were frozen or absent then: a higher strength is refused only if none was estimated.
        """
        estimated: dict[DWDRegularizer, list[bool]] = {self: []}
        for path, variable in variables.items():
            regularizer = self.regularizer_of(variable)
            estimated.setdefault(regularizer, []).append(self.holds(path, variable))
        for regularizer, each in estimated.items():
            missing = not any(each) if loaded else not all(each)
            regularizer._left_out = bool(tasks and each and missing)

    def regularizer_of(self, variable: keras.Variable) -> "DWDRegularizer":
        """The regularizer with the strength for `variable`: its own, else that of the model."""
        own = getattr(variable, "regularizer", None)
        return own if isinstance(own, DWDRegularizer) else self

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
        results: list[tuple[str, Block, Arrays]] = []
        for key, block in blocks.items():
            strengths = {
                path: self.folded.get(path, self.strength_of(variables[path]))
                for path in block.paths
            }
            if not any(strengths.values()):
                continue
            new = block.scale_variables(strengths)
            old = self.precisions.get(key)
            if isinstance(old, Diagonal) and isinstance(block, (Kronecker, RowKronecker)):
                old = block.of_diagonal(old)
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
            results.append((key, total, anchors))

        def commit() -> None:
            for key, block, anchors in results:
                self.assign_slots(key, block, anchors)
            for path, variable in variables.items():  # blocks of other workers too
                if variable.trainable and self.strength_of(variable):
                    self.folded.setdefault(path, self.strength_of(variable))
            self.budget_strengths.add(adjusted or {})

        return commit

    def assign_slots(self, key: str, block: Block, anchors: Arrays) -> None:
        """Assign a precision and its anchors to slots, creating slots where shapes are new."""
        slots = self.precisions[key].arrays() if key in self.precisions else {}
        arrays = block.arrays()
        if {n: v.shape for n, v in slots.items()} != {n: v.shape for n, v in arrays.items()}:
            slots = {name: untracked(array, name) for name, array in arrays.items()}
            insert(self.precisions, key, block.with_arrays(slots))
        for name, array in arrays.items():
            slots[name].assign(array)
        for path, anchor in anchors.items():
            if path not in self.anchors:
                insert(self.anchors, path, untracked(anchor, "anchor"))
            self.anchors[path].assign(anchor)

    def layout(self) -> Any:
        """What tracing builds into the training step: if it changes, the step is traced again."""
        shapes = {n: tuple(array.shape) for n, array in self.slots().items()}
        return shapes, dict(self.budget_strengths.group_of), dict(self.folded)

    def gradients(self, variables: Variables) -> dict[str, tf.Tensor]:
        """The pull Λ (θ − c) by path, in the shape of each variable that is pulled. Graph code."""
        total: dict[str, tf.Tensor] = {}
        for path, _, pull in self._pulls(variables):
            # Two blocks may cover a bias: first in a layer's matrix, later on its own.
            total[path] = total[path] + pull if path in total else pull
        for path, (weight, distance) in self._from_task_anchors(variables).items():
            pull = weight * distance
            total[path] = total[path] + pull if path in total else pull
        return total

    def _pulls(self, variables: Variables) -> Iterator[tuple[str, tf.Tensor, tf.Tensor]]:
        """Path, θ − c and Λ (θ − c) of each variable in each block. Graph code."""
        factors = self._factors(variables)
        for key, block in self.precisions.items():
            of_block = {path: factors[path] for path in block.paths if path in factors}
            if not of_block:
                continue
            differences = self._differences(block, variables)
            if _same(of_block):
                pulls = block.matvec(differences)
            else:  # √s Λ √s, where s has the factor of each variable
                of_block = {path: tf.sqrt(factor) for path, factor in of_block.items()}
                pulls = block.matvec(
                    [
                        of_block.get(p, 1.0) * d
                        for p, d in zip(block.paths, differences, strict=True)
                    ]
                )
            budget_strength = self.budget_strengths.of(key)
            for path, difference, pull in zip(block.paths, differences, pulls, strict=True):
                if path in of_block:
                    factor = of_block[path]
                    factor = factor if budget_strength is None else factor * budget_strength
                    yield path, difference, factor * pull

    def _factors(self, variables: Variables) -> dict[str, tf.Tensor]:
        """The current λ over that in the precision, by path; where equal, one tensor. Graph code.

        It is exactly 1 as long as no other strength is assigned.
        """
        factors: dict[str, tf.Tensor] = {}
        known: dict[tuple[int, float], tf.Tensor] = {}
        for path, folded in self.folded.items():
            regularizer = self.regularizer_of(variables[path])
            key = id(regularizer), folded
            if key not in known:
                # A compiler may turn the division into a product with 1 / folded, which is not
                # exactly 1 for the same strength.
                strength, before = regularizer._strength_variable.value, tf.constant(folded)
                known[key] = tf.where(strength == before, 1.0, strength / before)
            factors[path] = known[key]
        return factors

    def pull_to_tasks(self, weight: float, anchors: Arrays) -> None:
        """Set the penalty of the task graph, ½ weight ‖θ − anchor‖², regardless of precision.

        Args:
            weight: The weight for all variables, ≥ 0.
            anchors: The values that variables are pulled towards, by path.
        """
        for path, anchor in anchors.items():
            if path not in self.task_anchors:
                insert(self.task_anchors, path, untracked(anchor, "task_anchor"))
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

    def proximal_step(self, variables: Variables, stiffness: Mapping[str, tf.Tensor]) -> None:
        """The proximal step θ ← θ − (stiffness + Λ)⁻¹ Λ (θ − c). Graph code.

        Args:
            variables: Variables of the model, by path.
            stiffness: d/η of the variables to move, by path, in the shape of each or as a scalar.
        """
        factors = self._factors(variables)
        for key, block in self.precisions.items():
            moving = [path for path in block.paths if path in stiffness and path in factors]
            of_block = {path: factors[path] for path in moving}
            budget_strength = self.budget_strengths.of(key)
            differences = self._differences(block, variables)
            # One step per block; one per variable where λ has changed by different factors.
            for paths in [moving] if _same(of_block) else [[path] for path in moving]:
                if not paths:
                    continue
                # (d + mΛ)⁻¹ mΛ = (d/m + Λ)⁻¹ Λ
                factor = tf.maximum(of_block[paths[0]], _SMALLEST)
                relative = [
                    d if p in paths or p not in of_block else tf.sqrt(of_block[p] / factor) * d
                    for p, d in zip(block.paths, differences, strict=True)
                ]
                factor = factor if budget_strength is None else factor * budget_strength
                moves = block.proximal_correction(relative, [stiffness[p] / factor for p in moving])
                for path, move in zip(block.paths, moves, strict=True):
                    if path in paths:
                        variables[path].assign_sub(tf.cast(move, variables[path].dtype))
        for path, (weight, distance) in self._from_task_anchors(variables).items():
            if path in stiffness:
                move = weight / (stiffness[path] + weight) * distance
                variables[path].assign_sub(tf.cast(move, variables[path].dtype))

    def value(self, variables: Variables) -> tf.Tensor:
        """The penalty ½ (θ − c)ᵀ Λ (θ − c), a float32 scalar, for reporting."""
        total = tf.zeros(())
        for _, difference, pull in self._pulls(variables):
            total += 0.5 * tf.reduce_sum(difference * pull)
        for weight, distance in self._from_task_anchors(variables).values():
            total += 0.5 * weight * tf.reduce_sum(distance**2)
        return total

    def _from_task_anchors(self, variables: Variables) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        """Weight and θ − anchor, by path, for the variables that the task graph pulls."""
        return {
            path: (
                # λ does not weigh this term, but at zero it is switched off as well.
                tf.where(
                    self.regularizer_of(variables[path])._strength_variable.value > 0,
                    self.task_weight.value,
                    0.0,
                ),
                tf.cast(variables[path].value, "float32") - anchor.value,
            )
            for path, anchor in self.task_anchors.items()
            if variables[path].trainable and self.holds(path, variables[path])
        }

    def _differences(self, block: Block, variables: Variables) -> list[tf.Tensor]:
        return [self._difference(variables[path], self.anchors[path]) for path in block.paths]

    @staticmethod
    def _difference(variable: keras.Variable, anchor: keras.Variable) -> tf.Tensor:
        if not keras.backend.is_float_dtype(variable.dtype):  # quantized: not trained any more
            return tf.zeros_like(anchor.value)
        return tf.cast(variable.value, "float32") - anchor.value

    def state(self) -> Arrays:
        """All slots as arrays, by `NAME/PATH`; `level` holds the group's number and its λ_k."""
        budget_strengths = {f"level/{key}": a for key, a in self.budget_strengths.state().items()}
        slots = {name: np.asarray(v) for name, v in self.slots().items()}
        folded = {f"folded/{path}": np.asarray(strength) for path, strength in self.folded.items()}
        return slots | budget_strengths | folded | {"tie": np.asarray(self.task_weight)}

    def prepare_state(
        self,
        state: Arrays,
        variables: Variables,
        places: Mapping[str, Place],
        rank: int,
        correction: int,
        keeps: Callable[[str], bool],
    ) -> Commit:
        """Check a state, as returned by `state` for any model, without changing anything yet.

        Args:
            state: The arrays by `NAME/PATH`, with names from `NAMES`, and `tie`.
            variables: Variables of the model, by path.
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
        budget_strengths: Arrays = {}
        folded: Arrays = {}
        block_arrays: Arrays = {}
        for key, array in arrays.items():
            name, _, path = key.partition("/")
            shape = places[path].shapes[0]
            if name in BLOCK_ARRAYS:
                block_arrays[key] = array
                continue
            if array.shape != {"level": (2,), "folded": ()}.get(name, shape):
                refuse(name, path, array)
            whole_group = name != "level" or array[0] == np.floor(array[0])
            if not whole_group or (name == "folded" and not 0 < array <= _LARGEST):
                raise FileError(f"The saved {key!r} has numbers that cannot be. {UNCHANGED}")
            {
                "anchor": anchors,
                "center": task_anchors,
                "level": budget_strengths,
                "folded": folded,
            }[name][path] = array
        blocks: dict[str, Block] = {}
        for path, arrays_of_block in arrays_by_path(block_arrays).items():
            try:
                blocks[path] = block_from(arrays_of_block, places[path], rank, correction)
            except ValueError:
                refuse(*next((name, path, array) for name, array in arrays_of_block.items()))
            missing = [p for p in blocks[path].paths if p not in anchors]
            if missing:
                raise FileError(f"The saved precision of {missing[0]!r} has no anchor. {UNCHANGED}")

        strengths = {path: float(array) for path, array in folded.items()}
        if not strengths:  # an earlier format: its penalty was that of the strengths in force
            in_blocks = {path: variables[path] for block in blocks.values() for path in block.paths}
            strengths = {
                path: self.strength_of(v) for path, v in in_blocks.items() if self.strength_of(v)
            }

        def commit() -> None:
            for slots in (self.precisions, self.anchors):
                slots.clear()
            self.task_anchors.clear()
            self.folded.clear()
            self.folded.update(strengths)
            for path, block in blocks.items():
                if keeps(path):
                    self.assign_slots(path, block, {p: anchors[p] for p in block.paths})
            self.pull_to_tasks(weight, task_anchors)
            self.budget_strengths.load_state(budget_strengths)

        return commit

    def slots(self) -> Variables:
        """All variables of the state, by `NAME/PATH`."""
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


def _same(tensors: Mapping[str, tf.Tensor]) -> bool:
    """Whether all of these are one tensor."""
    return len({id(tensor) for tensor in tensors.values()}) == 1
