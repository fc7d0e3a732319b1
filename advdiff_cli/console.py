"""The only module that prints: results to stdout; log lines, warnings, errors and progress to stderr."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from advdiff_cli.data.distributed import is_main_process

PLAIN_INTERVAL = 30.0  # seconds between progress lines where stderr is not a terminal


class Advance(Protocol):
    """Reports progress: `n` more pieces of work are done, and a note about them."""

    def __call__(self, n: int = 1, note: str = "") -> None:
        """Report progress."""


def log(message: str) -> None:
    """Print a line to stderr, in the main process."""
    if is_main_process():
        _print(message)


def warn(message: str) -> None:
    """Print a warning to stderr, in every process."""
    _print(f"advdiff: warning: {message}")


def error(message: str) -> None:
    """Print an error to stderr, as one line, in every process."""
    _print(f"advdiff: error: {' '.join(message.split())}")


class WarningHandler(logging.Handler):
    """Prints what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record as a warning."""
        warn(record.getMessage())


def printable(text: str) -> str:
    """Return text as one line without control characters: file names could hold commands for the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _print(message: str) -> None:
    print(printable(message), file=sys.stderr, flush=True)


def emit(data: Mapping[str, object], text: str, brief: object, *, as_json: bool, quiet: bool) -> None:
    """Print the result of a command to stdout: one JSON object, the `brief` value alone, or `text`."""
    if not is_main_process():
        return
    if as_json:
        print(json.dumps(data))
    else:
        lines = str(brief if quiet else text).split("\n")
        raw = quiet and not sys.stdout.isatty()  # scripts need names as they are
        print("\n".join(lines if raw else map(printable, lines)))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return aligned columns, the first one to the left and the others to the right."""
    cells = [[printable(str(c)) for c in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


@contextmanager
def progress(total: int, label: str, *, done: int = 0, quiet: bool = False) -> Iterator[Advance]:
    """Show progress on stderr: a live bar on a terminal, and a line every 30 seconds elsewhere.

    Args:
        total: Pieces of work.
        label: What is done.
        done: Pieces that an earlier run finished.
        quiet: Show nothing.

    Yields:
        A function to call after each piece of work.
    """
    if quiet or not is_main_process():
        yield _no_progress
    elif sys.stderr.isatty():
        with _bar(total, label, done) as advance:
            yield advance
    else:
        yield _lines(total, label, done)


def _no_progress(n: int = 1, note: str = "") -> None:
    return


@contextmanager
def _bar(total: int, label: str, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=done, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bar.update(task, advance=n)
            if note:
                bar.update(task, note=note)

        yield advance


def _lines(total: int, label: str, done: int) -> Advance:
    started = last = time.monotonic()
    before = done

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal last, done
        done += n
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL or (done >= total and now - started >= PLAIN_INTERVAL):
            last = now
            rate = (done - before) / (now - started)
            left = f", {(total - done) / rate:.0f} s left" if done < total else ""
            log(f"{label}: {done}/{total}, {rate:.3g}/s{left}{'  ' + note if note else ''}")

    return advance
