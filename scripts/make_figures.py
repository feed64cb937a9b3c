"""Draws the figures of the README and docs/ from the files in `benchmarks/results`.

Usage: python scripts/make_figures.py [--out FOLDER]
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# On a transparent ground, text and lines that can be read in light and dark.
TEXT = "#7d858f"
COLOURS = ("#4c8dd6", "#e08a3c", "#3fa373", "#c9609b", "#8f7fd6")
STYLE = {
    "svg.hashsalt": "keras_dwd",  # the same figures give the same files
    "svg.fonttype": "path",
    "font.size": 11,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "axes.titlecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": TEXT,
    "grid.alpha": 0.2,
}


def read(name):
    """The content of a results file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def while_learning(path):
    """Accuracy on every task while five tasks are learned: fine-tuning, and DWD."""
    results = read("run_default")
    titles = {"finetune": "Fine-tuning", "dwd": "DWD"}
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.1), sharey=True, layout="constrained")
    for axis, (method, title) in zip(axes, titles.items(), strict=True):
        matrices = np.array(results["methods"][method]["accuracy_matrices"], dtype=float)
        mean, spread = 100 * matrices.mean(0), 100 * matrices.std(0)
        count = len(mean)
        for task, colour in zip(range(count), COLOURS, strict=False):
            learned = np.arange(task, count)
            line, band = mean[task:, task], spread[task:, task]
            axis.fill_between(learned + 1, line - band, line + band, color=colour, alpha=0.2, lw=0)
            axis.plot(learned + 1, line, "o-", color=colour, lw=2, ms=5, label=f"task {task + 1}")
        axis.set(title=title, xlabel="tasks learned", xticks=range(1, count + 1), ylim=(0, 101))
    axes[0].set_ylabel("accuracy %")
    legend = axes[0].legend(loc="lower left", frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(TEXT)
    _save(figure, path)


def by_strength(path):
    """Validation accuracy of DWD and EWC by λ, relative to the best, in each scenario."""
    titles = {
        "permuted-digits": "permuted digits, 5",
        "split-digits": "split digits, 5 (one head)",
        "permuted-mnist": "permuted MNIST, 10",
        "split-cifar100": "Split-CIFAR-100, 10",
    }
    panels = {"dwd-online": "DWD", "ewc": "EWC"}
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.1), sharey=True, layout="constrained")
    for axis, (method, title) in zip(axes, panels.items(), strict=True):
        for (scenario, label), colour in zip(titles.items(), COLOURS, strict=False):
            tried = read(f"retention_{scenario}")["tuning"]["validation_accuracy"][method]
            points = sorted((float(strength), 100 * value) for strength, value in tried.items())
            strengths, accuracy = zip(*points, strict=True)
            below = np.array(accuracy) - max(accuracy)
            axis.plot(strengths, below, "o-", color=colour, lw=2, ms=4, label=label)
        axis.set(title=title, xlabel="strength λ", xscale="log", ylim=(-20, 1))
    axes[0].axvline(200, color=TEXT, ls=":", lw=1.5)
    axes[0].annotate("default", (200, -19.3), xytext=(5, 0), textcoords="offset points")
    axes[0].set_ylabel("points below the best λ")
    legend = axes[1].legend(loc="lower right", frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(TEXT)
    _save(figure, path)


def _save(figure, path):
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    # matplotlib ends lines with blanks
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


FIGURES = {"while_learning.svg": while_learning, "by_strength.svg": by_strength}


def main():
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            draw(options.out / name)


if __name__ == "__main__":
    main()
