"""The examples run: scripts, and the code cells of notebooks, in a short form."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from cases import sweep

EXAMPLES = Path(__file__).parent.parent / "examples"
# `tests/test_export.py` runs the export and looks at what it wrote.
SCRIPTS = [path.stem for path in sorted(EXAMPLES.glob("*.py")) if path.stem != "export_model"]
NOTEBOOKS = [path.stem for path in sorted(EXAMPLES.glob("*.ipynb"))]


@pytest.mark.parametrize("name", sweep(SCRIPTS, "custom_loop"))
def test_a_script_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name])
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "EPOCHS"):
        module.EPOCHS = 1
    module.main()
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", sweep(NOTEBOOKS))
def test_the_code_of_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for source in cells_of(name):
        short = re.sub(r"^epochs = \d+$", "epochs = 1", source, flags=re.M)
        exec(compile(short, name, "exec"), names)
    assert names["epochs"] == 1


def cells_of(name):
    """The code of a notebook, cell by cell."""
    content = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_has_no_outputs_and_can_be_parsed(name):
    content = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    for source in cells_of(name):
        compile(source, name, "exec")
