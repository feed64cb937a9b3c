"""The methods of the field as keyword arguments."""

import pytest
from cases import mlp

import keras_dwd
from keras_dwd import DiagonalFisher, DWDModel, KroneckerFisher
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
