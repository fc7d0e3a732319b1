"""Write folders: a lossless 8-bit file for each input, each by atomic rename, and the journal of `folder_journal`."""

import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.data.atomic_files import sync
from advdiff_cli.data.folder_journal import (
    FolderEntry,
    JournalLine,
    is_done,
    journals,
    parse_lines,
)
from advdiff_cli.data.folder_leftovers import remove_leftovers
from advdiff_cli.data.folder_state import check_own_folder, last_lines, read_journal
from advdiff_cli.data.folder_target import output_target
from advdiff_cli.data.image_files import Metadata, write_image
from advdiff_cli.data.journal import complete_lines, drop_incomplete_line
from advdiff_cli.data.locks import OutputLock
from advdiff_cli.data.output_spec import OutputSpec
from advdiff_cli.data.provenance import canonical_json, provenance
from advdiff_cli.errors import AdvdiffError

_COMMIT_SECONDS, _COMMIT_FILES = 1.0, 64  # written files that get their final names together


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
        self._lines: dict[str, JournalLine] = {}
        self._written: dict[str, set[str]] = {}  # the outputs that this folder ever had, by input
        self._pending: list[tuple[Path, Path, JournalLine]] = []
        self._committed = time.monotonic()
        self._lock_of_lines = Lock()  # many threads write images, one at a time writes lines
        self._overwrite = output.overwrite
        self.damaged_lines = 0
        check_own_folder(output)
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

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give written files their final names, and close the journal."""
        try:
            with self._lock_of_lines:
                self._commit()
            if kind is None and not self._tag:
                remove_leftovers(self.out, self._lines, self._written)
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close the journal."""
        self.__exit__(None, None, None)

    def _open(self, output: OutputSpec, *, whole: bool) -> None:
        found = {journal: self._read(journal, output, whole=whole) for journal in journals(self.out)}
        replaced = {journal: lines for journal, lines in found.items() if lines is not None}
        if self._journal in replaced or not self._journal.exists():
            fresh = self._journal.with_suffix(".new")  # other processes must see a complete first line
            head = canonical_json(provenance(output.recipe, device=output.device)) + "\n"
            earlier = [line for lines in replaced.values() for line in lines]  # whose outputs are to be made again
            fresh.write_text(head + "".join(line.as_text() for line in earlier))
            sync(fresh)
            os.replace(fresh, self._journal)
        for journal in replaced.keys() - {self._journal}:
            with OutputLock(journal):
                journal.unlink(missing_ok=True)
        drop_incomplete_line(self._journal)
        if whole:
            self._merge_shards()

    def _read(self, journal: Path, output: OutputSpec, *, whole: bool) -> list[JournalLine] | None:
        """Take over the lines of a journal of the same recipe.

        Returns:
            None; or, for a journal that is to be replaced, lines about its outputs, which are not done any more.
        """
        same, lines = read_journal(journal, output)
        for line in filter(None, lines):
            if line.out is not None:
                self._written.setdefault(line.file, set()).add(line.out)
        if not same or (output.overwrite and (whole or journal == self._journal)):
            return [JournalLine(line.file, "unsure", out=line.out) for line in lines if line and line.out]
        if not output.overwrite:
            self.damaged_lines += lines.count(None)
            self._lines = last_lines([self._lines.values(), filter(None, lines)])
        return None

    def _merge_shards(self) -> None:
        """Append the lines of finished shards to the journal."""
        for journal in journals(self.out)[1:]:
            with suppress(AdvdiffError), OutputLock(journal):  # a running shard keeps its own journal
                lines = parse_lines(complete_lines(journal)[1:])
                files = {line.file: None for line in lines if line is not None}
                self._append(self._lines[name] for name in files if name in self._lines)
                journal.unlink()

    def is_done(self, entry: FolderEntry) -> bool:
        """Return whether this content was purified to this name and the whole output is still there."""
        return is_done(self.out, self._lines.get(entry.file), entry)

    def write(self, entry: FolderEntry, image: NDArray[np.uint8], metadata: Metadata | None = None) -> None:
        """Write the output of an input, with the metadata of its file; it soon gets its name and its journal line.

        Raises:
            AdvdiffError: The name cannot be written, or belongs to a file that advdiff did not make.
            OSError: The disk is full, or fails.
        """
        target = self._target(entry)
        name = blake2b(os.fsencode(target.name), digest_size=8).hexdigest()
        fresh = target.with_name(f".advdiff.{self._tag}{name}.part{target.suffix}")
        fresh.unlink(missing_ok=True)  # left by a killed process, or a link put in its place
        try:
            write_image(fresh, image, metadata)
            sync(fresh)
            line = JournalLine(entry.file, "ok", entry.sha256, entry.out, fresh.stat().st_size)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        with self._lock_of_lines:
            self._pending.append((fresh, target, line))
            if len(self._pending) >= _COMMIT_FILES or time.monotonic() - self._committed > _COMMIT_SECONDS:
                self._commit()

    def _target(self, entry: FolderEntry) -> Path:
        target = output_target(self.out, entry)
        is_file = target.is_file() and not target.is_symlink()
        if is_file and not self._overwrite and not any(entry.out in outs for outs in self._written.values()):
            raise AdvdiffError(f"{target} exists and was not made by advdiff; move it, or give --overwrite")
        return target

    def _commit(self) -> None:
        """Give the written files their final names. The journal tells before and after, so that a crash is seen."""
        if self._pending:
            self._append(JournalLine(line.file, "writing", line.sha256, line.out) for _, _, line in self._pending)
            sync(self._journal)
            done = list[JournalLine]()
            folders = set[Path]()
            try:
                while self._pending:
                    fresh, target, line = self._pending[0]
                    os.replace(fresh, target)
                    del self._pending[0]
                    done.append(line)
                    folders.add(target.parent)
                    self._written.setdefault(line.file, set()).add(str(line.out))
            finally:
                for folder in folders:
                    sync(folder)
                self._append(done)
                self._lines |= {line.file: line for line in done}
        self._committed = time.monotonic()

    def record_failure(self, file: str, sha256: str | None, reason: str) -> None:
        """Record in the journal why an input failed."""
        line = JournalLine(file, "failed", sha256, reason=reason)
        with self._lock_of_lines:
            self._lines[file] = line
            self._append([line])

    def record_inputs(self, names: Collection[str]) -> None:
        """Record in the journal which inputs of finished outputs are gone, and which are back.

        Args:
            names: The relative names of all inputs that there are.
        """
        status: dict[bool, Literal["ok", "gone"]] = {True: "ok", False: "gone"}
        done = (line for line in self._lines.values() if line.status in status.values())
        now = [replace(line, status=status[line.file in names]) for line in done]
        changed = {line.file: line for line in now if line != self._lines[line.file]}
        with self._lock_of_lines:
            self._lines |= changed
            self._append(list(changed.values()))

    def _append(self, lines: Iterator[JournalLine] | list[JournalLine]) -> None:
        with self._journal.open("a") as journal:
            journal.write("".join(line.as_text() for line in lines))
