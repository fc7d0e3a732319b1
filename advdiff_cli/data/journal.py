"""Line-based journals, whose last line may be incomplete after a crash."""

import os
from pathlib import Path


def complete_lines(journal: Path) -> list[str]:
    """Return the lines of a journal without an incomplete last line."""
    return journal.read_bytes().decode(errors="ignore").split("\n")[:-1]  # splitlines would also split file names


def drop_incomplete_line(journal: Path) -> None:
    """Remove an incomplete last line; no other process may be writing the journal."""
    text = journal.read_bytes()
    if (complete := text.rfind(b"\n") + 1) < len(text):
        os.truncate(journal, complete)
