"""Reading ahead: the same items, errors where they fall, and no thread left behind."""

import threading
import time

import pytest

from advdiff_cli.data.prefetch import prefetch


@pytest.mark.parametrize(("threads", "depth"), [(1, 1), (1, 3), (4, 8)])
def test_the_results_in_the_order_of_the_items(threads, depth):
    def late(k):
        time.sleep(0.002 * (k % 3))
        return -k

    assert list(prefetch(late, range(20), threads=threads, depth=depth)) == [-k for k in range(20)]
    assert list(prefetch(late, [], threads=threads, depth=depth)) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_as_many_items_as_the_depth_are_begun_while_one_is_worked_on(depth):
    taken = []
    reading = prefetch(lambda k: k, (taken.append(k) or k for k in range(10)), depth=depth)
    assert next(reading) == 0
    assert taken == list(range(depth + 1))


def test_items_are_taken_by_the_thread_that_asks_and_worked_on_by_others():
    mine = threading.get_ident()

    def items():
        for _ in range(3):
            yield threading.get_ident()

    assert all(taken == mine != worked for taken, worked in prefetch(lambda i: (i, threading.get_ident()), items()))


def test_an_error_is_raised_where_its_result_would_have_been():
    def task(k):
        if k == 2:
            raise OSError("gone")
        return k

    reading = prefetch(task, range(9), threads=3, depth=5)
    assert [next(reading), next(reading)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(reading)


def test_no_thread_is_left_when_the_reader_stops_early():
    before = threading.active_count()
    reading = prefetch(lambda k: k, range(10**9), threads=3, depth=4)
    next(reading)
    reading.close()
    assert threading.active_count() == before


def test_the_caller_leaves_at_once_when_items_end_in_an_error_at_the_first():
    gone = threading.Event()

    def items():
        yield 0
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        next(prefetch(lambda _: gone.wait(60), items(), threads=2, depth=3, on_exit=gone.set))
    assert gone.is_set()
