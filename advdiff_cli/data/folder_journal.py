"""The journal of a purified folder, OUT/advdiff.jsonl: its recipe, and what became of each input.

The first line holds the recipe. Every further line is about one input: its relative name, its SHA-256, the relative
name and size in bytes of its output, and a status. `writing` comes before an output is renamed into place and `ok`
after it; `failed` has a reason; `gone` is `ok`, but the input was missing in a later run. The last line about an input
counts. Each shard of a folder keeps its own journal, advdiff.IofN.jsonl, so that machines with a shared disk never
write to the same file.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from advdiff_cli.data.journal import complete_lines
from advdiff_cli.data.provenance import parse_provenance
from advdiff_cli.errors import AdvdiffError

JOURNAL = "advdiff.jsonl"
_JOURNALS_OF_SHARDS = "advdiff.*of*.jsonl"
_LOSSY = (".jpg", ".jpeg")


@dataclass(frozen=True)
class FolderEntry:
    """An input of a folder: its relative name, its SHA-256, and the relative name of its output."""

    file: str
    sha256: str
    out: str


@dataclass(frozen=True)
class JournalLine:
    """A line about one input; `size` is that of its output in bytes."""

    file: str
    status: Literal["ok", "gone", "failed", "writing", "unsure"]
    sha256: str | None = None
    out: str | None = None
    size: int | None = None
    reason: str | None = None

    def as_text(self) -> str:
        """Return the line in ASCII, since file names may hold line separators or invalid UTF-8."""
        fields = {k: v for k, v in asdict(self).items() if v is not None}
        return json.dumps(fields, sort_keys=True, separators=(",", ":")) + "\n"


_LINE = TypeAdapter(JournalLine)


def output_name(name: str) -> str:
    """Return the relative output name of a relative input name.

    Lossless images keep their name, and JPEG images get `.png` after it. So does a `.png` whose other suffix is that of
    a JPEG, so that two inputs never have one output, whatever else is in the folder: a.png -> a.png, a.jpg -> a.jpg.png
    and a.jpg.png -> a.jpg.png.png.
    """
    stem = name
    while stem.lower().endswith(".png"):
        stem = stem[: -len(".png")]
    return f"{name}.png" if PurePosixPath(stem).suffix.lower() in _LOSSY else name


def is_journal(name: str) -> bool:
    """Return whether a file of this name marks its folder as written by `purify`."""
    return name == JOURNAL or fnmatch(name, _JOURNALS_OF_SHARDS)


def journals(out: Path) -> list[Path]:
    """Return the journals of a folder, its own before those of shards."""
    return [out / JOURNAL] * (out / JOURNAL).is_file() + sorted(out.glob(_JOURNALS_OF_SHARDS))


def folder_resume_params(out: Path) -> Mapping[str, object]:
    """Return the parameters that the files in `out` were made with; empty if there is no journal."""
    for journal in journals(out):
        with suppress(AdvdiffError):  # of a damaged first line, about which the writer decides
            if lines := complete_lines(journal):
                parameters: Mapping[str, object] = parse_provenance(lines[0], journal)["recipe"]["parameters"]
                return parameters
    return {}


def is_purified_folder(out: Path) -> bool:
    """Return whether a folder is empty or was begun by a FolderWriter."""
    if not out.is_dir():
        return False
    names = [f.name for f in out.iterdir()]  # one listing, since another process may add the first file
    empty = all(f.endswith(".lock") or fnmatch(f, "advdiff.*new") for f in names)
    return empty or any(map(is_journal, names))


def parse_lines(texts: Iterable[str]) -> Iterator[JournalLine | None]:
    """Yield the line that each text holds; None for a damaged one."""
    for text in texts:
        try:
            yield _LINE.validate_python(json.loads(text))
        except (ValueError, RecursionError, ValidationError):
            yield None


def is_done(out: Path, line: JournalLine | None, entry: FolderEntry) -> bool:
    """Return whether this content was purified to this name, and the whole output is still there."""
    return line is not None and (line.sha256, line.out) == (entry.sha256, entry.out) and is_current(out, line)


def is_current(out: Path, line: JournalLine) -> bool:
    """Return whether the output of an `ok` or `gone` line exists, with the size that was written."""
    if line.status not in ("ok", "gone") or line.out is None:
        return False
    file = out / line.out
    return file.is_file() and file.stat().st_size == line.size
