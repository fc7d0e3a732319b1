"""Write folders: a lossless 8-bit file for each input, each by atomic rename, and the journal OUT/advdiff.jsonl.

The first line of the journal holds the recipe. Every further line is about one file: input, hash, output, status and
reason. The last line about a file counts. Each shard of a folder keeps its own journal, advdiff.IofN.jsonl, so that
machines with a shared disk never write to the same file. The next process that is not a shard merges them.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.data.image_files import Metadata, write_image
from advdiff_cli.data.journal import complete_lines, drop_incomplete_line
from advdiff_cli.data.locks import OutputLock
from advdiff_cli.data.patch_writer import OutputSpec
from advdiff_cli.data.provenance import (
    JsonObject,
    Provenance,
    canonical_json,
    parse_provenance,
    provenance,
)
from advdiff_cli.data.resume import matches_recipe
from advdiff_cli.errors import AdvdiffError

JOURNAL = "advdiff.jsonl"
_LOSSLESS = (".tif", ".tiff")  # kept; every other format becomes png


@dataclass(frozen=True)
class FolderEntry:
    """An input of a folder: its relative name, its SHA-256, and the relative name of its output."""

    file: str
    sha256: str
    out: str


def output_names(files: Sequence[str]) -> dict[str, str]:
    """Return the output name of each relative input name; inputs whose outputs collide get the full name plus .png."""

    def first_choice(name: str) -> str:
        path = Path(name)
        return name if path.suffix.lower() in _LOSSLESS else path.with_suffix(".png").as_posix()

    names = {f: first_choice(f) for f in files}
    while True:
        times = Counter(names.values())
        collisions = [f for f in files if times[names[f]] > 1 and names[f] != f"{f}.png"]
        if not collisions:
            return names
        names |= {f: f"{f}.png" for f in collisions}


def folder_resume_params(out: Path) -> Mapping[str, object]:
    """Return the parameters that the files in `out` were made with; empty if there is no journal."""
    for journal in _journals(out):
        if lines := complete_lines(journal):
            parameters: Mapping[str, object] = parse_provenance(lines[0], journal)["recipe"]["parameters"]
            return parameters
    return {}


def _line(record: Mapping[str, object]) -> str:
    """Return a journal line, in ASCII, since file names may hold line separators or invalid UTF-8."""
    return json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n"


def _journals(out: Path) -> list[Path]:
    """Return the journals of a folder, its own before those of shards."""
    return [out / JOURNAL] * (out / JOURNAL).is_file() + sorted(out.glob("advdiff.*of*.jsonl"))


def _may_write(out: Path) -> bool:
    """Return whether a folder is empty or was begun by a FolderWriter."""
    if not out.is_dir():
        return False
    names = [f.name for f in out.iterdir()]  # one listing, since another process may add the first file
    empty = all(f.endswith(".lock") or fnmatch(f, "advdiff.*new") for f in names)
    return empty or any(f == JOURNAL or fnmatch(f, "advdiff.*of*.jsonl") for f in names)


class FolderWriter:
    """Writes purified images into a folder and keeps the journal."""

    def __init__(self, output: OutputSpec, shard: tuple[int, int] | None = None) -> None:
        """Open or create the journal of a folder, or of one shard of it.

        Raises:
            AdvdiffError: The folder was made with another recipe or holds other files, or another process writes
                this journal.
        """
        self.out = out = output.path
        self._tag = "" if shard is None else f"{shard[0]}of{shard[1]}."
        self._journal = out / f"advdiff.{self._tag}jsonl"
        self._lines: dict[str, JsonObject] = {}
        self._journal_lock = Lock()  # many threads write images, one at a time writes lines
        if out.exists() and not output.overwrite and not _may_write(out):
            raise AdvdiffError(f"{out} exists and was not made by advdiff purify; give an empty or new folder as --out")
        out.mkdir(parents=True, exist_ok=True)
        self._lock = OutputLock(self._journal)
        try:
            self._open(output, whole=shard is None)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the journal."""
        self.close()

    def close(self) -> None:
        """Release the journal."""
        self._lock.release()

    def _open(self, output: OutputSpec, *, whole: bool) -> None:
        for journal in _journals(self.out):
            self._read_or_remove(journal, output, whole=whole)
        if not self._journal.exists():
            fresh = self._journal.with_suffix(".new")  # other processes must see a complete first line
            fresh.write_text(canonical_json(provenance(output.recipe, device=output.device)) + "\n")
            os.replace(fresh, self._journal)
        drop_incomplete_line(self._journal)
        if whole:
            self._merge_shards()

    def _read_or_remove(self, journal: Path, output: OutputSpec, *, whole: bool) -> None:
        """Take over the lines of a journal of the same recipe; remove one that may be replaced."""
        if journal.is_symlink():
            raise AdvdiffError(f"{journal} is a symbolic link, which advdiff does not write through; remove it")
        head, *lines = (complete_lines(journal) if journal.exists() else []) or [""]
        have: Provenance | None = parse_provenance(head, journal)["recipe"] if head else None
        same = matches_recipe(self.out, have, output.recipe, overwrite=output.overwrite)
        if not same or (output.overwrite and (whole or journal == self._journal)):
            self._remove(journal)
        elif not output.overwrite:
            self._take_over({line["file"]: line for line in map(json.loads, lines)})

    def _take_over(self, lines: Mapping[str, JsonObject]) -> None:
        for file, line in lines.items():
            known = self._lines.get(file, line)
            agree = known["sha256"] == line["sha256"]  # the order of lines in two journals is not known
            self._lines[file] = line if agree else {**line, "status": "unsure"}

    def _remove(self, journal: Path) -> None:
        if journal == self._journal:
            journal.unlink()
        else:
            with OutputLock(journal):
                journal.unlink(missing_ok=True)

    def _merge_shards(self) -> None:
        """Append the lines of finished shards to the journal."""
        for journal in _journals(self.out)[1:]:
            with suppress(AdvdiffError), OutputLock(journal):  # a running shard keeps its own journal
                files = {json.loads(line)["file"]: None for line in complete_lines(journal)[1:]}
                with self._journal.open("a") as file:
                    file.write("".join(_line(self._lines[name]) for name in files if name in self._lines))
                journal.unlink()

    def is_done(self, entry: FolderEntry) -> bool:
        """Return whether this content was purified to this name and the output still exists."""
        line = self._lines.get(entry.file, {})
        settled = (line.get("status"), line.get("sha256"), line.get("out")) == ("ok", entry.sha256, entry.out)
        return settled and (self.out / entry.out).is_file()

    def write(self, entry: FolderEntry, image: NDArray[np.uint8], metadata: Metadata | None = None) -> None:
        """Write the output of an input, with the metadata of its file, and record it in the journal."""
        target = self.out / entry.out
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(self.out.resolve()):
            raise AdvdiffError(f"{target.parent} is a link to a place outside {self.out}; remove it")
        fresh = target.with_name(f".{target.stem}.{self._tag}part{target.suffix}")
        fresh.unlink(missing_ok=True)  # left by a killed process, or a link put in its place
        try:
            write_image(fresh, image, metadata)
            os.replace(fresh, target)
        finally:
            fresh.unlink(missing_ok=True)
        self._record({"file": entry.file, "sha256": entry.sha256, "out": entry.out, "status": "ok"})

    def record_failure(self, file: str, sha256: str | None, reason: str) -> None:
        """Record in the journal why an input failed."""
        self._record({"file": file, "sha256": sha256, "status": "failed", "reason": reason})

    def _record(self, line: JsonObject) -> None:
        self._lines[line["file"]] = line
        with self._journal_lock, self._journal.open("a") as journal:
            journal.write(_line(line))
