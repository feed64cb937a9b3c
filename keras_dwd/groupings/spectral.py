"""Grouping of units or variables by spectral clustering of their Fisher profiles."""

from typing import Any

import keras
import numpy as np
from sklearn.cluster import SpectralClustering
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import KNeighborsClassifier

from keras_dwd.checks import integer
from keras_dwd.groupings.grouping import Described, Granularity, Parameters, Partition

# A profile is the log Fisher information at these quantiles of a unit's parameters.
_QUANTILES = np.linspace(0, 1, 9)


@keras.saving.register_keras_serializable("keras_dwd")
class SpectralGrouping(Partition):
    """Clusters units or variables whose Fisher information is distributed alike.

    The affinity of two units is exp(−‖p − q‖² / m), where p and q are their profiles (log F at nine
    quantiles of their parameters) and m is the median of the squared distances of all pairs. As the
    affinity matrix has an entry for each pair, at most `samples` units are clustered; every other
    unit joins the group of the most similar one among them.

    Args:
        groups: Number of groups K ≥ 1.
        strengths: The rule for λ_k, see `Partition`.
        granularity: `"unit"` or `"variable"`, see `Partition`.
        samples: Maximum number of randomly drawn units that are compared with each other.
        seed: Seed of that draw and of the clustering.

    Example:

    ```python
    model = DWDModel.from_model(network, grouping=SpectralGrouping(3, granularity="variable"))
    ```

    Reference:
        [von Luxburg, 2007](https://arxiv.org/abs/0711.0189).
    """

    def __init__(
        self,
        groups: int = 4,
        strengths: Any = "importance",
        granularity: Granularity = "unit",
        samples: int = 1000,
        seed: int = 0,
    ):
        if granularity == "element":
            raise ValueError(
                "`granularity` must be 'unit' or 'variable': an affinity of single elements would "
                f"have an entry for each pair. Received: {granularity!r}"
            )
        super().__init__(strengths, granularity)
        self.groups = integer("groups", groups, 1)
        self.strengths.check(self.groups)
        self.samples = integer("samples", samples, self.groups)
        self.seed = integer("seed", seed, 0)

    def describe(self, key: str, part: Parameters) -> tuple[np.ndarray, ...]:
        """The profiles of the units with F > 0, `(units, quantiles)`."""
        units = self._units(part)
        return (_profiles(units[units.max(1) > 0]),)

    def fit(self, described: Described) -> dict[str, np.ndarray]:
        """Cluster the profiles of all units: the group of each, by block."""
        profiles = [part for (part,) in described.values()]
        groups = self._clusters(np.concatenate(profiles or [np.zeros((0, len(_QUANTILES)))]))
        ends = np.cumsum([len(part) for part in profiles])[:-1]
        return dict(zip(described, np.split(groups, ends), strict=True)) if described else {}

    def label(self, fitted: dict[str, np.ndarray], key: str, part: Parameters) -> np.ndarray:
        """The group of each unit."""
        used = self._units(part).max(1) > 0
        labels = np.where(used, 0, -1).astype("int16")
        labels[used] = fitted[key]
        return labels if part.fisher.ndim else labels.reshape(())

    def _units(self, part: Parameters) -> np.ndarray:
        """F of each unit, `(units, parameters)`."""
        whole = self.granularity == "variable" or not part.fisher.ndim
        units = part.fisher[..., None] if whole else part.fisher
        return units.reshape(-1, units.shape[-1]).T

    def _clusters(self, profiles: np.ndarray) -> np.ndarray:
        """The group of each profile."""
        draw = np.random.default_rng(self.seed).permutation(len(profiles))[: self.samples]
        sample = profiles[draw]
        distinct, clusters = np.unique(sample, axis=0, return_inverse=True)
        if not len(distinct) or self.groups == 1:
            return np.zeros(len(profiles), "int16")
        if len(distinct) > self.groups:
            squares = pairwise_distances(sample, metric="sqeuclidean")
            median = np.median(squares[squares > 0])
            spectral = SpectralClustering(
                self.groups,
                affinity="precomputed",
                assign_labels="cluster_qr",
                random_state=self.seed,
            )
            clusters = spectral.fit_predict(np.exp(-squares / median))
        nearest = KNeighborsClassifier(1).fit(sample, clusters)
        return nearest.predict(profiles).astype("int16")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {
            "groups": self.groups,
            "samples": self.samples,
            "seed": self.seed,
        }


def _profiles(fisher: np.ndarray) -> np.ndarray:
    """Log Fisher information `(units, quantiles)`, from F of shape `(units, parameters)`."""
    # Zeros are raised to a millionth of the unit's mean: far below it, but with a finite log.
    floor = 1e-6 * fisher.mean(1, dtype="float64", keepdims=True)
    return np.log(np.quantile(np.maximum(fisher, floor), _QUANTILES, axis=1).T)
