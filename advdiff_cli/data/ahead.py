"""Work done ahead by threads: reading and decoding before the computation, encoding and writing after it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def ahead(task: Callable[[S], T], items: Iterable[S], *, threads: int = 1, depth: int = 1) -> Iterator[T]:
    """Yield task(item) for each of `items`, in their order.

    Args:
        task: Run by a thread; what it raises is raised where its result would have been.
        items: Taken by the caller's thread.
        threads: How many tasks run at once.
        depth: How many are begun while the caller works on a result.
    """
    source = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        coming = deque(pool.submit(task, item) for item in islice(source, depth))
        try:
            while coming:
                done = coming.popleft()
                coming.extend(pool.submit(task, item) for item in islice(source, 1))
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)
