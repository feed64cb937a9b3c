"""Tasks of text: prompts and what is to be written, read from JSONL files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PARTS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "dev"),
    "test": ("test",),
}
"""The words in the names of files, by part; the first that exists is taken."""


@dataclass(frozen=True)
class Kind:
    """A kind of task.

    Attributes:
        template: The prompt that the model gets, with names of the row's entries in braces.
        files: What names of files begin with, the preferred first.
        metrics: Names in `metrics.METRICS`, beside ROUGE-L.
    """

    template: str
    files: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()


KINDS = {
    "summarize": Kind("summarize: {prompt}", ("summarization", "summarize")),
    "translate": Kind("translate: {prompt}", ("translation", "translate"), ("chrf", "bleu")),
    "code": Kind("code: {prompt}\n{test}", ("code",), ("passed",)),
    "qa": Kind("answer: {prompt}", ("qa_context", "qa"), ("exact_match", "f1")),
}
"""Known kinds of tasks by name; each is also short for the first such task of a folder."""


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        prompt: What the model gets, as the template has made it.
        target: What it learns to write.
        references: All texts that are right; the target at least.
        program: Code that comes before what the model writes, for a task of code.
        tests: Code that raises if the program is wrong; empty if there is none.
        source: The prompt before the template.
    """

    prompt: str
    target: str
    references: tuple[str, ...]
    program: str = ""
    tests: str = ""
    source: str = ""


@dataclass(frozen=True)
class TextTask:
    """A task of text.

    Attributes:
        name: Name in reports.
        kind: Its kind; one of `KINDS` or the name itself.
        train: Rows to train on.
        validation: Rows to choose settings by; empty if there is no such file.
        test: Rows to measure on.
        metrics: Names in `metrics.METRICS`, beside ROUGE-L.
    """

    name: str
    kind: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    metrics: tuple[str, ...] = ()

    def limited(self, train: int, test: int) -> tuple["TextTask", tuple[Row, ...]]:
        """The task with the first rows alone, and the training rows that it leaves over.

        At most four fifths of the training rows are kept, so that some are left to pretrain on.

        Args:
            train: The largest number of training rows.
            test: The largest number of rows for validation and for tests, of each.
        """
        count = min(train, max(1, 4 * len(self.train) // 5))
        smaller = replace(
            self,
            train=self.train[:count],
            validation=self.validation[:test],
            test=self.test[:test],
        )
        return smaller, self.train[count:]


def load(name: str, data_dir: Path | None = None) -> TextTask:
    """Read a task.

    Its files are `NAME/PART.jsonl`, a folder for each task, or `NAME.PART.jsonl`, with PART one of
    `train`, `validation` (or `val`, `dev`) and `test`. Each line is a JSON object with `prompt` (or
    `input`), `target`, and where it applies `references` and, for code, `test_list`, or `test` and
    `entry_point`. A folder may have a file `template.txt` with a prompt such as
    `translate: {prompt}`.

    Args:
        name: A name in `data_dir`, a path, or one of `KINDS`: the first task of this kind.
        data_dir: The folder of the tasks; the current folder by default.

    Raises:
        FileNotFoundError: If there is no such task; lists those that there are.
        ValueError: If a line is not as above.
    """
    folder = Path(data_dir or ".").expanduser()
    stem = _stem(name, folder)
    kind = name if name in KINDS else _kind_of(stem.name)
    known = KINDS.get(kind)
    template = known.template if known else f"{stem.name}: {{prompt}}"
    own = stem / "template.txt"
    if own.is_file():
        template = own.read_text(encoding="utf-8").rstrip("\n")
    rows = {}
    for part in PARTS:
        path = _file(stem, part)
        if path is None and part != "validation":
            raise FileNotFoundError(f"The task {name!r} has no file {part}.jsonl at {str(stem)!r}.")
        rows[part] = () if path is None else _read(path, template)
    return TextTask(stem.name, kind, **rows, metrics=known.metrics if known else ())


def names_in(data_dir: Path) -> list[str]:
    """The names of all tasks in a folder that have training and test data."""
    stems = {path.name.partition(".")[0] for path in data_dir.glob("*.jsonl")}
    stems |= {path.parent.name for path in data_dir.glob("*/*.jsonl")}
    return sorted(
        name
        for name in stems
        if all(_file(data_dir / name, part) is not None for part in ("train", "test"))
    )


def _stem(name: str, folder: Path) -> Path:
    """The path of a task's folder, or of its files up to the part's name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"The data directory {str(folder)!r} does not exist.")
    for stem in (folder / name, Path(name).expanduser()):
        if name and any(_file(stem, part) for part in PARTS):
            return stem
    available = names_in(folder)
    for beginning in KINDS[name].files if name in KINDS else ():
        matches = [other for other in available if other.startswith(beginning)]
        if matches:
            return folder / matches[0]
    raise FileNotFoundError(
        f"There is no task {name!r} in {str(folder)!r}. Tasks with training and test data there: "
        f"{', '.join(available) or 'none'}."
    )


def _kind_of(name: str) -> str:
    beginnings = {b: kind for kind, known in KINDS.items() for b in known.files}
    return next((kind for b, kind in beginnings.items() if name.startswith(b)), name)


def _file(stem: Path, part: str) -> Path | None:
    for word in PARTS[part]:
        for path in (stem / f"{word}.jsonl", stem.with_name(f"{stem.name}.{word}.jsonl")):
            if path.is_file():
                return path
    return None


def _read(path: Path, template: str) -> tuple[Row, ...]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(_row(json.loads(line), template))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"Line {number} of {str(path)!r} must be a JSON object with `prompt` (or "
                    f"`input`) and `target`: {error!r}"
                ) from None
    if not rows:
        raise ValueError(f"{str(path)!r} has no examples.")
    return tuple(rows)


def _row(entry: Mapping[str, Any], template: str) -> Row:
    prompt, target = (
        _text(entry["prompt"] if "prompt" in entry else entry["input"]),
        _text(entry["target"]),
    )
    listed = [_text(test) for test in entry.get("test_list", ())]
    tests = "\n".join(listed)
    if "entry_point" in entry:
        tests = f"{_text(entry['test'])}\ncheck({entry['entry_point']})"
    fields = {**entry, "prompt": prompt, "test": listed[0] if listed else ""}
    references = tuple(_text(text) for text in entry.get("references", ())) or (target,)
    return Row(
        template.format_map(fields).strip(),
        target,
        references,
        # The model goes on with a program that has begun, where it is told what to define.
        prompt if "entry_point" in entry else "",
        tests,
        prompt,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"not a string: {value!r}")
    return value.replace("\r\n", "\n")
