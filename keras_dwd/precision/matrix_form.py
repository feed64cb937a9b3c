"""How the variables of a layer form one matrix."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class MatrixForm:
    """A kernel seen as a matrix of fan_in × fan_out, with the bias as one more row.

    Attributes:
        shape: `(fan_in, fan_out)`, without the bias row.
        kernel_shape: Shape of the kernel variable.
        permutation: Order of the kernel's axes in the matrix: first the fan-in axes, then the
            fan-out axes.
        bias_shape: Shape of the bias variable. `None` without a bias, or if several outputs share
            an element of it.
    """

    shape: tuple[int, int]
    kernel_shape: tuple[int, ...]
    permutation: tuple[int, ...]
    bias_shape: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        """The number of rows of the matrix, including the bias row."""
        return self.shape[0] + (self.bias_shape is not None)

    def join(self, kernel: Any, bias: Any = None) -> Any:
        """The matrix of shape `(rows, fan_out)`, from arrays or tensors."""
        ops = tf if tf.is_tensor(kernel) else np
        matrix = ops.reshape(ops.transpose(kernel, self.permutation), self.shape)
        if self.bias_shape is None:
            return matrix
        join = tf.concat if ops is tf else np.concatenate
        return join([matrix, ops.reshape(bias, (1, -1))], 0)

    def split(self, matrix: Any) -> list[Any]:
        """The inverse of `join`: the kernel and, if the matrix has a bias row, the bias."""
        ops = tf if tf.is_tensor(matrix) else np
        permuted = [self.kernel_shape[axis] for axis in self.permutation]
        kernel = ops.reshape(matrix[: self.shape[0]], permuted)
        parts = [ops.transpose(kernel, np.argsort(self.permutation))]
        if self.bias_shape is not None:
            parts.append(ops.reshape(matrix[self.shape[0]], self.bias_shape))
        return parts
