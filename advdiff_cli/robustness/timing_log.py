"""How long work took, summed over all runs of it."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from advdiff_cli.data.journal import complete_lines, drop_incomplete_line
from advdiff_cli.data.provenance import Provenance, canonical_json, digest


class TimingLog:
    """The seconds spent on a recipe, in a journal that survives a killed run."""

    def __init__(self, journal: Path, recipe: Provenance, *, restart: bool = False) -> None:
        """Time work on `recipe`; `restart` if nothing of it exists, so that earlier seconds do not count."""
        self._journal, self._key, self._restart = journal, digest([canonical_json(recipe).encode()]), restart
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

    def total(self) -> float:
        """Return the seconds since the work was last started from nothing."""
        total = 0.0
        for line in complete_lines(self._journal) if self._journal.is_file() else []:
            try:
                lap = json.loads(line)
                if lap["of"] == self._key:
                    total = float(lap["seconds"]) + (0.0 if lap["anew"] else total)
            except (ValueError, TypeError, KeyError):  # not a line of this log
                continue
        return total
