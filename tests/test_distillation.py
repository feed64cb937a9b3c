import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, dtype_policy, mlp, moved, state_of
from keras import layers

from keras_dwd import DiagonalFisher, Distillation, DWDModel, KroneckerFisher
from keras_dwd.layers import TaskHeads

T = 2.0


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def kl(teacher, student):
    """T² KL(softmax(t / T) ‖ softmax(s / T)) along the last axis."""
    p, q = softmax(teacher / T), softmax(student / T)
    return T**2 * (p * np.log(p / q)).sum(-1)


def linear(units=3, activation=None, features=6, name="head"):
    """One dense layer, whose gradients are known in closed form."""
    return keras.Sequential(
        [keras.Input((features,)), layers.Dense(units, activation=activation, name=name)]
    )


def distilling(model, loss, weight=1.0, optimizer=None, compile_settings=None, **settings):
    """A compiled model of distillation alone, with plain gradient steps."""
    made = DWDModel.from_model(
        model, **{"strength": 0.0, "distillation": Distillation(weight, T)} | settings
    )
    made.compile(
        optimizer or keras.optimizers.SGD(1.0), loss, metrics=[], **(compile_settings or {})
    )
    return made


def boundary(model, x, y, steps=2, **kwargs):
    """One task, after which the weights are moved, so that teacher and student differ."""
    for _ in range(steps):
        model.train_on_batch(x, y, **kwargs)
    model.consolidate(x, y)
    teacher = {v.path: np.array(v, "float64") for v in model.weights}
    moved(model, 0.3)
    return teacher


def step_without(model, batch):
    """The change of the weights in one step with and without distillation: what it adds."""
    before = model.get_weights()
    model.train_on_batch(*batch)
    after = model.get_weights()
    plain = keras.Model(model.inputs, model.outputs)
    plain.compile(keras.optimizers.SGD(1.0), model.loss)
    plain.set_weights(before)
    plain.train_on_batch(*batch)
    without = plain.get_weights()
    model.set_weights(before)
    return [np.array(b, "float64") - a for a, b in zip(after, without, strict=True)]


SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def test_the_gradient_is_that_of_the_divergence_of_softmax():
    x, y = blobs()
    model = distilling(linear(), SPARSE, weight=0.7)
    teacher = boundary(model, x, y)
    kernel, bias = (np.array(v, "float64") for v in model.trainable_variables)
    t = x @ list(teacher.values())[0] + list(teacher.values())[1]
    s = x @ kernel + bias
    added = step_without(model, (x, y))
    by_logits = 0.7 * T * (softmax(s / T) - softmax(t / T)) / len(x)
    np.testing.assert_allclose(added[0], x.T @ by_logits, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(added[1], by_logits.sum(0), rtol=1e-3, atol=1e-5)
