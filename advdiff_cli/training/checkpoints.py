"""Training state on disk: a work folder next to the output, with checkpoints and the log; the final name by rename."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Self

from advdiff_cli.data.atomic_files import set_default_mode, sync
from advdiff_cli.data.journal import complete_lines
from advdiff_cli.data.locks import OutputLock, lock_file
from advdiff_cli.data.output_spec import OutputSpec
from advdiff_cli.data.provenance import JsonObject, Provenance, canonical_json, read_json_object
from advdiff_cli.data.resume import matches_recipe
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.training.checkpoint_file import is_whole, read_checkpoint, write_checkpoint

if TYPE_CHECKING:  # imported where it is used, so that a model that is up to date is told at once
    from torch import Tensor

_log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_SECONDS = 120.0  # between checkpoints
LOG = "training.jsonl"
_RECIPE = "recipe.json"
_PREVIOUS = "previous"
"""The model that is being replaced, in the work folder."""


def training_resume_params(out: Path, recorded: Provenance | None) -> Mapping[str, object]:
    """Return the parameters of the unfinished work at `out`, or of the model there; empty if there is neither.

    The same command takes its precision from them, so that it resumes work begun on another machine.
    """
    recipe = _read_recipe(_work_folder(out)) or recorded
    parameters: Mapping[str, object] = (recipe or {}).get("parameters", {})
    return parameters


def is_begun(out: Path) -> bool:
    """Return whether there is a work folder for `out`."""
    return _work_folder(out).exists()


def remove_finished_work(out: Path, recipe: Provenance) -> None:
    """Remove the work folder and the lock of a finished model, if its process was killed while it tidied up."""
    part = _work_folder(_real_path(out))
    with suppress(AdvdiffError, OSError):  # another process may be at work, or the folder may be read-only
        if lock_file(_real_path(out)).exists() or part.exists():
            with OutputLock(_real_path(out)):
                if _read_recipe(part) == recipe:
                    shutil.rmtree(part)


class WorkFolder:
    """OUT.part, where a model is trained; `publish` renames it to OUT. Only the main process writes."""

    def __init__(self, output: OutputSpec, recorded: Provenance | None, *, is_main: bool = True) -> None:
        """Decide whether the output is up to date, and open or resume the work folder.

        Args:
            output: The folder to be made.
            recorded: The recipe of the model folder at the path, or None if there is no model.
            is_main: Whether this process writes.

        Raises:
            AdvdiffError: Something else is at the path or in the work folder, or another command works there.
        """
        self.out = out = _real_path(output.path)
        self._is_main = is_main
        self._lock: OutputLock | None = None
        self.part = _work_folder(out)
        self.final = self.part / "final"
        self.up_to_date = False
        if out.exists():
            if recorded is None and not (out.is_dir() and not any(out.iterdir())):
                raise AdvdiffError(f"{out} exists and is not a model folder of advdiff; choose another --out")
            same = matches_recipe(out, recorded, output.recipe, overwrite=output.overwrite)
            self.up_to_date = same and not output.overwrite
        if is_main and self.up_to_date:
            remove_finished_work(out, output.recipe)
        elif is_main and not self.up_to_date:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = OutputLock(out)
            try:
                self._open(output)
            except BaseException:
                self._lock.release()
                raise

    def __enter__(self) -> Self:
        """Return the work folder."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock; remove the work folder if training failed before it began."""
        if self._lock is not None:
            if self.part.is_dir() and [file.name for file in self.part.iterdir()] == [_RECIPE]:
                shutil.rmtree(self.part)
            self._lock.release()

    def _open(self, output: OutputSpec) -> None:
        if self.part.is_symlink():
            raise AdvdiffError(f"{self.part} is a symbolic link, which advdiff does not write through; remove it")
        if (previous := self.part / _PREVIOUS).is_dir() and not self.out.exists():  # killed between its two renames
            os.replace(previous, self.out)
        begun = _read_recipe(self.part)
        if matches_recipe(self.part, begun, output.recipe, overwrite=output.overwrite, unfinished=True):
            self._remove_damaged()
            return
        if begun is None and self.part.exists() and any(self.part.iterdir()) and not output.overwrite:
            raise AdvdiffError(f"{self.part} holds no unfinished work of advdiff; move it, or give --overwrite")
        if self.part.exists():
            shutil.rmtree(self.part)
        self.part.mkdir()
        _replace(self.part / _RECIPE, canonical_json(output.recipe))

    def _remove_damaged(self) -> None:
        """Remove all checkpoints if one of them or the log before them is damaged, so that training begins again."""
        files = sorted(self.part.glob("*.safetensors"))
        if not all(is_whole(file, self._logged_bytes) for file in files):
            _log.warning("a checkpoint or the log in %s is damaged; training begins again", self.part)
            for file in files:
                file.unlink()

    @property
    def _logged_bytes(self) -> int:
        return (self.part / LOG).stat().st_size if (self.part / LOG).is_file() else 0

    def log(self, record: Mapping[str, object]) -> None:
        """Append a record to training.jsonl."""
        if not self._is_main:
            return
        with (self.part / LOG).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, tensors: "Mapping[str, Tensor]", state: Mapping[str, object], name: str = CHECKPOINT) -> None:
        """Write a checkpoint of tensors and a JSON state; it replaces the old one when it is complete."""
        if not self._is_main:
            return
        write_checkpoint(self.part / name, tensors, state, self._logged_bytes)

    def load(self, name: str = CHECKPOINT) -> "tuple[dict[str, Tensor], JsonObject] | None":
        """Return the tensors and the state of the last checkpoint, or None before the first one."""
        path = self.part / name
        return read_checkpoint(path) if path.is_file() else None

    def truncate_log(self, step: int) -> None:
        """Remove the log records after `step`, and that of publishing, which will be written again."""
        path = self.part / LOG
        if self._is_main and path.is_file():
            lines = [(line, _step_of(line)) for line in complete_lines(path)]
            if any(found is None for _, found in lines):
                _log.warning("lines of %s are damaged; they are left out", path)
            kept = [line for line, found in lines if found is not None and found <= step]
            _replace(path, "".join(f"{line}\n" for line in kept))

    def publish(self, *kept: str) -> None:
        """Rename `final` to the output, together with the log and the files called `kept`; remove everything else."""
        for name in (LOG, *kept):
            if (self.part / name).is_file():
                shutil.copyfile(self.part / name, self.final / name)
        set_default_mode(self.final)
        for file in (self.final, *self.final.rglob("*")):
            sync(file)
        if self.out.exists():  # an earlier model, or an empty folder; kept where the next run finds it
            os.replace(self.out, self.part / _PREVIOUS)
        os.replace(self.final, self.out)
        sync(self.out.parent)
        shutil.rmtree(self.part)


def _work_folder(out: Path) -> Path:
    real = _real_path(out)
    return real.with_name(real.name + ".part")


def _real_path(out: Path) -> Path:
    """Return where a model goes: the target of a symbolic link, so that it is replaced and not the link.

    Raises:
        AdvdiffError: The path has no name that the work folder could be called after.
    """
    if out.name in ("", ".."):
        raise AdvdiffError(f"--out {out}: give the name of a folder for the model")
    return out.resolve() if out.is_symlink() else out


def _read_recipe(part: Path) -> Provenance | None:
    """Return the recipe of unfinished work; None if there is none, or it is damaged."""
    path = part / _RECIPE
    try:
        return read_json_object(path) if path.is_file() else None
    except (AdvdiffError, ValueError):
        return None


def _step_of(line: str) -> float | None:
    """Return the step of a log record, infinity for that of publishing, or None for a damaged line."""
    try:
        record = json.loads(line)
        return inf if "published" in record else int(record["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".new")
    temporary.write_text(text)
    os.replace(temporary, file)
