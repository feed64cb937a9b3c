"""Networks and training protocols of the reported results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
from keras import layers

from keras_dwd.evaluation.recipe import Recipe
from keras_dwd.evaluation.scenario import Scenario, Task
from keras_dwd.layers.task_heads import TaskHeads

_CPU = Recipe()
# With SGD, of which the pull is a proximal step, much more is retained than with Adam.
_FULL = Recipe("sgd", 0.1, "cosine", weight_decay=5e-4, augment=True, warmup=2.0, mixup=0.2)


@dataclass(frozen=True)
class Profile:
    """A training protocol.

    Attributes:
        network: Description of the network for reports.
        build: Function that builds the model for a scenario.
        epochs: Epochs per task.
        batch_size: Examples per step.
        images_per_class: Number of training images per class; all if `None`.
        recipe: Optimizer, learning rate and augmentation.
    """

    network: str
    build: Callable[[Scenario], keras.Model]
    epochs: int
    batch_size: int = 32
    images_per_class: int | None = None
    recipe: Recipe = _CPU


PROFILES = ("cpu", "full")


def profile_for(shape: tuple[int, ...], kind: str, name: str = "cpu") -> Profile:
    """The protocol for images of this shape.

    Args:
        shape: `(height, width, channels)`.
        kind: `split` or `permuted`. Permuted images have no local structure, so they get an MLP in
            place of a convolutional network.
        name: `cpu`, sized for two cores, or `full`, for a GPU.
    """
    if name not in PROFILES:
        raise ValueError(f"`profile` must be one of {', '.join(PROFILES)}. Received: {name!r}")
    if kind == "permuted" or shape[-1] == 1:
        small = shape[0] < 16  # such as digits: training is fast with all images
        images = None if small or name == "full" else 400
        return Profile("MLP 100-100", mlp, 10, images_per_class=images)
    if name == "cpu":
        return Profile("conv 32-32/2-64-64/2-pool-dense 128", conv_net, 8, images_per_class=200)
    return Profile("ResNet-32", resnet32, 27, batch_size=128, recipe=_FULL)


def network(name: str) -> keras.Model:
    """Build one of `NETWORKS` for small images and ten tasks of ten classes, with a head each."""
    shape = (28, 28, 1) if name == "mlp" else (32, 32, 3)
    tasks = tuple(Task(str(t), None, None) for t in range(10))
    return NETWORKS[name](Scenario(name, tasks, "task", 10, shape))


def mlp(scenario: Scenario) -> keras.Model:
    """Two hidden layers of 100 units."""
    inputs = keras.Input(scenario.input_shape)
    x = layers.Flatten(name="flatten")(inputs)
    for i in (1, 2):
        x = layers.Dense(100, activation="relu", name=f"dense_{i}")(x)
    return _with_head(inputs, x, scenario)


def conv_net(scenario: Scenario) -> keras.Model:
    """Four convolutions of 3 × 3, every other one with stride 2, pooling and a dense layer."""
    inputs = keras.Input(scenario.input_shape)
    x = inputs
    for i, (filters, stride) in enumerate([(32, 1), (32, 2), (64, 1), (64, 2)], start=1):
        x = layers.Conv2D(
            filters, 3, strides=stride, padding="same", activation="relu", name=f"conv_{i}"
        )(x)
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.Dense(128, activation="relu", name="dense")(layers.Flatten(name="flatten")(x))
    return _with_head(inputs, x, scenario)


def resnet32(scenario: Scenario) -> keras.Model:
    """ResNet-32 for small images: three stages of five residual blocks, 16 to 64 filters.

    Reference:
        [He et al., 2016](https://arxiv.org/abs/1512.03385), section 4.2.
    """
    return resnet(scenario, blocks=(5, 5, 5), filters=(16, 32, 64))


def resnet18_like(scenario: Scenario) -> keras.Model:
    """Four stages of two residual blocks, 64 to 512 filters: 11 million parameters."""
    return resnet(scenario, blocks=(2, 2, 2, 2), filters=(64, 128, 256, 512))


def resnet(scenario: Scenario, blocks: tuple[int, ...], filters: tuple[int, ...]) -> keras.Model:
    """A residual network for small images, batch normalisation after each convolution."""
    inputs = keras.Input(scenario.input_shape)
    x = _conv_norm(inputs, filters[0], 1, "stem")
    for stage, (count, width) in enumerate(zip(blocks, filters, strict=True), start=1):
        for block in range(1, count + 1):
            name = f"stage_{stage}_block_{block}"
            stride = 2 if stage > 1 and block == 1 else 1
            shortcut = x
            if stride != 1:
                shortcut = _conv_norm(x, width, stride, f"{name}_shortcut", size=1, relu=False)
            y = _conv_norm(x, width, stride, f"{name}_1")
            y = _conv_norm(y, width, 1, f"{name}_2", relu=False)
            x = layers.ReLU(name=f"{name}_out")(layers.Add(name=f"{name}_add")([y, shortcut]))
    return _with_head(inputs, layers.GlobalAveragePooling2D(name="pool")(x), scenario)


def _conv_norm(
    x: Any, filters: int, stride: int, name: str, size: int = 3, relu: bool = True
) -> Any:
    x = layers.Conv2D(
        filters, size, strides=stride, padding="same", use_bias=False, name=f"{name}_conv"
    )(x)
    x = layers.BatchNormalization(name=f"{name}_norm")(x)
    return layers.ReLU(name=f"{name}_relu")(x) if relu else x


def _with_head(inputs: Any, features: Any, scenario: Scenario) -> keras.Model:
    if scenario.setting != "task":
        return keras.Model(inputs, layers.Dense(scenario.outputs, name="head")(features))
    task = keras.Input((), dtype="int32", name="task")
    heads = TaskHeads(len(scenario.tasks), scenario.outputs, name="heads")
    return keras.Model([inputs, task], heads(features, task))


NETWORKS: dict[str, Callable[[Scenario], keras.Model]] = {
    "mlp": mlp,
    "conv": conv_net,
    "resnet32": resnet32,
    "resnet18_like": resnet18_like,
}
"""Functions that build a network, by the names for `keras-dwd plan`."""
