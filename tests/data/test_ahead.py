"""Reading ahead: the same items, errors where they fall, and no thread left behind."""

import threading

import pytest

from advdiff_cli.data.ahead import ahead


@pytest.mark.parametrize("depth", [1, 3])
def test_the_items_in_their_order(depth):
    assert list(ahead(range(10), depth)) == list(range(10))
    assert list(ahead([], depth)) == []
    assert list(ahead([None, None], depth)) == [None, None]


def test_the_next_item_is_made_while_one_is_worked_on():
    begun = [threading.Event() for _ in range(3)]

    def items():
        for event in begun:
            event.set()
            yield event

    reading = ahead(items())
    assert next(reading) is begun[0]
    assert begun[1].wait(10)


def test_an_error_is_raised_after_the_items_before_it():
    def items():
        yield 1
        raise OSError("gone")

    reading = ahead(items(), 2)
    assert next(reading) == 1
    with pytest.raises(OSError, match="gone"):
        next(reading)


def test_no_thread_is_left_when_the_reader_stops_early():
    before = threading.active_count()
    reading = ahead(iter(range(10**9)), 4)
    next(reading)
    reading.close()
    assert threading.active_count() == before
