"""Which parts of DWD help: each one changed alone, and tested against EWC."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from keras_dwd.evaluation.tuning import UNTOUCHED

BASELINE = "ewc"
"""What all are tested against, with its λ tuned."""

_PARTS = (
    ("as it is", "dwd-online"),
    ("no online average: a pass at the boundary", "dwd-online+pass"),
    ("γ = 0.9", "dwd-online+gamma-0.9"),
    ("γ = 0.99", "dwd-online+gamma-0.99"),
    ("Fisher at every step", "dwd-online+every-step"),
    ("earlier precision × 0.8 at each boundary", "dwd-online+decay-0.8"),
    ("earlier precision × 0.5 at each boundary", "dwd-online+decay-0.5"),
    ("no groups", "dwd-online+no-groups"),
    ("groups: layers", "dwd-online+layers"),
    ("groups: spectral, of units", "dwd-online+spectral"),
    ("groups: mixture of units", "dwd-online+units"),
    ("groups: mixture of variables", "dwd-online+variables"),
    ("groups: mixture, by movement too", "dwd-online+movement"),
    ("groups: mixture, their number by BIC", "dwd-online+bic"),
    ("groups: mixture, weighed by responsibilities", "dwd-online+soft"),
    ("groups: a policy that learns, from 10% of the data held back", "dwd-online+policy"),
    ("λ_k: levelled, α = −0.5", "dwd-online+levelled"),
    ("λ_k: evidence", "dwd-online+evidence"),
    ("λ_k: budget, of layers", "dwd-online+budget"),
    ("λ: budget", "dwd-online+one-budget"),
    ("task graph", "dwd-online+graph"),
    ("decoupled step", "dwd-online+decoupled"),
)
# What changes the scale of the Fisher information needs another λ than the default.
_TUNED = (
    ("as it is, λ tuned", "dwd-online"),
    ("a diagonal, λ tuned", "dwd-online+diagonal"),
    ("estimator: exact, λ tuned", "dwd-online:exact"),
    ("estimator: sampled, λ tuned", "dwd-online:sampled"),
    ("estimator: negated, λ tuned", "dwd-online:negated"),
)
PARTS: dict[str, str] = {
    **{label: f"{name}{UNTOUCHED}" for label, name in _PARTS},
    **dict(_TUNED),
}
"""The name of the method by what is changed in it; λ is the default, or tuned where it must be."""


def compare(
    results: dict[str, Any], baseline: str = BASELINE, metric: str = "average_accuracy"
) -> dict[str, dict[str, float]]:
    """Each method of some results against a baseline, seed by seed.

    Args:
        results: As of `tune` or `Experiment.compare`.
        baseline: Name of a method.
        metric: What is compared.

    Returns:
        By method the mean `difference` to the baseline, its `std` over the seeds, and `p` of a
        paired two-sided t-test (`nan` where all differences are the same).
    """
    methods = results["methods"]
    if baseline not in methods:
        raise ValueError(f"`baseline` must be one of {', '.join(methods)}. Received: {baseline!r}")
    base = _per_seed(methods, baseline, metric)
    found = {}
    for name in methods:
        if name == baseline:
            continue
        difference = _per_seed(methods, name, metric) - base
        spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
        p = float(ttest_rel(difference, 0 * difference).pvalue) if spread > 1e-12 else np.nan
        found[name] = {"difference": float(difference.mean()), "std": spread, "p": p}
    return found


def _per_seed(methods: dict[str, Any], name: str, metric: str) -> np.ndarray:
    return np.array(methods[name]["metrics"][metric]["per_seed"])


def parts(wanted: Sequence[str] = ()) -> dict[str, str]:
    """Those of `PARTS` whose method or label has one of these words in it; all if there are none.

    Raises:
        ValueError: If a word is in none.
    """
    for word in wanted:
        if not any(word in label or word in name for label, name in PARTS.items()):
            raise ValueError(f"No part is called {word!r}. Known: {', '.join(PARTS)}.")
    return {
        label: name
        for label, name in PARTS.items()
        if not wanted or any(word in label or word in name for word in wanted)
    }
