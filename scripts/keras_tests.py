"""Runs Keras' own tests on models wrapped in `DWDModel`, and says which only plain Keras passes.

The tests in `FOLDERS` run three times, in a copy: with plain Keras; with the models, and the
optimizers of `optimizers`, that the tests make turned into a `DWDModel` and a `DWDOptimizer`; and
with models that have, in addition, learned one task at a strength that moves no number. A test that
passes with plain Keras must pass in the other two, except for `MEANT`. A model is turned where it
stands, at the first of `ENTRIES` that a test calls, so that the test keeps its references to it.

This file is also the plugin of pytest that does so.
"""

import argparse
import collections
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

FOLDERS = ("trainers", "models", "callbacks", "saving", "export", "optimizers")
# Not run, for they are slow and repeat what others show.
LEFT_OUT = (
    "trainers/trainer_test.py::TestTrainer::test_steps_per_*_jit",  # also without "jit"
    "trainers/trainer_test.py::TestTrainer::test_steps_per_*_eager",
    "trainers/trainer_test.py::TestTrainer::test_steps_per_execution_unrolled_*_32",
)
SLOW = 5.0  # seconds of processor time; tests that take longer in plain Keras run there only
# With fewer tests than this on a wrapped model or optimizer, nothing was shown.
FEWEST = {"fresh": 550, "boundary": 390}

# Differences that are meant: patterns of `FILE::CLASS::TEST`, and why.
_LAYERS = "A wrapped Sequential is a functional model: its `layers` have the InputLayer."
_PRIVATE = "The private methods and settings of the wrapped optimizer are on `inner_optimizer`."
_NAMED = "A wrapped model or optimizer has the class and name of what wraps it."
_COUNTED = "A DWDOptimizer has a counter and a rate of its own among its variables."
_STATE = "Files have the state as well."
_FINITE = "`fit` refuses arrays with numbers that are not finite, before it changes anything."
_WITHIN = "What a subclassed model has as attributes is on the model within, the last layer."
_HDF5 = "HDF5 files have the name of a class alone: they are loaded with `custom_objects`."
_STATELESS = "HDF5 files have no place for the state of a model that has learned: refused."
_SPECS = "The message on a signature that does not fit is another one."
MEANT: dict[str, str] = {
    "models/sequential_test.py::SequentialTest::test_basic_flow_with_*": _LAYERS,
    "models/sequential_test.py::SequentialTest::test_serialization_with_lambda_layer": _LAYERS,
    "optimizers/multi_optimizer_test.py::*::test_multi_optimizer_with_model_fit": _LAYERS,
    "optimizers/multi_optimizer_test.py::*::test_swap_ema_weights_with_*": _LAYERS,
    "saving/saving_api_test.py::SaveModelTests::test_objects_to_skip": _LAYERS,
    "saving/saving_api_test.py::LoadModelTests::test_load_model_with_custom_objects": _LAYERS,
    "saving/saving_lib_test.py::SavingTest::test_partial_load": _LAYERS,
    "callbacks/backup_and_restore_test.py::*::test_backup_corrupted": _LAYERS,
    "callbacks/backup_and_restore_test.py::*::test_best_case_*": _LAYERS,
    "callbacks/terminate_on_nan_test.py::*::test_raise_error_terminate_*": _FINITE,
    "callbacks/terminate_on_nan_test.py::*::test_terminate_on_nan_*": _FINITE,
    "export/saved_model_test.py::*::test_input_signature_error": _SPECS,
    "export/saved_model_test.py::*::test_model_with_tracked_collection": (
        "A subclassed model of text is wrapped with `inputs`, which this program does not know."
    ),
    "export/saved_model_test.py::*::test_model_with_non_trainable_state_export_sequential": _LAYERS,
    "export/saved_model_test.py::*::test_export_saved_model_errors": (
        "A model that was never called can be exported: a DWDModel knows its inputs."
    ),
    "saving/saving_api_test.py::SaveModelTests::test_save_h5_format": _STATELESS,
    "saving/saving_api_test.py::LoadWeightsTests::test_load_weights_invalid_kwargs": _STATELESS,
    "saving/saving_api_test.py::LoadModelTests::test_load_h5_format": _HDF5,
    "saving/saving_lib_test.py::SavingAPITest::test_model_api_endpoint_h5": _HDF5,
    "saving/saving_lib_test.py::SavingBattleTest::test_*legacy_h5_format": _HDF5,
    "saving/saving_lib_test.py::*::test_nested_container_layer_saving_*": _WITHIN,
    "saving/saving_lib_test.py::*::test_saving_custom_assets_and_variables": _WITHIN,
    "trainers/trainer_test.py::TestTrainer::test_constraints_are_applied": _LAYERS,
    "trainers/trainer_test.py::TestTrainer::test_loss_scaling_prevents_underflow": _LAYERS,
    "trainers/trainer_test.py::TestTrainer::test_metric_tracking": (
        "The metrics of a layer that is no `keras.Model`, only a trainer, are not those of a model."
    ),
    "optimizers/optimizer_test.py::*::test_gradient_accumulation": _PRIVATE,
    "optimizers/optimizer_test.py::*::test_overwrite_with_gradient_with_gradient_*": _PRIVATE,
    "optimizers/optimizer_sparse_test.py::*::test_sparse_gradients_loss_scale_*": _PRIVATE,
    "optimizers/schedules/*::test_fit_lr_correctness": _COUNTED,
    # These call `update_step` and `_apply_weight_decay` themselves.
    "optimizers/muon_test.py::*::test_adamw_single_step": _PRIVATE,
    "optimizers/muon_test.py::*::test_muon_single_step": _PRIVATE,
    "optimizers/muon_test.py::*::test_adamw_weight_decay": _PRIVATE,
    "optimizers/optimizer_test.py::OptimizerTest::test_optimizer_auto_naming": _NAMED,
    "optimizers/multi_optimizer_test.py::*::test_serialization": _NAMED,
    "optimizers/multi_optimizer_test.py::*::test_tensorboard_logging_*": _NAMED,
    "saving/file_editor_test.py::SavingTest::test_scalar_weight": _STATE,
    "saving/file_editor_test.py::SavingTest::test_basics": _STATE,
    "models/model_test.py::ModelTest::test_quantize_*float8": (
        "A model that has learned tasks can be quantized to int8 only: it says so."
    ),
    "saving/saving_lib_test.py::SavingBattleTest::test_redefinition_of_trackable": (
        "The state belongs to variables by name, and the two models have other names."
    ),
    "optimizers/sgd_test.py::SGDTest::test_single_step": _COUNTED,
    "optimizers/optimizer_test.py::*::test_setting_lr_to_callable_untracks_lr_var": _COUNTED,
    "saving/saving_lib_test.py::SavingTest::test_saved_module_paths_and_class_names": _NAMED,
}

# Methods at which a model of a test becomes a `DWDModel`.
ENTRIES = [
    *("compile", "fit", "evaluate", "predict"),
    *("train_on_batch", "test_on_batch", "predict_on_batch"),
    *("save", "save_weights", "load_weights", "export", "quantize"),
    *("to_json", "summary", "get_layer"),
]
_TRAINING = ENTRIES[1:7]
# Functions that the tests call directly where users call a method of the model. No model that is
# made within them is turned: in a loaded model the parts must stay as they were saved.
_FUNCTIONS = {
    "keras.src.saving.saving_api": ("save_model", "load_model", "save_weights", "load_weights"),
    "keras.src.saving.saving_lib": (
        *("save_model", "load_model", "save_weights_only", "load_weights_only"),
    ),
    "keras.src.models.cloning": ("clone_model",),
}
_EXPORTS = {"saved_model": "tf_saved_model", "onnx": "onnx", "litert": "litert"}


# The program.


def main() -> int:
    """Run the tests three times; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repo", help="a checkout of Keras at the installed version")
    parser.add_argument("-k", default="", help="only tests that match, as in pytest")
    parser.add_argument("--out", help="a folder to keep what pytest says")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(settings.out or folder).resolve()
        out.mkdir(exist_ok=True, parents=True)
        tests = Path(folder, "tests")
        _copy(_sources(settings.repo), tests)
        plain = _run("plain", tests, out, settings.k, [])
        slow = sorted(t for t, r in plain["tests"].items() if r["seconds"] > SLOW)
        wrapped = {mode: _run(mode, tests, out, settings.k, slow) for mode in FEWEST}
    return _report(plain, wrapped, slow, whole=not settings.k)


def _sources(repo: str | None) -> Path:
    found = importlib.util.find_spec("keras")
    assert found is not None
    assert found.submodule_search_locations is not None
    sources = Path(repo, "keras") if repo else Path(found.submodule_search_locations[0])
    if repo and _version(sources) != _version(Path(found.submodule_search_locations[0])):
        sys.exit(f"KERAS_REPO must have the installed version of Keras. Received: {repo!r}")
    missing = [f for f in FOLDERS if not list((sources / "src" / f).rglob("*_test.py"))]
    if missing:
        sys.exit(f"No tests of {', '.join(missing)} in {sources}: give KERAS_REPO, a checkout.")
    return sources / "src"


def _version(sources: Path) -> str:
    return re.findall(r'__version__ = "(.+?)"', (sources / "src" / "version.py").read_text())[0]


def _copy(sources: Path, tests: Path) -> None:
    """Copy the tests; other backends that they import without use need not be installed."""
    for folder in FOLDERS:
        for file in (sources / folder).rglob("*_test.py"):
            copy = tests / file.relative_to(sources)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(
                re.sub(r"(?m)^import ([\w.]+)(?: as (\w+))?$", _optional, file.read_text())
            )


def _optional(found: re.Match[str]) -> str:
    module, name = found[1].split(".")[0], found[2] or found[1].split(".")[0]
    return found[0] if importlib.util.find_spec(module) else f"{name} = None"


def _run(mode: str, tests: Path, out: Path, k: str, without: list[str]) -> dict[str, Any]:
    result = out / f"{mode}.json"
    result.unlink(missing_ok=True)
    here = Path(__file__).resolve()
    environment = os.environ | {
        "KERAS_BACKEND": "tensorflow",
        "KERAS_TESTS_MODE": mode,
        "KERAS_TESTS_RESULT": str(result),
        "KERAS_TESTS_WITHOUT": json.dumps(without),
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parent.parent)]),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # fmt: off
    command = [
        sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tests),
        "-p", here.stem, "-p", "no:cacheprovider", "--import-mode=importlib", "--tb=short", "-k", k,
        "--continue-on-collection-errors", str(tests),
    ]
    # fmt: on
    print(f"{mode}: ", end="", flush=True)
    with open(out / f"{mode}.txt", "w") as log:
        done = subprocess.run(command, env=environment, cwd=tests, stdout=log, stderr=log)
    if not result.exists():
        said = (out / f"{mode}.txt").read_text()[-3000:]
        sys.exit(f"pytest ended early, with code {done.returncode}.\n{said}")
    results: dict[str, Any] = json.loads(result.read_text())
    print(results["count"], flush=True)
    return results


def _report(
    plain: dict[str, Any], wrapped: dict[str, dict[str, Any]], slow: list[str], whole: bool
) -> int:
    passed = {t for t, r in plain["tests"].items() if r["outcome"] == "passed"} - set(slow)
    bad = False
    used = set()
    print(f"\n{len(passed)} tests pass in plain Keras.")
    for mode, results in wrapped.items():
        mark, what = {
            "fresh": ("wrapped", "a wrapped model or optimizer"),
            "boundary": ("learned", "a model that has learned a task"),
        }[mode]
        reached = [t for t in passed if results["tests"].get(t, {}).get(mark)]
        print(f"\n{mode}: {len(reached)} of them use {what}")
        for reason, count in sorted(results["refused"].items(), key=lambda item: -item[1]):
            print(f"  {count} models left as they are: {reason}")
        if whole and len(reached) < FEWEST[mode]:
            print(f"  TOO FEW: expected {FEWEST[mode]}")
            bad = True
        for test in sorted(passed):
            result = results["tests"].get(test, {"outcome": "missing", "error": ""})
            if result["outcome"] == "passed":
                continue
            patterns = [p for p in MEANT if fnmatchcase(test, p)]
            used.update(patterns)
            if not patterns:
                bad = True
                print(f"  FAILS {test}: {result['error']}")
    for pattern in [p for p in MEANT if p not in used and whole]:
        bad = True
        print(f"\nNO DIFFERENCE any more: {pattern}")
    print(f"\n{'Slow, only in plain Keras: ' + ', '.join(slow) if slow else 'No slow tests.'}")
    return int(bad)


# The plugin of pytest.

_MODE = os.environ.get("KERAS_TESTS_MODE", "")
_tests: dict[str, dict[str, Any]] = {}
_refused: collections.Counter[str] = collections.Counter()
_current: dict[str, Any] = {"wrapped": 0, "learned": 0, "since": 0.0}


def pytest_configure(config: Any) -> None:
    """Have the models of the tests wrapped."""
    config.addinivalue_line("markers", "requires_trainable_backend: of Keras")
    if _MODE in FEWEST:
        _patch_models()


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note the start of a test."""
    _current.update(wrapped=0, learned=0, since=time.process_time())


def pytest_runtest_logreport(report: Any) -> None:
    """Note the outcome of a test, and whether it used a wrapped model or optimizer."""
    seen = _tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "error": ""})
    seen["seconds"] = time.process_time() - _current["since"]
    seen.update({name: _current[name] for name in ("wrapped", "learned")})
    if report.outcome != "passed":
        seen["outcome"] = report.outcome
        crash = getattr(report.longrepr, "reprcrash", None)
        seen["error"] = " ".join(str(crash.message if crash else report.longrepr).split())[:200]
    if report.when == "teardown" and (log := os.environ.get("KERAS_TESTS_LOG")):
        with open(log, "a") as file:
            print(report.nodeid, seen, file=file)


def pytest_sessionfinish() -> None:
    """Write the outcomes for the program."""
    count = collections.Counter(r["outcome"] for r in _tests.values())
    line = ", ".join(f"{n} {outcome}" for outcome, n in sorted(count.items()))
    result = {"tests": _tests, "refused": _refused, "count": line}
    Path(os.environ["KERAS_TESTS_RESULT"]).write_text(json.dumps(result, indent=1))


# Models.

_inside = 0  # how deep in the methods of a model
_target: list[Any] = []  # the model whose place the next `DWDModel` takes
# Attributes of models. Keras would save them, did their names not begin like this.
_PLAIN, _GIVEN = "__keras_tests_plain", "__keras_tests_compile"


def _patch_models() -> None:
    import keras
    from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
    from keras.src.ops.operation import Operation

    from keras_dwd import DWDModel

    for name in ENTRIES:
        owner = TensorFlowTrainer if hasattr(TensorFlowTrainer, name) else keras.Model
        owner = next(c for c in owner.__mro__ if name in vars(c))
        setattr(owner, name, _entry(name, vars(owner)[name]))
    for path, names in _FUNCTIONS.items():
        module = importlib.import_module(path)
        for name in names:
            if hasattr(module, name):
                setattr(module, name, _function(getattr(module, name)))
    for name, form in _EXPORTS.items():
        module = importlib.import_module(f"keras.src.export.{name}")
        export = getattr(module, f"export_{name}")
        setattr(module, f"export_{name}", _export(export, form))

    new = Operation.__new__

    def in_place(cls: type, *args: Any, **kwargs: Any) -> Any:
        instance = new(cls, *args, **kwargs)
        if not (_target and issubclass(cls, DWDModel)):
            return instance
        model = _target.pop()
        object.__setattr__(model, "__class__", cls)
        vars(model).clear()
        vars(model).update(vars(instance))
        return model

    Operation.__new__ = staticmethod(in_place)

    def of_plain(self: Any, name: str) -> Any:
        """What a test has set, and looks up, on its model is on the one within."""
        plain = vars(self).get(_PLAIN)
        if plain is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(plain, name)

    DWDModel.__getattr__ = of_plain


@contextlib.contextmanager
def _within() -> Iterator[None]:
    """What Keras itself calls in here turns no model."""
    global _inside
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1


def _entry(name: str, method: Any) -> Any:
    @functools.wraps(method)
    def entry(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "compile" and not _inside:
            vars(self)[_GIVEN] = args, kwargs
        if not _inside:
            before = type(self)
            args = _turn(self, name, args)
            if type(self) is not before:
                return getattr(self, name)(*args, **kwargs)
        with _within():
            return method(self, *args, **kwargs)

    return entry


def _function(function: Any) -> Any:
    @functools.wraps(function)
    def entry(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not _inside:
            _turn(model, "", ())
        with _within():
            return function(model, *args, **kwargs)

    return entry


def _export(function: Any, form: str) -> Any:
    from keras_dwd import DWDModel

    @functools.wraps(function)
    def entry(model: Any, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        if not _inside:
            _turn(model, "", ())
            if isinstance(model, DWDModel):
                return model.export(filepath, form, *args, **kwargs)
        return function(model, filepath, *args, **kwargs)

    return entry


def _turn(model: Any, name: str, args: Any) -> Any:
    """Turn a model of a test into a `DWDModel`; returns the arguments of the method called."""
    import keras
    from keras.src.trainers.trainer import Trainer

    from keras_dwd import DWDModel

    if isinstance(model, DWDModel):
        _current["wrapped"] += 1
        return args
    if not isinstance(model, Trainer) or not isinstance(model, keras.Layer):
        return args
    with _within():
        try:
            args = _turned(model, name, args)
            _current["wrapped"] += 1
        except _RefusedError as refused:
            _refused[str(refused)] += 1
    return args


class _RefusedError(Exception):
    """Says why a model of a test is left as it is."""


def _turned(model: Any, name: str, args: Any) -> Any:
    import keras

    from keras_dwd import DWDModel

    kind = type(model)
    if model._inbound_nodes and not isinstance(model, keras.Sequential):
        raise _RefusedError("within another model")
    own = [n for n in ENTRIES if not _module_of(getattr(kind, n, keras)).startswith("keras.")]
    if own:
        raise _RefusedError("the test overrides " + ", ".join(own))
    x = inputs = None
    if name in _TRAINING and args:
        args, x = _peeked(args)
    if not getattr(model, "inputs", None) and x is not None:
        inputs = keras.tree.map_structure(_input, x)
        if not model.built:
            keras.src.backend.compute_output_spec(model, inputs)
    if not model.built:
        if name in _TRAINING:
            raise _RefusedError("not built, and no data to build it on")
        return args  # later
    before = dict(vars(model))
    plain = object.__new__(kind)
    vars(plain).update({k: v for k, v in before.items() if k not in ("build", "quantize")})
    learned = _learned(plain, inputs) if _MODE == "boundary" else None
    _target[:] = [model]
    try:
        DWDModel.from_model(plain, inputs, strength=None if learned is None else 1e-12)
    except Exception as error:
        _target.clear()
        object.__setattr__(model, "__class__", kind)
        vars(model).clear()
        vars(model).update(before)
        raise _RefusedError(_short(error)) from error
    vars(model)[_PLAIN] = plain
    for attribute in ("unrolled_steps_per_execution", "stop_training"):
        vars(model)[attribute] = before.get(attribute)
    if learned is not None:
        model.inherit(learned)
        _current["learned"] += 1
    if before.get("compiled") and name != "compile":
        given, named = before.get(_GIVEN, ((), {}))
        model.compile(*given, **named)
    return args


def _module_of(method: Any) -> str:
    return getattr(method, "__module__", "") or "keras."


def _short(error: Exception) -> str:
    text = re.sub(r"'[^']*'|\[[^]]*\]|[(]\d.*?[)]", "…", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:120]


def _learned(model: Any, inputs: Any) -> Any:
    """A `DWDModel` with the same layers that has learned one task, of noise."""
    import keras
    import numpy as np

    from keras_dwd import DWDModel

    try:
        learned = DWDModel.from_model(model, inputs, strength=1e-12)
        rng = np.random.default_rng(0)

        def noise(tensor: Any) -> Any:
            shape = [4 if i == 0 else size or 3 for i, size in enumerate(tensor.shape)]
            if "float" in tensor.dtype:
                return rng.normal(size=shape).astype(tensor.dtype)
            return np.zeros(shape, tensor.dtype)

        x = keras.tree.map_structure(noise, learned._inputs_struct)
        before = learned.get_weights()
        y = keras.tree.map_structure(
            lambda o: np.zeros(o.shape, "float32"), learned(x, training=False)
        )
        learned.set_weights(before)  # some models count their calls
        learned.compile("sgd", "mse")
        learned.consolidate(x, y)
    except Exception as error:
        _refused[f"(no boundary) {_short(error)}"] += 1
        return None
    return learned


def _peeked(args: Any) -> tuple[Any, Any]:
    """The arguments of `fit`, and the inputs of the first batch."""
    import keras
    import tensorflow as tf

    data = args[0]
    if isinstance(data, tf.data.Dataset):
        first = data.element_spec
    elif isinstance(data, keras.utils.PyDataset):
        first = data[0]
    elif hasattr(data, "__next__"):
        first = next(data)
        args = (_again(first, data), *args[1:])
    elif hasattr(data, "dataset"):
        return args, None
    else:
        return args, data
    return args, first[0] if isinstance(first, tuple) else first


def _again(first: Any, rest: Any) -> Any:
    """A generator, which `itertools.chain` is not for Keras."""
    yield first
    yield from rest


def _input(array: Any) -> Any:
    import keras
    import tensorflow as tf

    dtype = str(getattr(array.dtype, "name", array.dtype))
    dtype = keras.config.floatx() if dtype.startswith("float") else dtype
    sparse = isinstance(array, (tf.SparseTensor, tf.SparseTensorSpec))
    sparse |= type(array).__module__.startswith("scipy.sparse")
    return keras.Input(tuple(array.shape)[1:], dtype=dtype, sparse=sparse)


# Optimizers.


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Have the optimizers that tests of optimizers make wrapped in a `DWDOptimizer`."""
    # Not by `--deselect`, which takes all tests whose names begin like that.
    without = json.loads(os.environ["KERAS_TESTS_WITHOUT"])
    items[:] = [
        i
        for i in items
        if i.nodeid not in without and not any(fnmatchcase(i.nodeid, p) for p in LEFT_OUT)
    ]
    if _MODE not in FEWEST:
        return
    import keras

    from keras_dwd import DWDOptimizer

    def of_inner(self: Any, name: str) -> Any:
        inner = vars(self).get("inner_optimizer")
        if inner is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inner, name)

    DWDOptimizer.__getattr__ = of_inner
    for module in {
        i.module for i in items if i.path.is_relative_to(i.config.rootpath / "optimizers")
    }:
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and issubclass(value, keras.optimizers.Optimizer):
                setattr(module, name, _Maker(value))
            elif (
                value is keras.optimizers
                or getattr(value, "__name__", "") == "keras.src.optimizers"
            ):
                setattr(module, name, _Makers(value))


class _Makers:
    """A module of Keras, with makers in place of its optimizers."""

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        import keras

        value = getattr(self._module, name)
        optimizer = isinstance(value, type) and issubclass(value, keras.optimizers.Optimizer)
        return _Maker(value) if optimizer else value


class _Maker:
    """Like an optimizer class, but what it makes is within a `DWDOptimizer`."""

    def __init__(self, kind: Any):
        self._kind = kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import keras

        from keras_dwd import DWDOptimizer

        made = self._kind(*args, **kwargs)
        given = keras.tree.flatten((args, kwargs))
        if type(made).__name__ == "Optimizer" or any(isinstance(g, DWDOptimizer) for g in given):
            return made
        _current["wrapped"] += 1
        return DWDOptimizer(made)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kind, name)

    def __mro_entries__(self, bases: Any) -> tuple[Any]:
        return (self._kind,)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(getattr(instance, "inner_optimizer", instance), self._kind)


if __name__ == "__main__":
    sys.exit(main())
