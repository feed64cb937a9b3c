"""Compares methods on sequences of text tasks by ROUGE-L, as `benchmarks/retention.py` on images.

λ of each method is tuned on validation data with the same number of values, the same seed and the
same epochs; the best one is then measured on the test data. Results that a file of an earlier run
with the same protocol and versions has are reused unless `--fresh` is given, so that an interrupted
run goes on where it was.

Usage: python benchmarks/text.py --data-dir DIR [--sequence NAME ...] [--methods NAME ...]
    [--seeds N] [--processes N] [--cache-dir DIR]
"""

import argparse
import os
from pathlib import Path

from rich.console import Console

from keras_dwd.evaluation.methods import method_named
from keras_dwd.evaluation.report import table
from keras_dwd.evaluation.tuning import UNTOUCHED, tune

SEQUENCES = {
    "summarize_translate": "text:summarize,translate",
    "code_qa": "text:code,qa",
    "translate_summarize": "text:translate,summarize",
    "qa_code": "text:qa,code",
    "four_tasks": "text:summarize,translate,code,qa",
}
METHODS = (
    "finetune",
    "ewc",
    f"dwd{UNTOUCHED}",
    "dwd",
    f"dwd+distill{UNTOUCHED}",
    "dwd+distill",
    "joint",
)
# The best values of preliminary runs lie inside. The same number of values for all, over the same
# range of factors: those of DWD are relative to the margins.
GRIDS = {
    "ewc": (1e2, 1e3, 1e4, 1e5, 1e6),
    "dwd": (2.0, 20.0, 200.0, 2e3, 2e4),
    "distill": (0.2, 2.0, 20.0, 200.0, 2e3),
}


def values_of(method):
    """The values of λ to try for a method."""
    configuration = method_named(method).configuration(1.0)
    if "distillation" in configuration:  # which needs a weaker pull
        return GRIDS["distill"]
    return GRIDS["dwd" if "rank" in configuration["fisher"] else "ewc"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--sequence", choices=SEQUENCES, nargs="+", default=list(SEQUENCES)[:2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.sequence:
        results = tune(
            {
                "scenario": SEQUENCES[name],
                "data_dir": options.data_dir,
                "cache_dir": options.cache_dir,
            },
            options.methods,
            grid=values_of,
            seeds=options.seeds,
            out=options.out / f"text_{name}.json",
            processes=options.processes,
            fresh=options.fresh,
            say=lambda line, name=name: print(f"{name}: {line}", flush=True),
        )
        Console().print(table(results))


if __name__ == "__main__":
    main()
