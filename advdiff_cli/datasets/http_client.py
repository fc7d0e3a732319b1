"""Fetch a file over https: resume with Range, retry with backoff, respect Retry-After, and abort stalled transfers."""

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
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # statuses worth another attempt


@dataclass(frozen=True)
class RetryPolicy:
    """When to retry a fetch, and when to give up.

    Args:
        attempts: Failures in a row before giving up.
        wait: Seconds before the second attempt; doubled for each further one.
        max_wait: The longest wait in seconds, including one that the server asks for.
        timeout: Seconds without a byte after which a transfer has failed.
        min_bytes: Fewer bytes than this in `timeout` seconds are a stall.
        progress: Bytes of progress after which the failures are counted from zero.
        sleep: Waits a number of seconds.
    """

    attempts: int = 6
    wait: float = 2.0
    max_wait: float = 600.0
    timeout: float = 60.0
    min_bytes: int = 4096
    progress: int = 1 << 20
    sleep: Callable[[float], None] = time.sleep


DEFAULT_RETRIES = RetryPolicy()


class FetchError(Exception):
    """Why a fetch failed, whether another attempt may succeed, and the seconds the server asks to wait before it."""

    def __init__(self, reason: str, *, transient: bool = False, wait: float | None = None) -> None:
        """Store the reason."""
        super().__init__(reason)
        self.transient, self.wait = transient, wait


def fetch(url: str, part: Path, size: int | None, retries: RetryPolicy = DEFAULT_RETRIES) -> Iterator[int]:
    """Fetch `url` into the file `part`, yielding the bytes of each block; a negative number when it starts again.

    Args:
        url: https, or http of this machine.
        part: The incomplete download; existing content is resumed.
        size: Bytes of the complete file, or None if unknown.
        retries: When to retry, and when to give up.

    Raises:
        FetchError: The file cannot be fetched; `part` is kept.
        AdvdiffError: The URL is not https.
    """
    check_scheme(url)
    failures, wait, mark = 0, retries.wait, _size(part)
    while True:
        try:
            yield from _once(url, part, size, retries)
            return
        except FetchError as e:
            if _size(part) - mark >= retries.progress:
                failures, wait, mark = 0, retries.wait, _size(part)
            failures += 1
            asked = wait if e.wait is None else e.wait
            if not e.transient or failures >= retries.attempts or asked > retries.max_wait:
                raise
            retries.sleep(asked)
            wait = min(2 * wait, retries.max_wait)


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _once(url: str, part: Path, size: int | None, retries: RetryPolicy) -> Iterator[int]:
    begun = _size(part)
    if size is not None and begun >= size:
        return
    headers = {"User-Agent": f"advdiff/{__version__}", "Accept-Encoding": "identity"}
    if begun:
        headers["Range"] = f"bytes={begun}-"
    try:
        with build_opener(_SafeRedirects).open(Request(url, headers=headers), timeout=retries.timeout) as reply:
            resumed = reply.status == 206 and reply.headers.get("Content-Range", "").startswith(f"bytes {begun}-")
            start = begun if resumed else 0
            whole = _announced(reply, start)
            if size is not None and whole not in (None, size):
                raise FetchError(f"the server has {whole} bytes of {reply.headers.get_content_type()}, not {size}")
            if begun and not resumed:
                yield -begun
            with part.open("ab" if resumed else "wb") as file:
                yield from _copy(reply, file, size, retries)
            if (got := _size(part)) < (whole or size or 0):
                raise FetchError(f"the connection ended after {got} of {whole or size} bytes", transient=True)
    except HTTPError as e:
        if e.code == 416:  # the range is past the end although the file is incomplete: start again
            part.unlink(missing_ok=True)
        transient = e.code in _TRANSIENT or e.code == 416
        raise FetchError(f"HTTP status {e.code}", transient=transient, wait=_asked_wait(e.headers)) from None
    except (URLError, HTTPException, TimeoutError, ConnectionError) as e:
        raise FetchError(str(getattr(e, "reason", None) or e or type(e).__name__), transient=True) from None


def _announced(reply: HTTPResponse, start: int) -> int | None:
    length = reply.headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() else None


def _copy(reply: HTTPResponse, file: IO[bytes], size: int | None, retries: RetryPolicy) -> Iterator[int]:
    """Write the reply to the file; raise FetchError if it stalls."""
    since, got = time.monotonic(), 0
    while block := reply.read1(_BLOCK):
        file.write(block)
        got += len(block)
        yield len(block)
        if size is not None and file.tell() > size:
            break  # too long; the hash check will report it
        if time.monotonic() - since > retries.timeout:
            if got < retries.min_bytes:
                raise FetchError(f"only {got} bytes came in {retries.timeout:g} s", transient=True)
            since, got = time.monotonic(), 0


def _asked_wait(headers: Message) -> float | None:
    """Return the seconds of the Retry-After header, or None without one."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    with suppress(ValueError, TypeError):
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    return None


def check_scheme(url: str) -> None:
    """Check that a URL is https, or plain http to this machine.

    Raises:
        AdvdiffError: It is neither.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        loopback = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
        raise AdvdiffError(f"{url}: a mirror must use https; plain http is allowed for this machine only")


class _SafeRedirects(HTTPRedirectHandler):
    """Follows only redirects to URLs that would be allowed as mirrors."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
