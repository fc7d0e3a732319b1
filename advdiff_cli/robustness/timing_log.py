"""How long work took, over every run of it."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from advdiff_cli.data.provenance import Provenance, canonical, digest, mend, whole_lines


class Stopwatch:
    """The seconds spent on a recipe, kept in a journal that outlives a killed run."""

    def __init__(self, journal: Path, recipe: Provenance, *, anew: bool = False) -> None:
        """Time work on `recipe`; `anew` when nothing of it is there yet, so that earlier seconds do not count."""
        self._journal, self._of, self._anew = journal, digest([canonical(recipe).encode()]), anew
        self._since = time.monotonic()
        if journal.is_file():
            mend(journal)  # half a line at its end would spoil the next

    def __enter__(self) -> Self:
        """Start."""
        self._since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Count what followed the last lap."""
        self.lap()

    def lap(self) -> None:
        """Count the seconds since the start or the last lap."""
        now = time.monotonic()
        line = {"of": self._of, "seconds": round(now - self._since, 3), "anew": self._anew}
        with self._journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._since, self._anew = now, False

    def spent(self) -> float:
        """Return the seconds spent since the work was last begun anew."""
        total = 0.0
        for line in whole_lines(self._journal) if self._journal.is_file() else []:
            try:
                lap = json.loads(line)
                if lap["of"] == self._of:
                    total = float(lap["seconds"]) + (0.0 if lap["anew"] else total)
            except (ValueError, TypeError, KeyError):  # no line of ours
                continue
        return total
