"""The only module that prints: results to stdout; log lines, warnings and progress to stderr."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

PLAIN_INTERVAL = 30.0  # seconds between progress lines where stderr is no terminal

Advance = Callable[..., None]


_heard = True
_first = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
"""Whether this process speaks for those that torchrun started with it; warnings and errors come from each."""


def log(message: str) -> None:
    """Print one line to stderr."""
    if _first:
        _say(message)


def _say(message: str) -> None:
    if _heard:
        print(message, file=sys.stderr, flush=True)


@contextmanager
def unheard() -> Iterator[None]:
    """Print nothing to stderr meanwhile: for commands that a command runs over and over."""
    global _heard
    before, _heard = _heard, False
    try:
        yield
    finally:
        _heard = before


def warn(message: str) -> None:
    """Print one warning line to stderr."""
    _say(f"advdiff: warning: {message}")


def error(message: str) -> None:
    """Print one error line to stderr."""
    _say(f"advdiff: error: {' '.join(message.split())}")


def emit(data: Mapping[str, Any], text: str, brief: object, *, as_json: bool, quiet: bool) -> None:
    """Print a command's result to stdout: one JSON object, the `brief` value alone, or `text`."""
    if not _first:
        return
    if as_json:
        print(json.dumps(data))
    else:
        print(brief if quiet else text)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out plain aligned columns: the first to the left, the others to the right."""
    cells = [[str(c) for c in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


@contextmanager
def progress(total: int, what: str, *, done: int = 0, quiet: bool = False) -> Iterator[Advance]:
    """Show progress on stderr: a live bar on a terminal, a plain line now and then elsewhere.

    `done` of the `total` were finished by an earlier run. Yields `advance(n=1, note="")`, to be called after each
    finished piece of work.
    """
    if quiet or not (_heard and _first):
        yield lambda n=1, note="": None
    elif sys.stderr.isatty():
        with _bar(total, what, done) as advance:
            yield advance
    else:
        yield _plain(total, what, done)


@contextmanager
def _bar(total: int, what: str, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bar.update(task, advance=n)
            if note:
                bar.update(task, note=note)

        yield advance


def _plain(total: int, what: str, done: int) -> Advance:
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
            log(f"{what}: {done}/{total}, {rate:.3g}/s{left}{'  ' + note if note else ''}")

    return advance
