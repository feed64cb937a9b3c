"""Checkpoints of a run, from which any number of workers can resume it."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_dwd.evaluation.methods import same_settings
from keras_dwd.evaluation.technique import Technique, TechniqueModel
from keras_dwd.files import FileError, read_arrays, remove_unfinished, write_arrays
from keras_dwd.model import DWDModel
from keras_dwd.variables import Arrays, by_path

_VERSION = 2
_MAX_TO_KEEP = 2
_NAME = "checkpoint-*.safetensors"
_PARTS = ("weights", "optimizer", "learned", "progress", "technique")


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class Checkpoints:
    """The newest checkpoints of one run, in a folder.

    Each checkpoint is one `safetensors` file with checksums, written atomically. Reading it loads
    no code.

    Args:
        folder: Folder of the checkpoints, created when it is needed.
        settings: JSON-serializable settings of the run; checkpoints of a run with other settings
            are refused.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any]):
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings))

    def save(self, model: DWDModel, progress: Arrays) -> None:
        """Write a checkpoint; all workers that train the model must call this together.

        Args:
            model: A compiled `DWDModel`.
            progress: Further arrays to save, by name.

        Raises:
            OSError: If the file cannot be written; earlier checkpoints are left unchanged.
        """
        learned = model._consolidation.save(model)
        if not model.workers.leads:
            return
        technique = _technique(model)
        added = {} if technique is None else technique.state()
        contents = (_weights(model), _optimizer(model), learned, progress, added)
        parts = dict(zip(_PARTS, contents, strict=True))
        arrays = {
            f"{part}/{name}": np.asarray(array)
            for part, content in parts.items()
            for name, array in content.items()
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = self.files()
        number = int(earlier[-1].stem.split("-")[1]) + 1 if earlier else 0
        about = {"version": _VERSION, "settings": self.settings}
        write_arrays(self.folder / f"checkpoint-{number:08d}.safetensors", arrays, about)
        for old in self.files()[:-_MAX_TO_KEEP]:
            old.unlink()

    def files(self) -> list[Path]:
        """The existing checkpoint files, the newest last."""
        return sorted(p for p in self.folder.glob(_NAME) if p.stem.split("-")[1].isdigit())

    def restore(
        self,
        model: DWDModel,
        check: Callable[[Arrays], None],
        say: Callable[[str], None] = _print_to_stderr,
    ) -> Arrays | None:
        """Restore a model from the newest readable checkpoint; all workers must call this together.

        Only rank 0 reads files.

        Args:
            model: A compiled `DWDModel` that was just built.
            check: Called with the `progress` before the model is changed; raises `FileError` if it
                does not fit this run.
            say: Called with a message for each damaged checkpoint, which is renamed.

        Returns:
            The `progress` that was saved; `None` if there is no checkpoint.

        Raises:
            FileError: If the checkpoint is of a run with other settings or of another model, or if
                all checkpoints are damaged.
            OSError: If the folder cannot be created.
        """
        communicator = model.workers.communicator
        arrays: Arrays = {}
        with communicator.fail_together("checkpoint"):
            if model.workers.leads:
                if not self.folder.is_dir():  # fails now instead of after the first epoch
                    self.folder.mkdir(parents=True)
                remove_unfinished(self.folder, _NAME)
                arrays = self._newest(say)
        arrays = communicator.broadcast(arrays, "checkpoint.arrays")
        if not arrays:
            return None
        parts: dict[str, Arrays] = {part: {} for part in _PARTS}
        for name, array in arrays.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = array
        weights, optimizer = _weights(model), _optimizer(model)
        for part, expected in (("weights", weights), ("optimizer", optimizer)):
            shapes = ({n: tuple(v.shape) for n, v in e.items()} for e in (parts[part], expected))
            self._check(part, *shapes)
        check(parts["progress"])
        technique = _technique(model)
        commit = None if technique is None else technique.prepare_state(parts["technique"])
        if parts["learned"]:
            model._consolidation.load(model, parts["learned"])
        for part, variables in (("weights", weights), ("optimizer", optimizer)):
            for name, variable in variables.items():
                variable.assign(parts[part][name])
        if commit is not None:
            commit()
        return parts["progress"]

    def _check(self, part: str, saved: Any, expected: Any) -> None:
        """Raise `FileError` if the shapes of the saved arrays are not the expected ones."""
        differing = [n for n in sorted({*saved, *expected}) if saved.get(n) != expected.get(n)]
        if differing:
            raise FileError(
                f"The checkpoint in {str(self.folder)!r} is of another model: its {part} do not "
                f"fit, {differing[0]!r} among them."
            )

    def _newest(self, say: Callable[[str], None]) -> Arrays:
        """The arrays of the newest readable checkpoint; empty if there is no checkpoint."""
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
            if not same_settings(settings, self.settings):
                raise FileError(
                    f"{str(path)!r} is of a run with other settings: name another folder, or "
                    f"remove it. {_difference(settings, self.settings)}"
                )
            for other in damaged:  # otherwise they would count towards `_MAX_TO_KEEP`
                other.rename(other.with_suffix(".damaged"))
            return arrays
        if files:
            raise FileError(
                f"Every checkpoint in {str(self.folder)!r} is damaged. Remove them to begin anew."
            )
        return {}


def _difference(saved: Any, asked: dict[str, Any]) -> str:
    """Text with the entries in which two settings differ."""
    if not isinstance(saved, dict):
        return f"It has {saved!r}."
    odd = [k for k in sorted({*saved, *asked}) if not same_settings(saved.get(k), asked.get(k))]
    return "; ".join(f"{k}: {saved.get(k)!r}, asked for is {asked.get(k)!r}" for k in odd) + "."


def _weights(model: DWDModel) -> dict[str, Any]:
    """The model's variables by position, as automatic layer names differ when it is built again."""
    return {str(i): v for i, v in enumerate(by_path(model).values())}


def _technique(model: DWDModel) -> Technique | None:
    return model.technique if isinstance(model, TechniqueModel) else None


def _optimizer(model: DWDModel) -> dict[str, Any]:
    return {str(i): v for i, v in enumerate(model.optimizer.variables)}
