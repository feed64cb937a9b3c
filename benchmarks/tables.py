"""Write the tables of the README from the files in `benchmarks/results`.

Usage: python benchmarks/tables.py [--check]
"""

import argparse
import json
import re
import sys
from pathlib import Path

from keras_dwd.evaluation.ablation import PARTS, compare
from keras_dwd.evaluation.report import COLUMNS, cell, method_cells

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def rows(lines):
    head, *body = lines
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def methods_table(results):
    """Methods × metrics, mean ± standard deviation over the seeds."""
    tuned = "tuning" in results
    lines = [["method", *(["λ"] if tuned else []), *COLUMNS.values()]]
    lines += [method_cells(name, method, tuned) for name, method in results["methods"].items()]
    protocol = results["protocol"]
    text = f"{protocol['title']}: {protocol['text']}"
    if tuned:
        tuning = results["tuning"]
        count = max(len(tried) for tried in tuning["validation_accuracy"].values())
        text += (
            f" λ is the best of {count} per method by the accuracy on "
            f"{tuning['validation_fraction']:.0%} of the training data held back, "
            f"seeds {', '.join(map(str, tuning['seeds']))}."
        )
    return f"{rows(lines)}\n\n{text}"


def untouched_table():
    """What `keras-dwd run --methods dwd-online` gives in each scenario, with nothing set."""
    shown = ("average_accuracy", "forgetting", "learning_accuracy")
    lines = [["scenario", "λ", *(COLUMNS[key] for key in shown)]]
    for path in sorted(RESULTS.glob("untouched_*.json")):
        results = json.loads(path.read_text())
        method, protocol = results["methods"]["dwd-online"], results["protocol"]
        cells = [cell(key, method["metrics"][key]) for key in shown]
        strength = method["settings"]["regularizer"]["strength"]
        lines.append([protocol["title"], f"{strength:g}", *cells])
    return (
        f"{rows(lines)}\n\nThree seeds each, under the protocols of the tables below, on test data."
    )


def ablation_table(results):
    """Parts × accuracy, and how much more or less that is than that of EWC."""
    lines = [["what is changed", "λ", "accuracy %", "forgetting %", "− EWC", "p"]]
    labels = {name: label for label, name in PARTS.items()}
    against = compare(results)
    for name, method in results["methods"].items():
        strength = method["settings"]["regularizer"]["strength"]
        keys = ("average_accuracy", "forgetting")
        cells = [cell(key, method["metrics"][key]) for key in keys]
        difference = [""] * 2
        if name in against:
            found = against[name]
            difference = [f"{100 * found['difference']:+.1f}", f"{found['p']:.3f}"]
        label = labels.get(name, f"({name})")
        lines.append([label, f"{strength:g}" if strength else "", *cells, *difference])
    protocol = results["protocol"]
    return f"{rows(lines)}\n\n{protocol['title']}: {protocol['text']}"


def cost_table(results):
    lines = [["network", "parameters", "DWD / fine-tuning", "task 20 / task 2", "state, bytes"]]
    for name, network in results["networks"].items():
        lines.append(
            [
                name,
                f"{network['parameters']:,}",
                *(_range(network[key]) for key in ("dwd_to_finetune", "task_20_to_task_2")),
                f"{network['state_bytes_per_parameter']:.1f} a parameter",
            ]
        )
    return f"{rows(lines)}\n\nMeasured as: {results['protocol']}."


def _range(found):
    low, high = found["range"]
    return f"{found['ratio']:.3f} ({low:.3f}–{high:.3f})"


def passes_table(results):
    kinds = ["exact diagonal", "Kronecker", "loop over examples"]
    lines = [["network", "parameters", *kinds]]
    for name, row in results["passes"].items():
        ratios = [f"{row[kind]['ratio']:.2f}" for kind in kinds]
        lines.append([name, f"{row['parameters']:,}", *ratios])
    return f"{rows(lines)}\n\nMeasured as: {results['protocol']}."


def groupings_table(results):
    lines = [["parameters", "seconds", "extra memory"]]
    for size, row in results["groupings"].items():
        lines.append([size, f"{row['seconds']:.1f}", f"{row['extra_gigabytes']:.2f} GB"])
    return f"{rows(lines)}\n\nMeasured as: {results['protocol']}."


# By what a file of results has.
TABLES = {
    "methods": methods_table,
    "networks": cost_table,
    "passes": passes_table,
    "groupings": groupings_table,
}


def fill(text):
    """The README with each `<!-- results: FILE -->` block made anew."""

    def block(match):
        name = match[1]
        if name == "untouched":
            return f"<!-- results: {name} -->\n{untouched_table()}\n<!-- end -->"
        results = json.loads((RESULTS / f"{name}.json").read_text())
        made = (
            ablation_table(results)
            if name.startswith("ablation_")
            else next(table(results) for key, table in TABLES.items() if key in results)
        )
        return f"<!-- results: {name} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- results: (\S+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    if options.check:
        sys.exit(0 if fill(text) == text else "README.md differs from benchmarks/results")
    readme.write_text(fill(text))


if __name__ == "__main__":
    main()
