"""Similarity of two models' representations of the same inputs."""

import numpy as np


def linear_cka(
    x: np.ndarray, y: np.ndarray, *, batch_size: int | None = None, unbiased: bool = False
) -> float:
    """Linear centred kernel alignment (CKA) of two representations of the same examples.

        CKA = HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L)),   K = x xᵀ, L = y yᵀ

    CKA is invariant to orthogonal transformations and to scaling of either representation. The
    largest matrix formed has d × e or n × n entries, whichever is smaller.

    Args:
        x: First representation, `(n, d)`.
        y: Second representation, `(n, e)`.
        batch_size: Number of examples per batch; HSIC is averaged over batches. By default all
            examples are one batch. At least 4 if `unbiased`, else at least 2.
        unbiased: Whether to use the unbiased estimate of HSIC. The biased estimate is too high if
            there are fewer examples than features.

    Returns:
        CKA in [0, 1]; the unbiased estimate may lie slightly outside. 0 if a representation is the
        same for all examples.

    Example:

    ```python
    print(linear_cka(x, 2 * x), linear_cka(x, new_x))  # 1 and less
    ```

    Reference:
        [Kornblith et al., 2019](https://arxiv.org/abs/1905.00414), equations 3 and 4;
        [Nguyen et al., 2021](https://arxiv.org/abs/2010.15327), equations 2 to 4, for batches and
        the unbiased estimate of Song et al., 2012.
    """
    least = 4 if unbiased else 2
    size = len(x) if batch_size is None else batch_size
    if len(x) != len(y):
        raise ValueError(
            f"`x` and `y` must be of the same examples. Received {len(x)} and {len(y)}."
        )
    if min(size, len(x)) < least:
        raise ValueError(
            f"`x` and `batch_size` must have at least {least} examples. Received: {len(x)} in "
            f"batches of {size}"
        )
    starts = range(0, len(x) - least + 1, size)  # drops a last batch that is too small
    hsic = _unbiased if unbiased else _biased
    sums, squares = np.zeros(3), np.zeros(2)
    for start in starts:
        pair = [np.asarray(a[start : start + size], "float64") for a in (x, y)]
        a, b = (part.reshape(len(part), -1) for part in pair)
        squares += [np.square(a).sum(), np.square(b).sum()]
        a, b = a - a.mean(0), b - b.mean(0)
        sums += [hsic(a, b), hsic(a, a), hsic(b, b)]
    across, own, others = sums
    # A constant representation has an HSIC of zero up to rounding errors.
    traces = (100 * np.finfo("float64").eps ** 2 * squares) ** 2
    if own <= traces[0] or others <= traces[1]:
        return 0.0
    return float(across / np.sqrt(own * others))


def _biased(x: np.ndarray, y: np.ndarray) -> float:
    """tr(K H L H) of a centred batch: ‖xᵀ y‖²."""
    return _squared(x, y)


def _unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """n(n − 3) · HSIC₁, with the diagonals of K and L set to zero.

    The result does not depend on whether the batch is centred, except for rounding.
    """
    n = len(x)
    a, b = (x**2).sum(1), (y**2).sum(1)
    rows, columns = x @ x.sum(0) - a, y @ y.sum(0) - b
    total = _squared(x, y) - a @ b
    return float(
        total + rows.sum() * columns.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ columns)
    )


def _squared(x: np.ndarray, y: np.ndarray) -> float:
    """‖xᵀ y‖² = tr(K L), by the cheaper of the two forms."""
    if x.shape[1] * y.shape[1] <= len(x) ** 2:
        return float(((x.T @ y) ** 2).sum())
    return float(((x @ x.T) * (y @ y.T)).sum())
