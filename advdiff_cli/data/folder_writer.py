"""Folders out: one lossless 8-bit file for each input, each renamed into place by itself, and OUT/advdiff.jsonl.

The journal's first line holds the recipe; then a line for each file: input, its hash, output, status, reason. The
last line of a file counts. Shards of a folder each keep a journal of their own, advdiff.IofN.jsonl, so that machines
that share a disk never write to one file; the next process that is no shard joins them to advdiff.jsonl.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.data.image_folder import write_image
from advdiff_cli.data.locks import OutputLock
from advdiff_cli.data.provenance import (
    Provenance,
    canonical,
    difference,
    mend,
    parse,
    provenance,
    same_recipe,
    whole_lines,
)
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
    for journal in _journals(out):
        if lines := whole_lines(journal):
            parameters: Provenance = parse(lines[0], journal)["recipe"]["parameters"]
            return parameters
    return {}


def _line(record: Mapping[str, Any]) -> str:
    """Return a line of a journal, in ASCII: names may hold what ends a line elsewhere, or no text at all."""
    return json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n"


def _journals(out: Path) -> list[Path]:
    """Return the journals of a folder, its own before those of shards."""
    return [out / JOURNAL] * (out / JOURNAL).is_file() + sorted(out.glob("advdiff.*of*.jsonl"))


def _is_ours(out: Path) -> bool:
    """Tell whether a folder is empty, or was begun by a writer."""
    if not out.is_dir():
        return False
    kept = [f.name for f in out.iterdir()]  # listed once: another process may put the first file between two looks
    return all(f.endswith(".lock") or fnmatch(f, "advdiff.*new") for f in kept) or any(
        f == JOURNAL or fnmatch(f, "advdiff.*of*.jsonl") for f in kept
    )


class FolderWriter:
    """Writes purified images below `out` and keeps the journal."""

    def __init__(
        self, out: Path, recipe: Provenance, shard: tuple[int, int] | None = None, *,
        device: str = "cpu", overwrite: bool = False,
    ) -> None:  # fmt: skip
        """Open or begin the journal of `out`, or that of a shard of it.

        Raises:
            AdvdiffError: the folder was made with another recipe, holds files that are not ours, or another process
                keeps this journal.
        """
        self.out = out
        self._tag = "" if shard is None else f"{shard[0]}of{shard[1]}."
        self._journal = out / f"advdiff.{self._tag}jsonl"
        self._lines: dict[str, dict[str, Any]] = {}
        self._turn = Lock()  # images are written by many threads, lines by one at a time
        if out.exists() and not overwrite and not _is_ours(out):
            raise AdvdiffError(f"{out} exists and was not made by advdiff purify; give an empty or new folder as --out")
        out.mkdir(parents=True, exist_ok=True)
        self._lock = OutputLock(self._journal)
        try:
            self._begin(recipe, device, overwrite, whole=shard is None)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let another process have the journal."""
        self.close()

    def close(self) -> None:
        """Let another process have the journal."""
        self._lock.release()

    def _begin(self, recipe: Provenance, device: str, overwrite: bool, *, whole: bool) -> None:
        for journal in _journals(self.out):
            if journal.is_symlink():
                raise AdvdiffError(f"{journal} is a symbolic link, which is not written through; remove it")
            head, *lines = (whole_lines(journal) if journal.exists() else []) or [""]
            have = parse(head, journal)["recipe"] if head else None
            same = have is not None and same_recipe(have, recipe)
            if (overwrite and (whole or not same or journal == self._journal)) or have is None:
                self._remove(journal)
            elif not same:
                raise AdvdiffError(
                    f"{self.out} was made otherwise ({difference(have, recipe)}); give --overwrite or another --out"
                )
            elif not overwrite:
                self._take_over({line["file"]: line for line in map(json.loads, lines)})
        if not self._journal.exists():
            fresh = self._journal.with_suffix(".new")  # others read it: it is there whole or not at all
            fresh.write_text(canonical(provenance(recipe, device=device)) + "\n")
            os.replace(fresh, self._journal)
        mend(self._journal)
        if whole:
            self._join()

    def _take_over(self, lines: Mapping[str, dict[str, Any]]) -> None:
        for file, line in lines.items():
            known = self._lines.get(file, line)
            agree = known["sha256"] == line["sha256"]  # which journal spoke last is not known
            self._lines[file] = line if agree else {**line, "status": "unsure"}

    def _remove(self, journal: Path) -> None:
        if journal == self._journal:
            journal.unlink()
        else:
            with OutputLock(journal):
                journal.unlink(missing_ok=True)

    def _join(self) -> None:
        """Take the lines of the shards that ended into the journal."""
        for journal in _journals(self.out)[1:]:
            with suppress(AdvdiffError), OutputLock(journal):  # one that is at work keeps its own
                files = {json.loads(line)["file"]: None for line in whole_lines(journal)[1:]}
                with self._journal.open("a") as file:
                    file.write("".join(_line(self._lines[name]) for name in files if name in self._lines))
                journal.unlink()

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
        if not target.parent.resolve().is_relative_to(self.out.resolve()):
            raise AdvdiffError(f"{target.parent} is a link out of {self.out}, which is not written through; remove it")
        fresh = target.with_name(f".{target.stem}.{self._tag}part{target.suffix}")
        fresh.unlink(missing_ok=True)  # of a process that was killed, or a link put in its place
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
        with self._turn, self._journal.open("a") as journal:
            journal.write(_line(line))
