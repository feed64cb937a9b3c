"""Write a model of this version to tests/data, for later versions to read.

Run it once for each release: `python scripts/make_reference_model.py`.
"""

import json
from pathlib import Path

import keras
import numpy as np

from keras_dwd import (
    DWDModel,
    DWDOptimizer,
    DWDRegularizer,
    KroneckerFisher,
    __version__,
)
from keras_dwd.experimental import GroupingPolicy
from keras_dwd.groupings import LayerGrouping, SingleGroup

FOLDER = Path(__file__).parent.parent / "tests" / "data"


def main() -> None:
    """Save a model in the middle of its third task, with most kinds of consolidation state."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    network = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="relu", name="hidden"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    model = DWDModel.from_model(
        network,
        regularizer=DWDRegularizer(50.0, decay=0.9),
        fisher=KroneckerFisher(correction=2),
        grouping=GroupingPolicy([SingleGroup(), LayerGrouping()]),
    )
    model.compile(
        DWDOptimizer(keras.optimizers.Adam(0.01)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x, y = rng.normal(size=(32, 6)).round(3).astype("float32"), rng.integers(0, 3, 32)
    for task in range(3):
        model.fit(np.roll(x, task, 1), y, epochs=3, batch_size=8, verbose=0)
        if task < 2:
            model.grouping.reward([0.5] * (model.tasks_learned + 1))
            model.consolidate()
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"model_{__version__}.keras"
    model.save(file)
    expected = {
        "x": x.tolist(),
        "y": y.tolist(),
        "predictions": model.predict(x, verbose=0).tolist(),
        "penalty": float(model.penalty()),
        "tasks_learned": model.tasks_learned,
        "groups": model.groups,
    }
    file.with_suffix(".json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
