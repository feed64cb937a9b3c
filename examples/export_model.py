"""Learns two tasks of scikit-learn's digits and exports to SavedModel, TF Lite and ONNX.

Usage: python examples/export_model.py [FOLDER]

The export to ONNX needs keras_dwd[export] and is skipped without it.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from keras_dwd import DWDModel
from keras_dwd.layers import TaskHeads


def trained():
    """A model that has learned to tell 0 from 1, then 2 from 3, and some of its inputs."""
    x, y = load_digits(n_class=4, return_X_y=True)
    x, task = x.astype("float32") / 16, (y // 2).astype("int32")
    pixels, number = keras.Input((64,), name="image"), keras.Input((), dtype="int32", name="task")
    hidden = keras.layers.Dense(32, activation="relu")(pixels)
    model = DWDModel([pixels, number], TaskHeads(tasks=2, units=2)(hidden, number))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for t in range(2):
        of_task = task == t
        model.compile("adam", loss)
        model.fit([x[of_task], task[of_task]], y[of_task] % 2, epochs=3, verbose=0)
        model.consolidate()
    return model, {"image": x[::50], "task": task[::50]}


def saved_model(folder, inputs):
    """The outputs of a SavedModel, loaded with TensorFlow alone."""
    serve = tf.saved_model.load(folder).signatures["serving_default"]
    return serve(**{name: tf.constant(array) for name, array in inputs.items()})["output_0"]


def tf_lite(folder, path, inputs):
    """The outputs of a SavedModel converted to TF Lite."""
    path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(folder)).convert())
    interpreter = tf.lite.Interpreter(model_path=str(path))
    return interpreter.get_signature_runner("serving_default")(**inputs)["output_0"]


def onnx(path, inputs):
    """The outputs of the ONNX model in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def main():
    keras.utils.set_random_seed(0)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    model, inputs = trained()
    expected = model.predict(inputs, verbose=0)

    model.export(folder / "saved", verbose=False)
    outputs_by_format = {
        "SavedModel": saved_model(folder / "saved", inputs),
        "TF Lite": tf_lite(folder / "saved", folder / "model.tflite", inputs),
    }
    if all(importlib.util.find_spec(name) for name in ("tf2onnx", "onnxruntime")):
        model.export(folder / "model.onnx", format="onnx", verbose=False)
        outputs_by_format["ONNX"] = onnx(folder / "model.onnx", inputs)
    else:
        print("ONNX: left out, as keras_dwd[export] is not installed")
    for name, outputs in outputs_by_format.items():
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5)
        largest = np.abs(outputs - expected).max()
        print(f"{name}: predictions agree, the largest difference is {largest:.1e}")


if __name__ == "__main__":
    main()
