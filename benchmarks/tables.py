"""Updates the tables in the README and docs/ from the files in `benchmarks/results`.

Usage: python benchmarks/tables.py [--check]
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

from misuse import CASES
from retention import DEFAULT, METHODS, SCENARIOS

from keras_dwd.evaluation.ablation import PARTS, compare
from keras_dwd.evaluation.metric import primary
from keras_dwd.evaluation.report import COLUMNS, cell, columns, method_cells

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEY = "average_accuracy"


def rows(lines):
    head, *body = lines
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def methods_table(results):
    """Table of methods and metrics, mean ± standard deviation over the seeds."""
    tuned = "tuning" in results
    headings = columns(results["protocol"])
    lines = [["method", *(["λ"] if tuned else []), *headings.values()]]
    lines += [
        method_cells(name, method, tuned, headings)
        for name, method in sorted(results["methods"].items(), key=lambda item: _place(item[0]))
        if name not in PARTS.values() or name in (*METHODS, DEFAULT)
    ]
    protocol = results["protocol"]
    text = f"{protocol['title']}: {protocol['text']}"
    if tuned:
        tuning = results["tuning"]
        metric = primary(protocol).name
        count = max(len(tried) for tried in tuning[f"validation_{metric}"].values())
        held_back = f"{tuning['validation_fraction']:.0%} of the training data held back"
        if protocol["scenario"].startswith("text:"):  # whose tasks may have files for it
            held_back = "validation data"
        seeds = (
            f"seed{'s' if len(tuning['seeds']) > 1 else ''} {', '.join(map(str, tuning['seeds']))}"
        )
        text += f" λ is the best of {count} per method by the {metric} on {held_back}, {seeds}."
    return f"{rows(lines)}\n\n{text}"


def _place(name):
    order = ("finetune", *METHODS, DEFAULT)
    return order.index(name) if name in order else len(order)


def untouched_table():
    """Table of `DWDModel` with its defaults in each scenario, next to the tuned methods."""
    shown = ("average_accuracy", "forgetting", "learning_accuracy")
    tuned = ("ewc", "dwd-online", "dwd")
    lines = [
        ["scenario", *(COLUMNS[k] for k in shown), *(f"{m}, tuned: accuracy %" for m in tuned)]
    ]
    for results in of_all_scenarios().values():
        methods = results["methods"]
        if DEFAULT not in methods:
            continue
        cells = [cell(key, methods[DEFAULT]["metrics"][key]) for key in shown]
        cells += [
            cell(shown[0], methods[m]["metrics"][shown[0]]) if m in methods else "" for m in tuned
        ]
        lines.append([results["protocol"]["title"], *cells])
    return (
        f"{rows(lines)}\n\nThree seeds each, under the protocols of the tables below, on test data."
    )


def ablation_table():
    """Table of parts and scenarios: accuracy, and its difference to the accuracy of tuned EWC."""
    scenarios = of_all_scenarios()
    lines = [["what is changed", *scenarios]]
    comparisons = {name: compare(results) for name, results in scenarios.items()}
    named = {"(fine-tuning)": "finetune", "(EWC, λ tuned)": "ewc"} | PARTS | {"(joint)": "joint"}
    for label, method in named.items():
        cells = []
        for scenario, results in scenarios.items():
            row = results["methods"].get(method)
            text = "" if row is None else cell(KEY, row["metrics"][KEY])
            if row is not None and method in comparisons[scenario]:
                difference = comparisons[scenario][method]
                text += f" ({100 * difference['difference']:+.1f}, p {difference['p']:.3f})"
            cells.append(text)
        if any(cells):
            lines.append([label, *cells])
    return (
        f"{rows(lines)}\n\nAverage accuracy in percent, mean ± std over three seeds; in "
        "parentheses the difference to EWC and the p of a paired t-test. Under the protocols of "
        "the tables above; λ is the default, 200, where it does not say that it was tuned."
    )


def seeds_table():
    """Table of DWD with its defaults against tuned EWC over more seeds than the other tables."""
    shown = ("finetune", "ewc", "dwd-online", "joint")
    lines = [["scenario", "seeds", *shown, "dwd-online − ewc"]]
    for path in sorted(RESULTS.glob("seeds_*.json")):
        results = json.loads(path.read_text())
        methods = results["methods"]
        against = compare(results)["dwd-online"]
        lines.append(
            [
                results["protocol"]["title"],
                str(len(results["protocol"]["seeds"])),
                *(cell(KEY, methods[m]["metrics"][KEY]) for m in shown),
                f"{100 * against['difference']:+.2f} ± {100 * against['std']:.2f}, "
                f"p {against['p']:.3f}",
            ]
        )
    return (
        f"{rows(lines)}\n\nAverage accuracy in percent on the test data, mean ± std; EWC with the "
        "λ tuned above, DWD with its default; the p of a paired t-test."
    )


def summary_table():
    """Table of the accuracy of few methods in each scenario, for the README."""
    shown = {
        "finetune": "fine-tuning",
        "ewc": "EWC, λ tuned",
        DEFAULT: "DWD, nothing set",
        "joint": "all tasks at once",
    }
    lines = [["tasks", *shown.values()]]
    for results in of_all_scenarios().values():
        methods = results["methods"]
        cells = [cell(KEY, methods[name]["metrics"][KEY]) for name in shown]
        lines.append([results["protocol"]["title"], *cells])
    return (
        f"{rows(lines)}\n\nAverage accuracy in percent on the test data of all tasks after the "
        "last, mean ± std over three seeds."
    )


def misuse_table():
    """Table of ways to call `consolidate`, and what they lead to."""
    results = json.loads((RESULTS / "misuse.json").read_text())
    lines = [["`consolidate` is called", "old data, %", "new data, %"]]
    lines += [[c, *_old_and_new(results["misuse"][c])] for c in CASES if c in results["misuse"]]
    return f"{rows(lines)}\n\nMeasured as: {results['protocol']}."


def examples_table():
    """Table of the numbers of examples given to `consolidate`."""
    results = json.loads((RESULTS / "misuse.json").read_text())
    how = {"inputs": "inputs alone", "labelled": "with labels"}
    lines = [["examples", *(f"{of} data, {h}, %" for h in how.values() for of in ("old", "new"))]]
    for count, row in results["examples"].items():
        if row:
            lines.append([count, *(text for key in how for text in _old_and_new(row.get(key)))])
    if len(lines) == 1:
        return "Not measured yet."
    return f"{rows(lines)}\n\nMeasured as: {results['protocol']}."


def _old_and_new(row):
    return [cell("accuracy", row[name]) if row else "" for name in ("old", "new")]


def of_all_scenarios():
    """The results of `benchmarks/retention.py`, by scenario."""
    paths = {name: RESULTS / f"retention_{name}.json" for name in SCENARIOS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def cost_table(results):
    ratios = {
        "dwd_to_finetune": "DWD / fine-tuning",
        "distillation_to_dwd": "with / without distillation",
        "task_20_to_task_2": "task 20 / task 2",
    }
    lines = [["network", "parameters", *ratios.values(), "bytes of state a parameter"]]
    for name, network in results["networks"].items():
        lines.append(
            [
                name,
                f"{network['parameters']:,}",
                *(_range(network[key]) if key in network else "" for key in ratios),
                "{:.1f}, in task 20 {:.1f}".format(*network["state_bytes_per_parameter"]),
            ]
        )
    return f"{rows(lines)}\n\nMeasured as: {results['protocol']}."


def _range(measured):
    low, high = measured["range"]
    return f"{measured['ratio']:.3f} ({low:.3f}–{high:.3f})"


def startup_table(results):
    """Table of networks and phases: seconds of a `DWDModel`, in parentheses of plain Keras."""
    networks = results["startup"]
    names = list(next(iter(networks.values()))["DWD"])
    lines = [["network", *names, "in all, DWD / Keras"]]
    for network, row in networks.items():
        cells = [f"{row['DWD'][n]:.1f} ({row['Keras'][n]:.1f})" for n in names]
        ratio = sum(row["DWD"].values()) / sum(row["Keras"].values())
        lines.append([network, *cells, f"{ratio:.2f}"])
    return (
        f"{rows(lines)}\n\nSeconds of a `DWDModel`, in parentheses those of plain Keras. Measured "
        f"as: {results['protocol']}."
    )


def memory_table(results):
    """Two tables: bytes of state after some tasks, and peaks of a training step and a pass."""
    tasks = list(next(iter(results["states"].values()))["bytes_per_parameter"])
    states = [["network", "parameters", *(f"bytes a parameter, {t} tasks" for t in tasks)]]
    for name, row in results["states"].items():
        found = [f"{row['bytes_per_parameter'][t]:.1f}" for t in tasks]
        states.append([name, f"{row['parameters']:,}", *found])
    states[0][2] = states[0][2].removesuffix("s")
    peaks = [["layer", "training step, Keras", "pass of a `DWDModel`"]]
    for name, row in results["peaks"].items():
        peaks.append([name, f"{row['step']:.0f} MB", f"{row['pass']:.0f} MB"])
    return f"{rows(states)}\n\n{rows(peaks)}\n\nMeasured as: {results['protocol']}."


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


def picks_table(results):
    """Table of rules for picking a grouping at each boundary, with their accuracy."""
    arms = results["arms"]
    lines = [["at each boundary", "accuracy %", "taken most often"]]
    for rule, row in results["rules"].items():
        picks = Counter(arms[pick] for run in row["picks"] for pick in run)
        most = ", ".join(f"{arm} ({n / picks.total():.0%})" for arm, n in picks.most_common(3))
        lines.append([rule, cell(KEY, row[KEY]), "" if rule in arms else most])
    return f"{rows(lines)}\n\nMeasured as: {results['protocol']}."


def faults_table():
    """Table of the results for killed runs and damaged files, and of the cost of checkpoints."""
    crash, fuzz, cost = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("crash", "fuzz", "checkpoint_cost")
    )
    refused = sum(n for outcome, n in fuzz["outcomes"].items() if outcome.endswith("refused"))
    kills = len(crash["kills"])
    lines = [
        ["what was done", "how it ended"],
        [
            f"{kills} runs of three tasks, killed at random moments and gone on with",
            f"{crash['identical']} of {kills} bit-identical to the undisturbed run",
        ],
        [
            f"{fuzz['files']:,} files damaged, or made to do harm, and read",
            f"{refused:,} refused, what the others hold fits the model; {len(fuzz['failures'])} "
            f"failures; memory {fuzz['peak_memory_rise_mb']:+.0f} MB",
        ],
        [
            f"a checkpoint after each epoch, {cost['largest_megabytes']:.1f} MB",
            f"{cost['share_of_run']:.1%} of the run's time, {1000 * cost['median_seconds']:.0f} ms "
            "each",
        ],
    ]
    return (
        f"{rows(lines)}\n\nKilled: {crash['protocol']}; methods "
        f"{', '.join(sorted({kill['method'] for kill in crash['kills']}))}. Files: checkpoints, "
        "consolidation state, task graphs, results; a failure is any other error, anything written "
        "or opened elsewhere, code that is loaded. Checkpoints: split:cifar100, `cpu` profile."
    )


OF_ALL = {
    "summary": summary_table,
    "misuse": misuse_table,
    "examples": examples_table,
    "untouched": untouched_table,
    "seeds": seeds_table,
    "ablation": ablation_table,
    "faults": faults_table,
}
# Functions that make a table, by the key that identifies a kind of results file.
TABLES = {
    "methods": methods_table,
    "networks": cost_table,
    "startup": startup_table,
    "peaks": memory_table,
    "passes": passes_table,
    "groupings": groupings_table,
    "rules": picks_table,
}


def fill(text):
    """The text of a page with each `<!-- results: FILE -->` block updated."""

    def block(match):
        name = match[1]
        if name in OF_ALL:
            return f"<!-- results: {name} -->\n{OF_ALL[name]()}\n<!-- end -->"
        results = json.loads((RESULTS / f"{name}.json").read_text())
        content = next(table(results) for key, table in TABLES.items() if key in results)
        return f"<!-- results: {name} -->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- results: (\S+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def pages():
    """The README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args()
    outdated = {
        page: text for page in pages() if (text := fill(page.read_text())) != page.read_text()
    }
    if options.check:
        names = ", ".join(str(page.relative_to(ROOT)) for page in outdated)
        sys.exit(f"{names}: not as in benchmarks/results" if outdated else 0)
    for page, text in outdated.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
