"""The workers that train a model together, seen from one of them."""

import hashlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dwd.communicator import Communicator
from keras_dwd.curvature.fisher import Statistics
from keras_dwd.groupings.grouping import Described
from keras_dwd.training.gradients import all_finite
from keras_dwd.variables import Arrays, Variables


class Workers:
    """Everything a `DWDModel` does together with other workers; does nothing for a single worker.

    Args:
        communicator: The communicator that connects the workers.
        sharded: Whether each worker stores only its shard of the consolidation state.
        owners: Rank of the worker that stores each block, for blocks that already have an owner.
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
        # First step at which this worker's gradient was not finite, −1 for none; and whether the
        # gradient of any worker was not finite.
        self.failed_at = keras.Variable(-1, trainable=False, dtype="int64", name="failed_at")
        self.failed = keras.Variable(False, trainable=False, dtype="bool", name="failed")
        self.received = keras.Variable(0.0, trainable=False, dtype="float32", name="received")

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the worker that writes files and shows progress."""
        return self.communicator.rank == 0

    # Sharding.

    def divide(self, sizes: Mapping[str, int]) -> None:
        """Assign each block without an owner to the worker with the smallest shard.

        Args:
            sizes: Bytes of the state of each block.
        """
        loads = np.zeros(self.communicator.size)
        for path, rank in self.owners.items():
            loads[rank] += sizes.get(path, 0)
        new = [path for path in sizes if path not in self.owners] if self.sharded else []
        for path in sorted(new, key=lambda path: (-sizes[path], path)):
            self.owners[path] = int(np.argmin(loads))
            loads[self.owners[path]] += sizes[path]

    def keeps(self, path: str) -> bool:
        """Whether this worker stores a block, named by its variable (of a matrix, the kernel)."""
        return not self.sharded or self.owners.get(path) == self.communicator.rank

    # In the training step.

    def averaged(self, gradients: list[Any], loss: tf.Tensor, step: Any, scaled: bool) -> list[Any]:
        """The mean of all workers' gradients. Called inside the training graph.

        Args:
            gradients: Gradients of this worker, `None` for variables without one.
            loss: Loss of this worker.
            step: Step count of the optimizer.
            scaled: Whether the loss is scaled. If so, gradients may overflow, which the
                `LossScaleOptimizer` handles, and is no failure.

        Returns:
            The mean gradients, `None` for variables without one.
        """
        if not self.several:
            return gradients
        present = [tf.convert_to_tensor(g) for g in gradients if g is not None]
        means = self.communicator.mean(present, "gradients")
        if not scaled:
            # The means are the same on all workers, so all of them fail in the same step.
            finite = all_finite([tf.cast(mean, "float32") for mean in means])
            self.failed.assign(self.failed.value | ~finite)

            def record_failure() -> tf.Tensor:
                own_finite = all_finite([tf.cast(g, "float32") for g in (loss, *present)])
                now = tf.cast(tf.convert_to_tensor(step), "int64")
                first = ~own_finite & (self.failed_at.value < 0)
                self.failed_at.assign(tf.where(first, now, self.failed_at.value))
                return finite

            tf.cond(finite, lambda: finite, record_failure)
        remaining = iter(means)
        return [None if g is None else next(remaining) for g in gradients]

    def reduced(self, statistics: Statistics) -> Statistics:
        """The mean of all workers' batch statistics. Called inside the training graph.

        All workers must have computed them from the same number of examples.
        """
        if not self.several or not statistics:
            return statistics
        means = self.communicator.mean(list(statistics.values()), "fisher")
        # A worker that stores none of them must still join the allreduce, and TensorFlow does not
        # run an operation whose result is not used.
        self.received.assign(tf.reshape(means[0], (-1,))[0])
        return dict(zip(statistics, means, strict=True))

    def summed(self, moves: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The sum of all workers' tensors, the same names on each. Called inside the graph."""
        # Named by the first, as optimizers within one may each send their own in the same step.
        means = self.communicator.mean(list(moves.values()), f"moves.{next(iter(moves))}")
        return {name: m * self.communicator.size for name, m in zip(moves, means, strict=True)}

    # Outside the training graph.

    def exchange(self, described: Described) -> Described:
        """The statistics for groupings of all blocks, from the workers that store them."""
        if not self.sharded:
            return described
        # The number of arrays of each block is sent as well, as it may be zero.
        sent = {f"{i}/{key}": a for key, parts in described.items() for i, a in enumerate(parts)}
        sent |= {f"parts/{key}": np.array(len(parts)) for key, parts in described.items()}
        gathered = self.communicator.gather_dicts(sent, "described")
        counts = {
            n.removeprefix("parts/"): int(a) for n, a in gathered.items() if n.startswith("parts/")
        }
        return {key: tuple(gathered[f"{i}/{key}"] for i in range(n)) for key, n in counts.items()}

    def whole_state(self, mine: Arrays) -> Arrays:
        """The consolidation state of the whole model, from this worker's shard `mine`."""
        return self.communicator.gather_dicts(mine, "state") if self.sharded else mine

    def total(self, value: tf.Tensor) -> tf.Tensor:
        """The sum over the workers of a scalar, such as the penalty of their shards."""
        if not self.sharded:
            return value
        (total,) = self.communicator.total([np.asarray(value)], "total")
        return tf.constant(total, value.dtype)

    def forget_failures(self) -> None:
        """Clear the record of failures at the beginning of training."""
        self.failed_at.assign(-1)
        self.failed.assign(False)

    def raise_if_failed(self) -> None:
        """End training on all workers if the loss or gradient of one is not finite.

        Raises:
            FloatingPointError: Names the rank of that worker and the step.
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

    def differs(self, arrays: Arrays, name: str) -> bool:
        """Whether the arrays are not the same on all workers, by their digests."""
        digest = hashlib.blake2b(digest_size=16)
        for key in sorted(arrays):
            digest.update(f"{key} {arrays[key].shape}".encode())
            digest.update(np.ascontiguousarray(arrays[key]).tobytes())
        return len(set(self.communicator.messages(digest.digest(), name))) > 1


def block_sizes(shapes: Mapping[str, tuple[int, ...]], variables: Variables) -> dict[str, int]:
    """Approximate bytes of the state of each block: statistics, precision and anchor.

    Args:
        shapes: Shapes of the Fisher statistics, by `KIND/PATH` of the block.
        variables: The pulled variables, by path.
    """
    sizes: dict[str, int] = dict.fromkeys({} if shapes else variables, 0)
    for name, shape in shapes.items():
        path = name.partition("/")[2]
        sizes[path] = sizes.get(path, 0) + 8 * int(np.prod(shape))
    for path in set(sizes) & set(variables):  # the kernel of a matrix may be excluded
        sizes[path] += 4 * int(np.prod(variables[path].shape))
    return sizes
