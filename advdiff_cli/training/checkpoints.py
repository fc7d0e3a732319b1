"""Training state on disk: a work folder beside the output, checkpoints in safetensors, the final name by rename."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from advdiff_cli.data.atomic_files import share, writing
from advdiff_cli.data.locks import OutputLock
from advdiff_cli.data.provenance import Provenance, canonical, difference, same_recipe, whole_lines
from advdiff_cli.errors import AdvdiffError

CHECKPOINT = "checkpoint.safetensors"
LOG = "training.jsonl"
_RECIPE = "recipe.json"
_STATE = "state"


def begun(out: Path, recorded: Provenance | None) -> Mapping[str, Any]:
    """Return the parameters of the unfinished work at `out`, else of the model there; empty where there is neither.

    The same command takes its precision from it, so that it goes on where another machine began.
    """
    known = out.with_name(out.name + ".part") / _RECIPE
    recipe = json.loads(known.read_text()) if known.is_file() else recorded
    parameters: Mapping[str, Any] = (recipe or {}).get("parameters", {})
    return parameters


class WorkFolder:
    """OUT.part: where a model is made; `publish` gives it the name OUT. Of several processes, the first one writes."""

    def __init__(
        self, out: Path, recipe: Provenance, recorded: Provenance | None, *, overwrite: bool, first: bool = True
    ) -> None:
        """Decide whether `out` is up to date, and open or resume the work folder.

        Args:
            out: the folder to be made.
            recipe: what is to be made.
            recorded: the recipe of what stands at `out`, or None where it is no model folder.
            overwrite: whether another model or another recipe's unfinished work may be replaced.
            first: whether this process is the one that writes; on the others nothing is written.

        Raises:
            AdvdiffError: something else stands at `out`, or in the work folder, or another command is at work there.
        """
        self.out = out
        self._first = first
        self._lock: OutputLock | None = None
        self.part = out.with_name(out.name + ".part")
        self.final = self.part / "final"
        self.up_to_date = False
        if out.exists():
            if recorded is None and not (out.is_dir() and not any(out.iterdir())):
                raise AdvdiffError(f"{out} exists and is no model folder of advdiff; choose another --out")
            self.up_to_date = recorded is not None and same_recipe(recorded, recipe) and not overwrite
            if recorded is not None and not self.up_to_date and not overwrite:
                raise AdvdiffError(
                    f"{out} was made otherwise ({difference(recorded, recipe)}); give --overwrite or another --out"
                )
        if first and self.up_to_date and self._begun() == recipe:  # a process died before it had tidied up
            with OutputLock(out):
                shutil.rmtree(self.part)
        elif first and not self.up_to_date:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = OutputLock(out)
            try:
                self._open(recipe, overwrite)
            except BaseException:
                self._lock.release()
                raise

    def __enter__(self) -> Self:
        """Return the work folder."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let another process have it."""
        if self._lock is not None:
            self._lock.release()

    def _open(self, recipe: Provenance, overwrite: bool) -> None:
        if self.part.is_symlink():
            raise AdvdiffError(f"{self.part} is a symbolic link, which is not written through; remove it")
        begun = self._begun()
        if begun is not None:
            if same_recipe(begun, recipe):
                return
            if not overwrite:
                raise AdvdiffError(
                    f"{self.part} holds unfinished work of another recipe ({difference(begun, recipe)}); "
                    "give --overwrite or another --out"
                )
        elif self.part.exists() and any(self.part.iterdir()) and not overwrite:
            raise AdvdiffError(
                f"{self.part} is in the way and holds no unfinished work of advdiff; move it, or give --overwrite"
            )
        if self.part.exists():
            shutil.rmtree(self.part)
        self.part.mkdir()
        _replace(self.part / _RECIPE, canonical(recipe))

    def _begun(self) -> Provenance | None:
        known = self.part / _RECIPE
        recipe: Provenance | None = json.loads(known.read_text()) if known.is_file() else None
        return recipe

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record to training.jsonl."""
        if not self._first:
            return
        with (self.part / LOG).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], name: str = CHECKPOINT) -> None:
        """Write a checkpoint: tensors, and a state that JSON can hold; the old one stays until the new one is whole."""
        if not self._first:
            return
        target = self.part / name
        fresh = target.with_name(name + ".new")
        copies = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        with writing(target):
            save_file(copies, fresh, {_STATE: canonical(dict(state))})
        os.replace(fresh, target)

    def load(self, name: str = CHECKPOINT) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and state of the last checkpoint, or None before the first; the log is cut back to it."""
        path = self.part / name
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            state: dict[str, Any] = json.loads(file.metadata()[_STATE])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        return tensors, state

    def cut_log(self, step: int) -> None:
        """Drop the log records after `step`, and of publishing, which are about to be made again."""
        path = self.part / LOG
        if self._first and path.is_file():
            lines = [(line, json.loads(line)) for line in whole_lines(path)]
            kept = [line for line, record in lines if record["step"] <= step and "published" not in record]
            _replace(path, "".join(f"{line}\n" for line in kept))

    def publish(self, *kept: str) -> None:
        """Give what was saved in `final` the output's name, with the files called `kept`; the rest is removed."""
        for name in (LOG, *kept):
            if (self.part / name).is_file():
                shutil.copyfile(self.part / name, self.final / name)
        share(self.final)
        old = self.out.with_name(self.out.name + ".old")
        if self.out.exists():
            if old.exists():
                shutil.rmtree(old)
            os.replace(self.out, old)
        os.replace(self.final, self.out)
        for folder in (self.part, old):
            if folder.exists():
                shutil.rmtree(folder)


def _replace(file: Path, text: str) -> None:
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(text)
    os.replace(fresh, file)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's per-parameter state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": torch.as_tensor(v) for i, entry in state.items() for name, v in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".", 2)
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under `prefix.`, without it."""
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
