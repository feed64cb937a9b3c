"""Ablation: variants of DWD with one part changed, each compared with tuned EWC."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from keras_dwd.evaluation.metric import primary
from keras_dwd.evaluation.tuning import UNTOUCHED

BASELINE = "ewc"
"""The method that all variants are compared with; its λ is tuned."""

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
# These variants change the scale of the Fisher information, so the default λ does not suit them.
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
"""Method names by the label of what is changed; λ is the default unless the label says tuned."""


def compare(
    results: dict[str, Any], baseline: str = BASELINE, metric: str | None = None
) -> dict[str, dict[str, float]]:
    """Compare each method with a baseline, paired by seed.

    Args:
        results: The return value of `tune` or `Experiment.compare`.
        baseline: Name of the method to compare with.
        metric: Name of the metric to compare, such as `forgetting`; by default the average of the
            first one that was measured.

    Returns:
        By method, a dictionary with the mean `difference` to the baseline, its `std` over the
        seeds, and the `p` of a paired two-sided t-test (`nan` if all differences are equal).
    """
    methods = results["methods"]
    if baseline not in methods:
        raise ValueError(f"`baseline` must be one of {', '.join(methods)}. Received: {baseline!r}")
    if metric is None:
        metric = f"average_{primary(results.get('protocol', {})).name}"
    base = _per_seed(methods, baseline, metric)
    comparisons = {}
    for name in methods:
        if name == baseline:
            continue
        difference = _per_seed(methods, name, metric) - base
        spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
        p = float(ttest_rel(difference, 0 * difference).pvalue) if spread > 1e-12 else np.nan
        comparisons[name] = {"difference": float(difference.mean()), "std": spread, "p": p}
    return comparisons


def _per_seed(methods: dict[str, Any], name: str, metric: str) -> np.ndarray:
    return np.array(methods[name]["metrics"][metric]["per_seed"])


def parts(wanted: Sequence[str] = ()) -> dict[str, str]:
    """The `PARTS` whose label or method contains one of the words; all without words.

    Raises:
        ValueError: If a word occurs in none of them.
    """
    for word in wanted:
        if not any(word in label or word in name for label, name in PARTS.items()):
            raise ValueError(f"No part is called {word!r}. Known: {', '.join(PARTS)}.")
    return {
        label: name
        for label, name in PARTS.items()
        if not wanted or any(word in label or word in name for word in wanted)
    }
