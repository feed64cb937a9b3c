"""One table of what Keras users do with a model, each tried on a `DWDModel`.

`python tests/conformance.py` runs all of it and writes docs/conformance.md. In the test-suite
test_conformance.py runs the same table.

Each habit is tried twice with the default settings. Fresh: a `DWDModel` must train exactly as the
plain Keras model does, with the same logs and weights. After a boundary: the same habit goes on
with a second task, the logs have the same names, and all numbers are finite with a penalty.
"""

import dataclasses
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from keras_dwd import DWDModel, DWDOptimizer

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6)).astype("float32")
Y = RNG.integers(0, 3, 48).astype("int32")
SEQUENCES = RNG.integers(0, 7, (48, 5)).astype("int32")
STEPS = RNG.normal(size=(48, 5, 2)).astype("float32")
IMAGES = RNG.normal(size=(48, 6, 6, 2)).astype("float32")
TEXTS = np.array(["a b", "b c d", "c", "d a b"] * 12, object)


def network(*between: Any, outputs: int = 3) -> keras.Model:
    """A small network on `X`."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, "tanh", name="hidden"),
            *between,
            layers.Dense(outputs, name="head"),
        ]
    )


def fit(model: Any, x: Any = X, y: Any = Y, **settings: Any) -> dict[str, Any]:
    """Two short epochs; returns the logs."""
    defaults = {"epochs": 2, "batch_size": 16, "shuffle": False, "verbose": 0}
    if y is not None:
        defaults["y"] = y
    return model.fit(x, **(defaults | settings)).history


@dataclasses.dataclass
class Habit:
    """Something that users do with a Keras model.

    Attributes:
        build: Makes a new model.
        compile: Arguments of `compile`, or a function that gives them, as optimizers are used once.
        train: Trains a compiled model and returns logs by name.
        policy: Dtype policy under which the model is built.
        prepare: Done to the model before it is compiled.
        consolidate: How the task is ended.
        tolerance: Relative, of the comparison with plain Keras; by default logs and weights must be
            the same to the last bit.
    """

    build: Callable[[], keras.Model] = network
    compile: Callable[[], dict[str, Any]] = dict
    train: Callable[[Any], dict[str, Any]] = fit
    policy: str = "float32"
    prepare: Callable[[Any], Any] = lambda model: None
    consolidate: Callable[[Any], Any] = lambda model: model.consolidate()
    tolerance: float = 0.0


def compiled(habit: Habit, wrap: Callable[[keras.Model], Any]) -> Any:
    """A model for a habit, plain or wrapped, always from the same weights."""
    keras.utils.set_random_seed(3)
    keras.config.set_dtype_policy(habit.policy)
    try:
        model = wrap(habit.build())
    finally:
        keras.config.set_dtype_policy("float32")
    habit.prepare(model)
    settings = {"optimizer": keras.optimizers.Adam(0.01), "loss": LOSS, "metrics": ["accuracy"]}
    model.compile(**(settings | habit.compile()))
    keras.utils.set_random_seed(4)
    return model


def check_fresh(habit: Habit) -> tuple[Any, dict[str, Any]]:
    """Compare a fresh `DWDModel` with plain Keras; returns the model and the logs of Keras."""
    plain, model = compiled(habit, lambda network: network), None
    expected = habit.train(plain)
    model = compiled(habit, DWDModel.from_model)
    logs = habit.train(model)
    assert logs.keys() == expected.keys(), (logs.keys(), expected.keys())
    for name, values in expected.items():
        assert_close(logs[name], values, habit.tolerance)
    for a, b in zip(plain.get_weights(), model.get_weights(), strict=True):
        assert_close(b, a, habit.tolerance)
    return model, expected


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Fail if an array is not what plain Keras has."""
    if tolerance:
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    else:
        np.testing.assert_array_equal(found, expected)


def check_after(habit: Habit, model: Any, expected: dict[str, Any]) -> None:
    """End the task, and go on with a second one."""
    habit.consolidate(model)
    assert model.tasks_learned == 1
    logs = habit.train(model)
    assert logs.keys() == expected.keys(), (logs.keys(), expected.keys())
    assert all(np.isfinite(values).all() for values in logs.values()), logs
    assert all(np.isfinite(np.asarray(w, "float32")).all() for w in model.get_weights())
    assert 0 < float(model.penalty()) < np.inf


# Models.


def several() -> keras.Model:
    """Two named inputs and two named outputs."""
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    shared = layers.Dense(5, "tanh", name="shared")
    joined = layers.Add()([shared(a), shared(b)])
    heads = {n: layers.Dense(k, name=n)(joined) for n, k in (("kind", 3), ("size", 1))}
    return keras.Model({"a": a, "b": b}, heads)


def listed() -> keras.Model:
    a, b = keras.Input((6,)), keras.Input((6,))
    joined = layers.Concatenate()([a, b])
    return keras.Model([a, b], [layers.Dense(n, name=f"of_{n}")(joined) for n in (3, 1)])


def two_losses() -> dict[str, Any]:
    losses = {"kind": LOSS, "size": "mse"}
    return {"loss": losses, "loss_weights": {"kind": 1.0, "size": 0.5}, "metrics": {"kind": "acc"}}


SEVERAL_Y = {"kind": Y, "size": X[:, :1]}


class Activity(layers.Layer):
    """Adds a loss of its own."""

    def call(self, x: Any) -> Any:
        self.add_loss(0.01 * ops.mean(x**2))
        return x


class Subclassed(keras.Model):
    """A model with a metric of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = layers.Dense(5, "tanh"), layers.Dense(3)
        self.size = keras.metrics.Mean(name="size")

    def call(self, x: Any) -> Any:
        h = self.hidden(x)
        self.size.update_state(ops.mean(h**2))
        return self.head(h)


def subclassed() -> keras.Model:
    model = Subclassed()
    model(X[:1])
    return model


def recurrent(layer: Any, **settings: Any) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        return keras.Sequential([keras.Input((5, 2), **settings), layer(), layers.Dense(3)])

    return build


def masked() -> keras.Model:
    inputs = keras.Input((5,), dtype="int32")
    x = layers.LSTM(4)(layers.Embedding(7, 3, mask_zero=True)(inputs))
    return keras.Model(inputs, layers.Dense(3)(x))


def stateful() -> keras.Model:
    return keras.Sequential(
        [keras.Input(batch_shape=(16, 5, 2)), layers.LSTM(3, stateful=True), layers.Dense(3)]
    )


def per_step() -> keras.Model:
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 3, mask_zero=True)(inputs)
    return keras.Model(inputs, layers.Dense(3)(x))


def nested() -> keras.Model:
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(5, "tanh")], name="inner")
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Dense(3)(layers.Add()([inner(inputs), inner(inputs)])))


class Tied(layers.Layer):
    """Multiplies by the transposed kernel of another layer."""

    def __init__(self, source: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self.source = source

    def call(self, x: Any) -> Any:
        return ops.matmul(x, ops.transpose(self.source.embeddings))


def tied() -> keras.Model:
    inputs = keras.Input((5,), dtype="int32")
    embedding = layers.Embedding(7, 4)
    return keras.Model(inputs, Tied(embedding)(layers.Dense(4)(embedding(inputs))))


def images(*augmentation: Any) -> keras.Model:
    inputs = keras.Input((6, 6, 2))
    x = inputs
    for layer in augmentation:
        x = layer(x)
    x = layers.BatchNormalization()(layers.Conv2D(3, 3, activation="relu")(x))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def augmented() -> keras.Model:
    return images(layers.RandomFlip(seed=1), layers.RandomTranslation(0.1, 0.1, seed=2))


def texts() -> keras.Model:
    vectorization = layers.TextVectorization(max_tokens=8, output_sequence_length=4)
    vectorization.adapt(TEXTS)
    inputs = keras.Input((), dtype="string")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(8, 3)(vectorization(inputs)))
    return keras.Model(inputs, layers.Dense(3)(x))


# Ways to train.


class Batches(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        return X[16 * i : 16 * i + 16], Y[16 * i : 16 * i + 16]


def generator(model: Any) -> dict[str, Any]:
    def batches() -> Any:
        while True:
            for i in range(3):
                yield X[16 * i : 16 * i + 16], Y[16 * i : 16 * i + 16]

    return model.fit(batches(), steps_per_epoch=3, epochs=2, shuffle=False, verbose=0).history


def unknown_length(model: Any) -> dict[str, Any]:
    data = tf.data.Dataset.from_tensor_slices((X, Y)).filter(lambda x, y: y < 5).batch(16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Your input ran out of data")  # as with plain Keras
        return model.fit(data, epochs=2, shuffle=False, verbose=0).history


def on_batches(model: Any) -> dict[str, Any]:
    logs = [model.train_on_batch(X[i::3], Y[i::3], return_dict=True) for i in range(3)]
    logs.append(model.test_on_batch(X, Y, return_dict=True))
    return {name: [float(each[name]) for each in logs] for name in logs[0]}


def with_files(*callbacks: Callable[[Path], Any]) -> Callable[[Any], dict[str, Any]]:
    """Training with callbacks that write into a folder."""

    def train(model: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            made = [make(Path(folder)) for make in callbacks]
            logs = fit(model, validation_data=(X, Y), callbacks=made)
            assert list(Path(folder).rglob("*")) or not callbacks
            return logs

    return train


def early(model: Any) -> dict[str, Any]:
    stop = keras.callbacks.EarlyStopping("val_loss", patience=0, restore_best_weights=True)
    # The validation labels are wrong on purpose: it stops and restores.
    return fit(model, validation_data=(X, (Y + 1) % 3), epochs=4, callbacks=[stop])


def saved_whole(model: Any) -> dict[str, Any]:
    logs = fit(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        again = keras.models.load_model(f"{folder}/model.keras")
    assert type(again) is type(model)
    np.testing.assert_allclose(
        again.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-5, atol=1e-6
    )
    same_penalty(again, model)
    return logs


def same_penalty(again: Any, model: Any) -> None:
    if isinstance(model, DWDModel):
        assert again.tasks_learned == model.tasks_learned
        np.testing.assert_allclose(float(again.penalty()), float(model.penalty()), rtol=1e-5)


def saved_weights(model: Any) -> dict[str, Any]:
    logs = fit(model)
    again = keras.models.clone_model(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_weights(f"{folder}/model.weights.h5")
        again.load_weights(f"{folder}/model.weights.h5")
    for a, b in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    same_penalty(again, model)
    return logs


def exported(model: Any) -> dict[str, Any]:
    logs = fit(model)
    with tempfile.TemporaryDirectory() as folder:
        model.export(folder, verbose=False)
        loaded = tf.saved_model.load(folder)
        served = loaded.serve(X)
    np.testing.assert_allclose(served, model.predict(X, verbose=0), rtol=1e-4, atol=1e-5)
    return logs


def cloned(model: Any) -> dict[str, Any]:
    clone = keras.models.clone_model(model)
    assert [tuple(w.shape) for w in clone.weights] == [tuple(w.shape) for w in model.weights]
    clone.compile("adam", LOSS)
    fit(clone)
    return fit(model)


def summarised(model: Any) -> dict[str, Any]:
    lines: list[str] = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    assert "hidden" in "".join(lines)
    assert model.count_params() == 5 * 7 + 3 * 6
    return fit(model)


def built_first(model: Any) -> dict[str, Any]:
    """Training with an optimizer that is built; Keras itself loses part of some that are not."""
    model.optimizer.build(model.trainable_variables)
    return fit(model)


def frozen(model: Any) -> None:
    model.get_layer("hidden").trainable = False


def with_lora(model: Any) -> None:
    model.get_layer("hidden").enable_lora(2)


def quantised(model: Any) -> dict[str, Any]:
    logs = fit(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        copy = keras.models.load_model(f"{folder}/model.keras")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Layer InputLayer")  # as with any functional model
        copy.quantize("int8")
    assert np.isfinite(copy.predict(X, verbose=0)).all()
    return logs


def quantised_in_training(model: Any) -> dict[str, Any]:
    """Goes on with what a quantized model can still train: biases and other layers."""
    if model.get_layer("hidden").quantization_mode is None:
        fit(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Layer InputLayer")
            model.quantize("int8")
        model.compile(keras.optimizers.Adam(0.01), LOSS, metrics=["accuracy"])
    return fit(model)


def checkpointed(model: Any) -> dict[str, Any]:
    """The best epoch is saved, and the file gives what the model did then."""
    with tempfile.TemporaryDirectory() as folder:
        best = CALLBACKS.ModelCheckpoint(f"{folder}/best.keras", "loss", save_best_only=True)
        logs = fit(model, epochs=3, callbacks=[best])
        again = keras.models.load_model(f"{folder}/best.keras")
    if np.argmin(logs["loss"]) == 2:  # the last epoch was the best
        np.testing.assert_array_equal(again.predict(X, verbose=0), model.predict(X, verbose=0))
    assert np.isfinite(again.predict(X, verbose=0)).all()
    return logs


def masks(model: Any) -> dict[str, Any]:
    return fit(model, SEQUENCES, np.repeat(Y[:, None], 5, 1))


SCHEDULE = keras.optimizers.schedules.CosineDecay
CALLBACKS = keras.callbacks

HABITS: dict[str, Habit] = {
    "`fit` with arrays": Habit(),
    "`class_weight`": Habit(train=lambda m: fit(m, class_weight={0: 1.0, 1: 3.0, 2: 0.5})),
    "`sample_weight`": Habit(train=lambda m: fit(m, sample_weight=np.linspace(0, 2, 48))),
    "weighted metrics": Habit(
        compile=lambda: {"weighted_metrics": ["accuracy"]},
        train=lambda m: fit(m, sample_weight=np.linspace(0, 2, 48)),
    ),
    "`validation_split`": Habit(train=lambda m: fit(m, validation_split=0.25)),
    "`mixed_float16`": Habit(policy="mixed_float16"),
    "`mixed_bfloat16`": Habit(policy="mixed_bfloat16"),
    "gradient accumulation": Habit(
        compile=lambda: {"optimizer": keras.optimizers.Adam(gradient_accumulation_steps=2)}
    ),
    "`steps_per_execution`": Habit(compile=lambda: {"steps_per_execution": 3}),
    # XLA may compute the sums of another graph in another order.
    "`jit_compile`": Habit(compile=lambda: {"jit_compile": True}, tolerance=1e-3),
    "`run_eagerly`": Habit(compile=lambda: {"run_eagerly": True}),
    "dict inputs and outputs, `loss_weights`": Habit(
        several, two_losses, lambda m: fit(m, {"a": X, "b": X[::-1]}, SEVERAL_Y)
    ),
    "list inputs and outputs": Habit(
        listed,
        lambda: {"loss": [LOSS, "mse"], "metrics": None},
        lambda m: fit(m, [X, X[::-1]], [Y, X[:, :1]]),
    ),
    "`add_loss`, regularizers": Habit(
        lambda: network(Activity(), layers.Dense(4, kernel_regularizer="l2"))
    ),
    "dropout, BatchNormalization": Habit(
        lambda: network(layers.Dropout(0.3, seed=1), layers.BatchNormalization())
    ),
    "a subclassed model with a metric of its own": Habit(subclassed),
    "frozen layers": Habit(prepare=frozen),
    "LoRA": Habit(prepare=with_lora),
    '`quantize("int8")` of what was trained': Habit(train=quantised),
    'training after `quantize("int8")`': Habit(train=quantised_in_training),
    "averaged weights (`use_ema`)": Habit(
        compile=lambda: {"optimizer": keras.optimizers.Adam(use_ema=True)},
        train=lambda m: fit(m, validation_data=(X, Y), callbacks=[CALLBACKS.SwapEMAWeights()]),
    ),
    "`global_clipnorm`": Habit(
        compile=lambda: {"optimizer": keras.optimizers.Adam(global_clipnorm=0.1)}
    ),
    "learning rate schedules": Habit(
        compile=lambda: {"optimizer": keras.optimizers.Adam(SCHEDULE(0.01, 100))}
    ),
    "`ReduceLROnPlateau`": Habit(
        train=lambda m: fit(
            m, epochs=3, callbacks=[CALLBACKS.ReduceLROnPlateau("loss", min_delta=9, patience=1)]
        )
    ),
    "`clone_model`": Habit(train=cloned),
    "`.keras` files": Habit(train=saved_whole),
    "weights files": Habit(train=saved_weights),
    "`export` to a SavedModel": Habit(train=exported),
    "`TensorBoard`, `CSVLogger`": Habit(
        train=with_files(
            lambda folder: CALLBACKS.TensorBoard(folder / "logs"),
            lambda folder: CALLBACKS.CSVLogger(folder / "log.csv"),
        )
    ),
    "`BackupAndRestore`": Habit(
        train=with_files(
            lambda folder: CALLBACKS.BackupAndRestore(folder / "backup"),
            lambda folder: CALLBACKS.CSVLogger(folder / "log.csv"),
        )
    ),
    "`ModelCheckpoint`": Habit(train=checkpointed),
    "`EarlyStopping` with the best weights": Habit(train=early),
    "`PyDataset`": Habit(train=lambda m: m.fit(Batches(), epochs=2, verbose=0).history),
    "generators": Habit(train=generator),
    "`tf.data` of unknown length": Habit(train=unknown_length),
    "`train_on_batch`, `test_on_batch`": Habit(train=on_batches),
    "`summary`, `count_params`": Habit(train=summarised),
    "augmentation layers": Habit(augmented, train=lambda m: fit(m, IMAGES)),
    "`TextVectorization` in the model": Habit(texts, train=lambda m: fit(m, TEXTS)),
    "masked sequences": Habit(masked, train=lambda m: fit(m, SEQUENCES)),
    "a label for each step, masked": Habit(per_step, train=masks),
    "bidirectional recurrent layers": Habit(
        recurrent(lambda: layers.Bidirectional(layers.GRU(3))), train=lambda m: fit(m, STEPS)
    ),
    "stateful recurrent layers": Habit(stateful, train=lambda m: fit(m, STEPS)),
    "nested models, shared layers": Habit(nested),
    "tied weights": Habit(tied, train=lambda m: fit(m, SEQUENCES, SEQUENCES)),
}
HABITS |= {
    f"optimizer {name}": Habit(compile=lambda k=kind: {"optimizer": k()}, train=built_first)
    for name, kind in sorted(vars(keras.optimizers).items())
    if isinstance(kind, type)
    and issubclass(kind, keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer", "Adam")
}
HABITS |= {
    "optimizer LossScaleOptimizer": Habit(
        compile=lambda: {"optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())}
    ),
    "optimizer DWDOptimizer": Habit(compile=lambda: {"optimizer": DWDOptimizer("adam")}),
}
if hasattr(keras.optimizers, "MultiOptimizer"):  # not in the oldest versions of Keras
    HABITS["optimizer MultiOptimizer"] = Habit(
        compile=lambda: {
            "optimizer": keras.optimizers.MultiOptimizer(
                keras.optimizers.OptimizerMap(
                    keras.optimizers.SGD(0.01), {".*kernel": keras.optimizers.Adam()}
                )
            )
        }
    )


def main() -> int:
    """Run the table and write it as docs/conformance.md."""
    rows, wrong = [], 0
    for name, habit in HABITS.items():
        works = []
        try:
            model, expected = check_fresh(habit)
            works.append("yes")
            check_after(habit, model, expected)
            works.append("yes")
        except Exception as error:
            wrong += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            works += ["no"] if works else ["no", "not tried"]
        rows.append(f"| {name} | {' | '.join(works)} |")
        keras.utils.clear_session(free_memory=False)
    text = "\n".join(
        [
            "# What Keras users do, and whether it works",
            "",
            f"Made by `python tests/conformance.py` with Keras {keras.__version__} and TensorFlow "
            f"{tf.__version__}, with the default settings of `DWDModel`. Fresh: it trains as the "
            "plain Keras model does, with the same logs and weights to the last bit (under XLA to "
            "0.1 %). After a boundary: it goes "
            "on with a second task, with the same logs, finite numbers and a penalty.",
            "",
            "| habit | fresh | after a boundary |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )
    Path(__file__).parents[1].joinpath("docs", "conformance.md").write_text(text)
    print(f"{len(HABITS) - wrong} of {len(HABITS)} habits work")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
