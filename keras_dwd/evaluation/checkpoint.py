"""A run's progress in files, from which any number of workers can go on."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from keras_dwd import state
from keras_dwd.evaluation.files import replaced
from keras_dwd.variables import Arrays, by_path

_VERSION = 1
_KEPT = 2
_PARTS = ("weights", "optimizer", "learned", "progress")


class Checkpoints:
    """The checkpoints of one run in a folder, the last few of them.

    Each is one file, written under another name and then renamed, with a checksum of each part of
    it. No code is loaded from it.

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
        """
        learned: Arrays = {}
        state.save(model, learned)
        if not model.workers.leads:
            return
        arrays = {f"weights/{path}": np.asarray(v) for path, v in by_path(model).items()}
        arrays |= {f"optimizer/{i}": np.asarray(v) for i, v in enumerate(_optimizer(model))}
        arrays |= {f"learned/{name}": array for name, array in learned.items()}
        arrays |= {f"progress/{name}": array for name, array in progress.items()}
        about = {"version": _VERSION, "settings": self.settings}
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), "uint8")
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = self.files()
        number = int(earlier[-1].stem.split("-")[1]) + 1 if earlier else 0
        with replaced(self.folder / f"checkpoint-{number:08d}.npz", "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        for old in self.files()[:-_KEPT]:
            old.unlink()

    def files(self) -> list[Path]:
        """The checkpoints there are, the newest last."""
        return sorted(self.folder.glob("checkpoint-????????.npz"))

    def restore(self, model: Any, say: Any = print) -> Arrays | None:
        """Set a model to the newest checkpoint that can be read; all workers call it together.

        Only rank 0 reads files.

        Args:
            model: A compiled `DWDModel`, as new.
            say: Told of checkpoints that are damaged.

        Returns:
            The `progress` it was saved with, `None` if there is no checkpoint.

        Raises:
            ValueError: If it is one of a run with other settings, or of another model.
        """
        communicator = model.workers.communicator
        found: Arrays = {}
        with communicator.together("checkpoint"):
            if model.workers.leads:
                found = self._newest(say)
        found = communicator.from_first(found, "checkpoint.arrays")
        if not found:
            return None
        parts: dict[str, Arrays] = {part: {} for part in _PARTS}
        for name, array in found.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = array
        variables = by_path(model)
        optimizer = {str(i): v for i, v in enumerate(_optimizer(model))}
        for part, expected in (("weights", variables), ("optimizer", optimizer)):
            shapes = {name: array.shape for name, array in parts[part].items()}
            if shapes != {name: tuple(v.shape) for name, v in expected.items()}:
                raise ValueError(
                    f"The checkpoint in {str(self.folder)!r} is of another model: its {part} do "
                    "not fit."
                )
        if parts["learned"]:
            state.restore(model, parts["learned"])
        for part, held in (("weights", variables), ("optimizer", optimizer)):
            for name, variable in held.items():
                variable.assign(parts[part][name])
        return parts["progress"]

    def _newest(self, say: Any) -> Arrays:
        for path in reversed(self.files()):
            try:
                with np.load(path, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
                about = json.loads(arrays.pop("about").tobytes())
                if {name.partition("/")[0] for name in arrays} - set(_PARTS):
                    raise ValueError
                version, settings = about["version"], about["settings"]
            except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError):
                say(f"{path.name} is damaged: taking the one before it.")
                continue
            if version != _VERSION or settings != self.settings:
                raise ValueError(
                    f"{str(path)!r} is of a run with other settings: name another folder, or "
                    f"remove it. It has {settings}, asked for is {self.settings}."
                )
            return arrays
        return {}


def _optimizer(model: Any) -> list[Any]:
    return list(model.optimizer.variables)
