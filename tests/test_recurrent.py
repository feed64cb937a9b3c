"""The closed forms of recurrent layers agree with single examples, differentiated in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blocks_of, dtype_policy, long, pass_statistics, sweep
from keras import layers

from keras_dwd import DiagonalFisher, DWDModel, KroneckerFisher
from keras_dwd.curvature import rules
from keras_dwd.curvature.layer_recorder import LayerRecorder
from keras_dwd.variables import by_path, trainable_by_path

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TIME, FEATURES, UNITS = 4, 2, 3


def both(layer, **settings):
    return lambda x: layers.Bidirectional(layer(UNITS, **settings))(x)


def from_states(x):
    """The final states of one layer are where another one starts, as in sequence to sequence."""
    _, *states = layers.LSTM(UNITS, return_state=True, name="encoder")(x)
    return layers.LSTM(UNITS, return_sequences=True, name="decoder")(x, initial_state=states)


def twice(x):
    layer = layers.GRU(UNITS)
    return layers.Concatenate()([layer(x), layer(2 * x)])


CASES = {
    "simple": lambda x: layers.SimpleRNN(UNITS)(x),
    "lstm": lambda x: layers.LSTM(UNITS)(x),
    "gru": lambda x: layers.GRU(UNITS)(x),
    "gru_reset_before": lambda x: layers.GRU(UNITS, reset_after=False)(x),
    "gru_without_bias": lambda x: layers.GRU(UNITS, use_bias=False)(x),
    "lstm_without_bias": lambda x: layers.LSTM(UNITS, use_bias=False)(x),
    "lstm_other_activations": lambda x: layers.LSTM(
        UNITS, activation="softsign", recurrent_activation="hard_sigmoid"
    )(x),
    "simple_backwards": lambda x: layers.SimpleRNN(UNITS, go_backwards=True)(x),
    "gru_sequences_backwards": lambda x: layers.GRU(
        UNITS, return_sequences=True, go_backwards=True
    )(x),
    "lstm_sequences": lambda x: layers.LSTM(UNITS, return_sequences=True)(x),
    "gru_unrolled": lambda x: layers.GRU(UNITS, unroll=True)(x),
    "bidirectional_lstm": both(layers.LSTM),
    "bidirectional_gru": both(layers.GRU, return_sequences=True),
    "cell_lstm": lambda x: layers.RNN(layers.LSTMCell(UNITS))(x),
    "cell_gru": lambda x: layers.RNN(layers.GRUCell(UNITS), return_sequences=True)(x),
    "dropout": lambda x: layers.GRU(UNITS, dropout=0.5, recurrent_dropout=0.5)(x),
    "masked_lstm": lambda x: layers.LSTM(UNITS)(layers.Masking()(x)),
    "masked_gru_sequences": lambda x: keras.ops.tanh(
        layers.GRU(UNITS, return_sequences=True)(layers.Masking()(x))
    ),
    "masked_zeros": lambda x: keras.ops.tanh(
        layers.SimpleRNN(UNITS, return_sequences=True, zero_output_for_mask=True)(
            layers.Masking()(x)
        )
    ),
    "masked_bidirectional": lambda x: both(layers.GRU)(layers.Masking()(x)),
    "from_states": from_states,
    "twice": twice,
}


def network(cases):
    """The cases side by side: tracing a graph is what takes time."""
    inputs = keras.Input((TIME, FEATURES))
    found = [layers.Flatten()(CASES[case](inputs)) for case in cases]
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Concatenate()(found)))


def data(count=5):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, TIME, FEATURES)).astype("float32")
    x[0, 2:] = x[1, :2] = x[2, 1:3] = 0.0  # what `Masking` masks
    return x, rng.integers(0, 3, count)


def made(base, fisher):
    model = DWDModel.from_model(base, strength=1.0, fisher=fisher, grouping=None)
    model.compile("sgd", LOSS)
    rng = np.random.default_rng(3)
    for variable in model.trainable_variables:  # zero biases would hide mistakes
        variable.assign(rng.normal(size=variable.shape) * 0.4)
    return model


def single_gradients(model, cases, x, y):
    """∂ℓ_b/∂θ by path, one example at a time, in float64."""
    with dtype_policy("float64"):
        copy = network(cases)
    copy.set_weights([w.astype("float64") for w in model.get_weights()])
    values = [v.value for v in copy.trainable_variables]

    @tf.function(autograph=False)
    def gradients_of(x, y):
        with tf.GradientTape() as tape:
            loss = -tf.nn.log_softmax(copy(x, training=False))[0, y]
        return [tf.convert_to_tensor(g) for g in tape.gradient(loss, values)]

    found = [gradients_of(x[i : i + 1].astype("float64"), y[i]) for i in range(len(y))]
    paths = {id(v): path for path, v in by_path(model).items()}
    ours = [paths[id(v)] for v in model.trainable_variables]
    return {p: np.stack(g) for p, g in zip(ours, zip(*found, strict=True), strict=True)}


def close(measured, expected, where):
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(measured, expected, rtol=1e-3, atol=atol, err_msg=where)


CORE = ("masked_bidirectional", "gru_reset_before")


@pytest.mark.parametrize(
    ("cases", "kronecker"),
    [(CORE, True), long(CORE, False), long(tuple(CASES), True)],
)
def test_closed_forms_are_those_of_single_examples(cases, kronecker, monkeypatch):
    """Kronecker factors of both kernels and squared gradients of two biases; or a diagonal."""
    monkeypatch.setattr("keras_dwd.curvature.fisher.one_by_one", None)  # fails on the slow path
    x, y = data()
    fisher = (KroneckerFisher if kronecker else DiagonalFisher)("empirical", gamma=None)
    model = made(network(cases), fisher)
    exact = single_gradients(model, cases, x, y)
    assert set(exact) == set(trainable_by_path(model))
    found = pass_statistics(model, (x, y), len(y))
    matrices = [r for r in rules.ruled_layers(model) if r.form is not None and kronecker]
    in_matrices = {path for ruled in matrices for path in ruled.matrix_paths}
    assert not kronecker or {p for p in exact if p.endswith("kernel")} <= in_matrices
    for path in set(exact) - in_matrices:
        close(found[f"fisher/{path}"], (exact[path] ** 2).mean(0), path)
    for ruled in matrices:
        parts = zip(*(exact[path] for path in ruled.matrix_paths), strict=True)
        d = np.stack([ruled.form.join(*part) for part in parts])
        for side, equation in (("input", "bio,bjo->ij"), ("output", "bio,bij->oj")):
            expected = np.einsum(equation, d, d) / len(d)
            close(found[f"{side}/{ruled.kernel}"], expected, f"{side}/{ruled.kernel}")


@pytest.mark.parametrize("damping", sweep([0.3, 0.7], 0.3))
def test_the_inputs_of_layers_over_time_are_damped(damping):
    inputs = keras.Input((TIME, FEATURES))
    h = layers.EinsumDense("abc,cd->abd", (None, 3), name="einsum")(inputs)
    h = layers.LSTM(3, name="lstm")(layers.Dense(3, name="over_time")(h))
    outputs = layers.Dense(2, name="head")(h)
    model = made(keras.Model(inputs, outputs), KroneckerFisher(damping=damping))
    rng = np.random.default_rng(0)
    halves = {name: rng.normal(size=shape) for name, shape in shapes_of(model).items() if shape}
    statistics = {name: half @ half.T if half.ndim == 2 else half for name, half in halves.items()}
    statistics |= {name: np.ones(()) for name in shapes_of(model) if name not in statistics}
    blocks = blocks_of(model, statistics)
    kernels = [name.partition("/")[2] for name in statistics if name.startswith("input/")]
    assert len(kernels) == 5
    for kernel in kernels:
        share = 0 if kernel.startswith("head") else min(2 * damping, 1)
        given = np.linalg.eigvalsh(statistics[f"input/{kernel}"] / 1.1)[::-1]
        expected = (1 - share) * given + share * given.mean()
        np.testing.assert_allclose(blocks[kernel].a.values, expected, rtol=1e-5, atol=1e-9)


def shapes_of(model):
    return model.fisher.shapes(model, model._consolidation.pulled_variables(model))


def test_cells_of_ones_own_have_no_closed_form():
    class OwnLayer(layers.GRU):
        def inner_loop(self, *args, **kwargs):
            return super().inner_loop(*args, **kwargs)

    class OwnCell(layers.GRUCell):
        def call(self, *args, **kwargs):
            return super().call(*args, **kwargs)

    class Named(layers.GRU):
        pass

    stacked = layers.RNN([layers.GRUCell(2), layers.GRUCell(2)])
    for layer in (OwnLayer(3), layers.RNN(OwnCell(3)), stacked):
        layer.build((None, TIME, FEATURES))
        assert rules.nested_rule_for(layer) is None
    named = Named(3)
    named.build((None, TIME, FEATURES))
    assert rules.nested_rule_for(named) is not None


def test_both_directions_are_called_on_a_gpu_too():
    """There `Bidirectional` computes both layers itself, if these allow cuDNN."""
    layer = layers.LSTM(2)
    with LayerRecorder([layer]):
        assert layer.use_cudnn is False
    assert layer.use_cudnn == "auto"


def test_a_stateful_layer_starts_from_its_states(monkeypatch):
    """The states before a batch are constants; without them no gradient could be right."""
    monkeypatch.setattr("keras_dwd.curvature.fisher.one_by_one", None)  # fails on the slow path
    inputs = keras.Input(batch_shape=(3, TIME, FEATURES))
    layer = layers.GRU(UNITS, stateful=True, name="gru")
    base = keras.Model(inputs, layers.Dense(3, name="head")(layer(inputs)))
    model = made(base, DiagonalFisher("empirical", gamma=None))
    x, y = (a[:3] for a in data())
    state = np.random.default_rng(1).normal(size=(3, UNITS)).astype("float32")
    layer.states[0].assign(state)
    found = pass_statistics(model, (x, y), 3)
    expected = np.zeros(layer.cell.kernel.shape)
    plain = layers.GRU(UNITS)
    plain.build(x.shape)
    plain.set_weights(layer.get_weights())
    head = base.get_layer("head")
    for i in range(3):
        with tf.GradientTape() as tape:
            h = plain(x[i : i + 1], initial_state=[tf.constant(state[i : i + 1])])
            loss = -tf.nn.log_softmax(head(h))[0, y[i]]
        gradient = tape.gradient(loss, plain.cell.kernel.value)
        expected += np.asarray(gradient, "float64") ** 2 / 3
    close(found[next(n for n in found if n.endswith("gru_cell/kernel"))], expected, "kernel")
