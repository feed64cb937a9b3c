"""Exported and stripped models give the outputs of the `DWDModel` without keras_dwd."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, dtype_policy, mlp, sweep, weights
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_dwd import (
    Communicator,
    DiagonalFisher,
    DWDModel,
    DWDOptimizer,
    DWDRegularizer,
    strip_dwd,
)
from keras_dwd.layers import TaskHeads

ROOT = Path(__file__).parent.parent
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CHEAP = {"fisher": DiagonalFisher("batch"), "grouping": None}


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(8, activation="tanh")
        self.dropout = layers.Dropout(0.5)
        self.head = layers.Dense(3)

    def call(self, x, training=False):
        return self.head(self.dropout(self.hidden(x), training=training))


def learned(model, x, y):
    """The model after one task and a part of the next one."""
    model.compile("adam", LOSS)
    model.fit(x, y, epochs=2, verbose=0)
    model.consolidate()
    model.fit(x, y, verbose=0)
    return model


def sequential():
    model = keras.Sequential(
        [
            keras.Input((6,), name="x"),
            layers.Dense(8, "relu", kernel_regularizer=DWDRegularizer(0.0)),
            layers.BatchNormalization(momentum=0.5),
            layers.Dropout(0.5),
            layers.Dense(3),
        ]
    )
    return learned(DWDModel.from_model(model, **CHEAP), *blobs()), {"x": blobs(5)[0]}


def subclassed():
    base = Subclassed()
    base(blobs()[0])
    return DWDModel.from_model(base, keras.Input((6,), name="x")), {"x": blobs(5)[0]}


def several():
    a, b = keras.Input((4,), name="a"), keras.Input((2, 2), name="b")
    x = layers.Concatenate()([a, layers.Flatten()(b)])
    outputs = {"kind": layers.Dense(3)(x), "size": layers.Dense(1)(x)}
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(5, 4)), "b": rng.normal(size=(5, 2, 2))}
    return DWDModel([b, a], outputs), {name: array.astype("float32") for name, array in x.items()}


def task_heads():
    x, task = keras.Input((6,), name="x"), keras.Input((), dtype="int32", name="task")
    model = DWDModel([x, task], TaskHeads(3, 3)(layers.Dense(8, "relu")(x), task), **CHEAP)
    inputs, labels = blobs()
    ids = np.arange(64, dtype="int32") % 3
    return learned(model, [inputs, ids], labels), {"x": inputs[:5], "task": ids[:5]}


def preprocessing():
    """Preprocessing layers: two lookup tables, a normalization, and a rescaled image."""
    inputs = {
        "word": keras.Input((1,), dtype="string", name="word"),
        "count": keras.Input((1,), dtype="int32", name="count"),
        "image": keras.Input((4, 4, 1), dtype="uint8", name="image"),
    }
    scale = layers.Normalization()
    scale.adapt(np.random.default_rng(0).normal(3, 2, size=(20, 4, 4, 1)))
    image = scale(layers.Rescaling(1 / 255)(inputs["image"]))
    parts = [
        layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")(inputs["word"]),
        layers.IntegerLookup(vocabulary=[4, 5], output_mode="one_hot")(inputs["count"]),
        layers.GlobalAveragePooling2D()(layers.Conv2D(3, 2)(image)),
    ]
    x = {
        "word": np.array([["a"], ["z"]]),
        "count": np.array([[5], [6]], "int32"),
        "image": np.arange(32, dtype="uint8").reshape(2, 4, 4, 1),
    }
    return DWDModel(inputs, layers.Dense(2)(layers.Concatenate()(parts))), x


def half():
    with dtype_policy("mixed_float16"):
        base = mlp()
    return DWDModel.from_model(base), {base.inputs[0].name: blobs(5)[0]}


def large():
    """A network of 11 million parameters, whose consolidation state is even larger."""
    base = keras.Sequential(
        [keras.Input((1000,), name="x"), layers.Dense(3000, "relu"), layers.Dense(2650)]
    )
    x = np.random.default_rng(0).normal(size=(8, 1000)).astype("float32")
    model = DWDModel.from_model(base, **CHEAP)
    return learned(model, x, np.arange(8)), {"x": x}


KINDS = [sequential, subclassed, several, task_heads, preprocessing, half, large]


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def called(model, inputs):
    """Outputs of a model in inference mode, for inputs by their names in the signature."""
    given = [tf.constant(inputs[tensor.name]) for tensor in model.inputs]
    outputs = model(keras.tree.pack_sequence_as(model.input, given), training=False)
    return outputs if isinstance(outputs, dict) else {"output_0": outputs}


def card():
    """The JSON values in the model card of the repository."""
    text = (ROOT / "saved_models" / "split_digits" / "README.md").read_text()
    (found,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    return json.loads(found)


def digits_of_card():
    """Test images, task ids and labels, made as the model card describes."""
    x, y = load_digits(return_X_y=True)
    split = card()["split"]
    _, images, _, labels = train_test_split(x.reshape(-1, 8, 8), y, stratify=y, **split)
    return {"image": images.astype("float32"), "task": (labels // 2).astype("int32")}, labels % 2


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """By kind: the model, its folder, and its outputs here and in a process without keras_dwd."""
    folder = tmp_path_factory.mktemp("served")
    found = {}
    for kind in KINDS:
        keras.utils.set_random_seed(0)
        model, inputs = kind()
        model.export(folder / kind.__name__ / "saved", verbose=False)
        found[kind.__name__] = (model, inputs)
    plain = strip_dwd(found["sequential"][0])
    (folder / "stripped").mkdir()
    plain.save(folder / "stripped" / "model.keras")
    found["stripped"] = plain, found["sequential"][1]
    for name, (_, inputs) in found.items():
        np.savez(folder / name / "inputs.npz", **inputs)
    (folder / "card").mkdir()
    (folder / "card" / "saved").symlink_to(ROOT / "saved_models" / "split_digits" / "1")
    np.savez(folder / "card" / "inputs.npz", **digits_of_card()[0])
    folders = [folder / name for name in [*found, "card"]]
    subprocess.run([sys.executable, ROOT / "tests" / "serving.py", *folders], check=True)
    outputs = {each.name: dict(np.load(each / "outputs.npz")) for each in folders}
    return folder, found, outputs


@pytest.mark.parametrize("kind", [*(kind.__name__ for kind in KINDS), "stripped"])
def test_predictions_are_the_same_without_keras_dwd(served, kind):
    _, found, outputs = served
    expected = called(*found[kind])
    assert expected.keys() == outputs[kind].keys()
    for name, value in expected.items():
        assert value.dtype == outputs[kind][name].dtype
        np.testing.assert_allclose(value, outputs[kind][name], rtol=1e-5, atol=1e-6)


def test_a_large_model_takes_the_bytes_of_its_weights(served):
    folder, found, _ = served
    model, _ = found["large"]
    assert model.count_params() > 10_900_000
    assert model.regularizer.precisions
    assert size(folder / "large" / "saved") <= 1.05 * 4 * model.count_params()


def test_the_model_of_the_repository_is_as_accurate_as_its_card_says(served):
    _, _, outputs = served
    inputs, labels = digits_of_card()
    correct = np.argmax(outputs["card"]["output_0"], axis=1) == labels
    accuracies = [np.mean(correct[inputs["task"] == task]) for task in range(5)]
    np.testing.assert_allclose(accuracies, card()["accuracy_of_tasks"], atol=0.02)
    assert np.mean(accuracies) == pytest.approx(card()["accuracy"], abs=0.005)
    assert card()["accuracy"] > 0.9
    assert size(ROOT / "saved_models") < 300_000


def test_signatures_have_the_names_of_inputs_and_outputs(served):
    folder, _, _ = served
    for kind, inputs, outputs in (
        ("task_heads", {"x": (None, 6), "task": (None,)}, {"output_0": (None, 3)}),
        ("several", {"a": (None, 4), "b": (None, 2, 2)}, {"kind": (None, 3), "size": (None, 1)}),
    ):
        loaded = tf.saved_model.load(folder / kind / "saved")
        assert set(loaded.signatures) == {"serve", "serving_default"}
        signature = loaded.signatures["serving_default"]
        found = signature.structured_input_signature[1], signature.structured_outputs
        assert [{n: tuple(t.shape) for n, t in each.items()} for each in found] == [inputs, outputs]


def test_batches_of_any_size_or_of_one_that_is_given(tmp_path):
    model, x = DWDModel.from_model(mlp()), blobs(7)[0]
    model.export(tmp_path / "any", verbose=False)
    served = tf.saved_model.load(tmp_path / "any")
    for count in (1, 7):
        np.testing.assert_allclose(served.serve(x[:count]), model(x[:count]), atol=1e-6)
    fixed = [keras.InputSpec(shape=(2, 6), dtype="float32", name="points")]
    model.export(tmp_path / "two", verbose=False, input_signature=fixed)
    signature = tf.saved_model.load(tmp_path / "two").signatures["serving_default"]
    assert signature.structured_input_signature[1]["points"].shape == (2, 6)


def test_an_earlier_export_is_replaced(tmp_path, capsys):
    model = DWDModel.from_model(mlp())
    before = model(blobs()[0])
    model.export(tmp_path / "deep" / "saved")
    assert str(tmp_path / "deep" / "saved") in capsys.readouterr().out
    model.get_layer("head").kernel.assign_add(tf.ones((8, 3)))
    model.export(str(tmp_path / "deep" / "saved"), verbose=False)
    assert not capsys.readouterr().out
    served = tf.saved_model.load(tmp_path / "deep" / "saved")
    after = served.serve(blobs()[0])
    assert np.any(after != before)
    np.testing.assert_allclose(after, model(blobs()[0]), atol=1e-6)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["saved"]


@pytest.mark.parametrize("at", ["writing", "moving"])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, at):
    model = DWDModel.from_model(mlp())
    model.export(tmp_path / "saved", verbose=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    save, rename = tf.saved_model.save, Path.rename

    def full(trackable, folder, *args, **kwargs):
        save(trackable, folder, *args, **kwargs)
        raise OSError("No space left on device")

    def refused(self, target):
        if self.parent != tmp_path and not self.name.endswith(".replaced"):
            raise OSError("Permission denied")
        return rename(self, target)

    if at == "writing":
        monkeypatch.setattr(tf.saved_model, "save", full)
    else:
        monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="No space" if at == "writing" else "Permission"):
        model.export(tmp_path / "saved", verbose=False)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"filepath": "notes.txt"}, "`filepath` must be a new or empty folder.*a file"),
        ({"filepath": "mine"}, r"`filepath` must be .*\['notes.txt'\] in it"),
        ({"filepath": "mine", "format": "onnx"}, "`filepath` must be a file for format='onnx'"),
        ({"format": "tflite"}, "Unrecognized format"),
        ({"opset_version": 18}, r"no other arguments .*\['opset_version'\]"),
        ({"input_signature": [keras.InputSpec(shape=(None, 5), dtype="float32")]}, r"\(None, 6\)"),
        ({"input_signature": [np.zeros((2, 6))] * 2}, "`input_signature` must have one"),
        ({"input_signature": "x"}, "Received: x"),
    ],
)
def test_export_refuses(tmp_path, arguments, error):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    before = set(tmp_path.rglob("*"))
    filepath = tmp_path / arguments.get("filepath", "saved")
    with pytest.raises(ValueError, match=error):
        DWDModel.from_model(mlp()).export(**(arguments | {"filepath": filepath}))
    assert set(tmp_path.rglob("*")) == before


def test_only_rank_zero_exports(tmp_path):
    class Second(Communicator):
        rank, size = 1, 2

    model = DWDModel.from_model(mlp())
    model.compile("sgd", LOSS, communicator=Second())
    model.export(tmp_path / "saved", verbose=False)
    assert not list(tmp_path.iterdir())


def test_a_file_system_of_tensorflow(tmp_path):
    DWDModel.from_model(mlp()).export(f"ram://{tmp_path}/saved", verbose=False)
    assert "saved_model.pb" in tf.io.gfile.listdir(f"ram://{tmp_path}/saved/")


@pytest.mark.long
def test_the_example_converts_to_tf_lite_and_onnx(tmp_path):
    command = [sys.executable, ROOT / "examples" / "export_model.py", tmp_path]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "SavedModel: predictions agree" in printed
    assert "TF Lite: predictions agree" in printed
    with_onnx = importlib.util.find_spec("tf2onnx") and importlib.util.find_spec("onnxruntime")
    assert ("ONNX: predictions agree" if with_onnx else "ONNX: left out") in printed
    assert (tmp_path / "model.tflite").stat().st_size < 100_000


def test_formats_of_keras_are_written_as_a_whole(tmp_path, monkeypatch):
    model = DWDModel.from_model(mlp())
    try:
        model.export(tmp_path / "model.tflite", format="litert", verbose=False)
    except ValueError as error:
        if "Unrecognized format" not in str(error):
            raise
        pytest.skip(f"Keras {keras.__version__} does not know the format")
    before = (tmp_path / "model.tflite").read_bytes()
    assert before

    def interrupted(self, filepath, *args):
        Path(filepath).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.export(tmp_path / "model.tflite", format="litert", verbose=False)
    assert (tmp_path / "model.tflite").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.tflite"]


# Tests of `strip_dwd`.


def test_a_stripped_model_shares_layers_and_weights():
    model = compiled(**CHEAP)
    plain = strip_dwd(model)
    assert not isinstance(plain, DWDModel)
    assert plain.layers == model.layers
    assert [id(v) for v in plain.weights] == [id(v) for v in model.weights]
    model.fit(*blobs(), verbose=0)
    np.testing.assert_array_equal(plain(blobs()[0]), model(blobs()[0]))
    again = DWDModel.from_model(plain)
    assert [id(v) for v in again.weights] == [id(v) for v in model.weights]


def test_layers_with_a_regularizer_of_their_own_are_copied_without_it(tmp_path):
    inner = keras.Sequential(
        [keras.Input((8,)), layers.Dense(4, bias_regularizer=DWDRegularizer(1.0))]
    )
    own = {"kernel_regularizer": DWDRegularizer(0.0), "bias_regularizer": "l2"}
    base = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8), inner, layers.Dense(3, name="head", **own)]
    )
    model = compiled(base, **CHEAP)
    model.fit(*blobs(), verbose=0)
    plain = strip_dwd(model)
    for a, b in zip(weights(plain), weights(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert plain.layers[1] is model.layers[1]
    assert plain.get_layer("head").kernel_regularizer is None
    assert isinstance(plain.get_layer("head").bias_regularizer, keras.regularizers.L2)
    assert isinstance(model.get_layer("head").kernel_regularizer, DWDRegularizer)
    assert not any(isinstance(v.regularizer, DWDRegularizer) for v in plain.trainable_variables)
    model.fit(*blobs(), verbose=0)


def test_a_stripped_model_is_compiled_without_the_decoupled_step():
    model = compiled(optimizer=DWDOptimizer(keras.optimizers.Adam(0.02)), **CHEAP)
    model.fit(*blobs(), verbose=0)
    plain = strip_dwd(model)
    assert type(plain.optimizer) is keras.optimizers.Adam
    assert float(plain.optimizer.learning_rate) == pytest.approx(0.02)
    assert int(plain.optimizer.iterations) == 0
    assert plain.evaluate(*blobs(), verbose=0) == model.evaluate(*blobs(), verbose=0)
    plain.fit(*blobs(), verbose=0)
    assert not strip_dwd(model, compile=False).compiled
    assert not strip_dwd(DWDModel.from_model(mlp())).compiled


def test_what_cannot_be_stripped():
    class Doubled(DWDModel):
        def call(self, inputs):
            return 2 * super().call(inputs)

    with pytest.raises(ValueError, match=r"`model` must be a DWDModel\. Received: Sequential"):
        strip_dwd(mlp())
    with pytest.raises(ValueError, match=r"a `call` of its own, .*Doubled"):
        strip_dwd(Doubled.from_model(mlp()))


# Tests of pretrained models.


def of_keras_applications():
    """The first blocks of MobileNetV2 with a new head; its weights are random."""
    whole = keras.applications.MobileNetV2((32, 32, 3), 0.35, include_top=False, weights=None)
    x = layers.GlobalAveragePooling2D()(whole.get_layer("block_1_project_BN").output)
    return keras.Model(whole.input, layers.Dense(3)(x))


@pytest.mark.parametrize("make", sweep([mlp, of_keras_applications], mlp))
def test_a_model_from_a_file_is_the_first_task(tmp_path, make):
    base = make()
    x = np.random.default_rng(0).normal(size=(16, *base.input_shape[1:])).astype("float32")
    y = np.arange(16) % 3
    base.compile("adam", LOSS, run_eagerly=True)
    base.fit(x, y, batch_size=16, verbose=0)
    base.save(tmp_path / "base.keras")
    model = DWDModel.from_model(
        keras.models.load_model(tmp_path / "base.keras"),
        fisher=DiagonalFisher("empirical"),
        grouping=None,
    )
    model.compile("sgd", LOSS)
    model.consolidate((x, y))
    assert model.tasks_learned == 1
    assert len(model.regularizer.precisions) == len(model.trainable_variables)
    for a, b in zip(weights(model), weights(base), strict=True):
        np.testing.assert_array_equal(a, b)
    model.trainable_variables[0].assign_add(tf.ones(model.trainable_variables[0].shape))
    assert float(model.penalty()) > 0


@keras.saving.register_keras_serializable("tests")
class InAList(keras.Model):
    """TensorFlow does not see layers in a list: their lookup tables must be found otherwise."""

    def __init__(self):
        super().__init__()
        text = layers.TextVectorization(vocabulary=["one", "two"], output_sequence_length=3)
        self.steps = [text, layers.Embedding(4, 2), layers.Flatten(), layers.Dense(1)]

    def call(self, x):
        for step in self.steps:
            x = step(x)
        return x


def test_tables_of_layers_in_a_list_are_exported(tmp_path):
    words = tf.constant(["one two", "two three"])
    plain = InAList()
    expected = plain(words)
    model = DWDModel.from_model(plain, keras.Input((), dtype="string"))
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(loaded.serve(words), expected, rtol=1e-6)


@pytest.mark.skipif(not importlib.util.find_spec("tf2onnx"), reason="tf2onnx is not installed")
def test_a_model_that_was_never_called_is_exported_to_onnx(tmp_path):
    DWDModel.from_model(mlp()).export(tmp_path / "model.onnx", "onnx", verbose=False)
    assert (tmp_path / "model.onnx").stat().st_size > 0
