from collections import Counter
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import (
    blobs,
    blocks_of,
    compiled,
    dtype_policy,
    gentle,
    grouped,
    load,
    long,
    mlp,
    moved,
    pass_statistics,
    saved,
    stepped,
    sweep,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from keras_dwd import DiagonalFisher, DWDOptimizer, KroneckerFisher
from keras_dwd.experimental import Budget
from keras_dwd.files import FileError
from keras_dwd.groupings import (
    FixedGrouping,
    GaussianMixtureGrouping,
    LayerGrouping,
    Responsibilities,
    SingleGroup,
    SpectralGrouping,
)
from keras_dwd.groupings.grouping import BoundaryContext
from keras_dwd.groupings.strength import Evidence, GroupStatistics, Importance
from keras_dwd.precision.diagonal import Diagonal


def planted(sizes=(300, 500, 200), seed=0):
    """F, θ and kind of parameters of three kinds, which are mixed over two variables."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat([0, 1, 2], sizes))
    fisher = 10.0 ** (np.array([-8, -3, 1])[group] + 0.3 * rng.normal(size=group.size))
    values = 10.0 ** (np.array([-3, -1, 0])[group] + 0.2 * rng.normal(size=group.size))
    cut = group.size // 4

    def parts(a):
        return {"a": a[:cut].reshape(5, -1), "b": a[cut:]}

    return parts(fisher), parts(values), group


def planted_units(units=60, seed=0):
    """A kernel whose units are of three kinds, and the kind of each unit."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.arange(units) % 3)
    fisher = np.array([1e-4, 1e-2, 1.0])[group] * 10 ** (0.2 * rng.normal(size=(40, units)))
    return {"a": fisher}, {"a": rng.normal(size=fisher.shape)}, group


def flat(arrays):
    return np.concatenate([a.ravel() for a in arrays.values()])


def divided(grouping, fisher, values, **learned):
    """λ_k of each parameter, and the summary of the groups."""
    blocks = {path: Diagonal(path, f) for path, f in fisher.items()}
    weighted, summary, _ = grouping.apply(BoundaryContext(blocks, values, **learned))
    shares = {
        p: np.divide(weighted[p].values, f, where=f > 0, out=np.zeros(f.shape))
        for p, f in fisher.items()
    }
    return shares, summary


def codes(strengths):
    return np.unique(np.round(flat(strengths), 5), return_inverse=True)[1]


@pytest.mark.parametrize("groups", [3, "bic"])
def test_planted_groups_are_found(groups):
    fisher, values, group = planted()
    strengths, summary = divided(GaussianMixtureGrouping(groups, samples=400), fisher, values)
    assert adjusted_rand_score(group, codes(strengths)) > 0.99
    assert [g["size"] for g in summary] == pytest.approx([300, 500, 200], abs=3)
    assert [g["group"] for g in summary] == [0, 1, 2]
    assert strengths["a"].shape == (5, 50)
    for g, members in zip(summary, ((group == k) for k in range(3)), strict=True):
        assert g["mean_fisher"] == pytest.approx(flat(fisher)[members].mean(), rel=0.05)
        rms = np.sqrt((flat(values)[members] ** 2).mean())
        assert g["magnitude"] == pytest.approx(rms, rel=0.05)
        assert sum(g["layers"].values()) == g["size"]
        assert g["layers"]["a"] == pytest.approx(members[:250].sum(), abs=3)


def test_a_sample_finds_what_a_fit_of_everything_finds():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 30_000)
    log_fisher = np.array([-6.0, -2.0, 3.0])[kind] + 1.0 * rng.normal(size=kind.size)
    log_values = np.array([0.0, -3.0, -1.0])[kind] + 0.5 * rng.normal(size=kind.size)
    fisher, values = {"a": np.exp(log_fisher)}, {"a": np.exp(log_values)}
    strengths, _ = divided(GaussianMixtureGrouping(3, samples=2000), fisher, values)
    features = np.stack([log_fisher, log_values], 1)
    features = (features - features.mean(0)) / features.std(0)
    whole = GaussianMixture(3, n_init=3, random_state=1).fit_predict(features)
    assert adjusted_rand_score(whole, codes(strengths)) >= 0.95


def test_responsibilities_are_those_of_the_mixture_and_weigh():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 2000)
    fisher = np.exp(np.array([-3.0, 0.0])[kind] + rng.normal(size=kind.size)).reshape(20, 100)
    values = np.exp(np.array([0.0, -2.0])[kind] + rng.normal(size=kind.size)).reshape(20, 100)
    fisher[0, :7] = 0.0
    grouping = GaussianMixtureGrouping(2, Importance(1.0), soft=True)
    learned = BoundaryContext({"a": Diagonal("a", fisher)}, {"a": values})
    blocks, summary, assignments = grouping.apply(learned)
    found, weighted = assignments["a"], blocks["a"].values
    assert found.shape == (20, 100, 2)
    assert found.dtype == "uint8"
    used = fisher > 0
    features = np.log(np.stack([fisher, values], -1)[used])
    features = (features - features.mean(0)) / features.std(0)
    mixture = GaussianMixture(2, n_init=3, random_state=1, reg_covar=1e-3).fit(features)
    order = np.argsort(mixture.means_[:, 0])
    shares = mixture.predict_proba(features)[:, order]
    assert np.mean((shares > 0.1) & (shares < 0.9)) > 0.05  # the groups overlap
    np.testing.assert_allclose(found[used] / 255, shares, atol=0.1)  # both EM fits stop early
    assert not found[~used].any()
    # λ_k ∝ mean F of group k, weighted by these responsibilities.
    shares = found[used] / 255
    np.testing.assert_array_equal(shares.sum(1), 1)
    means = shares.T @ fisher[used] / shares.sum(0)
    strengths = means * fisher.sum() / (means * (shares.T @ fisher[used])).sum()
    np.testing.assert_allclose([g["mean_fisher"] for g in summary], means)
    np.testing.assert_allclose([g["strength"] for g in summary], strengths)
    np.testing.assert_allclose([g["size"] for g in summary], shares.sum(0), atol=0.5)
    np.testing.assert_allclose(weighted[used], fisher[used] * (shares @ strengths), rtol=1e-5)
    assert weighted.sum() == pytest.approx(fisher.sum(), rel=1e-5)


@pytest.mark.parametrize("make", [GaussianMixtureGrouping, SpectralGrouping])
def test_planted_units_are_found(make):
    fisher, values, group = planted_units()
    strengths, summary = divided(make(3, granularity="unit"), fisher, values)
    np.testing.assert_allclose(strengths["a"] / strengths["a"][:1], 1, rtol=1e-6)
    assert adjusted_rand_score(group, codes({"a": np.array(strengths["a"][0])})) == 1
    assert [g["size"] for g in summary] == [800, 800, 800]


def test_spectral_groups_of_more_units_than_are_compared():
    fisher, values, group = planted_units(300)
    strengths, _ = divided(SpectralGrouping(3, samples=30), fisher, values)
    assert adjusted_rand_score(group, codes({"a": np.array(strengths["a"][0])})) == 1


@pytest.mark.parametrize("make", [GaussianMixtureGrouping, SpectralGrouping])
def test_variables_are_grouped_as_a_whole(make):
    rng = np.random.default_rng(0)
    scale = {"a": 1.0, "b": 1e-3, "c": 1.2, "d": 0.8e-3}
    fisher = {p: s * rng.uniform(0.9, 1.1, (3 + i, 4)) for i, (p, s) in enumerate(scale.items())}
    values = {path: rng.choice([-1.0, 1.0], f.shape) for path, f in fisher.items()}
    _, summary = divided(make(2, granularity="variable"), fisher, values)
    assert [g["layers"] for g in summary] == [{"b": 16, "d": 24}, {"a": 12, "c": 20}]
    # With more groups than variables each variable is its own group.
    _, alone = divided(GaussianMixtureGrouping(5, granularity="variable"), fisher, values)
    assert sorted(g["size"] for g in alone) == sorted(a.size for a in fisher.values())


@pytest.mark.parametrize("granularity", ["unit", "variable"])
@pytest.mark.parametrize(
    "make",
    [GaussianMixtureGrouping, partial(GaussianMixtureGrouping, soft=True), SpectralGrouping],
    ids=["hard", "soft", "spectral"],
)
def test_scalar_variables(make, granularity):
    fisher = {"a": np.full((4, 3), 0.1), "scale": np.array(2.0)}
    values = {"a": np.ones((4, 3)), "scale": np.array(1.0)}
    strengths, summary = divided(make(2, granularity=granularity), fisher, values)
    assert strengths["scale"].shape == ()
    assert [g["layers"] for g in summary] == [{"a": 12}, {"scale": 1}]


def test_layers_and_all_as_groups():
    fisher, values, _ = planted()
    strengths, summary = divided(LayerGrouping(), fisher, values)
    assert {tuple(g["layers"]) for g in summary} == {("a",), ("b",)}
    means = {path: f.mean() for path, f in fisher.items()}
    assert strengths["a"].flat[0] / strengths["b"].flat[0] == pytest.approx(
        (means["a"] / means["b"]) ** 0.5, rel=1e-4
    )
    strengths, (everything,) = divided(SingleGroup(), fisher, values)
    np.testing.assert_allclose(flat(strengths), 1, rtol=1e-6)
    assert everything["size"] == 1000


@pytest.mark.parametrize(
    ("feature", "expected"),
    [("movement", [0, 0, 1, 1]), ("depth", [0, 0, 1, 1]), ("kind", [0, 1, 0, 1])],
)
def test_features_decide(feature, expected):
    rng = np.random.default_rng(0)
    paths = ["a", "b", "c", "d"]
    fisher = {path: rng.uniform(0.9, 1.1, 50) for path in paths}
    values = {path: rng.normal(size=50) for path in paths}
    far = {"a": 1e-3, "b": 1e-3, "c": 1.0, "d": 1.0}
    anchors = {path: values[path] + far[path] for path in paths}
    kinds = {"a": "Dense", "b": "Conv2D", "c": "Dense", "d": "Conv2D"}
    grouping = GaussianMixtureGrouping(2, "evidence", "variable", features=(feature,))
    _, summary = divided(grouping, fisher, values, anchors=anchors, kinds=kinds)
    found = {path: g["group"] for g in summary for path in g["layers"]}
    assert adjusted_rand_score(expected, [found[path] for path in paths]) == 1


def test_importance_equals_its_formula():
    fisher, values, group = planted()
    grouping = GaussianMixtureGrouping(3, Importance(0.7))
    strengths, summary = divided(grouping, fisher, values)
    f = flat(fisher)
    ratio = np.array([f[group == k].mean() / f.mean() for k in range(3)]) ** 0.7
    ratio *= f.sum() / sum(ratio[k] * f[group == k].sum() for k in range(3))
    measured = [np.median(flat(strengths)[group == k]) for k in range(3)]
    np.testing.assert_allclose(measured, ratio, rtol=1e-3)
    np.testing.assert_allclose([g["strength"] for g in summary], ratio, rtol=1e-3)


def test_evidence_equals_its_formula():
    fisher, values, group = planted()
    rng = np.random.default_rng(1)
    distance = np.array([1e3, 0.1, 0.01])[group] * rng.normal(size=group.size)
    anchors = {"a": values["a"] - distance[:250].reshape(5, 50), "b": values["b"] - distance[250:]}
    strengths, summary = divided(
        GaussianMixtureGrouping(3, "evidence"), fisher, values, anchors=anchors
    )
    f = flat(fisher)
    alone = [(group == k).sum() / (f * distance**2)[group == k].sum() for k in range(3)]
    overall = 1000 / (f * distance**2).sum()
    relative = np.clip(np.array(alone) / overall, 0.01, 100)
    relative *= f.sum() / sum(relative[k] * f[group == k].sum() for k in range(3))
    np.testing.assert_allclose([g["strength"] for g in summary], relative, rtol=1e-4)
    # Before the first boundary there is no anchor.
    strengths, _ = divided(GaussianMixtureGrouping(3, "evidence"), fisher, values)
    np.testing.assert_allclose(flat(strengths), 1, rtol=1e-5)


def test_evidence_of_a_group_that_did_not_move_is_limited():
    groups = GroupStatistics(
        np.arange(2), np.array([10.0, 10.0]), np.array([1.0, 1.0]), np.array([0.0, 5.0])
    )
    relative = np.array([100.0, 0.5])
    np.testing.assert_allclose(Evidence().of(groups), relative * 2 / relative.sum())


def test_evidence_of_what_has_no_anchor_yet_is_that_of_the_rest():
    rng = np.random.default_rng(0)
    fisher = {name: rng.uniform(0.5, 1, 20) for name in "abc"}
    values = {name: rng.normal(size=20) for name in "abc"}
    moved = {"a": values["a"] - 0.1, "b": values["b"] - 1.0}
    strengths, _ = divided(LayerGrouping("evidence"), fisher, values, anchors=moved)
    of_each = {name: strengths[name][0] for name in "abc"}
    sums = {name: (fisher[name] * (values[name] - moved[name]) ** 2).sum() for name in "ab"}
    mean = (sums["a"] + sums["b"]) / 40
    relative = {name: 1 / max(sums[name] / 20 / mean, 0.01) for name in "ab"} | {"c": 1.0}
    for name in "ab":
        assert of_each[name] / of_each["c"] == pytest.approx(relative[name], rel=1e-5)


def test_a_sample_is_of_all_parts_of_a_variable():
    """Each variable is smaller than `samples`, but all together are larger."""
    rng = np.random.default_rng(0)
    fisher, values, kinds = {}, {}, {}
    for name in "abc":
        kinds[name] = np.repeat([0, 1, 2], 1000)  # the kind depends on the position
        fisher[name] = 10.0 ** (np.array([-8, -3, 1])[kinds[name]] + 0.1 * rng.normal(size=3000))
        values[name] = rng.normal(size=3000)
    grouping = GaussianMixtureGrouping(3, features=("fisher",), samples=3000)
    strengths, _ = divided(grouping, fisher, values)
    assert adjusted_rand_score(flat(kinds), codes(strengths)) > 0.99


def test_the_mean_fisher_of_fixed_groups_counts_directions_that_are_not_kept():
    model = compiled(fisher=KroneckerFisher("empirical", None, rank=2), grouping=FixedGrouping({}))
    statistics = pass_statistics(model, blobs(), 32)
    blocks = blocks_of(model, statistics)
    model.consolidate(blobs())
    (group,) = model.groups
    total = sum(block.trace for block in blocks.values())
    assert group["mean_fisher"] == pytest.approx(total / model.count_params())
    kept = sum(block.importances().sum() for block in blocks.values())
    assert kept < 0.999 * total


def test_strengths_as_given():
    fisher, values, _ = planted()
    grouping = GaussianMixtureGrouping(3, strengths=(0.5, 1, 2))
    assert [g["strength"] for g in divided(grouping, fisher, values)[1]] == [0.5, 1, 2]
    # Previous groups whose numbers have no strength are not matched.
    _, before = divided(GaussianMixtureGrouping(5), fisher, values)
    _, after = divided(grouping, fisher, values, groups=before)
    assert sorted(g["group"] for g in after) == [0, 1, 2]
    for make in (GaussianMixtureGrouping, SpectralGrouping):
        with pytest.raises(ValueError, match="`strengths` must have a value for each of 3 groups"):
            make(3, strengths=(0.5, 1), granularity="unit")
    with pytest.raises(ValueError, match="`strengths` must have a value for each of 2 groups"):
        divided(LayerGrouping((1.0,)), fisher, values)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), alpha=st.floats(-1, 1), groups=st.integers(1, 5))
def test_the_total_precision_is_unchanged(seed, alpha, groups):
    fisher, values, _ = planted(seed=seed)
    strengths, summary = divided(GaussianMixtureGrouping(groups, Importance(alpha)), fisher, values)
    assert (flat(strengths) * flat(fisher)).sum() == pytest.approx(flat(fisher).sum(), rel=1e-4)
    assert sum(g["size"] for g in summary) == flat(fisher).size
    if groups == 1 or alpha == 0:
        np.testing.assert_allclose(flat(strengths), 1, rtol=1e-5)


def test_groups_keep_their_numbers():
    # The order of the groups by Fisher information changes slightly.
    fisher, values, group = planted_units()
    more = {"a": fisher["a"] * np.array([1.0, 12.0, 0.08])[group]}
    sizes = {"a": 1.0 + values["a"] * 0 + np.array([0, 50, 500])[group]}
    grouping = GaussianMixtureGrouping(3, granularity="unit")
    _, before = divided(grouping, fisher, sizes)
    _, after = divided(grouping, more, sizes, groups=before)
    assert [g["group"] for g in before] == [g["group"] for g in after] == [0, 1, 2]
    assert [np.argsort([g["mean_fisher"] for g in s]).tolist() for s in (before, after)] == [
        [0, 1, 2],
        [0, 2, 1],
    ]
    np.testing.assert_allclose(
        [g["magnitude"] for g in before], [g["magnitude"] for g in after], rtol=1e-6
    )


def test_a_new_group_gets_a_new_number():
    fisher, values, _ = planted()
    _, before = divided(GaussianMixtureGrouping(2), fisher, values)
    _, after = divided(GaussianMixtureGrouping(3), fisher, values, groups=before)
    assert sorted(g["group"] for g in after) == [0, 1, 2]
    kept = {g["group"]: g for g in after}
    # The group that is not split keeps its number.
    same = [n for n in (0, 1) if kept[n]["size"] == pytest.approx(before[n]["size"], abs=5)]
    assert len(same) == 1


def test_parameters_without_fisher_belong_to_no_group():
    fisher, values, _ = planted()
    fisher["a"][0] = 0
    for grouping in (GaussianMixtureGrouping(3), LayerGrouping()):
        strengths, summary = divided(grouping, fisher, values)
        assert np.all(strengths["a"][1:] > 0)
        assert sum(g["size"] for g in summary) == 950


def test_the_same_seed_gives_the_same_groups():
    fisher, values, _ = planted()
    a, b = (
        divided(GaussianMixtureGrouping(3, samples=200, seed=4), fisher, values)[0] for _ in "ab"
    )
    np.testing.assert_array_equal(flat(a), flat(b))


@pytest.mark.parametrize(
    "grouping",
    [
        GaussianMixtureGrouping(2),
        GaussianMixtureGrouping(2, soft=True),
        SpectralGrouping(2),
        LayerGrouping(),
        SingleGroup(),
    ],
)
def test_all_zero_fisher(grouping):
    strengths, summary = divided(grouping, {"a": np.zeros(5)}, {"a": np.ones(5)})
    np.testing.assert_array_equal(strengths["a"], np.zeros(5))
    assert summary == []


MADE = [
    GaussianMixtureGrouping(2, Importance(1.0)),
    GaussianMixtureGrouping("bic", "evidence", features=("fisher", "movement", "kind")),
    SpectralGrouping(2),
    SpectralGrouping(2, granularity="variable"),
    LayerGrouping("evidence"),
    SingleGroup(),
]


@pytest.mark.parametrize(
    ("grouping", "fisher"),
    [(grouping, DiagonalFisher("empirical", gamma=None)) for grouping in MADE]
    + [long(grouping, KroneckerFisher("empirical", gamma=None)) for grouping in MADE[1:4]],
    ids=lambda given: type(given).__name__,
)
def test_the_model_groups_weighs_and_saves(grouping, fisher, tmp_path):
    model = compiled(strength=2.0, fisher=fisher, grouping=grouping)
    total = 0.0
    for seed in (0, 1):
        x, y = blobs(seed=seed)
        moved(model)
        statistics = pass_statistics(model, (x, y), 32)
        blocks = blocks_of(model, statistics)
        weighted, summary, assignments = grouped(model, blocks)
        model.consolidate((x, y))
        total += sum(2 * b.importances().sum() for b in weighted.values())
        assert model.groups == summary
    assert [g["group"] for g in summary] == list(range(len(summary)))
    if isinstance(fisher, DiagonalFisher):
        held = sum(np.sum(b.importances()) for b in model.regularizer.precisions.values())
        assert held == pytest.approx(total, rel=1e-4)
        assert sum(g["size"] for g in summary) == model.count_params()
    sizes, fishers = Counter(), Counter()
    for key, block in blocks.items():
        spectrum = block.importances()
        assigned = np.broadcast_to(model.assignments[key], spectrum.shape)
        assert assigned.dtype == "int8"
        np.testing.assert_array_equal(model.assignments[key], assignments[key])
        for group in np.unique(assigned[spectrum > 0]):
            members = spectrum[(assigned == group) & (spectrum > 0)]
            assert {g["group"]: g["layers"] for g in summary}[group][key] == members.size
            sizes[group] += members.size
            fishers[group] += members.sum(dtype="float64")
    assert dict(sizes) == {g["group"]: g["size"] for g in summary}
    for g in summary:
        assert fishers[g["group"]] / g["size"] == pytest.approx(g["mean_fisher"], rel=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.groups == model.groups
    assert {k: (a.dtype, a.tolist()) for k, a in again.assignments.items()} == {
        k: (a.dtype, a.tolist()) for k, a in model.assignments.items()
    }
    assert again.grouping.get_config() == model.grouping.get_config()


@pytest.mark.parametrize(
    ("granularity", "fisher"),
    [(name, DiagonalFisher("empirical", gamma=None)) for name in ("element", "unit", "variable")]
    + [long("element", KroneckerFisher("empirical", gamma=None))],
)
def test_responsibilities_are_saved_and_checked(fisher, granularity):
    def make():
        grouping = GaussianMixtureGrouping(2, granularity=granularity, soft=True)
        return compiled(fisher=fisher, grouping=grouping)

    model, store = make(), {}
    for seed in (0, 1):
        moved(model).consolidate(blobs(seed=seed))
    assert {a.dtype for a in model.assignments.values()} == {np.dtype("uint8")}
    store = saved(model)
    again = make()
    load(again, store)
    assert {k: a.tolist() for k, a in again.assignments.items()} == {
        k: a.tolist() for k, a in model.assignments.items()
    }
    name = next(name for name in store if name.startswith("group|"))
    a = store[name]
    other = np.concatenate([np.zeros_like(a), a], -1)  # refers to groups that do not exist
    for bad in (a // 2, other, np.stack([a] * 3), np.uint8(255)):
        with pytest.raises(FileError, match="saved group of"):
            load(make(), {**store, name: np.asarray(bad)})


def test_numbers_of_groups_may_be_unsigned():
    class Halves(LayerGrouping):
        def label(self, found, key, part):
            return (np.arange(part.fisher.shape[-1]) % 2).astype("uint8")

    fisher = np.ones((3, 4))
    grouped = Halves().apply(BoundaryContext({"a": Diagonal("a", fisher)}, {"a": fisher}))
    assert [g["size"] for g in grouped.groups] == [6, 6]
    assert grouped.assignments["a"].tolist() == [0, 1, 0, 1]


def test_a_grouping_of_your_own_may_give_responsibilities():
    class Rows(LayerGrouping):
        def label(self, found, key, part):
            first = np.array([1.0, 0.5, 0.0])[:, None] * np.ones(part.fisher.shape)
            return Responsibilities(Responsibilities.rounded(np.stack([first, 1 - first], -1)))

    fisher = np.repeat([[1.0], [2.0], [4.0]], 5, axis=1)
    grouping = Rows(strengths=(1.0, 3.0))
    grouped = grouping.apply(BoundaryContext({"a": Diagonal("a", fisher)}, {"a": fisher}))
    np.testing.assert_allclose([g["size"] for g in grouped.groups], [8, 7], atol=1)
    strengths = grouped.blocks["a"].values / fisher
    np.testing.assert_allclose(strengths, [[1.0] * 5, [2.0] * 5, [3.0] * 5], atol=0.01)


def test_what_are_no_responsibilities_is_refused():
    for bad in (np.full((2, 2), 100, "uint8"), np.ones((2, 2)), np.uint8(255)):
        with pytest.raises(ValueError, match=r"`array` must hold bytes that sum to 255.*Received"):
            Responsibilities(bad)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (GaussianMixtureGrouping, {"granularity": "layer"}),
        (GaussianMixtureGrouping, {"groups": 0}),
        (GaussianMixtureGrouping, {"groups": 1.5}),
        (GaussianMixtureGrouping, {"samples": 2}),
        (GaussianMixtureGrouping, {"features": ("size",)}),
        (GaussianMixtureGrouping, {"features": ()}),
        (GaussianMixtureGrouping, {"strengths": "loud"}),
        (GaussianMixtureGrouping, {"strengths": ()}),
        (GaussianMixtureGrouping, {"seed": -1}),
        (SpectralGrouping, {"granularity": "element"}),
        (SpectralGrouping, {"groups": 0}),
        (SpectralGrouping, {"samples": 1}),
        (LayerGrouping, {"strengths": 3.0}),
        (Importance, {"alpha": float("inf")}),
    ],
)
def test_bad_arguments_are_named(make, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}`"):
        make(**arguments)


@pytest.mark.parametrize(
    "fisher", [DiagonalFisher("empirical", None), long(KroneckerFisher("empirical", None))]
)
def test_fixed_groups_have_the_strengths_they_were_given(fisher):
    data = blobs()
    penalties = {}
    for chosen in ({"hidden/*": 2.0, "head/kernel": 0.5, "*/bias": 0.0}, {}):
        keras.utils.set_random_seed(0)
        grouping = FixedGrouping(chosen)
        model = compiled(strength=1.0, fisher=fisher, grouping=grouping)
        model.consolidate(data)
        for layer in ("hidden", "head"):
            kernel = model.get_layer(layer).kernel
            held = np.array(kernel)
            kernel.assign_add(tf.ones(kernel.shape))
            penalties[layer, bool(chosen)] = float(model.penalty())
            kernel.assign(held)
        if chosen:
            assert {g["pattern"]: g["strength"] for g in model.groups} == chosen
            assert sum(g["size"] for g in model.groups) == model.count_params()
    # Approximate, as the part of a factor that is the same for all rows cannot be scaled per row.
    assert penalties["hidden", True] == pytest.approx(2 * penalties["hidden", False], rel=0.02)
    assert penalties["head", True] == pytest.approx(0.5 * penalties["head", False], rel=0.02)


def test_fixed_groups_are_checked_and_saved():
    with pytest.raises(ValueError, match="'conv_\\*', which fits none"):
        compiled(grouping=FixedGrouping({"conv_*": 2.0}))
    with pytest.raises(ValueError, match="must be a number"):
        FixedGrouping({"*": -1.0})
    with pytest.raises(ValueError, match="must map patterns"):
        FixedGrouping(["*"])
    grouping = FixedGrouping({"hidden/*": 2.0})
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(grouping))
    assert again.get_config() == grouping.get_config()


NAMES = [f"{layer}/{kind}" for layer in ("hidden", "head") for kind in ("kernel", "bias")]


def budgeted(optimizer="sgd", strengths=None, **settings):
    strengths = Budget(share=0.3, rate=0.1) if strengths is None else strengths
    model = compiled(
        optimizer=optimizer,
        strength=0.01,
        fisher=DiagonalFisher("empirical", gamma=None),
        grouping=LayerGrouping(strengths),
        **settings,
    )
    model.fit(*blobs(), epochs=5, verbose=0)
    model.consolidate(blobs())
    return model


@pytest.mark.long
@pytest.mark.parametrize("decoupled", sweep([False, True], False))
def test_the_pull_gets_its_share_of_the_gradient(decoupled):
    sgd = keras.optimizers.SGD(0.0)  # only λ changes
    model = budgeted(DWDOptimizer(sgd) if decoupled else sgd, Budget(share=0.3, rate=0.5))
    assert {float(level) for level in model.regularizer.budget_strengths.values.values()} == {1.0}
    for variable in model.trainable_variables:
        variable.assign_add(0.1 * tf.ones(variable.shape))
    x, y = blobs(seed=3)
    model.fit(x, y, epochs=100, batch_size=64, verbose=0)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    for path, gradient in zip(NAMES, gradients, strict=True):
        level = float(model.regularizer.budget_strengths.of(path))
        pull = np.linalg.norm(level * 0.1 * np.array(model.regularizer.precisions[path].values))
        assert level != 1.0
        assert pull / (pull + np.linalg.norm(gradient)) == pytest.approx(0.3, abs=0.01)


def test_one_step_of_a_budget_equals_its_formula():
    model = budgeted(keras.optimizers.SGD(0.0))
    for variable in model.trainable_variables:
        variable.assign_add(0.1 * tf.ones(variable.shape))
    x, y = blobs(seed=3)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True))
    gradients = dict(zip(NAMES, tape.gradient(loss, model.trainable_variables), strict=True))
    model.fit(x, y, epochs=1, batch_size=64, verbose=0)
    for name in NAMES:
        pull = np.linalg.norm(0.1 * np.array(model.regularizer.precisions[name].values))
        share = pull / (pull + np.linalg.norm(gradients[name]))
        level = float(model.regularizer.budget_strengths.of(name))
        assert level == pytest.approx(np.exp(0.1 * (0.3 - share)), rel=1e-4)


def test_a_budget_leaves_alone_what_nothing_pulls():
    model = budgeted()
    model.get_layer("hidden").trainable = False
    model.compile("sgd", model.loss)
    model.fit(*blobs(seed=3), epochs=5, verbose=0)
    levels = {
        key: float(model.regularizer.budget_strengths.values[group])
        for key, group in model.regularizer.budget_strengths.group_of.items()
    }
    assert levels["hidden/kernel"] == levels["hidden/bias"] == 1.0
    assert levels["head/kernel"] > 1.0


@pytest.mark.long
def test_a_budget_is_saved_and_goes_on(tmp_path):
    model = budgeted()
    model.fit(*blobs(seed=3), epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert float(again.penalty()) == pytest.approx(float(model.penalty()))
    assert float(model.penalty()) > 0
    levels = [float(v) for v in model.regularizer.budget_strengths.values.values()]
    assert [float(v) for v in again.regularizer.budget_strengths.values.values()] == levels
    assert len(set(levels)) > 1
    for each in (model, again):
        each.fit(*blobs(seed=5), epochs=1, verbose=0, shuffle=False)
        each.consolidate(blobs(seed=5))
        found = {g["group"]: g["strength"] for g in each.groups}
        assert found == {k: float(v) for k, v in each.regularizer.budget_strengths.values.items()}
    for each in (model, again):
        each.fit(*blobs(seed=4), epochs=2, verbose=0, shuffle=False)
    levels = [float(v) for v in model.regularizer.budget_strengths.values.values()]
    np.testing.assert_allclose(
        [float(v) for v in again.regularizer.budget_strengths.values.values()], levels
    )


def test_a_budget_needs_whole_variables():
    with pytest.raises(ValueError, match="`granularity` must be 'variable'"):
        GaussianMixtureGrouping(strengths="budget")
    with pytest.raises(ValueError, match="`soft` must be False"):
        GaussianMixtureGrouping(strengths="budget", granularity="variable", soft=True)
    with pytest.raises(ValueError, match="`share`"):
        Budget(1.0)
    model = budgeted(strengths="budget")
    assert model.grouping.get_config()["strengths"]["config"] == {"share": 0.2, "rate": 0.1}


@pytest.mark.parametrize("decoupled", sweep([False, True], True))
def test_a_step_and_the_penalty_have_the_levels_of_a_budget(decoupled):
    """g + m Λ (θ − c) as gradient, or decoupled (θ' / η + m Λ c) / (1 / η + m Λ), in float64."""
    rate = 0.1
    model = budgeted("sgd", Budget(share=0.3, rate=0.0))
    model.compile(keras.optimizers.SGD(rate) if decoupled else gentle(), model.loss)
    regularizer = model.regularizer
    for number, level in enumerate(regularizer.budget_strengths.values.values()):
        level.assign(2.0 + 3 * number)
    for variable in model.trainable_variables:
        variable.assign_add(0.1 * keras.random.normal(variable.shape, seed=1))
    x, y = blobs(seed=3)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    before = [np.array(v, "float64") for v in model.trainable_variables]
    penalty, expected = 0.0, []
    for name, gradient, theta in zip(NAMES, gradients, before, strict=True):
        level = float(regularizer.budget_strengths.of(name))
        precision = level * np.array(regularizer.precisions[name].values, "float64")
        anchor = np.array(regularizer.anchors[name], "float64")
        penalty += 0.5 * (precision * (theta - anchor) ** 2).sum()
        gradient = np.array(gradient, "float64")
        if decoupled:
            moved = theta - rate * gradient
            expected.append((moved / rate + precision * anchor) / (1 / rate + precision))
        else:
            expected += stepped(gentle(), [theta], [gradient + precision * (theta - anchor)])
    assert float(model.penalty()) == pytest.approx(penalty, rel=1e-4)
    model.train_on_batch(x, y)
    for variable, value in zip(model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(variable, value, rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_a_budget_in_mixed_precision_is_that_of_float32_and_overflow_leaves_it_alone():
    levels = {}
    for policy in ("float32", "mixed_float16"):
        keras.utils.set_random_seed(0)
        with dtype_policy(policy):
            model = budgeted(strengths=Budget(share=0.9, rate=0.5))
        for variable in model.trainable_variables:
            variable.assign_add(0.1 * tf.ones(variable.shape))
        x, y = blobs(seed=3)
        held = model.regularizer.budget_strengths.values
        for level in held.values():
            level.assign(100.0)
        model.train_on_batch(x, y)
        levels[policy] = [float(level) for level in held.values()]
    # Far from what it would be where nothing pulls, or where the gradient is scaled.
    assert min(levels["float32"]) < 95 * np.exp(0.5 * 0.9)
    np.testing.assert_allclose(levels["mixed_float16"], levels["float32"], rtol=0.01)
    model.optimizer.dynamic_scale.assign(1e38)
    model.train_on_batch(x, y)
    assert [float(level) for level in held.values()] == levels["mixed_float16"]


@pytest.mark.parametrize(("share", "limit"), [(0.99, 1000.0), (0.01, 1e-3)])
def test_the_levels_of_a_budget_have_limits(share, limit):
    model = budgeted(keras.optimizers.SGD(0.0), Budget(share=share, rate=1e4))
    for variable in model.trainable_variables:
        variable.assign_add(10 * tf.ones(variable.shape))
    model.train_on_batch(*blobs(seed=3))
    found = [float(level) for level in model.regularizer.budget_strengths.values.values()]
    np.testing.assert_allclose(found, limit, rtol=1e-5)


def test_the_summary_of_fixed_groups_equals_its_formula():
    base, data = mlp(), blobs()
    settings = {"strength": 1.0, "fisher": DiagonalFisher("empirical", None)}
    plain = compiled(base, grouping=None, **settings)
    model = compiled(base, grouping=FixedGrouping({"hidden/*": 2.0}), **settings)
    for each in (plain, model):  # they share their weights
        each.consolidate(data)
    assert [group["pattern"] for group in model.groups] == ["hidden/*", "*"]
    for group, layer in zip(model.groups, ("hidden", "head"), strict=True):
        paths = [f"{layer}/kernel", f"{layer}/bias"]
        values = np.concatenate([np.ravel(v) for v in model.get_layer(layer).weights])
        fisher = [np.ravel(plain.regularizer.precisions[path].values) for path in paths]
        assert group["size"] == values.size
        assert group["magnitude"] == pytest.approx(np.sqrt(np.mean(values**2)), rel=1e-5)
        assert group["mean_fisher"] == pytest.approx(np.concatenate(fisher).mean(), rel=1e-5)


def test_spectral_groups_of_units_with_some_zeros():
    fisher, values, group = planted_units()
    fisher["a"][np.arange(60) % 40, np.arange(60)] = 0
    strengths, summary = divided(SpectralGrouping(3), fisher, values)
    assert adjusted_rand_score(group, codes({"a": np.array(strengths["a"].max(0))})) == 1
    assert sum(g["size"] for g in summary) == np.count_nonzero(fisher["a"])


def test_spectral_groups_are_found_whatever_the_scale_of_their_differences():
    """An affinity that the distances were not scaled for would be zero between all units."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.arange(60) % 3)
    logs = 100 * group + 8 * rng.normal(size=60) + 0.1 * rng.normal(size=(40, 60))
    fisher, values = {"a": np.exp(logs)}, {"a": rng.normal(size=(40, 60))}
    strengths, _ = divided(SpectralGrouping(3, strengths=(1, 2, 3)), fisher, values)
    np.testing.assert_allclose(strengths["a"], np.broadcast_to(group + 1, (40, 60)))
