"""Train and export the model in `saved_models`, and write its model card.

Usage: python scripts/make_saved_model.py

The model learns to tell apart five pairs of digits, one pair after another, with a head for each.
All figures in the model card are measured on the exported model.
"""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_dwd import DWDModel, __version__
from keras_dwd.files import replaced
from keras_dwd.layers import TaskHeads

FOLDER = Path(__file__).parent.parent / "saved_models" / "split_digits"
EPOCHS = 10
TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
SPLIT = {"test_size": 0.25, "random_state": 0}

CARD = """\
---
license: apache-2.0
library_name: tensorflow
pipeline_tag: image-classification
tags: [continual-learning, keras, keras_dwd]
---

# Split digits

A small network that learned to tell apart five pairs of handwritten digits, one pair after another,
without seeing earlier ones again: an example of what `DWDModel.export` writes. Made by
`make saved-model`; every figure here is from the exported model.

| task | digits | test images | accuracy % |
| --- | --- | ---: | ---: |
{rows}

## How it was made

- Data: the 1,797 images of 8 × 8 pixels of scikit-learn's `load_digits`, which are of UCI's Optical
  Recognition of Handwritten Digits; {test_size:.0%} of them, held back, are the test images
  (`train_test_split`, stratified, `random_state={random_state}`).
- Protocol: task-incremental. {epochs} epochs a task with Adam(0.001), reset for each task, in
  batches of 32; `DWDModel` with its defaults, `consolidate()` after each task; one run, seed 0.
- Network: two hidden layers of 64 units and `TaskHeads`, {parameters:,} parameters, {size:,} bytes.

It is an example of a file format. Five easy tasks with a head each say little about what a method
retains; the README of the repository has comparisons.

## How to use it

It needs TensorFlow alone. `image` is `(batch, 8, 8)`, float32, from 0 to 16 as scikit-learn has it;
`task` is `(batch,)`, int32, from 0 to 4; `output_0` is `(batch, 2)`: the logits of the two digits.

```python
import tensorflow as tf
from sklearn.datasets import load_digits

serve = tf.saved_model.load("saved_models/split_digits/1").signatures["serving_default"]
images, digits = load_digits(return_X_y=True)
images = tf.constant(images.reshape(-1, 8, 8), "float32")
logits = serve(image=images, task=tf.constant(digits // 2, "int32"))["output_0"]
print(tf.argmax(logits, axis=1)[:10], digits[:10] % 2)
```

TensorFlow Serving takes the folder above it, in which `1` is the version:

```sh
tensorflow_model_server --rest_api_port=8501 --model_name=split_digits \\
  --model_base_path=$PWD/saved_models/split_digits
```

## For machines

```json
{facts}
```
"""


def network() -> keras.Model:
    """A network from pixel values and task ids to the logits of the two digits of the task."""
    image = keras.Input((8, 8), name="image")
    task = keras.Input((), dtype="int32", name="task")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 16)(image))
    for _ in range(2):
        x = keras.layers.Dense(64, activation="relu")(x)
    return keras.Model([image, task], TaskHeads(len(TASKS), 2)(x, task))


def parts(x: np.ndarray, y: np.ndarray) -> list[Any]:
    """Inputs and labels of each task."""
    tasks = []
    for t, digits in enumerate(TASKS):
        of_task = np.isin(y, digits)
        images = x[of_task].reshape(-1, 8, 8).astype("float32")
        tasks.append(((images, np.full(len(images), t, "int32")), y[of_task] - digits[0]))
    return tasks


def main() -> None:
    """Train on the tasks, export the model, measure its accuracy and write the model card."""
    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, stratify=y, **SPLIT)
    model = DWDModel.from_model(network())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for inputs, labels in parts(x_train, y_train):
        model.compile(keras.optimizers.Adam(1e-3), loss)
        model.fit(inputs, labels, epochs=EPOCHS, batch_size=32, verbose=0)
        model.consolidate()
    saved = FOLDER / "1"
    model.export(saved, verbose=False)

    serve = tf.saved_model.load(saved).signatures["serving_default"]
    accuracies, rows = [], []
    for t, ((images, ids), labels) in enumerate(parts(x_test, y_test)):
        logits = serve(image=tf.constant(images), task=tf.constant(ids))["output_0"]
        accuracies.append(float(np.mean(np.argmax(logits, axis=1) == labels)))
        digits = " and ".join(map(str, TASKS[t]))
        rows.append(f"| {t} | {digits} | {len(labels)} | {100 * accuracies[-1]:.1f} |")
    mean = float(np.mean(accuracies))
    rows.append(f"| mean | | | {100 * mean:.1f} |")
    facts = {
        "accuracy": mean,
        "accuracy_of_tasks": accuracies,
        "split": SPLIT,
        "epochs": EPOCHS,
        "seed": 0,
        "versions": {
            "keras_dwd": __version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
        },
    }
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    with replaced(FOLDER / "README.md") as card:
        card.write_text(
            CARD.format(
                rows="\n".join(rows),
                epochs=EPOCHS,
                parameters=model.count_params(),
                size=size,
                facts=json.dumps(facts, indent=1),
                **SPLIT,
            )
        )
    print(f"{FOLDER.name}: accuracy {100 * mean:.1f} %, {size:,} bytes")


if __name__ == "__main__":
    main()
