import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import blobs, compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from keras_dwd import DiagonalFisher, FixedGrouping, GaussianMixtureGrouping, KroneckerFisher


def planted(sizes=(300, 500, 200), seed=0):
    """Parameters of three kinds, mixed over two variables."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat([0, 1, 2], sizes))
    fisher = 10.0 ** (np.array([-8, -3, 1])[group] + 0.3 * rng.normal(size=group.size))
    values = 10.0 ** (np.array([-3, -1, 0])[group] + 0.2 * rng.normal(size=group.size))
    cut = group.size // 4

    def parts(a):
        return {"a": a[:cut].reshape(5, -1), "b": a[cut:]}

    return parts(fisher), parts(values), group


def flat(arrays):
    return np.concatenate([a.ravel() for a in arrays.values()])


def test_planted_groups_are_found():
    fisher, values, group = planted()
    strengths, summary = GaussianMixtureGrouping(3, alpha=0.5, samples=400).strengths(
        fisher, values
    )
    assert adjusted_rand_score(group, np.unique(flat(strengths), return_inverse=True)[1]) > 0.99
    assert [g["size"] for g in summary] == pytest.approx([300, 500, 200], abs=3)
    assert strengths["a"].shape == (5, 50)


def test_strengths_equal_their_formula():
    fisher, values, group = planted()
    strengths, summary = GaussianMixtureGrouping(3, alpha=0.7).strengths(fisher, values)
    f = flat(fisher)
    ratio = np.array([f[group == k].mean() / f.mean() for k in range(3)]) ** 0.7
    ratio *= f.sum() / sum(ratio[k] * f[group == k].sum() for k in range(3))
    measured = [np.median(flat(strengths)[group == k]) for k in range(3)]
    np.testing.assert_allclose(measured, ratio, rtol=1e-3)
    np.testing.assert_allclose([g["strength"] for g in summary], ratio, rtol=1e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), alpha=st.floats(-1, 1), groups=st.integers(1, 5))
def test_the_total_precision_is_unchanged(seed, alpha, groups):
    fisher, values, _ = planted(seed=seed)
    strengths, summary = GaussianMixtureGrouping(groups, alpha).strengths(fisher, values)
    assert (flat(strengths) * flat(fisher)).sum() == pytest.approx(flat(fisher).sum(), rel=1e-4)
    assert sum(g["size"] for g in summary) == flat(fisher).size
    if groups == 1 or alpha == 0:
        np.testing.assert_allclose(flat(strengths), 1, rtol=1e-5)


def test_parameters_without_fisher_belong_to_no_group():
    fisher, values, _ = planted()
    fisher["a"][0] = 0
    strengths, summary = GaussianMixtureGrouping(3).strengths(fisher, values)
    assert np.all(strengths["a"][0] == 0)
    assert np.all(strengths["a"][1:] > 0)
    assert sum(g["size"] for g in summary) == 950


def test_the_same_seed_gives_the_same_groups():
    fisher, values, _ = planted()
    a, b = (
        GaussianMixtureGrouping(3, samples=200, seed=4).strengths(fisher, values)[0] for _ in "ab"
    )
    np.testing.assert_array_equal(flat(a), flat(b))


def test_all_zero_fisher():
    strengths, summary = GaussianMixtureGrouping(2).strengths({"a": np.zeros(5)}, {"a": np.ones(5)})
    np.testing.assert_array_equal(strengths["a"], np.zeros(5))
    assert summary == []


def test_layers_are_grouped_as_a_whole():
    rng = np.random.default_rng(0)
    scale = {"a": 1.0, "b": 1e-3, "c": 1.2, "d": 0.8e-3}
    fisher = {p: s * rng.uniform(0.9, 1.1, (3 + i, 4)) for i, (p, s) in enumerate(scale.items())}
    values = {path: rng.choice([-1.0, 1.0], f.shape) for path, f in fisher.items()}
    grouping = GaussianMixtureGrouping(2, alpha=0.5, granularity="layer")
    strengths, summary = grouping.strengths(fisher, values)
    means = []
    for pair in (("b", "d"), ("a", "c")):
        (strength,) = {float(s) for path in pair for s in strengths[path].ravel()}
        mean = np.concatenate([fisher[path].ravel() for path in pair]).mean()
        means.append((strength, mean))
    overall = flat(fisher).mean()
    ratio = np.array([(mean / overall) ** 0.5 for _, mean in means])
    sizes = [4 * (4 + 6), 4 * (3 + 5)]
    ratio *= flat(fisher).sum() / sum(
        r * n * mean for r, n, (_, mean) in zip(ratio, sizes, means, strict=True)
    )
    np.testing.assert_allclose([strength for strength, _ in means], ratio, rtol=1e-5)
    assert [g["size"] for g in summary] == sizes
    # More groups than layers: one each.
    _, alone = GaussianMixtureGrouping(5, granularity="layer").strengths(fisher, values)
    assert sorted(g["size"] for g in alone) == sorted(a.size for a in fisher.values())


def test_the_model_folds_strength_times_fisher():
    x, y = blobs()
    model = compiled(
        strength=2.0,
        fisher=DiagonalFisher("exact"),
        grouping=GaussianMixtureGrouping(2, alpha=1.0),
    )
    values = {
        f"{layer.name}/{v.name}": np.array(v) for layer in model.layers for v in layer.weights
    }
    statistics = model._estimate((x, y), 32)
    fisher = {path: statistics[f"fisher/{path}"] for path in values}
    strengths, summary = model.grouping.strengths(fisher, values)
    model.consolidate((x, y))
    for path, precision in model.regularizer.precisions.items():
        expected = 2 * strengths[path] * fisher[path]
        np.testing.assert_allclose(precision.values, expected, rtol=1e-4)
    assert [g["size"] for g in model.groups] == [g["size"] for g in summary]


@pytest.mark.parametrize(
    "arguments",
    [
        {"granularity": "unit"},
        {"groups": 0},
        {"groups": 1.5},
        {"samples": 2},
        {"alpha": float("inf")},
        {"seed": -1},
    ],
)
def test_bad_arguments_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}`"):
        GaussianMixtureGrouping(**arguments)


def test_config_round_trip():
    grouping = GaussianMixtureGrouping(5, 0.25, 1000, 3)
    assert GaussianMixtureGrouping.from_config(grouping.get_config()).get_config() == {
        "groups": 5,
        "alpha": 0.25,
        "samples": 1000,
        "seed": 3,
        "granularity": "element",
    }


@pytest.mark.parametrize("fisher", [DiagonalFisher("exact", None), KroneckerFisher("exact", None)])
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
    # Within what a factor's rest, the same for all of its rows, leaves open.
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
