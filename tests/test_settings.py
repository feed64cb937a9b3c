"""The methods of the field as keyword arguments."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import blobs, compiled, long, mlp, state_of
from test_hardening import CONSTRUCTORS, PUBLIC

import keras_dwd
from keras_dwd import DiagonalFisher, DWDModel, DWDRegularizer, KroneckerFisher, TaskGraph
from keras_dwd.checks import FixedSettings
from keras_dwd.groupings import GaussianMixtureGrouping


def settings_of(model):
    config = model.get_config()
    return {name: config[name] for name in ("regularizer", "fisher", "grouping")}


def test_dwd_is_the_default():
    model = DWDModel.from_model(mlp(), **keras_dwd.dwd())
    assert settings_of(model) == settings_of(DWDModel.from_model(mlp()))
    assert isinstance(model.fisher, KroneckerFisher)
    assert isinstance(model.grouping, GaussianMixtureGrouping)


def test_dwd_by_a_pass_over_data_keeps_no_estimate():
    assert keras_dwd.dwd(online=False)["fisher"].gamma is None


@pytest.mark.parametrize("name", ["ewc", "online_ewc"])
def test_ewc_is_an_empirical_diagonal_without_groups(name):
    model = DWDModel.from_model(mlp(), **getattr(keras_dwd, name)(strength=7.0))
    assert model.regularizer.strength == 7.0
    assert isinstance(model.fisher, DiagonalFisher)
    assert model.fisher.get_config() == {"estimator": "empirical", "gamma": None, "every": 5}
    assert model.grouping is None


def test_only_the_first_form_of_ewc_keeps_the_exact_sum_of_all_tasks():
    ewc, online = keras_dwd.ewc()["regularizer"], keras_dwd.online_ewc(decay=0.8)["regularizer"]
    assert (ewc.anchor, ewc.decay) == ("folded", 1.0)
    assert (online.anchor, online.decay) == ("latest", 0.8)


def test_from_model_names_its_settings():
    with pytest.raises(ValueError, match="`strength` or `regularizer`, not both"):
        DWDModel.from_model(mlp(), strength=1.0, **keras_dwd.ewc())


# What is given and would have no effect is refused.


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("strenght", r"Did you mean 'strength'\?"),
        ("lam", "The strength λ of the penalty is `strength`"),
        ("lambda_", "The strength λ of the penalty is `strength`"),
        ("ewc_lambda", "The strength λ of the penalty is `strength`"),
        ("importance", "The strength λ of the penalty is `strength`"),
        ("taskgraph", r"Did you mean 'task_graph'\?"),
        ("decay", r"Pass `regularizer=DWDRegularizer\(decay=…\)`"),
        ("gamma", r"Pass `fisher=KroneckerFisher\(gamma=…\)`"),
        ("zzz", "Its settings are strength"),
    ],
)
def test_an_unknown_setting_is_refused_with_what_was_meant(given, hint):
    for make in (DWDModel.from_model, lambda net, **k: DWDModel(net.inputs, net.outputs, **k)):
        with pytest.raises(TypeError, match=f"DWDModel has no argument '{given}'.*{hint}"):
            make(mlp(), **{given: 3})


def test_a_subclass_is_told_of_its_own_settings():
    class Mine(DWDModel):
        def __init__(self, *args, temperature=1.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.temperature = temperature

    assert Mine.from_model(mlp(), temperature=2.0, strength=3).strength == 3
    with pytest.raises(TypeError, match=r"Mine has no argument 'temprature'\. Did you mean 'temp"):
        Mine.from_model(mlp(), temprature=2.0)


def test_a_strength_by_position_is_refused():
    with pytest.raises(TypeError, match="`strength`, given by its name"):
        DWDModel.from_model(mlp(), 3.0)


@pytest.mark.parametrize("name", sorted({*CONSTRUCTORS, "ewc", "online_ewc", "dwd"}))
def test_no_constructor_takes_what_it_does_not_know(name):
    make = PUBLIC.get(name) or getattr(keras_dwd, name)
    with pytest.raises((TypeError, ValueError), match=r"nonsense|takes no arguments"):
        make(**CONSTRUCTORS.get(name, {}), nonsense=3)


SETTINGS = [
    (name, setting)
    for name, given in CONSTRUCTORS.items()
    if issubclass(PUBLIC[name], FixedSettings)
    for setting in inspect.signature(PUBLIC[name]).parameters
    if setting != "rewards"  # data to begin with
]
LIVE = {("DWDRegularizer", "strength"), ("DWDRegularizer", "decay")}


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_settings_take_effect_when_assigned_or_cannot_be(name, setting):
    """That strength and decay do is in `test_strength.py`."""
    made = PUBLIC[name](**CONSTRUCTORS[name])
    if (name, setting) in LIVE:
        setattr(made, setting, 0.5)
        assert made.get_config()[setting] == 0.5
        with pytest.raises(ValueError, match=f"`{setting}` must be a number"):
            setattr(made, setting, -1)
        return
    before = getattr(made, setting)
    with pytest.raises(AttributeError, match=setting):
        setattr(made, setting, 3)
    assert getattr(made, setting) is before or getattr(made, setting) == before


def test_all_settings_are_looked_at():
    assert {name for name, _ in SETTINGS} >= {
        "DWDRegularizer",
        "DiagonalFisher",
        "KroneckerFisher",
        "GaussianMixtureGrouping",
        "GroupingPolicy",
        "Budget",
    }


def test_so_it_is_with_a_task_graph(tmp_path):
    graph = TaskGraph(tmp_path, weights=np.ones((2, 2)))
    for setting in inspect.signature(TaskGraph).parameters:
        if setting != "probe":
            with pytest.raises(AttributeError, match=setting):
                setattr(graph, setting, 3)
    model = compiled(strength=1.0)
    with pytest.raises(ValueError, match="`task_graph` must be a TaskGraph or None"):
        model.task_graph = "graph"


def test_a_task_graph_that_is_taken_away_pulls_no_more(tmp_path):
    model = compiled(
        fisher=DiagonalFisher("batch"),
        grouping=None,
        task_graph=TaskGraph(tmp_path, weights=np.ones((3, 3)), strength=1.0),
    )
    x, y = blobs()
    model.fit(x, y, verbose=0)
    model.consolidate()
    assert float(model.regularizer.task_weight) == 1
    model.task_graph = None
    assert float(model.regularizer.task_weight) == 0


@pytest.mark.parametrize("name", ["regularizer", "fisher", "grouping"])
def test_parts_of_a_model_cannot_be_replaced(name):
    model = compiled(strength=1.0)
    with pytest.raises(AttributeError, match=name):
        setattr(model, name, "another")


def test_decay_is_that_of_the_next_boundary():
    from test_strength import X2, Y2, X, Y, fisher_of, linear, theta

    model = linear(strength=2.0)
    model.fit(X, Y, verbose=0)
    model.consolidate((X, Y))
    first = fisher_of(theta(model), X, Y)
    model.fit(X2, Y2, verbose=0)
    model.regularizer.decay = 0.25
    model.consolidate((X2, Y2))
    expected = 2.0 * (0.25 * first + fisher_of(theta(model), X2, Y2))
    precisions = model.regularizer.precisions
    total = [np.asarray(precisions[f"dense/{n}"].values).ravel() for n in ("kernel", "bias")]
    np.testing.assert_allclose(np.concatenate(total), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fisher", [DiagonalFisher("batch"), long(KroneckerFisher())])
def test_the_penalty_can_be_differentiated_in_a_loop_of_ones_own(fisher):
    model = compiled(strength=5.0, fisher=fisher, grouping=None)
    x, y = blobs()
    model.fit(x, y, verbose=0)
    model.consolidate()
    model.fit(*blobs(seed=1), verbose=0)
    values = [v.value for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        penalty = model.penalty()
    gradients = tape.gradient(penalty, values)
    from keras_dwd.variables import trainable_by_path

    pulls = model.regularizer.gradients(trainable_by_path(model))
    for path, gradient in zip(trainable_by_path(model), gradients, strict=True):
        assert np.any(gradient)
        np.testing.assert_allclose(gradient, pulls[path], rtol=1e-4, atol=1e-6)
    assert not model.losses


def test_a_training_step_in_a_loop_of_ones_own_makes_the_online_estimate():
    states = []
    for own in (False, True):
        keras.utils.set_random_seed(5)
        model = compiled(strength=5.0, fisher=DiagonalFisher("empirical", every=1), grouping=None)
        for seed in (0, 1):
            data = tf.data.Dataset.from_tensor_slices(blobs(16, seed=seed)).batch(8)
            if own:
                step = tf.function(model.train_step)
                for batch in data:
                    step(batch)
            else:
                model.fit(data, shuffle=False, verbose=0)
            model.consolidate()
        states.append(state_of(model))
    for name, array in states[0].items():
        if "/" in name:
            np.testing.assert_allclose(states[1][name], array, rtol=1e-5, atol=1e-7, err_msg=name)
    assert any(name.startswith("precision/") for name in states[1])


def test_a_regularizer_outside_of_the_floor_keeps_its_anchor():
    regularizer = DWDRegularizer(anchor="folded")
    with pytest.raises(AttributeError, match="`anchor` of a DWDRegularizer"):
        regularizer.anchor = "latest"
    assert keras.regularizers.get(regularizer) is regularizer


def test_the_path_of_a_model_is_not_a_model():
    with pytest.raises(TypeError, match=r"load one from a file.*'trained.keras'"):
        DWDModel.from_model("trained.keras")
