"""How long work took, summed over all runs and processes of it."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from advdiff_cli.data.journal import complete_lines, drop_incomplete_line
from advdiff_cli.data.provenance import Provenance, canonical_json, digest


def journal_path(folder: Path, i: int, count: int) -> Path:
    """Return the journal of process i of `count`."""
    return folder / ("seconds.jsonl" if count == 1 else f"seconds.{i}of{count}.jsonl")


def recorded_seconds(folder: Path, recipe: Provenance) -> float:
    """Return the seconds that the journals in a folder hold of work on a recipe."""
    key = _key(recipe)
    return sum(_total(journal, key) for journal in folder.glob("seconds*.jsonl"))


class TimingLog:
    """The seconds spent on a recipe, in a journal that survives a killed run."""

    def __init__(self, journal: Path, recipe: Provenance, *, restart: bool = False) -> None:
        """Time work on `recipe`; `restart` if nothing of it exists, so that earlier seconds do not count."""
        self._journal, self._key, self._restart = journal, _key(recipe), restart
        self._since = time.monotonic()
        if journal.is_file():
            drop_incomplete_line(journal)

    def __enter__(self) -> Self:
        """Start."""
        self._since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Record the time since the last lap."""
        self.lap()

    def lap(self) -> None:
        """Record the seconds since the start or the last lap."""
        now = time.monotonic()
        line = {"of": self._key, "seconds": round(now - self._since, 3), "anew": self._restart}
        with self._journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._since, self._restart = now, False


def _key(recipe: Provenance) -> str:
    return digest([canonical_json(recipe).encode()])


def _total(journal: Path, key: str) -> float:
    """Return the seconds since the work was last started from nothing."""
    total = 0.0
    for line in complete_lines(journal):
        try:
            lap = json.loads(line)
            if lap["of"] == key:
                total = float(lap["seconds"]) + (0.0 if lap["anew"] else total)
        except (ValueError, TypeError, KeyError):  # not a line of this log
            continue
    return total
