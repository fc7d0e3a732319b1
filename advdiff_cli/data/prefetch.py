"""Run tasks in threads ahead of the code that uses their results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def prefetch(
    task: Callable[[S], T],
    items: Iterable[S],
    *,
    threads: int = 1,
    depth: int = 1,
    on_exit: Callable[[], object] = lambda: None,
) -> Iterator[T]:
    """Yield task(item) for each item, in order.

    Args:
        task: Runs in a thread. An exception it raises is raised where its result would have been yielded.
        items: Consumed in the caller's thread.
        threads: Number of tasks that run at the same time.
        depth: Number of tasks started while the caller works on a result.
        on_exit: Called at the end, or when the caller stops early, before running tasks are joined.
    """
    source = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        pending = deque[Future[T]]()
        try:
            pending.extend(pool.submit(task, item) for item in islice(source, depth))
            while pending:
                done = pending.popleft()
                pending.extend(pool.submit(task, item) for item in islice(source, 1))
                yield done.result()
        finally:
            on_exit()
            pool.shutdown(cancel_futures=True)
