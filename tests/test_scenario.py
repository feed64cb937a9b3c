import time

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dwd.evaluation import Scenario, datasets
from keras_dwd.evaluation.scenario import permuted, split


def pair(count=10, shape=(4,), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, *shape)).astype("float32"), np.arange(count) % classes


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def test_digits_are_split_into_train_and_test(digits):
    assert digits.x_train.shape == (1437, 8, 8, 1)
    assert len(digits.x_test) == 360
    assert digits.x_train.max() == 255
    assert set(np.unique(digits.y_test)) == set(range(10))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), tasks=st.sampled_from([1, 2, 5, 10]))
def test_split_gives_every_example_once_with_its_label(seed, tasks):
    data = datasets.load("digits")
    order = np.random.RandomState(seed).permutation(10)
    scenario = split(data, tasks, "domain", seed)
    each = 10 // tasks
    total = 0
    for t, task in enumerate(scenario.tasks):
        x, y = task.train
        assert y.min() == 0
        assert y.max() == each - 1
        classes = order[t * each : (t + 1) * each][y]
        expected = np.isin(data.y_train, order[t * each : (t + 1) * each])
        np.testing.assert_array_equal(classes, data.y_train[expected])
        np.testing.assert_array_equal(x, data.x_train[expected].astype("float32") / 255)
        total += len(y)
    assert total == len(data.y_train)


def test_settings_tell_the_model_what_they_should(digits):
    task, domain, single = (split(digits, 5, s) for s in ("task", "domain", "class"))
    (_, ids), y = task.tasks[3].test
    assert set(ids) == {3}
    assert set(y) == {0, 1}
    assert set(domain.tasks[3].test[1]) == {0, 1}
    assert set(single.tasks[3].test[1]) == {6, 7}
    assert (task.outputs, domain.outputs, single.outputs) == (2, 2, 10)
    assert set(permuted(digits, 3, "class").tasks[2].test[1]) == set(range(20, 30))


def test_permutations_are_fixed_and_the_first_is_none(digits):
    scenario = permuted(digits, 3, seed=5)
    plain = digits.x_train.astype("float32") / 255
    np.testing.assert_array_equal(scenario.tasks[0].train[0], plain)
    for task in scenario.tasks[1:]:
        x = task.train[0]
        assert not np.array_equal(x, plain)
        np.testing.assert_array_equal(
            np.sort(x.reshape(len(x), -1)), np.sort(plain.reshape(len(x), -1))
        )
    again = permuted(digits, 3, seed=5)
    np.testing.assert_array_equal(scenario.tasks[2].test[0], again.tasks[2].test[0])


def test_images_per_class(digits):
    for scenario in (split(digits, 5, images_per_class=7), permuted(digits, 2, images_per_class=7)):
        for task in scenario.tasks:
            assert set(np.bincount(task.train[1])) == {7}


def test_holdout_takes_from_the_training_data_only(digits):
    scenario = split(digits, 5, "domain")
    held = scenario.holdout(0.2)
    for whole, part in zip(scenario.tasks, held.tasks, strict=True):
        assert len(part.test[1]) == round(0.2 * len(whole.train[1]))
        both = np.concatenate([part.train[0], part.test[0]]).reshape(-1, 64)
        expected = whole.train[0].reshape(-1, 64)
        np.testing.assert_array_equal(both[np.lexsort(both.T)], expected[np.lexsort(expected.T)])


def test_joint_is_all_training_data(digits):
    scenario = split(digits, 5, "class")
    x, y = scenario.joint().train
    assert len(x) == len(digits.y_train)
    np.testing.assert_array_equal(np.bincount(y), np.bincount(digits.y_train))


def test_own_tasks_of_arrays_and_datasets():
    scenario = Scenario.from_tasks([("a", pair(), pair()), ("b", pair(seed=1), pair())])
    assert (scenario.outputs, scenario.input_shape, len(scenario.tasks)) == (3, (4,), 2)
    data = tf.data.Dataset.from_tensor_slices(pair()).batch(4)
    assert Scenario.from_tasks([("a", data, data)], outputs=3).joint().name == "joint"
    with pytest.raises(ValueError, match="`outputs` is needed"):
        Scenario.from_tasks([("a", data, data)])


X, Y = pair()


@pytest.mark.parametrize(
    ("tasks", "settings", "error"),
    [
        ([], {}, "at least one task"),
        ([("a", (X[:0], Y[:0]), (X, Y))], {}, "training data|empty"),
        ([("a", (X, Y), (X, Y[:3]))], {}, "10.* examples and 3 labels"),
        ([("a", (X * np.nan, Y), (X, Y))], {}, "must be finite"),
        ([("a", (X, Y), (X, Y + 1))], {"outputs": 3}, r"must be in \[0, 3\).*from 1 to 3"),
        ([("a", (X, Y), (X, Y)), ("b", pair(shape=(5,)), pair(shape=(5,)))], {}, "one shape"),
        ([("a", (X, Y), (X, Y)), ("a", pair(shape=(5,)), pair(shape=(5,)))], {}, "one shape"),
        ([("a", (X, Y), pair(shape=(5,)))], {}, r"shape \(\(4,\),\) to train on"),
        ([("a", X, (X, Y))], {}, r"must be \(x, y\)"),
    ],
)
def test_bad_tasks_are_refused(tasks, settings, error):
    with pytest.raises(ValueError, match=error):
        Scenario.from_tasks(tasks, **settings)


def test_bad_arguments_are_refused(digits):
    with pytest.raises(ValueError, match="must divide the 10 classes"):
        split(digits, 3)
    with pytest.raises(ValueError, match="`setting` must be one of task, class, domain"):
        split(digits, 5, "tasks")
    with pytest.raises(ValueError, match="`tasks` must be at least 1"):
        permuted(digits, 0)
    with pytest.raises(ValueError, match="`fraction`"):
        split(digits, 5).holdout(1.0)


def test_labels_are_checked_where_their_number_is_found_in_them():
    x = np.zeros((4, 2), "float32")
    train, more = (x, np.array([0, 1, 0, 1])), (x, np.array([0, 1, 2, 1]))
    assert Scenario.from_tasks([("a", train, more)]).outputs == 3
    with pytest.raises(ValueError, match="from -1 to 1"):
        Scenario.from_tasks([("a", train, (x, np.array([0, 1, -1, 1])))])


def test_arrays_and_datasets_are_not_joined():
    x, y = np.zeros((4, 2), "float32"), np.array([0, 1, 0, 1])
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
    mixed = Scenario.from_tasks([("a", (x, y), (x, y)), ("b", dataset, dataset)])
    with pytest.raises(ValueError, match="cannot be joined"):
        mixed.joint()
    with pytest.raises(ValueError, match="must give"):
        Scenario.from_tasks([("c", dataset.map(lambda x, y: x), dataset)], outputs=2)


def test_a_missing_dataset_is_said_in_seconds(tmp_path):
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"Unknown data set 'cifar100'.*Known here: digits"):
        datasets.load("cifar100", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Known here: digits.*does not exist"):
        datasets.load("cifar100", tmp_path / "nowhere")
    assert time.monotonic() - started < 5


REAL = [("mnist", (28, 28, 1), 10), ("cifar100", (32, 32, 3), 100)]


@pytest.mark.parametrize(("name", "shape", "classes"), REAL)
def test_real_data_in_tfds_format(data_dir, name, shape, classes):
    data = datasets.load(name, data_dir)
    assert data.x_train.dtype == np.uint8
    assert data.x_train.shape[1:] == data.x_test.shape[1:] == shape
    assert len(data.x_train) == len(data.y_train) > len(data.x_test) == len(data.y_test)
    assert data.classes == classes == len(np.unique(data.y_train))


@pytest.mark.long
@pytest.mark.parametrize(("name", "shape", "classes"), REAL)
def test_all_of_the_real_data(whole_data_dir, name, shape, classes):
    data = datasets.load(name, whole_data_dir)
    assert data.x_train.shape[1:] == shape
    assert data.classes == classes == len(np.unique(data.y_train))
    if name == "cifar100":
        scenario = split(data, 10, "task", 1993, images_per_class=20)
        expected = np.random.RandomState(1993).permutation(100)[:10]
        assert scenario.tasks[0].name == f"classes {', '.join(map(str, expected))}"
        assert [len(t.train[1]) for t in scenario.tasks] == [200] * 10
        assert [len(t.test[1]) for t in scenario.tasks] == [1000] * 10


def test_training_and_test_images_are_permuted_alike(digits):
    def pixels(task):
        both = np.concatenate([task.train[0], task.test[0]])
        return [hash(column.tobytes()) for column in both.reshape(len(both), -1).T]

    scenario = permuted(digits, 3, seed=5)
    plain = set(pixels(scenario.tasks[0]))
    orders = set()
    for task in scenario.tasks:
        columns = pixels(task)
        assert not set(columns) ^ plain, "pixels of which training and test images differ"
        orders.add(tuple(columns))
        np.testing.assert_array_equal(task.train[1], digits.y_train)
        np.testing.assert_array_equal(task.test[1], digits.y_test)
    assert len(orders) == 3  # each task its own
