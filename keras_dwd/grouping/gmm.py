"""Groups of parameters found by a Gaussian mixture, each with its own strength λ_k."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import keras
import numpy as np
from sklearn.mixture import GaussianMixture

from keras_dwd.checks import integer, number
from keras_dwd.curvature.fisher import Block
from keras_dwd.grouping.grouping import Grouping, Summary
from keras_dwd.variables import Arrays, Variables

_CHUNK = 2**18

Granularity = Literal["element", "layer"]


@keras.saving.register_keras_serializable("keras_dwd")
class GaussianMixtureGrouping(Grouping):
    """Clusters parameters or layers by log Fisher and log magnitude, and weighs each cluster.

    Layers are heterogeneous, so groups are found in the data instead of being read off the
    architecture. The strength of group k follows the importance of what is in it,

        λ_k ∝ (mean F in G_k / mean F)^alpha,   Σ_k λ_k Σ_{G_k} F = Σ F

    so that the total precision is unchanged: `alpha` moves it between groups, `strength` alone
    sets how much there is. Parameters with zero Fisher information belong to no group.

    Args:
        groups: K ≥ 1, number of groups. 1 is plain EWC: one strength for all.
        alpha: 0 gives every group the same strength; above 0 important groups are held tighter
            than their Fisher alone would, below 0 the differences are levelled.
        samples: The mixture is fitted to this many parameters drawn at random, then applied to all.
        seed: Of that draw and of the fit.
        granularity: What is clustered: `"element"`, single parameters or, where the Fisher
            information has Kronecker factors, eigen-directions; or `"layer"`, all of a variable or
            of a layer's matrix together, by their mean.

    Reference:
        McLachlan & Peel, "Finite Mixture Models", 2000.
    """

    def __init__(
        self,
        groups: int = 4,
        alpha: float = 0.5,
        samples: int = 10_000,
        seed: int = 0,
        granularity: Granularity = "element",
    ):
        if granularity not in get_args(Granularity):
            known = " or ".join(map(repr, get_args(Granularity)))
            raise ValueError(f"`granularity` must be {known}. Received: {granularity!r}")
        self.granularity = granularity
        self.groups = integer("groups", groups, 1)
        self.alpha = number("alpha", alpha, -np.inf)
        self.samples = integer("samples", samples, self.groups)
        self.seed = integer("seed", seed, 0)

    def apply(
        self, blocks: Mapping[str, Block], values: Arrays
    ) -> tuple[dict[str, Block], Summary]:
        """Weigh each direction of the Fisher information by the λ_k of its group.

        What is grouped are the eigenvalues: the parameters themselves where the Fisher is diagonal,
        eigen-directions of a layer where it has Kronecker factors.

        Of Kronecker factors the result is the nearest pair of factors: its total differs a little.
        """
        spectra = {key: block.spectrum() for key, block in blocks.items()}
        coordinates = {key: block.coordinates(values) for key, block in blocks.items()}
        strengths, summary = self.strengths(spectra, coordinates)
        return {key: block.scaled(strengths[key]) for key, block in blocks.items()}, summary

    def strengths(self, fisher: Arrays, values: Arrays) -> tuple[Arrays, Summary]:
        """Group all parameters and give each the λ_k of its group.

        Args:
            fisher: Fisher information per variable path.
            values: The variables' values, same keys and shapes.

        Returns:
            λ_k per parameter, shaped as `fisher` (0 where the Fisher is 0), and a summary per
            group: `size`, `mean_fisher`, `strength`. Groups are ordered by mean Fisher, rising.

            Where there is less to group than groups, each is a group of its own.
        """
        paths = list(fisher)
        flat = np.concatenate([fisher[p].ravel() for p in paths]).astype("float64")
        theta = np.concatenate([values[p].ravel() for p in paths]).astype("float64")
        used = np.flatnonzero(flat > 0)
        mean, magnitude = flat, np.abs(theta)
        owner: Any = slice(None)
        if self.granularity == "layer":
            owner = np.repeat(np.arange(len(paths)), [fisher[p].size for p in paths])
            sizes = np.bincount(owner)
            mean = np.bincount(owner, flat) / sizes
            magnitude = np.sqrt(np.bincount(owner, theta**2) / sizes)
        labels = np.zeros(mean.size, int)
        clustered = np.flatnonzero(mean > 0)
        count = max(1, min(self.groups, clustered.size))
        if count > 1:
            labels[clustered] = self._cluster(mean[clustered], magnitude[clustered], count)
        assigned = labels[owner][used]

        sizes = np.bincount(assigned, minlength=count)
        sums = np.bincount(assigned, weights=flat[used], minlength=count)
        means = sums / np.maximum(sizes, 1)
        overall = sums.sum() / max(used.size, 1)
        ratio = np.divide(means, overall, out=np.ones_like(means), where=means > 0)
        relative = np.where(sizes > 0, ratio**self.alpha, 0.0)
        weighted = (relative * sums).sum()
        strengths = relative * (sums.sum() / weighted) if weighted > 0 else relative

        per_parameter = np.zeros(flat.size, "float32")
        per_parameter[used] = strengths[assigned]
        split = np.split(per_parameter, np.cumsum([fisher[p].size for p in paths])[:-1])
        summary = [
            {
                "size": int(sizes[k]),
                "mean_fisher": float(means[k]),
                "strength": float(strengths[k]),
            }
            for k in np.argsort(means)
            if sizes[k]
        ]
        shaped = {p: s.reshape(fisher[p].shape) for p, s in zip(paths, split, strict=True)}
        return shaped, summary

    def check(self, variables: Variables) -> None:
        """Raise `ValueError` if a model has fewer parameters than groups."""
        parameters = sum(int(np.prod(v.shape)) for v in variables.values())
        if self.groups > parameters:
            raise ValueError(
                f"`groups` must not exceed the number of parameters of the model ({parameters}). "
                f"Received: {self.groups}"
            )

    def _cluster(self, fisher: np.ndarray, theta: np.ndarray, groups: int) -> np.ndarray:
        """The group of each parameter."""
        tiny = np.finfo("float64").tiny
        features = np.stack([np.log(fisher), np.log(np.abs(theta) + 1e-8)], axis=1)
        features = np.nan_to_num(features, neginf=np.log(tiny))
        features = (features - features.mean(0)) / np.maximum(features.std(0), 1e-12)
        draw = np.random.default_rng(self.seed).permutation(len(features))[: self.samples]
        mixture = GaussianMixture(
            groups, random_state=self.seed, reg_covar=1e-3, init_params="k-means++"
        ).fit(features[draw])
        chunks = range(0, len(features), _CHUNK)
        return np.concatenate([mixture.predict(features[i : i + _CHUNK]) for i in chunks])

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "groups": self.groups,
            "alpha": self.alpha,
            "samples": self.samples,
            "seed": self.seed,
            "granularity": self.granularity,
        }
