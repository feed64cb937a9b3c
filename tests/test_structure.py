"""The floors of the package: a module imports only from its own floor and lower ones."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import keras_dwd

ROOT = Path(keras_dwd.__file__).parent

# From the ground up. A folder stands for all its modules that are not named themselves.
FLOORS = [
    ["version", "backend_check", "variables", "checks", "words", "keras_private"],
    ["files", "communicator", "state", "learner"],
    ["precision"],
    ["curvature"],
    ["groupings", "layers"],
    ["regularizer"],
    ["training"],
    ["task_graph", "distributed", "distillation"],
    ["training.step"],
    ["growing", "consolidation"],
    ["distributed.fitting"],
    ["hub_tasks", "saving", "wrapping", "export", "summary", "strength_check"],
    ["model"],
    ["stripping", "streams", "callbacks", "settings", "experimental"],
    ["evaluation"],
    ["plots"],
    ["page"],
    ["cli", "__main__"],
]


def floor_of(module: str) -> int:
    """The number of a module's floor, by the longest matching name."""
    fitting = {
        name: number
        for number, names in enumerate(FLOORS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    }
    assert fitting, f"{module} has no floor: give it one in FLOORS"
    return fitting[max(fitting, key=len)]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = (ROOT.parent / Path(*inner.split("."))).with_suffix(".py").exists()
                found.add(inner if is_module else str(node.module))
    return {n.removeprefix("keras_dwd.") for n in found if n.startswith("keras_dwd.")}


MODULES = {module_of(path): imports_of(path) for path in sorted(ROOT.rglob("*.py"))}


def test_no_module_imports_from_a_floor_above():
    climbing = [
        f"{module} imports {other}"
        for module, others in MODULES.items()
        if module  # the package itself is the roof
        for other in others
        if floor_of(other) > floor_of(module)
    ]
    assert not climbing


def test_no_imports_go_in_a_circle():
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in MODULES.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
    assert done == set(MODULES)


def test_the_check_sees_imports():
    assert {"consolidation", "regularizer"} <= MODULES["model"]
    assert "training.optimizer" in MODULES["consolidation"]
    with pytest.raises(AssertionError, match="has no floor"):
        floor_of("elsewhere")


def test_the_package_loads_nothing_of_the_experiments():
    code = (
        "import json, sys, keras, tensorflow; before = set(sys.modules); import keras_dwd; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    listed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    loaded = set(json.loads(listed.splitlines()[-1]))
    assert "keras_dwd.model" in loaded
    assert not loaded & {"typer", "rich", "tensorflow_datasets", "matplotlib", "horovod"}
    assert not [name for name in loaded if name.startswith("keras_dwd.evaluation")]


def test_a_star_import_brings_no_module():
    names: dict[str, object] = {}
    exec("from keras_dwd import *", names)
    assert names["DWDModel"] is keras_dwd.DWDModel
    assert "layers" not in names
    assert set(keras_dwd.__all__) <= names.keys()


@pytest.mark.parametrize("name", [*keras_dwd._MOVED, *keras_dwd._RENAMED])
def test_names_of_before_still_work_and_say_where_they_are(name):
    with pytest.warns(DeprecationWarning, match=f"`keras_dwd.{name}` is deprecated") as said:
        found = getattr(keras_dwd, name)
    new = str(said[0].message).split("use `keras_dwd.")[1].removesuffix("`.")
    place = keras_dwd
    for part in new.split("."):
        place = getattr(place, part)
    assert place is found


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'DWDModl'"):
        keras_dwd.DWDModl  # noqa: B018
