"""How alike two models represent the same inputs."""

import numpy as np


def linear_cka(
    x: np.ndarray, y: np.ndarray, *, batch_size: int | None = None, unbiased: bool = False
) -> float:
    """Linear centred kernel alignment of two representations of the same examples.

        CKA = HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L)),   K = x xᵀ, L = y yᵀ

    It does not change with orthogonal transformations and with the scale of either. Linear in the
    number of examples: with d and e features the largest matrix formed is of d × e, or of
    n × n where that is smaller.

    Args:
        x: `(n, d)`.
        y: `(n, e)`.
        batch_size: HSIC is averaged over batches of this many examples, where all at once
            do not fit in memory. At least 4 where it is unbiased, else at least 2.
        unbiased: Whether HSIC is estimated without bias. The biased one is too high where there are
            fewer examples than features.

    Returns:
        In [0, 1]; the unbiased one may fall outside of it by chance. 0 where a representation
        is the same for all examples.

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
    starts = range(0, len(x) - least + 1, size)  # a last batch of too few is left out
    hsic = _unbiased if unbiased else _biased
    sums, squares = np.zeros(3), np.zeros(2)
    for start in starts:
        pair = [np.asarray(a[start : start + size], "float64") for a in (x, y)]
        a, b = (part.reshape(len(part), -1) for part in pair)
        squares += [np.square(a).sum(), np.square(b).sum()]
        a, b = a - a.mean(0), b - b.mean(0)
        sums += [hsic(a, b), hsic(a, a), hsic(b, b)]
    across, own, others = sums
    # Rounding leaves a trace of what is the same for all examples.
    traces = (100 * np.finfo("float64").eps ** 2 * squares) ** 2
    if own <= traces[0] or others <= traces[1]:
        return 0.0
    return float(across / np.sqrt(own * others))


def _biased(x: np.ndarray, y: np.ndarray) -> float:
    """tr(K H L H), of a batch that is centred: ‖xᵀ y‖²."""
    return _squared(x, y)


def _unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """n(n − 3) · HSIC₁, with the diagonals of K and L set to zero.

    To centre before changes nothing but the rounding.
    """
    n = len(x)
    a, b = (x**2).sum(1), (y**2).sum(1)
    rows, columns = x @ x.sum(0) - a, y @ y.sum(0) - b
    total = _squared(x, y) - a @ b
    return float(
        total + rows.sum() * columns.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ columns)
    )


def _squared(x: np.ndarray, y: np.ndarray) -> float:
    """‖xᵀ y‖² = tr(K L), by whichever of the two forms is smaller."""
    if x.shape[1] * y.shape[1] <= len(x) ** 2:
        return float(((x.T @ y) ** 2).sum())
    return float(((x @ x.T) * (y @ y.T)).sum())
