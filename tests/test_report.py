"""The figures of `keras_dwd.plots`, and the page of `keras-dwd report`."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from cases import DEFAULTS, blobs, compiled, sweep

pytest.importorskip("matplotlib")

from keras_dwd import plots
from keras_dwd.files import FileError
from keras_dwd.page import report, spread, write_report

HOSTILE = '<script>alert("1")</script> & $x_1$'


def results(tasks=3, seeds=2, names=("finetune", "ewc", HOSTILE, "joint"), tuned=True):
    """Results of made-up numbers, as `Experiment.compare` gives them."""
    rng = np.random.default_rng(0)
    methods = {}
    for name in names:
        matrices = rng.uniform(0.2, 1.0, (seeds, tasks, tasks))
        matrices[:, *np.triu_indices(tasks, 2)] = np.nan
        metrics = {
            key: rng.uniform(0, 1, seeds)
            for key in ("average_accuracy", "forgetting", "learning_accuracy", "seconds")
        }
        methods[name] = {
            "settings": {"regularizer": {"strength": 0.0 if name == "finetune" else 30.0}},
            "metrics": {
                key: {"mean": v.mean(), "std": v.std(), "per_seed": v.tolist()}
                for key, v in metrics.items()
            },
            "train_seconds": rng.uniform(0, 1, (seeds, tasks)).tolist(),
            "boundary_seconds": rng.uniform(0, 1, (seeds, tasks)).tolist(),
            "accuracy_matrices": [
                [[None if np.isnan(a) else a for a in row] for row in m] for m in matrices
            ],
            "consolidation": retained() if name == HOSTILE else {},
        }
    made = {
        "protocol": {
            "title": f"made up {HOSTILE}",
            "text": "no training",
            "tasks": [f"{HOSTILE} {t}" for t in range(tasks)],
        },
        "versions": {"keras_dwd": "0"},
        "methods": methods,
    }
    if tuned:
        made["tuning"] = {"validation_accuracy": {"ewc": {"1.0": 0.4, "10.0": 0.6, "100.0": 0.5}}}
    return json.loads(json.dumps(made))


def retained():
    return {
        "layers": [{"name": HOSTILE, "parameters": 5, "share": 1.0, "reach": None}],
        "groups": [
            {"group": 0, "size": 3, "strength": 1.5, "layers": {HOSTILE: 3}},
            {"group": 2, "size": 2, "strength": 0.5, "layers": {HOSTILE: 2, "head": 4}},
        ],
        "histograms": {"per_decade": 4, "first": -8, "counts": {"0": [1, 2], "2": [0, 2]}},
        "similarity": [[1.0, 0.4], [0.4, 1.0]],
        "held": 5,
        "trainable": 9,
        "strength": 30.0,
        "bytes": 60,
        "pull": "part of the gradient",
        "directions": 0.2,
    }


# Figures show the numbers that they are given.


def test_accuracy_over_time():
    given = results()
    drawn = plots.accuracy_over_time(given, ["ewc"])
    matrices = np.array(given["methods"]["ewc"]["accuracy_matrices"], "float64")
    for task, axis in enumerate(drawn.axes):
        (line,) = axis.lines
        np.testing.assert_allclose(line.get_ydata(), 100 * matrices[:, task:, task].mean(0))
        assert list(line.get_xdata()) == list(range(task + 1, 4))


def test_the_matrix_and_the_methods():
    given = results()
    (axis, *_) = plots.accuracy_matrix(given, "ewc").axes
    matrices = np.array(given["methods"]["ewc"]["accuracy_matrices"], "float64")
    shown = sorted(float(text.get_text()) for text in axis.texts)
    expected = 100 * matrices.mean(0)[np.tril_indices(3)]
    np.testing.assert_allclose(shown, sorted(np.round(expected)))
    (axis,) = plots.method_comparison(given, "forgetting").axes
    widths = [bar.get_width() for bar in axis.patches]
    means = [100 * m["metrics"]["forgetting"]["mean"] for m in given["methods"].values()]
    np.testing.assert_allclose(widths, means)
    assert [len(line.get_xdata()) for line in axis.lines[:4]] == [2] * 4


def test_the_strengths_and_the_one_chosen():
    (axis,) = plots.strength_curve(results()).axes
    curve, ring = axis.lines
    np.testing.assert_allclose(curve.get_ydata(), [40, 60, 50])
    assert list(ring.get_xdata()) == [10.0]
    with pytest.raises(ValueError, match="no λ that were tried"):
        plots.strength_curve(results(tuned=False))


def test_what_a_model_retains():
    model = compiled(strength=3.0, **DEFAULTS)
    model.fit(*blobs(), verbose=0)
    with pytest.raises(ValueError, match="no layer is held"):
        plots.layer_importance(model)
    model.consolidate(*blobs(), verbose=0)
    (axis,) = plots.layer_importance(model).axes
    shares = [100 * layer.share for layer in model.consolidation.layers]
    np.testing.assert_allclose([bar.get_width() for bar in axis.patches], shares)
    strengths, histogram = plots.groups(model.consolidation).axes
    np.testing.assert_allclose(
        [bar.get_width() for bar in strengths.patches], [g["strength"] for g in model.groups]
    )
    counted = sum(bar.get_height() for bar in histogram.patches)
    assert counted == pytest.approx(sum(g["size"] for g in model.groups), abs=0.5)
    (axis,) = plots.layers_by_groups(model.consolidation.as_dict()).axes
    layers = {name for group in model.groups for name in group["layers"]}
    assert {label.get_text() for label in axis.get_yticklabels()} == layers
    with pytest.raises(ValueError, match="no task graph"):
        plots.task_graph(model)
    with pytest.raises(ValueError, match="`retained` must be"):
        plots.groups({"a": 1})


def test_a_task_graph():
    graph, matrix = plots.task_graph(retained()).axes
    assert [text.get_text() for text in graph.texts] == ["1", "2"]
    assert [text.get_text() for text in matrix.texts] == ["1", "0.4", "0.4", "1"]


# The page.


class Page(HTMLParser):
    """Collects the tags, the texts and all addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_self_contained_and_escapes_what_is_in_the_file():
    page = Page(report(results()))
    assert "script" not in page.tags
    assert any(HOSTILE in text for text in page.texts)
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.findall(r"url\((?!#)", report(results()))
    assert page.tags.count("figure") == 2 + 1 + 3 + 1 + 4


def test_the_figures_of_the_page_are_xml_and_have_the_colours_of_its_text():
    text = report(results())
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 11
    for drawing in drawings:
        ET.fromstring(drawing.replace("xlink:", ""))
        assert "var(--ink)" in drawing
        assert "#3d3d3d" not in drawing
        assert "<rdf" not in drawing


def test_the_page_has_the_numbers():
    given = results()
    texts = Page(report(given)).texts
    accuracy = given["methods"]["ewc"]["metrics"]["average_accuracy"]
    assert f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f}" in texts
    assert "10" in texts  # λ chosen
    assert any("5 of 9 trainable parameters are held with λ = 30" in text for text in texts)


def test_one_seed_has_no_deviation():
    assert spread({"mean": 0.5, "std": 0.0, "per_seed": [0.5]}, 100) == "50.0"
    texts = Page(report(results(seeds=1))).texts
    assert not any("±" in text for text in texts)


@pytest.mark.long
def test_several_files_are_on_one_page(tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, count in zip(files, (1, 14), strict=True):
        file.write_text(json.dumps(results(tasks=count, names=("finetune", "dwd"), tuned=False)))
    write_report(tmp_path / "report.html", files)
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("h1") == page.tags.count("section") == 2
    assert page.tags.count("nav") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("methods"),
        lambda r: r.update(methods={}),
        lambda r: r["methods"]["ewc"].update(accuracy_matrices=[[[1.0]]]),
        lambda r: r["methods"]["ewc"]["metrics"]["forgetting"].update(mean="<b>"),
        lambda r: r["methods"]["ewc"].update(settings=3),
        lambda r: r["tuning"].update(validation_accuracy={"ewc": {"x": 1}}),
        lambda r: r["methods"][HOSTILE]["consolidation"].update(groups=[{"strength": "x"}]),
        lambda r: r["methods"]["ewc"].update(train_seconds=[["x"]]),
        lambda r: r.update(versions=3),
    ],
)
def test_what_is_no_file_of_results_is_refused(change, tmp_path):
    given = results(names=("ewc", HOSTILE))
    change(given)
    (tmp_path / "r.json").write_text(json.dumps(given))
    with pytest.raises(FileError):
        write_report(tmp_path / "report.html", tmp_path / "r.json")
    assert not (tmp_path / "report.html").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.json"):
        report(tmp_path / "no.json")
    with pytest.raises(ValueError, match="at least one"):
        report([])


@pytest.mark.parametrize("size", sweep(["1100,900", "390,844"], "390,844"))
def test_the_page_renders_in_a_browser(size, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    write_report(tmp_path / "report.html", results())
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={size}",
    ]
    page = f"file://{tmp_path / 'report.html'}"
    found = subprocess.run(
        [*command, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert found.count("<svg") == 11
    subprocess.run(
        [*command, f"--screenshot={tmp_path / 'page.png'}", page],
        capture_output=True,
        timeout=120,
        check=True,
    )
    from matplotlib.image import imread

    shown = imread(tmp_path / "page.png")[..., :3]
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 50  # neither blank nor an error
