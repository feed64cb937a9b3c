"""What `import keras_dwd` costs beyond importing Keras and TensorFlow, in seconds and modules.

Each round starts three processes, one after another: one that imports TensorFlow and Keras only,
one that imports the package too, and one that imports the evaluation as well. Figures are medians
over the rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from keras_dwd.evaluation.experiment import versions
from keras_dwd.files import write_json

PROTOCOL = (
    "Medians over {rounds} rounds of processes started one after another; seconds of the import "
    "statements alone, after files were read once."
)
IMPORTS = {
    "tensorflow and keras": "import tensorflow, keras",
    "and keras_dwd": "import tensorflow, keras, keras_dwd",
    "and keras_dwd.evaluation": "import tensorflow, keras, keras_dwd.evaluation",
}
CODE = (
    "import json, sys, time; start = time.perf_counter(); {imports}; "
    "print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))"
)


def measured(imports: str) -> tuple[float, set[str]]:
    """The seconds that imports take in a fresh process, and the modules that are loaded then."""
    command = [sys.executable, "-c", CODE.format(imports=imports)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, modules = json.loads(output.splitlines()[-1])
    return seconds, set(modules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/import.json")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    modules: dict[str, set[str]] = {}
    for _ in range(options.rounds + 1):
        for name, imports in IMPORTS.items():
            taken, modules[name] = measured(imports)
            seconds[name].append(taken)
    base = modules["tensorflow and keras"]
    rows = {
        name: {
            "seconds": statistics.median(seconds[name][1:]),
            "packages_added": sorted({m.partition(".")[0] for m in modules[name] - base}),
        }
        for name in IMPORTS
    }
    for name, row in rows.items():
        print(f"{name}: {row['seconds']:.2f} s, {len(row['packages_added'])} packages more")
    write_json(
        options.out,
        {
            "protocol": PROTOCOL.format(rounds=options.rounds),
            "versions": versions(),
            "imports": rows,
        },
    )


if __name__ == "__main__":
    main()
