"""The workers that train a model together, seen from one of them."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd import state
from keras_dwd.curvature.fisher import Statistics
from keras_dwd.distributed.communicator import Communicator
from keras_dwd.gradients import all_finite
from keras_dwd.grouping.grouping import Described
from keras_dwd.variables import Arrays, Variables, by_path


class Workers:
    """What a `DWDModel` does with other workers: nothing where there are none.

    Args:
        communicator: How they are reached.
        sharded: Whether each keeps only its share of the consolidation state.
        owners: The rank that keeps each block, of those that were divided before.
    """

    def __init__(
        self,
        communicator: Communicator | None = None,
        sharded: bool = False,
        owners: Mapping[str, int] | None = None,
    ):
        self.communicator = communicator or Communicator()
        self.several = self.communicator.size > 1
        self.sharded = self.several and sharded
        self.owners = dict(owners or {}) if self.sharded else {}
        # The step at which this worker's gradient was not finite first, and whether any's was.
        self.failed_at = keras.Variable(-1, trainable=False, dtype="int64", name="failed_at")
        self.failed = keras.Variable(False, trainable=False, dtype="bool", name="failed")
        self.received = keras.Variable(0.0, trainable=False, dtype="float32", name="received")

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.communicator.rank == 0

    # Who keeps what.

    def divide(self, sizes: Mapping[str, int]) -> None:
        """Give each block that has no owner yet to the worker that has least.

        Args:
            sizes: By block, the bytes of its state.
        """
        loads = np.zeros(self.communicator.size)
        for path, rank in self.owners.items():
            loads[rank] += sizes.get(path, 0)
        new = [path for path in sizes if path not in self.owners] if self.sharded else []
        for path in sorted(new, key=lambda path: (-sizes[path], path)):
            self.owners[path] = int(np.argmin(loads))
            loads[self.owners[path]] += sizes[path]

    def keeps(self, path: str) -> bool:
        """Whether the block of a variable, or of the matrix it is the kernel of, is kept here."""
        return not self.sharded or self.owners.get(path) == self.communicator.rank

    # In the training step.

    def averaged(self, gradients: list[Any], loss: tf.Tensor, step: Any, scaled: bool) -> list[Any]:
        """The mean of all workers' gradients, `None` where there is none. Graph code.

        Args:
            gradients: Of this worker.
            loss: Of this worker.
            step: The optimizer's.
            scaled: Whether the loss was scaled: then gradients may overflow, which is mended.
        """
        if not self.several:
            return gradients
        present = [tf.convert_to_tensor(g) for g in gradients if g is not None]
        means = self.communicator.mean(present, "gradients")
        if not scaled:
            # The same on all workers: one that fails fails all of them in the same step.
            whole = all_finite([tf.cast(mean, "float32") for mean in means])
            self.failed.assign(self.failed.value | ~whole)

            def note() -> tf.Tensor:
                mine = all_finite([tf.cast(g, "float32") for g in (loss, *present)])
                now = tf.cast(tf.convert_to_tensor(step), "int64")
                first = ~mine & (self.failed_at.value < 0)
                self.failed_at.assign(tf.where(first, now, self.failed_at.value))
                return whole

            tf.cond(whole, lambda: whole, note)
        found = iter(means)
        return [None if g is None else next(found) for g in gradients]

    def reduced(self, statistics: Statistics) -> Statistics:
        """The mean of all workers' statistics of as many examples each. Graph code."""
        if not self.several or not statistics:
            return statistics
        means = self.communicator.mean(list(statistics.values()), "fisher")
        # Also of a worker that keeps none of them others wait for its part, and TensorFlow does not
        # run what nothing is made of.
        self.received.assign(tf.reshape(means[0], (-1,))[0])
        return dict(zip(statistics, means, strict=True))

    # At the boundaries of tasks, epochs and training.

    def exchange(self, described: Described) -> Described:
        """What all workers say of the blocks they keep."""
        if not self.sharded:
            return described
        # The number of each block's parts too: of some there is nothing to say but that they are.
        sent = {f"{i}/{key}": a for key, parts in described.items() for i, a in enumerate(parts)}
        sent |= {f"parts/{key}": np.array(len(parts)) for key, parts in described.items()}
        every = self.communicator.of_all(sent, "described")
        counts = {
            n.removeprefix("parts/"): int(a) for n, a in every.items() if n.startswith("parts/")
        }
        return {key: tuple(every[f"{i}/{key}"] for i in range(n)) for key, n in counts.items()}

    def whole_state(self, mine: Arrays) -> Arrays:
        """The consolidation state of the model, of which each worker keeps a part."""
        return self.communicator.of_all(mine, "state") if self.sharded else mine

    def total(self, value: tf.Tensor) -> tf.Tensor:
        """The sum of a scalar of which each worker has a part."""
        if not self.sharded:
            return value
        (total,) = self.communicator.total([np.asarray(value)], "total")
        return tf.constant(total, value.dtype)

    def metrics_result(self, model: Any, result: Any) -> Any:
        """What `result` makes of metrics that have seen the examples of all workers."""
        variables = [v for metric in model.metrics for v in metric.variables]
        before = [np.asarray(v) for v in variables]
        totals = self.communicator.total(before, "metrics")
        for variable, total in zip(variables, totals, strict=True):
            variable.assign(total.astype(variable.dtype))
        try:
            found = result()
            return {name: float(np.asarray(v)) for name, v in found.items()}
        finally:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)

    def begin(self, model: Any) -> None:
        """Make all workers start from the same model, that of rank 0.

        Raises:
            RuntimeError: If one of them has built another model, with its rank and what differs.
        """
        if not self.several:
            return
        self.failed_at.assign(-1)
        self.failed.assign(False)
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._compare(_built(model, self.sharded))
        values = {f"w/{path}": v for path, v in by_path(model).items()}
        values |= {f"o/{i}": v for i, v in enumerate(model.optimizer.variables)}
        if self._differs({name: np.asarray(v) for name, v in values.items()}, "digests"):
            first = self.communicator.from_first(
                {name: np.asarray(v) for name, v in values.items()}, "weights"
            )
            for name, variable in values.items():
                variable.assign(first[name])
        learned: Arrays = {}
        if not self.sharded:
            state.save(model, learned)
        if self._differs(learned or {"tasks": np.array(model.tasks_learned)}, "states"):
            if self.sharded:
                raise RuntimeError(
                    "Workers have learned different tasks. With `sharded=True` load the saved "
                    "model on each of them."
                )
            first = self.communicator.from_first(learned, "consolidation")
            if first:
                state.restore(model, first)

    def average_moving(self, model: Any) -> None:
        """Average what layers follow of their inputs: moving means and variances."""
        if not self.several:
            return
        moving = [
            v
            for v in model.non_trainable_variables
            if keras.backend.is_float_dtype(v.dtype) and not v.trainable
        ]
        totals = self.communicator.total([np.asarray(v) for v in moving], "moving")
        for variable, total in zip(moving, totals, strict=True):
            variable.assign((total / self.communicator.size).astype(variable.dtype))

    def raise_if_failed(self) -> None:
        """End training on all workers if the loss of one is not finite.

        Raises:
            FloatingPointError: With the rank of that worker.
        """
        if not self.several or not bool(np.asarray(self.failed)):
            return
        mine = str(int(np.asarray(self.failed_at))).encode()
        steps = [int(step) for step in self.communicator.messages(mine, "failed")]
        known = [(step, rank) for rank, step in enumerate(steps) if step >= 0]
        if not known:
            raise FloatingPointError(
                "The mean of the workers' gradients became infinite, though that of each is "
                "finite: training has ended on all workers. Half precision may not hold it."
            )
        step, rank = min(known)
        raise FloatingPointError(
            f"The loss of worker {rank}, or its gradient, became NaN or infinite at step {step}: "
            "training has ended on all workers. Look at its data of that step, and at the learning "
            "rate."
        )

    def _differs(self, arrays: Arrays, name: str) -> bool:
        """Whether a worker has other arrays."""
        digest = hashlib.blake2b(digest_size=16)
        for key in sorted(arrays):
            digest.update(f"{key} {arrays[key].shape}".encode())
            digest.update(np.ascontiguousarray(arrays[key]).tobytes())
        return len(set(self.communicator.messages(digest.digest(), name))) > 1

    def _compare(self, built: dict[str, Any]) -> None:
        """Raise `RuntimeError` naming the worker that is unlike most."""
        said = self.communicator.messages(json.dumps(built, sort_keys=True).encode(), "built")
        every = [json.loads(each) for each in said]
        for part in built:
            texts = [json.dumps(each.get(part), sort_keys=True) for each in every]
            usual, _ = Counter(texts).most_common(1)[0]
            odd = [rank for rank, text in enumerate(texts) if text != usual]
            if odd:
                other = texts.index(usual)
                raise RuntimeError(
                    f"Worker {', '.join(map(str, odd))} has built another model than worker "
                    f"{other}: its {part} are {_difference(texts[odd[0]], usual)}. All workers "
                    "must run the same script."
                )


def _built(model: Any, sharded: bool) -> dict[str, Any]:
    """What must be the same on all workers, as JSON."""
    serialize = keras.saving.serialize_keras_object
    trainable = {id(v) for v in model.trainable_variables}
    settings = {
        "regularizer": model.regularizer,
        "fisher": model.fisher,
        "grouping": model.grouping,
        "optimizer": model.optimizer,
    }
    found = {
        "variables": {
            path: [list(v.shape), str(v.dtype), id(v) in trainable]
            for path, v in by_path(model).items()
        },
        "settings": {
            name: None if each is None else serialize(each) for name, each in settings.items()
        }
        | {"sharded": sharded, "steps_per_execution": model.steps_per_execution},
    }
    # Numbers of NumPy and the like, of learning rates.
    return json.loads(json.dumps(found, default=str))


def _difference(odd: str, usual: str) -> str:
    """The first entries of two JSON objects that are not the same."""
    a, b = json.loads(odd), json.loads(usual)
    differing = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    parts = [f"{key!r}: {a.get(key)} where others have {b.get(key)}" for key in differing[:3]]
    return "; ".join(parts)


def block_sizes(shapes: Mapping[str, tuple[int, ...]], variables: Variables) -> dict[str, int]:
    """About how many bytes the state of each block takes: statistics, precision and anchor."""
    sizes: dict[str, int] = dict.fromkeys({} if shapes else variables, 0)
    for name, shape in shapes.items():
        path = name.partition("/")[2]
        sizes[path] = sizes.get(path, 0) + 8 * int(np.prod(shape))
    for path in set(sizes) & set(variables):  # of a matrix the kernel may be excluded
        sizes[path] += 4 * int(np.prod(variables[path].shape))
    return sizes
