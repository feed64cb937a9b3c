"""`DWDModel` behaves like a Keras model in all ways in which users train one."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import (
    DEFAULTS,
    blobs,
    compiled,
    dtype_policy,
    gentle,
    load,
    long,
    mlp,
    moved,
    saved,
    state_of,
    stepped,
    sweep,
    weights,
)
from keras import layers

from keras_dwd import DiagonalFisher, DWDModel, DWDRegularizer, KroneckerFisher
from keras_dwd.callbacks import PenaltyLogger
from keras_dwd.layers import TaskHeads

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def rich_net():
    """A network with BatchNormalization, dropout, weight decay and activity regularisation."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu", kernel_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(3, activity_regularizer="l2"),
        ]
    )


def train(model, compile_settings=None, fit_settings=None, optimizer="adam"):
    model.compile(
        optimizer=keras.optimizers.get(optimizer)
        if isinstance(optimizer, str)
        else keras.optimizers.get(keras.optimizers.serialize(optimizer)),
        **({"loss": LOSS, "metrics": ["accuracy"]} | (compile_settings or {})),
    )
    keras.utils.set_random_seed(7)
    arguments = {"x": blobs()[0], "y": blobs()[1], "epochs": 2, "batch_size": 8, "verbose": 0}
    return model.fit(**(arguments | (fit_settings or {}))).history


WAYS = {
    "plain": {},
    "class_weight": {"fit_settings": {"class_weight": {0: 1.0, 1: 3.0, 2: 0.5}}},
    "sample_weight": {"fit_settings": {"sample_weight": np.linspace(0, 2, 64)}},
    "steps_per_execution": {"compile_settings": {"steps_per_execution": 3}},
    "jit_compile": {"compile_settings": {"jit_compile": True}},
    "run_eagerly": {"compile_settings": {"run_eagerly": True}, "fit_settings": {"batch_size": 32}},
    "accumulation": {"optimizer": keras.optimizers.Adam(gradient_accumulation_steps=3)},
    "clipping": {"optimizer": keras.optimizers.SGD(0.1, global_clipnorm=0.5)},
    "sgd": {"optimizer": keras.optimizers.SGD(0.02)},
    "ema": {"optimizer": keras.optimizers.SGD(0.02, use_ema=True)},
    "weight_decay": {"optimizer": keras.optimizers.AdamW(weight_decay=0.1)},
    "loss_scale": {"optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.02))},
    "validation": {"fit_settings": {"validation_split": 0.25}},
}


@pytest.fixture
def graphs_as_written():
    """Without TensorFlow's rewriting of sums, which depends on what else a gradient is used for."""
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    yield
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": True})


# Kronecker factors are estimated apart from the step, whose gradients the others have.
KRONECKER_WAYS = ("plain", "sample_weight", "run_eagerly", "accumulation", "loss_scale")


@pytest.mark.usefixtures("graphs_as_written")
@pytest.mark.parametrize(
    ("way", "fisher"),
    [
        *sweep([(way, DiagonalFisher) for way in WAYS], "sample_weight", "sgd"),
        *sweep([(way, KroneckerFisher) for way in KRONECKER_WAYS], "plain"),
    ],
)
def test_it_is_bit_identical_to_keras_until_a_boundary_and_then_holds_what_matters(way, fisher):
    """With the penalty the second task moves the weights less, in the metric of the penalty."""
    # Plain SGD with the penalty is stable up to learning rate × strength × F = 2.
    strength = 1.0 if way in ("sgd", "ema", "loss_scale") else 10.0
    keras.utils.set_random_seed(1)
    plain = rich_net()
    expected = train(plain, **WAYS[way])
    keras.utils.set_random_seed(1)
    model = DWDModel.from_model(rich_net(), strength=strength, fisher=fisher())
    history = train(model, **WAYS[way])
    assert history == expected
    for a, b in zip(weights(plain), weights(model), strict=True):
        np.testing.assert_array_equal(a, b)

    model.consolidate()
    x, y = blobs(seed=9)
    given = {"epochs": 8, "batch_size": 8, "verbose": 0} | WAYS[way].get("fit_settings", {})
    for each in (plain, model):
        keras.utils.set_random_seed(7)
        each.fit(x, y, **given)
    held = float(model.penalty())
    model.set_weights(plain.get_weights())
    assert 0 < held < 0.9 * float(model.penalty())


@pytest.mark.parametrize("policy", sweep(["float32", "mixed_float16"], "mixed_float16"))
def test_so_it_is_with_a_frozen_layer_and_in_mixed_precision(policy):
    trained = []
    for wrap in (lambda model: model, lambda model: DWDModel.from_model(model, strength=5.0)):
        keras.utils.set_random_seed(1)
        with dtype_policy(policy):
            base = mlp()
        base.get_layer("hidden").trainable = False
        model = wrap(base)
        history = train(model)
        trained.append((history, weights(model)))
    assert trained[0][0] == trained[1][0]
    for a, b in zip(trained[0][1], trained[1][1], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long
def test_kronecker_factors_under_jit_compile_leave_training_alone():
    trained = []
    # A small network, as XLA takes seconds to compile each layer.
    for make in (mlp, lambda: DWDModel.from_model(mlp(), strength=5.0)):
        keras.utils.set_random_seed(1)
        model = make()
        train(model, **WAYS["jit_compile"])
        trained.append(weights(model))
    for a, b in zip(*trained, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    model.consolidate()
    train(model, **WAYS["jit_compile"])
    assert float(model.penalty()) > 0


def test_no_variable_of_a_step_is_of_a_type_that_xla_cannot_reach_on_a_gpu():
    """TensorFlow keeps int32 in host memory, but on a GPU Keras compiles every step with XLA."""
    inputs, task = keras.Input((6,)), keras.Input((), dtype="int32")
    outputs = TaskHeads(2, 3)(layers.Dense(4, "relu")(inputs), task)
    model = compiled(keras.Model([inputs, task], outputs), **DEFAULTS)
    x, y = blobs()
    tasks = np.zeros(64, "int32")
    model.fit([x, tasks], y, verbose=0)
    model.consolidate()
    step = tf.function(model.train_step, autograph=False).get_concrete_function(((x, tasks), y))
    used = {variable.name: variable.dtype for variable in step.graph.variables}
    assert any("fisher_looked" in name for name in used)
    assert tf.int32 not in used.values(), used


@pytest.mark.parametrize(
    "fisher",
    [
        KroneckerFisher("influence", correction=2),
        *(
            long(fisher)
            for fisher in (
                *(KroneckerFisher(e, correction=2) for e in ("empirical", "mc", "negated")),
                DiagonalFisher("influence"),
            )
        ),
    ],
    ids=lambda fisher: f"{type(fisher).__name__}-{fisher.estimator}",
)
def test_xla_compiles_a_step_once(fisher):
    """XLA would recompile the step whenever a value that it treats as a constant changes."""
    inputs, task = keras.Input((8, 8, 2)), keras.Input((), dtype="int32")
    x = layers.MaxPooling2D()(layers.Conv2D(4, 3, activation="relu")(inputs))
    x = layers.LayerNormalization()(layers.Flatten()(x))
    model = keras.Model([inputs, task], TaskHeads(2, 3)(x, task))
    model = compiled(model, strength=5.0, fisher=fisher, grouping=None)
    x, y = np.random.default_rng(0).normal(size=(16, 8, 8, 2)).astype("float32"), np.arange(16) % 3
    model.fit([x, np.zeros(16, "int32")], y, verbose=0)
    model.consolidate()
    given = ((tf.constant(x), tf.ones(16, "int32")), tf.constant(y))
    step = tf.function(model.train_step, jit_compile=True, autograph=False)
    program = step.experimental_get_compiler_ir(given)(stage="hlo")
    parameters = re.findall(r" parameter\(\d+\)", program[program.index("ENTRY") :])
    assert len(parameters) == len(step.get_concrete_function(given).inputs)


def test_the_step_is_the_gradient_of_loss_plus_penalty():
    x, y = blobs()
    model = compiled(optimizer=gentle(), strength=4.0)
    model.fit(x, y, verbose=0)
    model.consolidate((x, y))
    model.compile(gentle(), LOSS)
    for variable in model.trainable_variables:
        variable.assign_add(tf.random.normal(variable.shape))
    with tf.GradientTape() as tape:
        total = LOSS(y, model(x)) + model.penalty()
    variables = [v.value for v in model.trainable_variables]
    gradients = tape.gradient(total, variables)
    expected = stepped(gentle(), [np.array(v) for v in variables], gradients)
    model.fit(x, y, batch_size=len(x), verbose=0)
    for variable, value in zip(model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(variable, value, rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_mixed_precision_pulls_as_float32_does():
    x, y = blobs(32)

    def trained(policy, wrap):
        keras.utils.set_random_seed(1)
        with dtype_policy(policy):
            model = wrap(mlp())
        model.compile(keras.optimizers.SGD(0.02), LOSS)
        model.fit(x, y, shuffle=False, verbose=0)
        if isinstance(model, DWDModel):
            model.consolidate((x, y))
        model.fit(*blobs(32, seed=4), epochs=40, shuffle=False, verbose=0)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (
            policy == "mixed_float16"
        )
        return np.concatenate([w.ravel() for w in weights(model)])

    def wrap(model):
        return DWDModel.from_model(model, strength=5.0, grouping=None)

    full, half = (trained(policy, wrap) for policy in ("float32", "mixed_float16"))
    without = trained("mixed_float16", lambda model: model)
    assert np.linalg.norm(half - full) < 0.05 * np.linalg.norm(half - without)


def test_several_inputs_and_outputs():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    shared = layers.Dense(6, activation="tanh", name="shared")
    x = layers.Add()([shared(a), shared(b)])
    outputs = {
        "kind": layers.Dense(3, name="kind")(x),
        "size": layers.Dense(1, name="size")(x),
    }
    model = DWDModel([a, b], outputs, strength=1.0, fisher=DiagonalFisher("empirical"))
    model.compile(
        "adam",
        {"kind": LOSS, "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.1},
        metrics={"kind": "accuracy"},
    )
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(20, 4)).astype("float32") for _ in "ab"]
    y = {"kind": rng.integers(0, 3, 20), "size": rng.normal(size=(20, 1)).astype("float32")}
    history = model.fit(x, y, epochs=2, verbose=0).history
    assert {"loss", "kind_loss", "size_loss", "kind_accuracy"} <= set(history)
    model.consolidate((x, y))
    model.fit(x, y, verbose=0)
    assert float(model.penalty()) > 0
    assert set(model.predict(x, verbose=0)) == {"kind", "size"}


@pytest.mark.long
def test_the_reported_losses_of_several_outputs_are_those_of_keras():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 4)).astype("float32")
    y = {"a": rng.integers(0, 3, 20), "b": rng.integers(0, 3, 20)}
    histories = []
    for wrap in (
        lambda m: m,
        lambda m: DWDModel.from_model(m, fisher=KroneckerFisher()),
        lambda m: DWDModel.from_model(m, fisher=DiagonalFisher("empirical", every=1)),
    ):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        hidden = layers.Dense(6, activation="tanh")(inputs)
        model = wrap(keras.Model(inputs, {n: layers.Dense(3, name=n)(hidden) for n in y}))
        model.compile("adam", {"a": LOSS, "b": LOSS}, metrics={"a": "accuracy"})
        histories.append(model.fit(x, y, epochs=2, batch_size=8, verbose=0).history)
    assert histories[0] == histories[1] == histories[2]
    assert "b_loss" in histories[1]


def slots_of(model, layer):
    """The precision and anchors of a layer, by name."""
    state = model.regularizer.state().items()
    return {name: array.copy() for name, array in state if f"/{layer}/" in name}


@pytest.mark.parametrize(
    "fisher", [DiagonalFisher(), long(KroneckerFisher())], ids=["diag", "kron"]
)
def test_frozen_layers_are_neither_trained_nor_folded(fisher):
    x, y = blobs()
    model = compiled(strength=1.0, fisher=fisher)
    model.consolidate((x, y))
    model.get_layer("hidden").trainable = False
    model.compile("adam", LOSS)
    held = slots_of(model, "hidden")
    assert held
    before = np.array(model.get_layer("hidden").kernel)
    model.fit(x, y, epochs=2, verbose=0)
    model.consolidate((x, y))
    np.testing.assert_array_equal(before, model.get_layer("hidden").kernel)
    assert held.keys() == slots_of(model, "hidden").keys()
    for name, array in slots_of(model, "hidden").items():
        np.testing.assert_array_equal(array, held[name])
    model.get_layer("hidden").trainable = True
    model.compile("adam", LOSS)
    model.fit(x, y, verbose=0)
    model.consolidate()
    anchor = "anchor/hidden/kernel"
    assert np.any(held[anchor] != slots_of(model, "hidden")[anchor])


def test_a_model_without_trainable_layers_can_be_run():
    model = compiled(strength=1.0)
    before = weights(model)
    model.trainable = False
    model.compile("sgd", LOSS)
    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        model.fit(*blobs(), verbose=0)
    for a, b in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_recompiling_keeps_what_was_learned():
    x, y = blobs()
    model = compiled(strength=1.0)
    model.fit(x, y, verbose=0)
    model.consolidate()
    held = slots_of(model, "head")
    model.compile("adam", LOSS)
    model.fit(*blobs(seed=5), verbose=0)
    for name, array in slots_of(model, "head").items():
        np.testing.assert_array_equal(array, held[name])
    assert float(model.penalty()) > 0


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(8, activation="tanh")
        self.head = layers.Dense(3)

    def call(self, x):
        return self.head(self.hidden(x))


def functional():
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(8)(inputs)))


@pytest.mark.parametrize("kind", [mlp, functional, Subclassed])
def test_any_kind_of_model_shares_its_weights(kind):
    base = kind()
    x, y = blobs()
    base(x)
    model = compiled(base, strength=1.0)
    model.fit(x, y, verbose=0)
    model.consolidate()
    np.testing.assert_allclose(base(x), model(x), rtol=1e-5)
    assert {id(v) for v in base.trainable_variables} == {id(v) for v in model.trainable_variables}
    assert len(model.regularizer.anchors) == 4


def test_a_model_someone_else_trained_is_the_first_task():
    base = mlp()
    base.compile("adam", LOSS)
    base.fit(*blobs(), verbose=0)
    model = compiled(base, strength=1.0)
    model.consolidate(blobs())
    assert model.tasks_learned == 1


def test_a_keras_file_keeps_everything(tmp_path):
    x, y = blobs()
    model = compiled(optimizer="adam", regularizer=DWDRegularizer(3.0, decay=0.9), **DEFAULTS)
    model.fit(x, y, verbose=0)
    model.consolidate((x, y))
    model.fit(*blobs(seed=3), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(again, DWDModel)
    assert again.regularizer.get_config() == model.regularizer.get_config()
    assert again.tasks_learned == 1
    assert float(again.penalty()) == float(model.penalty()) > 0
    states = [state_of(m) for m in (model, again)]
    assert states[0].keys() == states[1].keys()
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name])
    for m in (model, again):
        keras.utils.set_random_seed(2)
        m.fit(*blobs(seed=4), verbose=0)
        m.consolidate()
    for a, b in zip(weights(model), weights(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_is_no_weight_of_the_model(tmp_path):
    x, y = blobs()
    model = compiled(strength=1.0)
    count = len(model.get_weights())
    model.fit(x, y, verbose=0)
    model.consolidate()
    assert len(model.get_weights()) == count == 4
    model.export(tmp_path / "saved", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(served.serve(x), model(x), rtol=1e-5, atol=1e-6)


def test_state_that_fits_no_variable_is_refused(tmp_path):
    model = compiled(strength=1.0)
    model.fit(*blobs(), verbose=0)
    store = {}
    store = saved(model)
    before = state_of(model)
    for bad in (
        {**store, "precision|9|elsewhere": np.zeros(3)},
        {**store, "anchor|0|hidden|kernel": np.zeros(3)},
        {**store, "unknown|0|hidden|kernel": np.zeros((6, 8))},
        {key: array for key, array in store.items() if key != "tasks_learned"},
    ):
        with pytest.raises(ValueError, match="left as it was"):
            load(model, bad)
    for name, array in state_of(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_models_made_from_one_set_of_settings_share_no_state():
    settings = {"regularizer": DWDRegularizer(10.0), "fisher": DiagonalFisher()}
    first, second = (compiled(**settings) for _ in "ab")
    first.fit(*blobs(), verbose=0)
    first.consolidate()
    assert first.regularizer.precisions
    assert not second.regularizer.precisions
    assert not second.fisher.slots


def test_a_callback_may_consolidate_within_fit():
    class Boundary(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.consolidate()

    model = compiled(strength=1.0)
    model.fit(*blobs(), epochs=3, verbose=0, callbacks=[Boundary()])
    assert model.tasks_learned == 3
    model.fit(*blobs(seed=2), verbose=0)
    assert float(model.penalty()) > 0


def test_an_interrupted_fit_resumes_with_backup_and_restore(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def learn(stop):
        keras.utils.set_random_seed(5)
        model = compiled(strength=50.0)
        model.fit(*blobs(), verbose=0, shuffle=False)
        model.consolidate()
        for callbacks in ([Stop()], []) if stop else ([],):
            backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
            try:
                model.fit(
                    *blobs(seed=2),
                    epochs=4,
                    verbose=0,
                    shuffle=False,
                    callbacks=[backup, *callbacks],
                )
            except KeyboardInterrupt:
                model = compiled(strength=50.0)  # as in a new process that has only the backup
        return model

    expected, resumed = learn(stop=False), learn(stop=True)
    assert float(resumed.penalty()) == float(expected.penalty()) > 0
    for a, b in zip(weights(expected), weights(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@keras.saving.register_keras_serializable("tests")
class Nested(Subclassed):
    """A subclassed model, whose layers get new names whenever it is built again."""


def test_state_follows_a_subclassed_model_whose_layers_are_named_anew(tmp_path):
    base = Nested()
    base(blobs()[0])
    model = compiled(base, strength=1.0)
    model.fit(*blobs(), verbose=0)
    model.consolidate()
    model.fit(*blobs(seed=3), verbose=0)
    model.save(tmp_path / "model.keras")
    layers.Dense(2), layers.Dense(2)
    again = keras.models.load_model(tmp_path / "model.keras")
    assert set(again.regularizer.precisions) != set(model.regularizer.precisions)
    assert float(again.penalty()) == pytest.approx(float(model.penalty()), rel=1e-6)


def test_loading_replaces_the_state_as_a_whole():
    early = compiled(strength=1.0)
    early.fit(*blobs(), verbose=0)
    store = saved(early)
    late = compiled(strength=1.0, fisher=DiagonalFisher("empirical", gamma=None))
    late.consolidate(blobs())
    load(late, store)
    assert late.tasks_learned == 0
    assert not late.regularizer.precisions
    assert not late.fisher.slots


def test_penalty_logger():
    model = compiled(strength=1.0)
    model.fit(*blobs(), verbose=0)
    model.consolidate()
    history = model.fit(*blobs(seed=2), epochs=2, verbose=0, callbacks=[PenaltyLogger()]).history
    assert history["penalty"][-1] == pytest.approx(float(model.penalty()))
    assert history["penalty"][-1] > 0


def test_other_layers_in_models_within_models():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(4, name="dense")], name="inner")
    other = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="dense")], name="other")
    inputs = keras.Input((6,))
    model = compiled(keras.Model(inputs, layers.Dense(3, name="dense")(other(inner(inputs)))))
    model.fit(*blobs(), verbose=0)
    model.consolidate()
    assert set(model.regularizer.anchors) == {
        f"{where}dense/{what}" for where in ("", "inner/", "other/") for what in ("kernel", "bias")
    }


# Invalid input raises a clear error before anything changes.


def _refused(model, error, action):
    before, state = weights(model), state_of(model)
    with pytest.raises(ValueError, match=error):
        action()
    for a, b in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert state.keys() == state_of(model).keys()
    for name, array in state_of(model).items():
        np.testing.assert_array_equal(array, state[name])


def _with(x, index, value):
    x = x.copy()
    x.flat[index] = value
    return x


X, Y = blobs()


@pytest.fixture(scope="module")
def trained():
    """A model that has been trained on a first task, for tests that leave it as it is."""
    model = compiled(strength=1.0)
    model.fit(X, Y, verbose=0)
    return model


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ((X, _with(Y, 3, 3)), r"Labels must be in \[0, 3\)"),
        ((X, _with(Y, 3, -1)), r"Labels must be in \[0, 3\)"),
        ((_with(X, 7, np.nan), Y), "finite"),
        ((X[:0], Y[:0]), "empty"),
        (tf.data.Dataset.from_tensor_slices((X, Y)).take(0).batch(4), "empty"),
        ((X[:, :5], Y), r"shape \(5,\)"),
        ((X, Y[:5]), "as many examples as each other"),
        ((X, Y, _with(np.ones(64), 2, np.inf)), "sample_weight"),
        (tf.data.Dataset.from_tensor_slices((X, Y)).repeat().batch(4), "must end"),
    ],
)
def test_consolidate_refuses(trained, data, error):
    _refused(trained, error, lambda: trained.consolidate(data))


class Batches(keras.utils.PyDataset):
    """Slices of arrays, which are empty past the end and raise no error there."""

    def __init__(self, size, **settings):
        super().__init__(**settings)
        self.size, self.asked = size, []

    def __len__(self):
        return -(-len(X) // self.size)

    def __getitem__(self, index):
        self.asked.append(index)
        part = slice(index * self.size, (index + 1) * self.size)
        return X[part], Y[part]


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 24), (2, 12)])
def test_a_py_dataset_ends_and_says_what_its_arrays_say(workers, batch_size):
    # Batches of 24, 24 and 16 examples, as those of the arrays.
    data = Batches(24, workers=workers)
    states = []
    for given in ((X, Y), data):
        keras.utils.set_random_seed(3)
        model = compiled(strength=1.0)
        for _ in range(2):  # the same dataset is used for two tasks
            moved(model)
            data.asked.clear()
            model.consolidate(given, batch_size)
        states.append(state_of(model))
    assert data.asked == [0, 1, 2]
    of_arrays, of_data = states
    assert of_arrays.keys() == of_data.keys()
    for name, array in of_arrays.items():
        np.testing.assert_allclose(of_data[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_py_dataset_without_a_length_is_refused(trained):
    class Endless(Batches):
        num_batches = None

    _refused(trained, "must end", lambda: trained.consolidate(Endless(24)))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"x": _with(X, 7, np.nan)}, "`x` must be finite"),
        ({"y": _with(Y, 0, 9)}, "Labels must be"),
        ({"x": X[:0], "y": Y[:0]}, "`x` is empty"),
        ({"sample_weight": _with(np.ones(64), 3, np.nan)}, "`sample_weight` must be finite"),
        ({"validation_data": (X * np.nan, Y)}, "`validation_data: x` must be finite"),
        ({"validation_data": (X, Y + 2)}, "Labels must be"),
    ],
)
def test_fit_refuses(trained, arguments, error):
    _refused(trained, error, lambda: trained.fit(**({"x": X, "y": Y, "verbose": 0} | arguments)))


def test_consolidating_twice_without_training_is_refused():
    model = compiled(strength=1.0)
    model.consolidate((X, Y))
    _refused(model, "train the model on the next task", lambda: model.consolidate((X, Y)))


def with_a_frozen_layer():
    """A model that has learned a task, with a layer that was frozen since."""
    model = compiled(strength=1.0)
    model.consolidate((X, Y))
    model.get_layer("hidden").trainable = False
    model.compile("sgd", LOSS)
    return model


def test_freezing_a_layer_is_no_training():
    model = with_a_frozen_layer()
    _refused(model, "train the model on the next task", lambda: model.consolidate((X, Y)))


def test_layers_frozen_after_training_are_not_folded():
    model = compiled(strength=1.0)
    model.fit(X, Y, verbose=0)
    model.get_layer("hidden").trainable = False
    model.consolidate()
    assert set(model.regularizer.precisions) == {"head/kernel", "head/bias"}


def test_diverged_weights_are_refused():
    model = compiled(strength=1.0)
    model.fit(X, Y, verbose=0)
    model.fisher.slots["fisher/head/kernel"].assign(tf.fill((8, 3), np.inf))
    _refused(model, "'head/kernel' is not finite", model.consolidate)


def test_more_groups_than_parameters_are_refused():
    from keras_dwd.groupings import GaussianMixtureGrouping

    with pytest.raises(ValueError, match=r"`groups` .* \(83\)"):
        compiled(grouping=GaussianMixtureGrouping(84, samples=100))


def test_constructor_refuses():
    with pytest.raises(TypeError, match="from_model"):
        DWDModel(strength=1.0)
    with pytest.raises(ValueError, match="must be built"):
        DWDModel.from_model(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(ValueError, match="not both"):
        DWDModel.from_model(mlp(), strength=1.0, regularizer=DWDRegularizer())
    with pytest.raises(ValueError, match="`fisher` must be a Fisher"):
        DWDModel.from_model(mlp(), fisher="empirical")
    with pytest.raises(ValueError, match="`strength`"):
        DWDModel.from_model(mlp(), strength=-1)
    with pytest.raises(ValueError, match="is a DWDModel already"):
        DWDModel.from_model(DWDModel.from_model(mlp()))
    with pytest.raises(ValueError, match="Compile the model first"):
        DWDModel.from_model(mlp()).consolidate((X, Y))


def test_a_training_step_of_its_own_is_not_dropped():
    class Own(Subclassed):
        def train_step(self, data):
            return super().train_step(data)

    base = Own()
    base(X)
    with pytest.raises(ValueError, match="its own train_step, which"):
        DWDModel.from_model(base)


def test_fit_looks_at_arguments_by_position_and_at_empty_datasets(trained):
    model = trained
    bad = np.full_like(X, np.nan)
    _refused(model, "validation_data: x", lambda: model.fit(X, Y, 8, 1, 0, None, 0.0, (bad, Y)))
    empty = tf.data.Dataset.from_tensor_slices((X, Y)).take(0).batch(8)
    _refused(model, "`x` is empty", lambda: model.fit(empty, verbose=0))


def test_labels_of_each_output_are_checked():
    inputs = keras.Input((6,))
    heads = [layers.Dense(n, name=f"head_{n}")(inputs) for n in (3, 5)]
    model = DWDModel(inputs, heads)
    model.compile("sgd", [LOSS, LOSS])
    model.fit(X, [Y, Y + 2], verbose=0)
    _refused(model, "at 'head_3'", lambda: model.fit(X, [Y + 2, Y], verbose=0))


def test_the_penalty_is_reported_with_a_layer_frozen():
    model = with_a_frozen_layer()
    model.fit(*blobs(seed=1), verbose=0, callbacks=[PenaltyLogger()])
    assert float(model.penalty()) > 0


def test_a_model_of_two_parameters_can_be_made():
    inputs = keras.Input((1,))
    model = DWDModel(inputs, layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    model.fit(X[:, :1], X[:, 1:2], verbose=0)
    model.consolidate()
    assert model.tasks_learned == 1


def test_outputs_of_a_dictionary_go_by_its_keys():
    inputs = keras.Input((6,))
    model = DWDModel(inputs, {"b": layers.Dense(3, name="x")(inputs)})
    model.compile("sgd", {"b": LOSS})
    _refused(model, "Labels must be in", lambda: model.fit(X, {"b": Y + 3}, verbose=0))
    with_fisher = DWDModel(inputs, model.output, fisher=DiagonalFisher("negated"))
    with_fisher.compile("sgd", {"b": LOSS})
    with pytest.raises(ValueError, match="single output"):
        with_fisher.fit(X, {"b": Y}, verbose=0)
    drawing = DWDModel(inputs, model.output, fisher=DiagonalFisher("mc"))
    drawing.compile("sgd", {"b": LOSS})
    drawing.fit(X, {"b": Y}, verbose=0)
    assert np.any(drawing.fisher.slots["fisher/x/kernel"])


def test_several_replicas_are_refused(monkeypatch):
    model = compiled(strength=1.0)
    strategy = tf.distribute.get_strategy()
    monkeypatch.setattr(type(strategy.extended), "_num_replicas_in_sync", 2)
    with pytest.raises(RuntimeError, match="several replicas"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("fisher", [DiagonalFisher(), KroneckerFisher()])
def test_weights_that_are_not_finite_are_refused(fisher):
    model = compiled(fisher=fisher, grouping=None)
    model.consolidate(blobs())
    model.fit(*blobs(seed=1), verbose=0)
    before = model.regularizer.state()
    held = np.array(model.get_layer("head").kernel)
    model.get_layer("head").kernel.assign(np.full((8, 3), np.nan))
    with pytest.raises(ValueError, match="'head/kernel' are not finite"):
        model.consolidate()
    for name, array in model.regularizer.state().items():
        np.testing.assert_array_equal(array, before[name])
    model.get_layer("head").kernel.assign(held)
    model.consolidate()
    assert model.tasks_learned == 2


@pytest.mark.parametrize("as_dataset", [False, True])
def test_the_first_fit_traces_the_step_once(as_dataset):
    class Counting(DWDModel):
        traces = 0

        def train_step(self, data):
            type(self).traces += 1
            return super().train_step(data)

    model = Counting.from_model(mlp(), fisher=DiagonalFisher("batch"), grouping=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], weighted_metrics=["accuracy"])
    x, y = blobs(32)
    weight = np.ones(32, "float32")
    if as_dataset:
        data = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(8)
        model.fit(data, shuffle=False, verbose=0)
    else:
        model.fit(x, y, batch_size=8, sample_weight=weight, verbose=0)
    assert Counting.traces == 1


def test_labels_that_the_loss_ignores_are_no_bad_labels():
    inputs = keras.Input((6,))
    model = DWDModel(
        inputs,
        layers.Dense(3, name="head")(inputs),
        fisher=DiagonalFisher("empirical", None),
        grouping=None,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    model.compile("sgd", loss)
    y = np.where(np.arange(64) % 2, Y, 255)
    model.fit(X, y, verbose=0)
    model.consolidate((X, y))
    assert model.tasks_learned == 1


def test_a_mistyped_setting_is_refused():
    inputs = keras.Input((6,))
    for make in (
        lambda: DWDModel(inputs, layers.Dense(3)(inputs), stength=1.0),
        lambda: DWDModel.from_model(mlp(), stength=1.0),
    ):
        with pytest.raises(TypeError, match="has no argument 'stength'"):
            make()


def test_a_model_in_place_of_inputs_is_told_of_from_model():
    with pytest.raises(TypeError, match=r"Received the model .* use `DWDModel.from_model"):
        DWDModel(mlp())


def test_an_estimate_from_data_alone_asks_for_data():
    model = compiled(fisher=DiagonalFisher("empirical", gamma=None), grouping=None)
    model.fit(*blobs(), verbose=0)
    with pytest.raises(ValueError, match=r"estimated from data. Call `consolidate\(x, y\)`"):
        model.consolidate()
