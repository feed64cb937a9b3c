"""The README and docs/: their code runs and prints what they say, links lead somewhere."""

import contextlib
import importlib
import importlib.util
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import sweep

import keras_dwd

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = ("groupings", "layers", "callbacks", "evaluation", "experimental")

# A block of code, and the block after it, which is what it prints.
CODE = re.compile(r"```python\n(.*?)```(?:[^`]*?(?<=\n\n)```text\n(.*?)```)?", re.DOTALL)
PLAIN = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def run(code, names, where):
    """What the code prints."""
    printed = io.StringIO()
    keras.config.disable_interactive_logging()  # no bar of progress
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, where, "exec"), names)
    finally:
        keras.config.enable_interactive_logging()
    return printed.getvalue()


def same(printed, expected):
    """Whether two texts are equal, up to 0.03 in their fractions."""
    fraction = r"\d+\.\d+"
    assert re.sub(fraction, "#", printed).split() == re.sub(fraction, "#", expected).split()
    numbers = [[float(n) for n in re.findall(fraction, text)] for text in (printed, expected)]
    np.testing.assert_allclose(*numbers, atol=0.03)


WITH_CODE = [name_of(page) for page in PAGES if CODE.search(page.read_text())]


@pytest.mark.parametrize("page", sweep(WITH_CODE, "README.md", "docs/concepts/penalty.md"))
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    if page == "docs/guides/language-models.md":
        pytest.importorskip("keras_hub")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, expected in CODE.findall((ROOT / page).read_text()):
        printed = run(code, names, page)
        if expected:
            same(printed, expected)


def test_what_is_printed_is_compared():
    same("old 0.951 new 3\n", "old 0.94 new 3")
    for other in ("old 0.90 new 3", "old 0.95 new 4", "new 0.95 old 3"):
        with pytest.raises(AssertionError):
            same("old 0.95 new 3", other)


def test_the_readme_can_be_read_in_minutes():
    assert len(README.read_text().split()) <= 900


def test_tables_are_those_of_the_result_files():
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    subprocess.run(command, check=True)


def anchors_of(text):
    """The anchors of a page's headings, as mkdocs and most hosts of repositories make them."""
    found = set(re.findall(r"\{#([\w-]+)\}", text))
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M):
        words = re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower()).strip()
        found.add(re.sub(r"\s", "-", words))
    return found


@pytest.mark.parametrize("page", map(name_of, PAGES))
def test_no_link_is_broken(page):
    page = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", PLAIN.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        if page != README:  # the site of docs/ has nothing else
            assert found.resolve().is_relative_to(ROOT / "docs"), target
        if anchor and found.suffix == ".md":
            assert anchor in anchors_of(found.read_text()), target


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        assert page.relative_to(ROOT / "docs").as_posix() in menu


# Public names and their examples.


def public():
    """Every public object, by its full name."""
    modules = [keras_dwd, *(importlib.import_module(f"keras_dwd.{name}") for name in MODULES)]
    return {f"{m.__name__}.{name}": getattr(m, name) for m in modules for name in m.__all__}


REFERENCE = "\n".join(page.read_text() for page in PAGES if page.parent.name == "reference")
PUBLIC = public()
# Data have no docstrings: their examples are in the reference itself, which runs.
DATA = {"keras_dwd.__version__", "keras_dwd.evaluation.METHODS"}
DOCUMENTED = [name for name in PUBLIC if name not in DATA]
# Figures need matplotlib and files of results, with which `tests/test_report.py` draws them all.
FIGURES = {}
if importlib.util.find_spec("matplotlib"):
    plots = importlib.import_module("keras_dwd.plots")
    FIGURES = {f"keras_dwd.plots.{name}": getattr(plots, name) for name in plots.__all__}


def examples_of(documented):
    """The code after `Example:` in the docstring of an object."""
    text = inspect.getdoc(documented) or ""
    return re.findall(r"```python\n(.*?)```", text.partition("Example:\n")[2], re.DOTALL)


@pytest.mark.parametrize("name", [*PUBLIC, *FIGURES])
def test_every_public_name_is_in_the_reference_with_an_example(name):
    if name in DATA:
        assert re.search(rf"```python\n[^`]*\b{name.rpartition('.')[2]}\b", REFERENCE)
    else:
        listed = re.search(rf"^::: {re.escape(name)}$", REFERENCE, re.M)
        assert listed, f"no page of docs/reference has the line `::: {name}`"
        assert examples_of((PUBLIC | FIGURES)[name]), (
            f"the docstring of {name} has no `Example:` with code"
        )


@pytest.fixture
def vocabulary(tmp_path, monkeypatch):
    """What the examples of the reference take for granted; `docs/reference/index.md` lists it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def data():
        return rng.normal(size=(64, 20)).astype("float32"), rng.integers(0, 3, 64).astype("int32")

    def build(scenario=None):
        return keras.Sequential(
            [
                keras.Input((20,), name="pixels"),
                keras.layers.Dense(8, activation="relu"),
                keras.layers.Dense(3, activation="softmax" if scenario is None else None),
            ]
        )

    tasks, validation = [data(), data()], [data(), data()]
    network, loss = build(), keras.losses.SparseCategoricalCrossentropy()
    model = keras_dwd.DWDModel.from_model(build(), fisher=keras_dwd.DiagonalFisher("batch"))
    model.compile("adam", loss, metrics=["accuracy"])
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Flatten()(keras.layers.Conv2D(2, 3, name="conv_1")(inputs))

    class Scale(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1],), name="w")

        def call(self, x):
            return x * self.w

    return {
        **{name.rpartition(".")[2]: found for name, found in PUBLIC.items()},
        **{"keras": keras, "np": np, "tf": tf, "keras_dwd": keras_dwd, "Scale": Scale},
        **{"network": network, "model": model, "loss": loss, "build": build},
        **{"tasks": tasks, "validation": validation, "pretrained": network},
        **dict(zip(("x_test", "y_test"), validation[0], strict=True)),
        **dict(zip(("x", "y", "new_x", "new_y"), (*tasks[0], *tasks[1]), strict=True)),
        **{"inputs": inputs, "outputs": keras.layers.Dense(3, name="head")(x)},
        "scenario": keras_dwd.evaluation.Scenario.from_tasks([("one", *[tasks[0]] * 2)]),
    }


@pytest.mark.parametrize("name", sweep(DOCUMENTED, "keras_dwd.groupings.Partition"))
def test_the_example_of_a_public_name_runs(name, vocabulary):
    if name == "keras_dwd.HorovodCommunicator":
        pytest.importorskip("horovod")
    if name == "keras_dwd.evaluation.Scenario":
        vocabulary |= {f"{c}{i}": vocabulary[c] for c in "xy" for i in (1, 2)}
        vocabulary |= {"u1": vocabulary["x"], "u2": vocabulary["x"]}
        vocabulary |= {"v1": vocabulary["y"], "v2": vocabulary["y"]}
    if name == "keras_dwd.FileError":
        vocabulary["model"].save_weights("model.weights.h5")
    for example in examples_of(PUBLIC[name]):
        run(example, vocabulary, name)


# The site, and the package.


@pytest.mark.long
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "KroneckerFisher" in (tmp_path / "reference" / "fisher.html").read_text()


@pytest.mark.long
def test_the_wheel_works_without_the_source_tree(tmp_path):
    source, fresh, wheels = (tmp_path / name for name in ("source", "fresh", "wheels"))
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for part in ROOT.glob("keras_dwd*"):
        copy = shutil.copytree if part.is_dir() else shutil.copy
        copy(part, source / part.name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source]
    subprocess.run(build, check=True, capture_output=True)
    shutil.rmtree(source)

    # A new environment that has what the package needs, but not the package.
    venv.create(fresh, with_pip=False)
    python = fresh / "bin" / "python"
    packages = next(fresh.glob("lib/python*/site-packages"))
    (packages / "needed.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
    install = [*pip, "--python", python, "install", "--no-deps", *wheels.iterdir()]
    subprocess.run(install, check=True, capture_output=True)

    code = (
        "import keras, keras_dwd, pathlib; from keras_dwd import DWDModel; "
        "network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]); "
        "model = DWDModel.from_model(network); model.compile('adam', 'mse'); "
        "x = keras.ops.ones((8, 2)); model.consolidate(x, verbose=0); "
        "model.fit(x, x[:, :1], verbose=0); "
        "print(model.tasks_learned, keras_dwd.__file__, pathlib.Path(keras_dwd.__file__)"
        ".with_name('py.typed').exists())"
    )
    elsewhere = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    settings = {"cwd": tmp_path, "env": elsewhere, "check": True, "capture_output": True}
    done = subprocess.run([python, "-c", code], text=True, **settings)
    assert done.stdout.split() == ["1", str(packages / "keras_dwd" / "__init__.py"), "True"]
    command = subprocess.run([fresh / "bin" / "keras-dwd", "--help"], text=True, **settings)
    assert "ablate" in command.stdout
