"""Learns two tasks with several workers.

    horovodrun -np 2 python examples/several_workers.py

All workers run the same script on the same data. Each trains on its share of every batch and stores
its shard of the consolidation state.
"""

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_dwd import DWDModel
from keras_dwd.callbacks import LearningRateWarmup


def main() -> None:
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    tasks = []
    for low in (0, 5):
        chosen = (labels >= low) & (labels < low + 5)
        tasks.append(train_test_split(images[chosen], labels[chosen] - low, random_state=0))

    network = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(100, "relu"), keras.layers.Dense(5)]
    )
    model = DWDModel.from_model(network)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], sharded=True)
    for x, _, y, _ in tasks:
        # 16 examples per worker and step.
        model.fit(x, y, batch_size=16, epochs=10, verbose=0, callbacks=[LearningRateWarmup(2)])
        model.consolidate()
    accuracies = [
        model.evaluate(u, v, verbose=0, return_dict=True)["accuracy"] for _, u, _, v in tasks
    ]
    if model.workers.leads:
        print("accuracy on each task:", [f"{accuracy:.3f}" for accuracy in accuracies])


if __name__ == "__main__":
    main()
