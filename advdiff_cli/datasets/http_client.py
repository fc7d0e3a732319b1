"""Fetch a file over https: resumed by Range, retried with backoff, Retry-After honoured, stalls cut off."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage, HTTPResponse
from ipaddress import ip_address
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from advdiff_cli import __version__
from advdiff_cli.errors import AdvdiffError

_BLOCK = 1 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be another next time


@dataclass(frozen=True)
class Patience:
    """How long a fetch puts up with trouble: attempts in a row, and seconds.

    `wait` is before the second attempt and doubles; `longest` is the longest wait, one that a server asks for too;
    `timeout` is without a byte; less than `slow` bytes in `timeout` seconds is a stall.
    """

    attempts: int = 6
    wait: float = 2.0
    longest: float = 600.0
    timeout: float = 60.0
    slow: int = 4096
    progress: int = 1 << 20  # bytes after which the attempts are counted anew
    sleep: Callable[[float], None] = time.sleep


PATIENT = Patience()


class FetchError(Exception):
    """Why a fetch failed; `passing` when another attempt may not, `wait` the seconds a server asks for first."""

    def __init__(self, reason: str, *, passing: bool = False, wait: float | None = None) -> None:
        """Say why."""
        super().__init__(reason)
        self.passing, self.wait = passing, wait


def fetch(url: str, part: Path, size: int | None, patience: Patience = PATIENT) -> Iterator[int]:
    """Grow the file `part` to the whole of `url`, yielding bytes as they come; negative when it begins anew.

    Args:
        url: https, or http of this machine.
        part: Where it grows; what is there already is taken for its beginning.
        size: Of the whole in bytes, or None where it is not known.
        patience: How long to put up with trouble.

    Raises:
        FetchError: it cannot be had; what was fetched stays.
        AdvdiffError: the address is not https.
    """
    check_scheme(url)
    failures, wait, mark = 0, patience.wait, _size(part)
    while True:
        try:
            yield from _once(url, part, size, patience)
            return
        except FetchError as e:
            if _size(part) - mark >= patience.progress:
                failures, wait, mark = 0, patience.wait, _size(part)
            failures += 1
            asked = wait if e.wait is None else e.wait
            if not e.passing or failures >= patience.attempts or asked > patience.longest:
                raise
            patience.sleep(asked)
            wait = min(2 * wait, patience.longest)


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _once(url: str, part: Path, size: int | None, patience: Patience) -> Iterator[int]:
    begun = _size(part)
    if size is not None and begun >= size:
        return
    headers = {"User-Agent": f"advdiff/{__version__}", "Accept-Encoding": "identity"}
    if begun:
        headers["Range"] = f"bytes={begun}-"
    try:
        with build_opener(_SafeRedirects).open(Request(url, headers=headers), timeout=patience.timeout) as reply:
            resumed = reply.status == 206 and reply.headers.get("Content-Range", "").startswith(f"bytes {begun}-")
            start = begun if resumed else 0
            whole = _announced(reply, start)
            if size is not None and whole not in (None, size):
                raise FetchError(f"the server has {whole} bytes of {reply.headers.get_content_type()}, not {size}")
            if begun and not resumed:
                yield -begun
            with part.open("ab" if resumed else "wb") as file:
                yield from _copy(reply, file, size, patience)
            if (got := _size(part)) < (whole or size or 0):
                raise FetchError(f"the connection ended after {got} of {whole or size} bytes", passing=True)
    except HTTPError as e:
        if e.code == 416:  # nothing follows what is there, and that is not the whole: begin anew
            part.unlink(missing_ok=True)
        passing = e.code in _PASSING or e.code == 416
        raise FetchError(f"HTTP status {e.code}", passing=passing, wait=_asked_wait(e.headers)) from None
    except (URLError, HTTPException, TimeoutError, ConnectionError) as e:
        raise FetchError(str(getattr(e, "reason", None) or e or type(e).__name__), passing=True) from None


def _announced(reply: HTTPResponse, start: int) -> int | None:
    length = reply.headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() else None


def _copy(reply: HTTPResponse, file: IO[bytes], size: int | None, patience: Patience) -> Iterator[int]:
    """Write what comes, as it comes; FetchError when it comes too slowly."""
    since, got = time.monotonic(), 0
    while block := reply.read1(_BLOCK):
        file.write(block)
        got += len(block)
        yield len(block)
        if size is not None and file.tell() > size:
            break  # more than it should be: the check of its hash says so
        if time.monotonic() - since > patience.timeout:
            if got < patience.slow:
                raise FetchError(f"only {got} bytes came in {patience.timeout:g} s", passing=True)
            since, got = time.monotonic(), 0


def _asked_wait(headers: Message) -> float | None:
    """Return the seconds that Retry-After asks to wait, or None where it does not."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    with suppress(ValueError, TypeError):
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    return None


def check_scheme(url: str) -> None:
    """Check that a URL is https, or plain http to this machine; AdvdiffError when not."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        loopback = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
        raise AdvdiffError(f"{url}: a mirror must be https; plain http is for this machine only")


class _SafeRedirects(HTTPRedirectHandler):
    """Follows redirects to where a mirror itself may lie, and nowhere else."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
