"""Grouping of parameters by a Gaussian mixture model."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import keras
import numpy as np
from sklearn.mixture import GaussianMixture

from keras_dwd.checks import integer
from keras_dwd.groupings.assignment import WHOLE, Responsibilities
from keras_dwd.groupings.grouping import (
    Described,
    Granularity,
    Parameters,
    Partition,
    pieces,
    reduced,
)
from keras_dwd.variables import Variables

Feature = Literal["fisher", "magnitude", "movement", "depth", "kind"]


@keras.saving.register_keras_serializable("keras_dwd")
class GaussianMixtureGrouping(Partition):
    """Clusters parameters, units or layers by log Fisher information and log magnitude.

    The parameters of one layer differ widely, so the groups are fitted to the data instead of
    following the architecture.

    Args:
        groups: Number of groups K ≥ 1, or `"bic"` for the number from 1 to 8 with the lowest
            Bayesian information criterion. 1 is plain EWC: one strength for all parameters.
        strengths: The rule for λ_k, see `Partition`.
        granularity: What is clustered, see `Partition`.
        features: Features to cluster by: `"fisher"`, log F; `"magnitude"`, log |θ|; `"movement"`,
            log |θ − c| since the last boundary; `"depth"`, the position of the layer in the model;
            `"kind"`, the class of the layer.
        samples: The mixture is fitted to about this many randomly drawn items, then applied to
            all of them.
        seed: Seed of that draw and of the fit.
        soft: If `True`, the strength of an item is the mean of all λ_k, weighted by its
            responsibilities, which take one byte per group and item instead of one per item. If
            `False`, it is the λ_k of the most probable group. The accuracy is the same.

    Raises:
        ValueError: If `soft` is combined with a `Budget`, whose groups are whole variables.

    Example:

    ```python
    grouping = GaussianMixtureGrouping("bic", features=("fisher", "movement"))
    model = DWDModel.from_model(network, grouping=grouping)
    ```

    Reference:
        McLachlan & Peel, "Finite Mixture Models", 2000.
    """

    MOST = 8

    def __init__(
        self,
        groups: int | Literal["bic"] = 4,
        strengths: Any = "importance",
        granularity: Granularity = "element",
        features: Sequence[Feature] = ("fisher", "magnitude"),
        samples: int = 10_000,
        seed: int = 0,
        soft: bool = False,
    ):
        super().__init__(strengths, granularity)
        if soft and self.budget is not None:
            raise ValueError("`soft` must be False with strengths that follow a budget.")
        self.groups = groups if groups == "bic" else integer("groups", groups, 1)
        self.strengths.check(self._most)
        unknown = set(features) - set(get_args(Feature))
        if unknown or not features or isinstance(features, str):
            known = ", ".join(map(repr, get_args(Feature)))
            raise ValueError(f"`features` must be some of {known}. Received: {features!r}")
        self.features = tuple(features)
        self.samples = integer("samples", samples, self._most)
        self.seed = integer("seed", seed, 0)
        self.soft = bool(soft)

    @property
    def _most(self) -> int:
        return self.MOST if self.groups == "bic" else self.groups

    def check(self, variables: Variables) -> None:
        """Raise `ValueError` if a model has fewer parameters than groups."""
        parameters = sum(int(np.prod(v.shape)) for v in variables.values())
        if self.groups != "bic" and self.groups > parameters:
            raise ValueError(
                f"`groups` must not exceed the number of parameters of the model ({parameters}). "
                f"Received: {self.groups}"
            )

    def describe(self, key: str, part: Parameters) -> tuple[np.ndarray, ...]:
        """Number of items with F > 0, and the features of a random sample of them."""
        arrays = self._items(part)
        count = int(np.count_nonzero(arrays[0] > 0))
        # One seed per block, so that the draw does not depend on the worker that makes it.
        rng = np.random.default_rng([self.seed, zlib.crc32(key.encode())])
        share = min(1.0, self.samples / max(count, 1))
        features = [self._features(chosen, part) for chosen in _sampled(arrays, share, rng)]
        sample = np.concatenate(features or [np.zeros((0, 1), "float32")])
        return np.array(count), rng.permutation(sample)  # `fit` may use only the first rows

    def fit(self, described: Described) -> Any:
        """Fit the mixture to a sample of all blocks.

        Where there are fewer distinct items than groups, each distinct item is its own group.

        Returns:
            The mixture (`None` for a single group), and the mean and scale of the features.
        """
        total = sum(int(n) for n, _ in described.values())
        share = min(1.0, self.samples / max(total, 1))
        chosen = [part[: round(share * int(n))] for n, part in described.values() if len(part)]
        sample = np.concatenate(chosen or [np.zeros((0, 1), "float32")])
        mean, std = (f(sample, 0) if len(sample) else 0.0 for f in (np.mean, np.std))
        std = np.where(std > 1e-6, std, np.inf)  # a constant feature carries no information
        return self._fitted((sample - mean) / std), mean, std

    def label(self, fitted: Any, key: str, part: Parameters) -> np.ndarray | Responsibilities:
        """The most probable group of each item, or its responsibilities."""
        mixture, mean, std = fitted
        arrays = self._items(part)
        if self.soft:
            count = 1 if mixture is None else mixture.n_components
            labels = np.zeros((arrays[0].size, count), "uint8")
        else:
            labels = np.full(arrays[0].size, -1, np.min_scalar_type(-self._most - 1))
        start = 0
        for piece in pieces(*arrays):
            used = piece[0] > 0
            target = labels[start : start + len(used)]
            start += len(used)
            if mixture is None:
                target[used] = WHOLE if self.soft else 0
            elif used.any():
                chosen = [None if a is None else a[used] for a in piece]
                features = (self._features(chosen, part) - mean) / std
                if self.soft:
                    target[used] = Responsibilities.rounded(mixture.predict_proba(features))
                else:
                    target[used] = mixture.predict(features)
        labels = labels.reshape((*arrays[0].shape, *labels.shape[1:]))
        return Responsibilities(labels) if self.soft else labels

    def _items(self, part: Parameters) -> list[Any]:
        """Mean F, root mean square of θ and, if it is a feature, of θ − c, for each item."""
        moved = part.moved if "movement" in self.features else None
        if self.granularity == "element":
            return [part.fisher, part.values, moved]
        distances = [None if a is None else _rms(a, self.granularity) for a in (part.values, moved)]
        return [reduced(part.fisher, self.granularity), *distances]

    def _features(self, arrays: list[Any], part: Parameters) -> np.ndarray:
        """Feature matrix `(items, columns)` from flat arrays of F > 0, θ and θ − c."""
        fisher, values, moved = arrays
        kinds = sorted(set(part.context.kinds.values()))
        columns: list[Any] = []
        for feature in self.features:
            if feature == "fisher":
                columns.append(np.log(fisher))
            elif feature == "magnitude":
                columns.append(_log(values))
            elif feature == "movement":
                columns.append(np.zeros(len(fisher)) if moved is None else _log(moved))
            elif feature == "depth":
                columns.append(np.full(len(fisher), part.depth))
            else:
                columns += [np.full(len(fisher), float(kind == part.kind)) for kind in kinds]
        return np.stack(columns, 1).astype("float32")

    def _fitted(self, sample: np.ndarray) -> GaussianMixture | None:
        """The fitted mixture, or `None` for a single group."""
        most = min(self._most, len(np.unique(sample, axis=0)))
        if most <= 1:
            return None
        counts = range(1, most + 1) if self.groups == "bic" else (most,)
        # More restarts for small samples: they have more local optima and are fitted faster.
        starts = min(10, max(1, 2000 // len(sample) // len(counts)))
        mixtures = [
            GaussianMixture(
                count,
                n_init=starts,
                random_state=self.seed,
                reg_covar=1e-3,
                init_params="k-means++",
            ).fit(sample)
            for count in counts
        ]
        return min(mixtures, key=lambda m: m.bic(sample)) if len(mixtures) > 1 else mixtures[0]

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {
            "groups": self.groups,
            "features": list(self.features),
            "samples": self.samples,
            "seed": self.seed,
            "soft": self.soft,
        }


def _sampled(arrays: list[Any], share: float, rng: np.random.Generator) -> Iterator[list[Any]]:
    """A random sample of about this share of the items with F > 0, piece by piece."""
    for piece in pieces(*arrays):
        used = np.flatnonzero(piece[0] > 0)
        if share < 1:
            used = rng.choice(used, rng.binomial(used.size, share), replace=False)
        if used.size:
            yield [None if a is None else a[used] for a in piece]


def _log(distance: np.ndarray) -> np.ndarray:
    return np.log(np.abs(distance) + 1e-8)


def _rms(distance: np.ndarray, granularity: Granularity) -> np.ndarray:
    return np.sqrt(reduced(distance**2, granularity))
