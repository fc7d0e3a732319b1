"""Work done ahead by threads: reading and decoding before the computation, encoding and writing after it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def ahead(
    task: Callable[[S], T], items: Iterable[S], *,
    threads: int = 1, depth: int = 1, leaving: Callable[[], object] = lambda: None,
) -> Iterator[T]:  # fmt: skip
    """Yield task(item) for each of `items`, in their order.

    Args:
        task: Run by a thread; what it raises is raised where its result would have been.
        items: Taken by the caller's thread.
        threads: How many tasks run at once.
        depth: How many are begun while the caller works on a result.
        leaving: Called at the end, or when the caller goes no further, before running tasks are waited for.
    """
    source = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        coming = deque[Future[T]]()
        try:
            coming.extend(pool.submit(task, item) for item in islice(source, depth))
            while coming:
                done = coming.popleft()
                coming.extend(pool.submit(task, item) for item in islice(source, 1))
                yield done.result()
        finally:
            leaving()
            pool.shutdown(cancel_futures=True)
