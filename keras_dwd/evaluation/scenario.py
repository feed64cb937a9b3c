"""Sequences of tasks: split by classes, with permuted pixels, or the user's own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from keras_dwd.evaluation.datasets import Dataset

Setting = Literal["task", "class", "domain"]
SETTINGS: tuple[Setting, ...] = ("task", "class", "domain")
KINDS = ("split", "permuted")


@dataclass(frozen=True)
class Task:
    """One task: a name, training data and test data.

    Attributes:
        name: Name in reports.
        train: Training data: `(x, y)` or `(x, y, sample_weight)` of arrays, or a batched
            `tf.data.Dataset` of these. `x` may be any structure of arrays, for instance
            `(images, task_ids)`, and so may `y` where a model has several outputs.
        test: Test data, in the same form.
        known: Whether the model knows the task before, because it was trained on it elsewhere. It
            is consolidated then, and not trained.

    Example:

    ```python
    night = Task("night", train=(x, y), test=(new_x, new_y))
    ```
    """

    name: str
    train: Any
    test: Any
    known: bool = False


@dataclass(frozen=True)
class Scenario:
    """A sequence of tasks with the same input shape.

    Attributes:
        name: Name in reports.
        tasks: The tasks in order.
        setting: `"task"`: each example comes with its task id, and each task has its own head.
            `"domain"`: no task ids, all tasks share the outputs. `"class"`: no task ids, every
            class of every task has its own output.
        outputs: Number of outputs of the model; per head in the setting `"task"`. For labels that
            are no class numbers, as in regression, the length of a label.
        input_shape: Shape of one example without the task id; `None` for `tf.data`.

    Example:

    ```python
    scenario = Scenario.from_tasks([("day", (x1, y1), (u1, v1)), ("night", (x2, y2), (u2, v2))])
    ```
    """

    name: str
    tasks: tuple[Task, ...]
    setting: Setting
    outputs: int
    input_shape: tuple[int, ...] | None

    @classmethod
    def from_tasks(
        cls,
        tasks: Iterable[Task | tuple[str, Any, Any]],
        name: str = "custom",
        outputs: int | None = None,
        setting: Setting = "domain",
    ) -> "Scenario":
        """A scenario of the user's own tasks.

        Args:
            tasks: `Task`s or tuples `(name, train, test)`.
            name: Name in reports.
            outputs: See `Scenario`. By default the highest label in arrays plus one; or, for labels
                with fractions, their length. With several arrays of labels it is that of the first.
            setting: See `Scenario`. In the setting `"task"` the data must include task ids.

        Raises:
            ValueError: If there is no task, if a task is empty, contains NaN, or differs in shape
                from the first, or if a label is not in `[0, outputs)`.
        """
        sequence = tuple(t if isinstance(t, Task) else Task(*t) for t in tasks)
        if not sequence:
            raise ValueError("`tasks` must hold at least one task. Received none.")
        if outputs is None:
            outputs = _outputs(sequence)
        shapes = [_check(task, outputs) for task in sequence]
        first = shapes[0]
        for task, shape in zip(sequence, shapes, strict=True):
            if shape is not None and first is not None and shape != first:
                raise ValueError(
                    f"All tasks must have examples of one shape. Task {sequence[0].name!r} has "
                    f"{first}, task {task.name!r} has {shape}."
                )
        return cls(name, sequence, setting, outputs, first[0] if first else None)

    def one_hot(self) -> "Scenario":
        """The same tasks with one-hot vectors in place of class numbers, in tasks of arrays."""

        def encoded(data: Any) -> Any:
            x, y, *weights = data
            return (x, np.eye(self.outputs, dtype="float32")[np.asarray(y, "int64")], *weights)

        tasks = [replace(t, train=encoded(t.train), test=encoded(t.test)) for t in self.tasks]
        return replace(self, tasks=tuple(tasks))

    def holdout(self, fraction: float = 0.1, seed: int = 0) -> "Scenario":
        """The same tasks, with part of the *training* data held back in place of the test data.

        Use it for tuning: the result does not contain the test data.

        Args:
            fraction: Fraction of each task's training examples to hold back, in (0, 1).
            seed: Seed of the random choice of these examples.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"`fraction` must be in (0, 1). Received: {fraction!r}")
        tasks = []
        for task in self.tasks:
            if isinstance(task.train, tf.data.Dataset):
                raise ValueError(f"Task {task.name!r} is `tf.data`: hold data back before.")
            count = len(tf.nest.flatten(task.train)[0])
            order = np.random.default_rng(seed).permutation(count)
            held_back = max(1, round(fraction * count))

            def pick(index: np.ndarray, train: Any = task.train) -> Any:
                return tf.nest.map_structure(lambda a: np.asarray(a)[index], train)

            train, test = pick(order[held_back:]), pick(order[:held_back])
            tasks.append(replace(task, train=train, test=test))
        return replace(self, name=f"{self.name} (validation)", tasks=tuple(tasks))

    def joint(self) -> Task:
        """One task with the training data of all tasks, for joint training as an upper bound.

        Its test data is that of the last task.
        """
        trains = [task.train for task in self.tasks]
        kinds = {isinstance(train, tf.data.Dataset) for train in trains}
        if len(kinds) > 1:
            raise ValueError("Tasks of arrays and of `tf.data` cannot be joined: bring one kind.")
        if kinds == {True}:
            data = trains[0]
            for other in trains[1:]:
                data = data.concatenate(other)
            # Shuffles whole batches, as the datasets are batched.
            return Task("joint", data.shuffle(1000), self.tasks[-1].test)
        data = tf.nest.map_structure(lambda *a: np.concatenate(a), *trains)
        return Task("joint", data, self.tasks[-1].test)


def split(
    data: Dataset,
    tasks: int = 5,
    setting: Setting = "task",
    class_order_seed: int | None = None,
    images_per_class: int | None = None,
) -> Scenario:
    """A scenario in which each task has an equal share of the classes.

    Args:
        data: A data set from `datasets.load`.
        tasks: Number of tasks; must divide the number of classes.
        setting: See `Scenario`.
        class_order_seed: The classes are ordered by
            `numpy.random.RandomState(class_order_seed).permutation(classes)`; `None` keeps them in
            their natural order.
        images_per_class: Use only the first training images of each class, this many; all if
            `None`.
    """
    _check_choice("setting", setting, SETTINGS)
    if not 1 <= tasks <= data.classes or data.classes % tasks:
        raise ValueError(
            f"`tasks` must divide the {data.classes} classes of {data.name!r}. Received: {tasks}"
        )
    order = np.arange(data.classes)
    if class_order_seed is not None:
        order = np.random.RandomState(class_order_seed).permutation(data.classes)
    per_task = data.classes // tasks
    sequence = []
    for t in range(tasks):
        classes = order[t * per_task : (t + 1) * per_task]

        def select(x: np.ndarray, y: np.ndarray, limit: int | None, c: Any = classes) -> Any:
            index = np.sort(np.concatenate([np.flatnonzero(y == k)[:limit] for k in c]))
            local = np.argsort(c)[np.searchsorted(np.sort(c), y[index])]
            return x[index], local.astype("int32")

        train = select(data.x_train, data.y_train, images_per_class)
        test = select(data.x_test, data.y_test, None)
        sequence.append((f"classes {', '.join(map(str, classes))}", train, test))
    return _in_setting(f"split:{data.name}", sequence, setting, per_task)


def permuted(
    data: Dataset,
    tasks: int = 5,
    setting: Setting = "domain",
    seed: int = 0,
    images_per_class: int | None = None,
) -> Scenario:
    """A scenario in which each task has all classes, with its own permutation of the pixels.

    The first task keeps the pixels in their order.

    Args:
        data: A data set from `datasets.load`.
        tasks: Number of tasks.
        setting: See `Scenario`.
        seed: Seed of the permutations.
        images_per_class: Use only the first training images of each class, this many; all if
            `None`.
    """
    _check_choice("setting", setting, SETTINGS)
    if tasks < 1:
        raise ValueError(f"`tasks` must be at least 1. Received: {tasks}")
    rng = np.random.default_rng(seed)
    shape = data.x_train.shape[1:]
    pixels = int(np.prod(shape))
    labels = range(data.classes)
    index = np.sort(
        np.concatenate([np.flatnonzero(data.y_train == k)[:images_per_class] for k in labels])
    )
    sequence = []
    for t in range(tasks):
        order = np.arange(pixels) if t == 0 else rng.permutation(pixels)

        def shuffle(x: np.ndarray, order: np.ndarray = order) -> np.ndarray:
            return x.reshape(len(x), pixels)[:, order].reshape(-1, *shape)

        train = shuffle(data.x_train[index]), data.y_train[index]
        sequence.append((f"permutation {t}", train, (shuffle(data.x_test), data.y_test)))
    return _in_setting(f"permuted:{data.name}", sequence, setting, data.classes)


def _in_setting(name: str, tasks: Sequence[Any], setting: Setting, classes: int) -> Scenario:
    """Scenario of tasks whose labels start at 0: adds task ids or shifts labels by the setting."""

    def data(pair: Any, t: int) -> Any:
        x, y = pair[0].astype("float32"), pair[1]
        x = x / 255 if pair[0].dtype == "uint8" else x
        if setting == "task":
            return (x, np.full(len(x), t, "int32")), y
        return x, (y + t * classes if setting == "class" else y)

    sequence = [Task(n, data(train, t), data(test, t)) for t, (n, train, test) in enumerate(tasks)]
    outputs = classes * len(tasks) if setting == "class" else classes
    return Scenario.from_tasks(sequence, name, outputs, setting)


def are_classes(labels: Any) -> bool:
    """Whether labels can be class numbers: whole numbers in a single array."""
    if tf.nest.is_nested(labels) and not isinstance(labels, list):
        return False
    array = np.asarray(labels)
    return array.dtype.kind in "iub" or (array.dtype.kind == "f" and not np.any(array % 1))


def _outputs(tasks: Sequence[Task]) -> int:
    """The default of `Scenario.outputs`."""
    parts = [data for task in tasks for data in (task.train, task.test)]
    labels = [d[1] for d in parts if isinstance(d, (tuple, list)) and len(d) in (2, 3)]
    if not labels:
        raise ValueError("`outputs` is needed where all tasks are `tf.data`.")
    arrays = [np.asarray(_arrays(y)[0]) for y in labels]
    if all(are_classes(array) for array in arrays):
        return int(max((array.max() for array in arrays if array.size), default=0)) + 1
    return int(np.prod(arrays[0].shape[1:]))


def _arrays(labels: Any) -> list[Any]:
    """The arrays of labels; a list, as of numbers, is one."""
    return [labels] if isinstance(labels, list) else tf.nest.flatten(labels)


def _check(task: Task, outputs: int) -> tuple[tuple[int, ...], ...] | None:
    """The shapes of an example, `None` for `tf.data`; raises `ValueError` for unusable data."""
    from keras_dwd.training.data import check_finite

    shapes = None
    for part, data in (("train", task.train), ("test", task.test)):
        if isinstance(data, tf.data.Dataset):
            if int(data.cardinality()) == 0:
                raise ValueError(f"The {part} data of task {task.name!r} is empty.")
            spec = data.element_spec
            if not isinstance(spec, tuple) or len(spec) < 2:
                raise ValueError(
                    f"The {part} data of task {task.name!r} must give (x, y). Received: {spec}"
                )
            continue
        if not (isinstance(data, (tuple, list)) and len(data) in (2, 3)):
            raise ValueError(
                f"The {part} data of task {task.name!r} must be (x, y), (x, y, sample_weight) or a "
                f"`tf.data.Dataset`. Received: {type(data).__name__}"
            )
        x, labels = tf.nest.flatten(data[0]), _arrays(data[1])
        lengths = [len(a) for a in [*x, *labels, *tf.nest.flatten(data[2:])]]
        if not lengths[len(x)]:
            raise ValueError(f"The {part} data of task {task.name!r} is empty.")
        if len({*lengths}) > 1:
            raise ValueError(
                f"The {part} data of task {task.name!r} has {lengths[: len(x)]} examples and "
                f"{', '.join(map(str, lengths[len(x) :]))} labels."
            )
        check_finite(f"{part} data of task {task.name}", data)
        y = np.asarray(labels[0])
        classes = len(labels) == 1 and y.ndim == 1 and are_classes(y)
        if classes and not 0 <= y.min() <= y.max() < outputs:
            raise ValueError(
                f"The labels of task {task.name!r} must be in [0, {outputs}). Received labels "
                f"from {y.min()} to {y.max()} in its {part} data."
            )
        own = tuple(tuple(np.shape(a)[1:]) for a in x)
        if shapes is not None and own != shapes:
            raise ValueError(
                f"Task {task.name!r} has examples of shape {shapes} to train on and {own} to test."
            )
        shapes = own
    return shapes


def _check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}. Received: {value!r}")
