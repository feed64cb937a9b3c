"""Sequences of text tasks, with the model, the training protocol and the metrics for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keras_dwd.checks import integer
from keras_dwd.evaluation.metric import TaskMetric
from keras_dwd.evaluation.prepared import Prepared
from keras_dwd.evaluation.scenario import Scenario, Task
from keras_dwd.evaluation.text.encoding import Encoding
from keras_dwd.evaluation.text.language import Language, of_preset, small_decoder
from keras_dwd.evaluation.text.metrics import METRICS
from keras_dwd.evaluation.text.pretraining import Pretraining
from keras_dwd.evaluation.text.scoring import PASSED, Scorer
from keras_dwd.evaluation.text.tasks import TextTask, load, names_in

_TESTS = 200


@dataclass(frozen=True)
class TextSettings:
    """What sequences of text tasks can be given.

    Attributes:
        tokenizer: That of the small decoder, see `Pretraining`; by default `"bpe"`.
        beams: See `Generator`.
        run_code: Whether to run programs that the model writes with the tests of their task, see
            `passed`.
        examples: The largest number of training rows of a task; at least a fifth of the rows is
            left to pretrain on.
        tests: The largest number of rows of a task to measure on.
        cache_dir: See `Pretraining`.
        preset: Folder of a causal language model of KerasHub, in place of the small decoder.
        lora: The rank of its adapters, which are then trained alone.
    """

    tokenizer: str | None = None
    beams: int = 1
    run_code: bool = False
    examples: int = 4000
    tests: int = _TESTS
    cache_dir: Path | None = None
    preset: Path | None = None
    lora: int | None = None

    def __post_init__(self) -> None:
        for name in ("beams", "examples", "tests"):
            integer(name, getattr(self, name), 1)
        if self.lora is not None:
            integer("lora", self.lora, 1)
            if self.preset is None:
                raise ValueError(f"`lora` needs a `preset`. Received: {self.lora}")
        if self.preset is not None and self.tokenizer is not None:
            raise ValueError(
                "`tokenizer` is no setting of a `preset`, which has one. Received: "
                f"{self.tokenizer!r}"
            )


def text_sequence(
    names: str,
    data_dir: Path | None = None,
    settings: TextSettings | None = None,
    validation: float | None = None,
    pretraining: Pretraining | None = None,
    say: Callable[[str], None] = print,
) -> Prepared:
    """Read tasks, and prepare the model that learns them.

    The small decoder is pretrained, if that has not been done yet, on the training rows that the
    tasks leave over, prompts and targets apart, and on those of the other tasks in `data_dir`.

    Args:
        names: The tasks separated by commas, see `load`.
        data_dir: The folder of the tasks.
        settings: By default those of `TextSettings`.
        validation: The share of the training rows to measure on, for a task without a file of
            validation data. If it is not `None`, all tasks are measured on validation data.
        pretraining: Of the small decoder; by default that of `Pretraining` with the tokenizer of
            `settings`.
        say: Called with a message when pretraining begins.

    Raises:
        FileNotFoundError: If there is no such task or preset.
        ValueError: If a task is named twice, or a setting is wrong.
    """
    settings = settings or TextSettings()
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ValueError("`scenario` must name a task at least: text:TASK,TASK…")
    folder = Path(data_dir or ".").expanduser()
    read = [load(name, folder) for name in wanted]
    if len({task.name for task in read}) < len(read):
        raise ValueError(f"`scenario` must not name a task twice. Received: {names!r}")
    tasks, texts = _with_leftovers(read, folder, settings)
    if settings.preset is not None:
        language = of_preset(settings.preset.expanduser(), settings.lora, settings.beams)
    else:
        pretraining = pretraining or Pretraining(settings.tokenizer or "bpe")
        language = small_decoder(pretraining, texts, settings.beams, settings.cache_dir, say)
    tokenizer, length = language.tokenizer, language.length
    encodings = [Encoding.fitted(tokenizer, task.train, length) for task in tasks]
    measured = tuple(dict.fromkeys(n for t in tasks for n in t.metrics if n in METRICS))
    if settings.run_code:
        measured += (PASSED,)
    pairs = list(zip(tasks, encodings, strict=True))
    scorer = Scorer(pairs, ("rouge_l", *measured), language.writer)
    scenario = Scenario.from_tasks(
        [_arrays(task, encoding, language, validation) for task, encoding in pairs],
        f"text:{names}",
        outputs=tokenizer.size,
    )
    return Prepared(
        scenario,
        language.profile,
        _metrics(scorer, measured),
        {
            "training_rows": [len(task.train) for task in tasks],
            "measured_rows": [len(task.test[1]) for task in scenario.tasks],
            "cut_rows": [round(e.cut(t.train), 3) for t, e in pairs],
            "tokens": tokenizer.size,
            "length": length,
            "beams": settings.beams,
            **language.about,
        },
        f"{' and '.join(str(len(task.train)) for task in tasks)} training rows",
        language.details,
        "validation data",
    )


def _with_leftovers(
    read: Sequence[TextTask], folder: Path, settings: TextSettings
) -> tuple[list[TextTask], list[str]]:
    """The tasks with the rows that are used, and text of rows that are not."""
    task_of = {task.name: task for task in read}
    others = [name for name in names_in(folder) if name not in task_of]
    task_of |= {name: load(name, folder) for name in others}
    tasks, texts = [], []
    for name in sorted(task_of):
        task, rest = task_of[name].limited(settings.examples, settings.tests)
        tasks.append(task)
        texts += [text for row in rest for text in (row.source, row.target)]
    limited_of = {task.name: task for task in tasks}
    return [limited_of[task.name] for task in read], list(dict.fromkeys(texts))


def _arrays(
    task: TextTask, encoding: Encoding, language: Language, validation: float | None
) -> Task:
    """The task as arrays, to be measured on its test data or on validation data."""
    train, test = task.train, task.test
    if validation is not None and task.validation:
        test = task.validation
    elif validation is not None:
        order = np.random.default_rng(0).permutation(len(train))
        count = max(1, round(validation * len(train)))
        test = tuple(train[i] for i in order[:count])[: len(task.test)]
        train = tuple(train[i] for i in order[count:])
    arrays = [language.inputs(encoding.examples(rows)) for rows in (train, test)]
    return Task(task.name, *arrays)


def _metrics(scorer: Scorer, names: Sequence[str]) -> tuple[TaskMetric, ...]:
    shares = ("rouge_l", "token_accuracy", *names)
    metrics = [TaskMetric(name, scorer, higher_is_better=True, percent=True) for name in shares]
    return (*metrics, TaskMetric("loss", scorer, higher_is_better=False, percent=False))
