"""Reading ahead: what is computed next is read and decoded by a thread meanwhile."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """Yield `items` in order, one thread being up to `depth` of them ahead; its errors are raised where they fall."""
    source, end = iter(items), object()
    thread = ThreadPoolExecutor(1)
    try:
        coming = deque(thread.submit(next, source, end) for _ in range(depth))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, source, end))
            yield item  # type: ignore[misc]  # mypy does not see that it is not `end`
    finally:
        thread.shutdown(cancel_futures=True)
