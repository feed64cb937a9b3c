"""A run's progress in files, from which any number of workers can go on."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_dwd import state
from keras_dwd.files import FileError, read_arrays, remove_unfinished, write_arrays
from keras_dwd.variables import Arrays, by_path

_VERSION = 2
_KEPT = 2
_NAME = "checkpoint-*.safetensors"
_PARTS = ("weights", "optimizer", "learned", "progress")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


class Checkpoints:
    """The checkpoints of one run in a folder, the last few of them.

    Each is one `safetensors` file with a checksum, written under another name and then renamed. No
    code is loaded from it.

    Args:
        folder: Made if it is not there.
        settings: What the run was asked to do, JSON-able: one of other settings is refused.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any]):
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings))

    def save(self, model: Any, progress: Arrays) -> None:
        """Write a checkpoint; all workers that train the model call it together.

        Args:
            model: A compiled `DWDModel`.
            progress: What else is to be known, by name.

        Raises:
            OSError: If it cannot be written: those before it are as they were.
        """
        learned: Arrays = {}
        state.save(model, learned)
        if not model.workers.leads:
            return
        held = (_weights(model), _optimizer(model), learned, progress)
        parts = dict(zip(_PARTS, held, strict=True))
        arrays = {
            f"{part}/{name}": np.asarray(array)
            for part, held in parts.items()
            for name, array in held.items()
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = self.files()
        number = int(earlier[-1].stem.split("-")[1]) + 1 if earlier else 0
        about = {"version": _VERSION, "settings": self.settings}
        write_arrays(self.folder / f"checkpoint-{number:08d}.safetensors", arrays, about)
        for old in self.files()[:-_KEPT]:
            old.unlink()

    def files(self) -> list[Path]:
        """The checkpoints there are, the newest last."""
        return sorted(p for p in self.folder.glob(_NAME) if p.stem.split("-")[1].isdigit())

    def restore(
        self, model: Any, check: Callable[[Arrays], None], say: Callable[[str], None] = _say
    ) -> Arrays | None:
        """Set a model to the newest checkpoint that can be read; all workers call it together.

        Only rank 0 reads files.

        Args:
            model: A compiled `DWDModel`, as new.
            check: Told of `progress` before the model is changed; raises `FileError` if it cannot
                be that of this run.
            say: Told of checkpoints that are damaged, which are put aside.

        Returns:
            The `progress` it was saved with, `None` if there is no checkpoint.

        Raises:
            ValueError: If it is one of a run with other settings, or of another model.
            FileError: If all that there are are damaged.
            OSError: If the folder cannot be made.
        """
        communicator = model.workers.communicator
        found: Arrays = {}
        with communicator.together("checkpoint"):
            if model.workers.leads:
                if not self.folder.is_dir():  # found now, not after hours of training
                    self.folder.mkdir(parents=True)
                remove_unfinished(self.folder, _NAME)
                found = self._newest(say)
        found = communicator.from_first(found, "checkpoint.arrays")
        if not found:
            return None
        parts: dict[str, Arrays] = {part: {} for part in _PARTS}
        for name, array in found.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = array
        weights, optimizer = _weights(model), _optimizer(model)
        for part, expected in (("weights", weights), ("optimizer", optimizer)):
            shapes = ({n: tuple(v.shape) for n, v in e.items()} for e in (parts[part], expected))
            self._check(part, *shapes)
        check(parts["progress"])
        if parts["learned"]:
            state.restore(model, parts["learned"])
        for part, held in (("weights", weights), ("optimizer", optimizer)):
            for name, variable in held.items():
                variable.assign(parts[part][name])
        return parts["progress"]

    def _check(self, part: str, found: Any, expected: Any) -> None:
        odd = [n for n in sorted({*found, *expected}) if found.get(n) != expected.get(n)]
        if odd:
            raise FileError(
                f"The checkpoint in {str(self.folder)!r} is of another model: its {part} do not "
                f"fit, {odd[0]!r} among them."
            )

    def _newest(self, say: Callable[[str], None]) -> Arrays:
        files = self.files()
        damaged = []
        for path in reversed(files):
            try:
                arrays, about = read_arrays(path)
                version, settings = about["version"], about["settings"]
                if {name.partition("/")[0] for name in arrays} - set(_PARTS):
                    raise FileError(f"{str(path)!r} has parts that are unknown.")
            except (OSError, FileError, KeyError, TypeError) as error:
                say(f"{path.name} is damaged: taking the one before it. ({error})")
                damaged.append(path)
                continue
            if version != _VERSION:
                raise FileError(f"{str(path)!r} is of version {version}: this reads {_VERSION}.")
            if settings != self.settings:
                raise FileError(
                    f"{str(path)!r} is of a run with other settings: name another folder, or "
                    f"remove it. {_difference(settings, self.settings)}"
                )
            for other in damaged:  # or they would count as those that are kept
                other.rename(other.with_suffix(".damaged"))
            return arrays
        if files:
            raise FileError(
                f"Every checkpoint in {str(self.folder)!r} is damaged. Remove them to begin anew."
            )
        return {}


def _difference(found: Any, asked: dict[str, Any]) -> str:
    """What of two settings is not the same."""
    if not isinstance(found, dict):
        return f"It has {found!r}."
    odd = [key for key in sorted({*found, *asked}) if found.get(key) != asked.get(key)]
    return "; ".join(f"{k}: {found.get(k)!r}, asked for is {asked.get(k)!r}" for k in odd) + "."


def _weights(model: Any) -> dict[str, Any]:
    """By position: layers without a name of their own get another one when they are made again."""
    return {str(i): v for i, v in enumerate(by_path(model).values())}


def _optimizer(model: Any) -> dict[str, Any]:
    return {str(i): v for i, v in enumerate(model.optimizer.variables)}
