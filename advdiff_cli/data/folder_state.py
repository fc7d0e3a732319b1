"""What the journals of a purified folder tell: what is done, and what is left to do."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from advdiff_cli.data.folder_journal import (
    FolderEntry,
    JournalLine,
    is_done,
    is_purified_folder,
    journals,
    output_name,
    parse_lines,
)
from advdiff_cli.data.image_files import check_file
from advdiff_cli.data.journal import complete_lines
from advdiff_cli.data.output_spec import OutputSpec
from advdiff_cli.data.provenance import Provenance, file_digest, parse_provenance
from advdiff_cli.data.resume import matches_recipe
from advdiff_cli.errors import AdvdiffError

State = Literal["new", "changed", "failed", "kept"]


def check_own_folder(output: OutputSpec) -> None:
    """Check that a folder is new, empty or purified, or that its files may be replaced.

    Raises:
        AdvdiffError: It holds other files.
    """
    out = output.path
    if out.exists() and not output.overwrite and not is_purified_folder(out):
        raise AdvdiffError(f"{out} exists and was not made by advdiff purify; give an empty or new folder as --out")


def read_journal(journal: Path, output: OutputSpec) -> tuple[bool, list[JournalLine | None]]:
    """Return whether a journal is of the recipe of `output`, and its lines; None for a damaged one.

    Raises:
        AdvdiffError: It is of another recipe and may not be overwritten, or is a link.
    """
    if journal.is_symlink():
        raise AdvdiffError(f"{journal} is a symbolic link, which advdiff does not write through; remove it")
    head, *texts = complete_lines(journal) or [""]
    have = _head_recipe(head, journal, overwrite=output.overwrite) if head else None
    same = matches_recipe(output.path, have, output.recipe, overwrite=output.overwrite)
    return same, list(parse_lines(texts))


def _head_recipe(head: str, journal: Path, *, overwrite: bool) -> Provenance:
    """Return the recipe in the first line of a journal; a damaged one is another recipe, if it may be overwritten."""
    try:
        recipe: Provenance = parse_provenance(head, journal)["recipe"]
    except AdvdiffError:
        if overwrite:
            return {}
        raise AdvdiffError(f"the first line of {journal} is damaged; give --overwrite or another --out") from None
    return recipe


def last_lines(journals: Iterable[Iterable[JournalLine]]) -> dict[str, JournalLine]:
    """Return the last line about each input; it is unsure where two journals differ, whose order is not known."""
    found: dict[str, JournalLine] = {}
    for lines in journals:
        for file, line in {line.file: line for line in lines}.items():
            agree = found.get(file, line).sha256 == line.sha256
            found[file] = line if agree else JournalLine(file, "unsure", line.sha256, line.out)
    return found


def folder_plan(output: OutputSpec, root: Path, files: Sequence[Path]) -> Counter[State]:
    """Return how many images are new, changed (or their output is), failed before, and kept; nothing is written.

    Args:
        output: The folder to be made, and its recipe.
        root: The folder that names are relative to.
        files: The images.

    Raises:
        AdvdiffError: The folder holds other files, or was made by another recipe.
    """
    check_own_folder(output)
    read = [read_journal(journal, output) for journal in journals(output.path)]
    known = last_lines(filter(None, lines) for same, lines in read if same and not output.overwrite)
    counts: Counter[State] = Counter()
    for file in files:
        name = file.relative_to(root).as_posix()
        counts[_state(output.path, file, name, known.get(name))] += 1
    return counts


def _state(out: Path, file: Path, name: str, line: JournalLine | None) -> State:
    if line is None:
        return "new"
    if line.status == "failed":
        return "failed"
    try:
        check_file(file)
        entry = FolderEntry(name, file_digest(file), output_name(name))
    except (OSError, AdvdiffError):
        return "changed"
    return "kept" if is_done(out, line, entry) else "changed"
