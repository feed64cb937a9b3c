"""The pull never throws weights further away than training without it does."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import DEFAULTS, blobs, compiled, sweep
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keras import layers

from keras_dwd import DiagonalFisher, DWDModel, DWDOptimizer

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class OwnSGD(keras.optimizers.Optimizer):
    """An optimizer that the package does not know, with a scale of its own."""

    def update_step(self, gradient, variable, learning_rate):
        variable.assign_sub(3.0 * keras.ops.cast(learning_rate, variable.dtype) * gradient)


class OwnApply(keras.optimizers.SGD):
    """An optimizer that updates all variables in a method of its own."""

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(trainable_variables)
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            variable.assign_sub(self.learning_rate * gradient)
        self.iterations.assign_add(1)


def several(default, kernels):
    """An optimizer for kernels and another one for the rest."""
    optimizers = keras.optimizers
    if not hasattr(optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has none")
    return optimizers.MultiOptimizer(optimizers.OptimizerMap(default, {".*kernel": kernels}))


OPTIMIZERS = {
    name: kind
    for name, kind in vars(keras.optimizers).items()
    if isinstance(kind, type)
    and issubclass(kind, keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer", "TFOptimizer")
} | {
    "nesterov": lambda: keras.optimizers.SGD(momentum=0.9, nesterov=True),
    "clipped": lambda: keras.optimizers.SGD(momentum=0.9, global_clipnorm=1.0),
    "accumulating": lambda: keras.optimizers.SGD(momentum=0.9, gradient_accumulation_steps=2),
    "averaged": lambda: keras.optimizers.SGD(use_ema=True, ema_overwrite_frequency=5),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
    "unknown": lambda: OwnSGD(learning_rate=0.01),
    "own_apply": OwnApply,
    "several": lambda: several(keras.optimizers.SGD(momentum=0.9), keras.optimizers.Adam()),
    "several_decoupled": lambda: several(
        keras.optimizers.RMSprop(), DWDOptimizer(keras.optimizers.Adam())
    ),
    "decoupled": lambda: DWDOptimizer(keras.optimizers.Lion()),
}


class Learner:
    """A model after its first task, whose optimizer, learning rate and strength can be changed."""

    def __init__(self):
        keras.utils.set_random_seed(1)
        network = [layers.Dense(12, "tanh", name="hidden"), layers.Dense(3, name="head")]
        base = keras.Sequential([keras.Input((6,)), *network])
        self.model = compiled(base, "adam", strength=1.0, **DEFAULTS)
        self.model.fit(*blobs(), epochs=10, verbose=0)
        self.model.consolidate()
        x, y = blobs()
        self.batches = [(x[i::4] + 0.5, 2 - y[i::4]) for i in range(4)] * 3
        self.anchors = [np.array(v) for v in self.model.trainable_variables]
        scaled = ("precision", "output_values", "output_rest")  # Λ is linear in each of them
        self.precision = [
            (array, np.array(array))
            for block in self.model.regularizer.precisions.values()
            for key, array in block.arrays().items()
            if key in scaled
        ]
        assert len(self.precision) >= 2
        self.penalty = tf.function(self.model.penalty, autograph=False)

    def compile(self, optimizer):
        self.model.compile(optimizer, LOSS, jit_compile=False)
        optimizer.build(self.model.trainable_variables)
        self.start = [(v, np.array(v)) for v in optimizer.variables]

    def distances(self, learning_rate, strength):
        """How far the second task has moved the weights after each step, without and with Λ."""
        variables = self.model.trainable_variables
        for variable, value in (*zip(variables, self.anchors, strict=True), *self.start):
            variable.assign(value)
        for each in getattr(self.model.optimizer, "optimizers", [self.model.optimizer]):
            each.learning_rate = learning_rate
        plain, weighted = [], []
        for x, y in self.batches:
            self._scale(strength)
            self.model.train_on_batch(x, y)
            pairs = zip(variables, self.anchors, strict=True)
            plain.append(sum(np.sum((np.asarray(v, "float64") - c) ** 2) for v, c in pairs))
            self._scale(1.0)
            weighted.append(2 * float(self.penalty()))
        return np.sqrt(plain), np.sqrt(weighted)

    def _scale(self, strength):
        for array, value in self.precision:
            array.assign(strength * value)


@pytest.fixture(scope="module")
def learner():
    return Learner()


CORE = ("Adam", "nesterov", "several")


@pytest.mark.parametrize("name", sweep(OPTIMIZERS, *CORE))
def test_nothing_moves_further_from_the_anchor_than_without_the_pull(name, learner):
    """At any learning rate and strength, with the default settings and nothing else set."""
    learner.compile(OPTIMIZERS[name]())

    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(st.floats(-4, 0), st.floats(0, 6))
    @example(0.0, 6.0)
    @example(-4.0, 6.0)
    @example(-2.0, 3.0)
    def check(log_rate, log_strength):
        free = learner.distances(10.0**log_rate, 0.0)
        held = learner.distances(10.0**log_rate, 10.0**log_strength)
        # A pull in some directions may lead the loss to others that are not held: a fifth more.
        for distance, without, more in zip(held, free, (1.2, 1.02), strict=True):
            assert np.isfinite(distance).all()
            assert distance[-1] > 0
            np.testing.assert_array_less(distance, more * np.maximum.accumulate(without) + 1e-6)

    check()


def test_a_variable_without_a_gradient_stays_where_an_unknown_optimizer_leaves_it():
    """Nothing pulls where nothing can be measured: a head whose examples have no weight."""
    inputs = keras.Input((6,))
    heads = [layers.Dense(n, name=f"of_{n}") for n in (3, 2)]
    model = DWDModel.from_model(
        keras.Model(inputs, [head(inputs) for head in heads]),
        strength=100.0,
        fisher=DiagonalFisher("batch"),
        grouping=None,
    )
    model.compile(OwnSGD(learning_rate=0.01), [LOSS, LOSS])
    x, y = blobs()
    model.fit(x, [y, y % 2], verbose=0)
    model.consolidate()
    heads[1].kernel.assign_add(tf.ones((6, 2)))
    before = np.array(heads[1].kernel)
    model.fit(x, [y, y % 2], sample_weight=[np.ones(64), np.zeros(64)], verbose=0)
    np.testing.assert_array_equal(heads[1].kernel, before)


class Scaled(keras.optimizers.Adam):
    """A subclass of an optimizer with limited steps whose own steps are not."""

    def update_step(self, gradient, variable, learning_rate):
        variable.assign_sub(keras.ops.cast(learning_rate, variable.dtype) * gradient)


def test_a_subclass_with_steps_of_its_own_is_not_taken_for_its_parent(learner):
    learner.compile(Scaled())
    plain, weighted = learner.distances(0.1, 1e6)
    assert np.isfinite(plain).all()
    assert weighted[-1] < learner.distances(0.1, 0.0)[1][-1]


def test_all_of_the_step_may_be_momentum(learner):
    learner.compile(keras.optimizers.SGD(momentum=1.0))
    assert all(np.isfinite(d).all() for d in learner.distances(0.01, 100.0))
