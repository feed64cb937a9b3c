"""Reads damaged and malicious files: each must be refused or be harmless.

Checkpoints, the consolidation state of saved models, folders of task graphs and files of results
are changed at random: either their bytes, or their content with a matching checksum. Reading one
must raise a `FileError` and leave the model unchanged, or give a state that fits the model. An
audit hook checks that nothing is written, nothing outside of the folder is read, and no code is
loaded or run. The rise of the peak memory is measured.

Usage: python benchmarks/fuzz.py [--files 10000] [--seed 0]
"""

import argparse
import collections
import json
import os
import random
import resource
import struct
import sys
import tempfile
import traceback
from pathlib import Path

import keras
import numpy as np

from keras_dwd import TaskGraph
from keras_dwd.evaluation import Scenario, run_sequence, runner, tuning
from keras_dwd.evaluation.checkpoint import Checkpoints
from keras_dwd.evaluation.experiment import versions
from keras_dwd.evaluation.matrix import AccuracyMatrix
from keras_dwd.files import FileError, read_arrays, write_arrays, write_json
from keras_dwd.variables import by_path

NAMES = (
    "../../x",
    "/etc/passwd",
    "learned/../x",
    "",
    "a" * 10_000,
    "weights/0",
    "learned/anchor|0",
    "grouping.a",
    "learned/grouping.a",
)
VALUES = (None, -1, 2**70, 1e308, "x", "../../x", [], {}, True, [[[]]], "A" * 100_000)
EVENTS = ("exec", "compile", "import", "pickle.find_class", "subprocess.Popen", "os.system")
EVENTS += ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.rmtree", "ctypes.dlopen")


class Watch:
    """Records what the process does between `start` and `stop` that reading a file must not do."""

    def __init__(self):
        self.folder, self.seen = None, []
        sys.addaudithook(self._note)

    def _note(self, event, args):
        if self.folder is None:
            return
        if event == "open" and isinstance(args[0], (str, bytes)):
            path, mode = os.path.realpath(os.fsdecode(args[0])), args[1] or "r"
            if not path.startswith(self.folder) or set(str(mode)) & set("wax+"):
                self.seen.append((event, path, mode))
        elif event in EVENTS:
            self.seen.append((event, *map(repr, args[:1])))

    def start(self, folder):
        self.folder, self.seen = os.path.realpath(folder), []

    def stop(self):
        self.folder = None
        return self.seen


def changed_bytes(rng, content):
    """Damage the bytes of a file; returns the kind of damage and the bytes."""
    content = bytearray(content)
    kind = rng.choice(("cut", "flip", "insert", "zero", "header", "garbage", "twice"))
    at = rng.randrange(len(content))
    if kind == "cut":
        del content[at:]
    elif kind == "flip":
        for _ in range(rng.choice((1, 1, 8, 100))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "insert":
        content[at:at] = rng.randbytes(rng.randrange(1, 100))
    elif kind == "zero":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif kind == "header":  # a header that declares more data than the file has
        big = rng.choice((2**31, 2**40, 2**62, 2**63, 2**64 - 1, -1))
        header = {"w": {"dtype": "F32", "shape": [big, 4], "data_offsets": [0, big]}}
        text = json.dumps({"__metadata__": {"about": "{}", "checksum": "0"}} | header).encode()
        length = rng.choice((len(text), big % 2**64))
        content = bytearray(struct.pack("<Q", length) + text)
    elif kind == "garbage":
        content = bytearray(rng.randbytes(rng.randrange(1000)))
    else:
        content = content * 2
    return kind, bytes(content)


def changed_json(rng, content):
    """A copy of a JSON value in which one value is replaced or removed."""
    content = json.loads(json.dumps(content))
    holder, place = content, None
    while isinstance(holder, (dict, list)) and holder:
        place = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if not isinstance(holder[place], (dict, list)) or rng.random() < 0.3:
            break
        holder = holder[place]
    if not isinstance(holder, (dict, list)) or not holder:
        return rng.choice(VALUES)
    if rng.random() < 0.3:
        del holder[place]
    else:
        holder[place] = rng.choice(VALUES)
    return content


def changed_arrays(rng, arrays):
    """A copy of arrays by name in which some arrays or names are wrong."""
    arrays = dict(arrays)
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice(sorted(arrays))
        array = arrays[name]
        kind = rng.choice(("drop", "rename", "shape", "dtype", "value", "swap", "bytes", "add"))
        if kind == "drop":
            del arrays[name]
        elif kind == "rename":
            arrays[rng.choice(NAMES)] = arrays.pop(name)
        elif kind == "shape":
            shapes = ((0,), (1,), (3, 1, 2), (1000, 1000), (*array.shape, 1), array.shape[1:])
            arrays[name] = np.ones(rng.choice(shapes), array.dtype)
        elif kind == "dtype":
            kinds = ("float64", "int64", "uint8", "bool", "float16")
            arrays[name] = array.astype(rng.choice(kinds))
        elif kind == "value":
            values = (0, 1, 255) if array.dtype.kind in "ub" else (np.nan, np.inf, -1, 1e38, 2**40)
            with np.errstate(all="ignore"):
                arrays[name] = np.full_like(
                    array, np.asarray(rng.choice(values)).astype(array.dtype)
                )
        elif kind == "swap":
            other = rng.choice(sorted(arrays))
            arrays[name], arrays[other] = arrays[other], array
        elif kind == "bytes" and array.size:
            raw = bytearray(array.tobytes())
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            if array.dtype.kind != "b":
                arrays[name] = np.frombuffer(raw, array.dtype).reshape(array.shape)
        else:
            arrays[rng.choice(NAMES)] = array
        if not arrays:
            break
    return arrays


class Subject:
    """A small model that has learned two tasks, and its files."""

    def __init__(self, folder):
        self.folder = folder
        rng = np.random.default_rng(0)
        tasks = []
        for t in range(2):
            x, y = rng.normal(size=(40, 6)).astype("float32"), rng.integers(0, 3, 40)
            tasks.append((f"task {t}", (x, y), (x, y)))

        def build(scenario):
            return keras.Sequential(
                [
                    keras.Input((6,)),
                    keras.layers.Dense(8, "tanh", name="hidden"),
                    keras.layers.BatchNormalization(name="norm"),
                    keras.layers.Dense(3, name="head"),
                ]
            )

        scenario = Scenario.from_tasks(tasks)
        self.run = folder / "run"
        result = run_sequence(
            build,
            scenario,
            "dwd-online+budget+graph",
            epochs=1,
            strength=1.0,
            checkpoint_dir=self.run,
        )
        self.model = result.model
        newest = max(self.run.glob("checkpoint-*"))
        for path in self.run.glob("checkpoint-*"):
            if path != newest:
                path.unlink()
        self.checkpoint = newest
        self.arrays, self.about = read_arrays(newest)
        self.learned = {
            name.removeprefix("learned/"): array
            for name, array in self.arrays.items()
            if name.startswith("learned/")
        }
        self.contents = {path: path.read_bytes() for path in self.run.rglob("*") if path.is_file()}
        self.results = folder / "results.json"
        summary = tuning.summarize([result])
        settings = {"regularizer": {"strength": 1.0}}
        self.results_content = {
            "protocol": {"title": "x"},
            "versions": versions(),
            "methods": {"dwd": {"settings": settings, **summary}},
            "tuning": {"seeds": [0], "validation_accuracy": {"dwd": {"1.0": 0.5}}},
        }

    def state(self):
        arrays = {f"weights/{p}": np.asarray(v) for p, v in by_path(self.model).items()}
        arrays |= {f"o/{i}": np.asarray(v) for i, v in enumerate(self.model.optimizer.variables)}
        return arrays | self.model._consolidation.state(self.model)

    def restore(self):
        self.model._consolidation.load(self.model, self.learned)
        for name, variable in by_path(self.model).items():
            position = list(by_path(self.model)).index(name)
            variable.assign(self.arrays[f"weights/{position}"])
        for i, variable in enumerate(self.model.optimizer.variables):
            variable.assign(self.arrays[f"optimizer/{i}"])
        for path, content in self.contents.items():
            path.write_bytes(content)

    # One method for each kind of file: it changes a file, and returns the kind of change and a
    # function that reads the file.

    def a_checkpoint(self, rng):
        if rng.random() < 0.5:
            kind, content = changed_bytes(rng, self.contents[self.checkpoint])
            self.checkpoint.write_bytes(content)
        elif rng.random() < 0.8:
            kind = "arrays"
            write_arrays(self.checkpoint, changed_arrays(rng, self.arrays), self.about)
        else:
            kind = "about"
            write_arrays(self.checkpoint, self.arrays, changed_json(rng, self.about))
        return kind, self._resume

    def _resume(self):
        empty = AccuracyMatrix(np.full((2, 2), np.nan), np.full(2, np.nan))
        result = runner.SequenceResult(empty, 0, [], [], 0, self.model)
        checkpoints = Checkpoints(self.run, self.about["settings"])
        restored, checkpoints.restore = checkpoints.restore, None
        checkpoints.restore = lambda model, check: restored(model, check, say=lambda line: None)
        runner._Progress(result, checkpoints, 1).restore()

    def a_state(self, rng):
        changed = changed_arrays(rng, self.learned)
        return "arrays", lambda: self.model._consolidation.load(self.model, changed)

    def a_graph(self, rng):
        path = rng.choice(sorted((self.run / "graph").iterdir()))
        if path.suffix == ".json" and rng.random() < 0.7:
            kind = "json"
            path.write_text(json.dumps(changed_json(rng, json.loads(self.contents[path]))))
        elif path.suffix == ".safetensors" and rng.random() < 0.5:
            kind = "arrays"
            write_arrays(path, changed_arrays(rng, read_arrays(path)[0]), {})
        else:
            kind, content = changed_bytes(rng, self.contents[path])
            path.write_bytes(content)

        def read():
            graph = TaskGraph(self.run / "graph", strength=1.0)
            graph.check(
                self.model, self.model.tasks_learned, self.model._consolidation.weights_digest
            )
            graph.anchor(graph.weights_to(self.model), by_path(self.model))

        return kind, read

    def results_of_methods(self, rng):
        if rng.random() < 0.5:
            kind = "json"
            text = json.dumps(changed_json(rng, self.results_content))
            self.results.write_text(text)
        else:
            kind, content = changed_bytes(rng, json.dumps(self.results_content).encode())
            self.results.write_bytes(content)
        return kind, lambda: tuning._earlier(self.results, self.results_content)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/fuzz.json")
    options = parser.parse_args()
    rng, watch = random.Random(options.seed), Watch()
    counts, failures = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(Path(folder))
        readers = ("a_checkpoint", "a_state", "a_graph", "results_of_methods")
        for reader in readers:  # warm up: later imports and traces would count as failures
            for _ in range(20):
                attempt(subject, reader, rng, watch)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for index in range(options.files):
            reader = readers[index % len(readers)]
            kind, outcome, wrong = attempt(subject, reader, rng, watch)
            counts[f"{reader}, {kind}: {outcome}"] += 1
            if wrong:
                failures.append({"reader": reader, "kind": kind, "wrong": wrong})
                print(json.dumps(failures[-1]), flush=True)
        rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    print(
        f"{options.files} files, {len(failures)} failures, peak memory rose by {rise / 1024:.0f} MB"
    )
    write_json(
        options.out,
        {
            "files": options.files,
            "seed": options.seed,
            "versions": versions(),
            "failures": failures,
            "outcomes": dict(sorted(counts.items())),
            "peak_memory_rise_mb": rise / 1024,
        },
    )
    sys.exit(bool(failures))


def attempt(subject, reader, rng, watch):
    """Change a file and read it; returns the kind of change, the outcome and any violations."""
    kind, read = getattr(subject, reader)(rng)
    before = {name: array.copy() for name, array in subject.state().items()}
    wrong = []
    watch.start(subject.folder)
    try:
        read()
        outcome = "read"
    except FileError:
        outcome = "refused"
    except BaseException as error:
        outcome = type(error).__name__
        wrong.append("".join(traceback.format_exception(error)[-3:]))
    finally:
        wrong += [f"{seen}" for seen in watch.stop()]
    after = subject.state()
    if outcome == "refused":
        odd = [n for n in {*before, *after} if not _same(before.get(n), after.get(n))]
        wrong += [f"{name} was changed" for name in odd]
    elif outcome == "read":
        shapes = {n: v.shape for n, v in by_path(subject.model).items()}
        for path, anchor in subject.model.regularizer.anchors.items():
            if tuple(anchor.shape) != tuple(shapes[path]):
                wrong.append(f"the anchor of {path} has the shape {anchor.shape}")
    subject.restore()
    return kind, outcome, wrong


def _same(a, b):
    return a is not None and b is not None and np.array_equal(a, b, equal_nan=True)


if __name__ == "__main__":
    main()
