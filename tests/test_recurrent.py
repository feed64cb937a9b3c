"""The closed forms of recurrent layers agree with single examples, differentiated in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import dtype_policy, pass_statistics, sweep
from keras import layers

from keras_dwd import DiagonalFisher, DWDModel, KroneckerFisher
from keras_dwd.curvature import rules
from keras_dwd.curvature.fisher import Fisher
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


CORE = ("masked_bidirectional", "gru_reset_before", "from_states", "masked_zeros")


@pytest.mark.parametrize(
    ("cases", "kronecker"),
    sweep([(CORE, True), (tuple(CASES), False), (tuple(CASES), True)], CORE),
)
def test_closed_forms_are_those_of_single_examples(cases, kronecker, monkeypatch):
    """Kronecker factors of both kernels and squared gradients of two biases; or a diagonal."""
    monkeypatch.setattr(Fisher, "_one_by_one", None)  # fails on the slow path
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
