"""Folders out: one lossless 8-bit file for each input, each renamed into place by itself, and OUT/advdiff.jsonl.

The journal's first line holds the recipe; then a line for each file: input, its hash, output, status, reason. The
last line of a file counts.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.data.image_folder import write_image
from advdiff_cli.data.provenance import Provenance, canonical, difference, parse, provenance, same_recipe, whole_lines
from advdiff_cli.errors import AdvdiffError

JOURNAL = "advdiff.jsonl"
_KEPT = (".tif", ".tiff")  # lossless already; everything else becomes png


def output_names(files: Sequence[str]) -> dict[str, str]:
    """Return the output name of each relative input name; where stems collide, the full old name plus .png."""

    def first_choice(name: str) -> str:
        path = Path(name)
        return name if path.suffix.lower() in _KEPT else path.with_suffix(".png").as_posix()

    names = {f: first_choice(f) for f in files}
    while True:
        times = Counter(names.values())
        collide = [f for f in files if times[names[f]] > 1 and names[f] != f"{f}.png"]
        if not collide:
            return names
        names |= {f: f"{f}.png" for f in collide}


def begun(out: Path) -> Provenance:
    """Return the parameters that the files of `out` were made with; empty where it has no journal."""
    journal = out / JOURNAL
    lines = whole_lines(journal) if journal.is_file() else []
    parameters: Provenance = parse(lines[0], journal)["recipe"]["parameters"] if lines else {}
    return parameters


class FolderWriter:
    """Writes purified images below `out` and keeps the journal."""

    def __init__(self, out: Path, recipe: Provenance, *, device: str = "cpu", overwrite: bool = False) -> None:
        """Open or begin the journal of `out`.

        Raises:
            AdvdiffError: the folder was made with another recipe, or holds files that are not ours.
        """
        self.out = out
        self._journal = out / JOURNAL
        self._lines: dict[str, dict[str, Any]] = {}
        if self._journal.is_file() and not overwrite:
            self._take_over(recipe)
            return
        if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
            raise AdvdiffError(f"{out} exists and was not made by advdiff purify; give an empty or new folder as --out")
        out.mkdir(parents=True, exist_ok=True)
        self._journal.write_text(canonical(provenance(recipe, device=device)) + "\n")

    def _take_over(self, recipe: Provenance) -> None:
        head, *lines = whole_lines(self._journal) or [""]
        have = parse(head, self._journal)["recipe"]
        if not same_recipe(have, recipe):
            raise AdvdiffError(
                f"{self.out} was made otherwise ({difference(have, recipe)}); give --overwrite or another --out"
            )
        for line in lines:
            record = json.loads(line)
            self._lines[record["file"]] = record

    def is_done(self, file: str, sha256: str, name: str) -> bool:
        """Tell whether an input of this content was purified to `name`, and the result is still there."""
        line = self._lines.get(file, {})
        settled = line.get("status") == "ok" and line.get("sha256") == sha256 and line.get("out") == name
        return settled and (self.out / name).is_file()

    def write(
        self, file: str, sha256: str, name: str, image: NDArray[np.uint8], about: Mapping[str, Any] | None = None
    ) -> None:
        """Write the result of `file` as `name`, with what its file told about it, then say so in the journal."""
        target = self.out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.stem}.part{target.suffix}")
        try:
            write_image(fresh, image, about)
            os.replace(fresh, target)
        finally:
            fresh.unlink(missing_ok=True)
        self._say({"file": file, "sha256": sha256, "out": name, "status": "ok"})

    def fail(self, file: str, sha256: str | None, reason: str) -> None:
        """Note in the journal why `file` failed."""
        self._say({"file": file, "sha256": sha256, "status": "failed", "reason": reason})

    def _say(self, line: dict[str, Any]) -> None:
        self._lines[line["file"]] = line
        with self._journal.open("a") as journal:
            journal.write(canonical(line) + "\n")
