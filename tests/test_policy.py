import keras
import numpy as np
import pytest
from cases import blobs, compiled

from keras_dwd import DiagonalFisher
from keras_dwd.evaluation import Scenario, run_sequence
from keras_dwd.evaluation.methods import Method
from keras_dwd.experimental import GroupingPolicy
from keras_dwd.groupings import GaussianMixtureGrouping, LayerGrouping, SingleGroup
from keras_dwd.groupings.grouping import BoundaryContext
from keras_dwd.precision.diagonal import Diagonal


def worth(policy, value):
    """Reward a policy with the accuracy `value` on a new task and on all earlier ones."""
    tasks = max(policy.state()["accuracies"].size, 1)
    policy._accuracies = np.ones(tasks)
    policy.reward([value] * (tasks + 1))


ARMS = [SingleGroup(), LayerGrouping(), GaussianMixtureGrouping(2)]


def learned(seed=0, moved=0.1):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=20)
    blocks = {"a": Diagonal("a", rng.uniform(0.1, 1, 20))}
    return BoundaryContext(blocks, {"a": values}, {"a": values - moved})


def test_it_tries_each_and_then_takes_the_best():
    policy = GroupingPolicy(ARMS)
    of_each = [0.2, 0.9, 0.4]
    picks = []
    for seed in range(30):
        policy.apply(learned(seed))
        policy.commit()
        picks.append(policy.picked)
        worth(policy, of_each[policy.picked])
    assert picks[:3] == [0, 1, 2]
    assert picks.count(1) > 20
    assert policy.picked is None


def test_the_context_decides():
    policy = GroupingPolicy(ARMS[:2], exploration=0.2)
    for seed in range(60):
        far = seed % 2
        policy.apply(learned(seed, moved=2.0 if far else 0.01))
        policy.commit()
        worth(policy, 0.9 if policy.picked == far else 0.3)
    chosen = []
    for moved in (0.01, 2.0):
        policy.apply(learned(100, moved))
        policy.commit()
        chosen.append(policy.picked)
    assert chosen == [0, 1]


def test_the_expectation_is_ridge_regression():
    policy = GroupingPolicy(ARMS[:2], exploration=0.5)
    rng = np.random.default_rng(0)
    contexts, rewards = [], []
    for seed in range(6):
        what = learned(seed, rng.uniform(0, 1))
        policy.apply(what)
        policy.commit()
        reward = rng.uniform()
        if policy.picked == 0:
            contexts.append(policy.context_features(what))
            rewards.append(reward)
        worth(policy, reward)
    x = np.array(contexts)
    now = policy.context_features(learned(9))
    gram = x.T @ x + np.eye(4)
    means, widths = policy.expected(now)
    assert means[0] == pytest.approx(now @ np.linalg.solve(gram, x.T @ rewards))
    assert widths[0] == pytest.approx(0.5 * np.sqrt(now @ np.linalg.solve(gram, now)))


def test_the_reward_is_what_is_left_and_what_was_learned():
    policy = GroupingPolicy(ARMS[:2])
    policy.reward([0.8])
    policy.apply(learned())
    policy.commit()
    policy.reward([0.6, 0.9])
    context = policy.context_features(learned())
    first = (0.6 / 0.8 + 0.9) / 2
    np.testing.assert_allclose(policy.state()["b"][0], first * context)
    policy.apply(learned())
    policy.commit()
    policy.reward([0.7, 0.0, 0.5, 0.7])  # two more tasks; the first one has improved
    np.testing.assert_allclose(policy.state()["b"][1], (0.5 * 1 + 0.6) / 2 * context)
    policy.apply(learned())
    policy.commit()
    policy.reward([0.7, 0.3, 0.0, 0.7, 1.0])  # an accuracy of 0 cannot fall
    third = (3 / 4 + 1.0) / 2
    np.testing.assert_allclose(policy.state()["b"].sum(0), (first + 0.55 + third) * context)


def test_what_is_picked_is_applied_and_a_reward_needs_a_pick():
    policy = GroupingPolicy(ARMS)
    policy.reward([1.0])
    assert policy.counts == [0, 0, 0]
    what = learned()
    weighted, summary, _ = policy.apply(what)
    expected, alike, _ = ARMS[0].apply(what)
    np.testing.assert_array_equal(weighted["a"].values, expected["a"].values)
    assert summary == alike
    assert policy.picked is None  # until `commit`
    policy.commit()
    assert policy.picked == 0


def test_it_is_saved_with_what_it_learned(tmp_path):
    model = compiled(fisher=DiagonalFisher("empirical"), grouping=GroupingPolicy(ARMS))
    for seed in range(2):
        model.fit(*blobs(seed=seed), verbose=0)
        model.grouping.reward([0.7] * (seed + 1))
        model.consolidate()
    assert model.grouping.counts == [1, 0, 0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.grouping.get_config() == model.grouping.get_config()
    assert again.grouping.picked == 1
    with pytest.raises(ValueError, match="more than the 2 tasks of the last call"):
        again.grouping.reward([0.5, 0.5])
    again.grouping.reward([0.5] * 3)
    assert again.grouping.counts == [1, 1, 0]


@pytest.mark.long
def test_a_run_rewards_it_by_held_back_data():
    policy = GroupingPolicy(ARMS)
    settings = {"grouping": policy, "fisher": DiagonalFisher("batch")}
    method = Method("policy", lambda s: {"strength": s, **settings}, strength=1.0)
    data = [blobs(seed=seed) for seed in range(4)]
    tasks = Scenario.from_tasks([(f"task {i}", d, d) for i, d in enumerate(data)])

    def build(scenario):
        return keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])

    result = run_sequence(build, tasks, method, epochs=20)
    assert result.model.grouping.counts == [1, 1, 1]
    assert policy.counts == [0, 0, 0]  # the model has a copy
    means, _ = result.model.grouping.expected(np.array([1.0, 1.0, 0.1, 0.1]))
    assert (means > 0).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"groupings": [SingleGroup()]},
        {"groupings": [SingleGroup(), "gmm"]},
        {"groupings": [SingleGroup(), SingleGroup("budget")]},
        {"groupings": ARMS, "exploration": -1},
        {"groupings": ARMS, "rewards": {"counts": [1]}},
    ],
)
def test_bad_arguments_are_named(arguments):
    name = list(arguments)[-1]
    with pytest.raises(ValueError, match=f"`{name}`"):
        GroupingPolicy(**arguments)
    with pytest.raises(ValueError, match="`accuracies`"):
        GroupingPolicy(ARMS).reward([2.0])


def test_the_context_equals_its_formula():
    """One, whether there was a boundary before, how far θ moved, and how unequal log F is."""
    rng = np.random.default_rng(3)
    fisher, values = rng.uniform(0.01, 1, 20), rng.normal(size=20)
    anchors = values - 0.3 * rng.normal(size=20)
    policy = GroupingPolicy(ARMS)
    found = policy.context_features(
        BoundaryContext({"a": Diagonal("a", fisher)}, {"a": values}, {"a": anchors})
    )
    distance = np.linalg.norm(values - anchors) / np.linalg.norm(anchors)
    np.testing.assert_allclose(found, [1, 1, distance, np.log(fisher).std() / 10])
    first = policy.context_features(BoundaryContext({"a": Diagonal("a", fisher)}, {"a": values}))
    np.testing.assert_allclose(first, [1, 0, 0, np.log(fisher).std() / 10])
