"""A row's numbers belong to the row."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from advdiff_cli.data.rng import RowStreams, stream

rows = st.lists(st.one_of(st.integers(0, 10**6), st.text(min_size=1, max_size=8)), min_size=1, max_size=5, unique=True)


@given(rows, st.randoms())
def test_order_and_company_do_not_matter(keys, shuffler):
    whole = dict(zip(keys, RowStreams(3, "purify", keys).normal(2, 5), strict=True))
    shuffled = list(keys)
    shuffler.shuffle(shuffled)
    for key, numbers in zip(shuffled, RowStreams(3, "purify", shuffled).normal(2, 5), strict=True):
        assert torch.equal(numbers, whole[key])


def test_every_part_of_the_name_matters():
    names = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 1, 0), (0, "a", "1")]
    drawn = {tuple(stream(seed, purpose, *rest).random(3)) for seed, purpose, *rest in names}
    assert len(drawn) == len(names)


def test_numbers_are_standard_normal():
    numbers = RowStreams(0, "purify", list(range(64))).normal(3, 32, 32)
    assert abs(numbers.mean().item()) < 0.01
    assert abs(numbers.std().item() - 1) < 0.01
    assert numbers.isfinite().all()
