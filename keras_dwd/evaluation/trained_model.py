"""What a trained model knows already, as the first task of a scenario."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_dwd.evaluation.datasets import Dataset
from keras_dwd.evaluation.profiles import Profile
from keras_dwd.evaluation.scenario import Scenario, permuted
from keras_dwd.keras_private import layer_of
from keras_dwd.model import DWDModel


def after_model(
    path: Path, data: Dataset, scenario: Scenario, profile: Profile
) -> tuple[Scenario, Profile, str]:
    """A scenario whose first task a trained model knows.

    Args:
        path: The `.keras` file of a classifier with one input and one output, of logits or of a
            softmax. Code within it is not run.
        data: What it was trained on. Class k is output k.
        scenario: The tasks that follow, in the setting `"domain"`.
        profile: The protocol that these are trained by.

    Returns:
        The scenario, the protocol that trains the model, and what was found, in words.

    Raises:
        ValueError: If this is no such file, or does not fit the data.
    """
    model = _load(path)
    shape, units = model.inputs[0].shape[1:], model.outputs[0].shape[-1]
    _check_shape(path, shape, data.x_train.shape[1:], data.name)
    _check_shape(path, shape, scenario.input_shape, scenario.name)
    (known,) = permuted(data, 1).tasks
    tasks = [replace(known, name=f"known ({data.name})", known=True), *scenario.tasks]
    together = Scenario.from_tasks(tasks, f"{scenario.name} after {path.name}", units)
    x, y = known.test
    accuracy = float(np.mean(np.argmax(model.predict(x, verbose=0), -1) == y))
    settings: dict[str, Callable[[], Any]] = dict(profile.compile_settings)
    if _activation(model) is keras.activations.softmax:
        settings["loss"] = keras.losses.SparseCategoricalCrossentropy
    return (
        together,
        replace(
            profile,
            network=path.name,
            build=partial(_built, path),
            compile_settings=settings,
        ),
        f"as loaded {100 * accuracy:.1f} % accurate on the test data of {data.name}",
    )


def _built(path: Path, scenario: Scenario) -> keras.Model:
    return _load(path)


def _load(path: Path) -> keras.Model:
    if path.suffix != ".keras" or not path.is_file():
        raise ValueError(f"`--model` must be a file that ends in .keras. Received: {str(path)!r}")
    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # of any kind: Keras reads whatever is in the file
        raise ValueError(f"`--model`: {str(path)!r} cannot be loaded: {error}") from error
    if isinstance(model, DWDModel):
        raise ValueError(
            f"`--model`: {str(path)!r} is a DWDModel. Save the plain model: "
            "`keras_dwd.strip_dwd(model).save(path)`."
        )
    if _activation(model) not in (keras.activations.linear, keras.activations.softmax):
        raise ValueError(
            f"`--model`: {str(path)!r} must be a functional or sequential classifier with one "
            "input and one output, whose last layer gives logits (no activation) or a softmax."
        )
    return model


def _activation(model: keras.Model) -> Any:
    """The activation of the last layer of a model with one input and one output, else `None`."""
    inputs: list[Any] = getattr(model, "inputs", None) or []
    outputs: list[Any] = getattr(model, "outputs", None) or []
    single = len(inputs) == len(outputs) == 1 and len(outputs[0].shape) == 2
    return getattr(layer_of(outputs[0]), "activation", None) if single else None


def _check_shape(path: Path, expected: Any, received: Any, name: str) -> None:
    fits = len(expected) == len(received) and all(
        e in (None, g) for e, g in zip(expected, received, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`--model`: {str(path)!r} takes examples of shape {tuple(expected)}. {name!r} has "
            f"examples of shape {tuple(received)}."
        )
