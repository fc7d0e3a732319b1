"""Noise drawn on a device: the published numbers of Philox, torch's own where it has them, each row's by its name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from advdiff_cli.data import philox

CPU = torch.device("cpu")
N = 3 * 96 * 96
rows = st.lists(st.one_of(st.integers(0, 10**6), st.text(min_size=1, max_size=8)), min_size=1, max_size=5, unique=True)


def keys(names, draws=None, purpose="purify", seed=3, restart=0):
    return philox.row_keys(seed, purpose, names, draws or [0] * len(names), restart=restart, device=CPU)


def test_numbers_are_those_of_the_paper():
    """The known answer of Random123 for a key and a count of zero, and the ten rounds with whole numbers for others."""
    zero = philox.integers(torch.zeros((1, 2), dtype=torch.int64), 8)[0].tolist()
    assert zero[:4] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for key, count in ((-1, 2**61 + 2**33 - 1), (0x123456789ABCDEF0, 5), (2**63 - 1, 2**62 - 1)):
        found = philox.integers(torch.tensor([[key, count]]), 8)[0].tolist()
        assert found == [*_philox(key % 2**64, count), *_philox(key % 2**64, count + 1)]


def _philox(key, count):
    low = 2**32 - 1
    a, b, c, d, k, m = count & low, count >> 32, 0, 0, key & low, key >> 32
    for _ in range(10):
        first, third = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (third >> 32) ^ b ^ k, third & low, (first >> 32) ^ d ^ m, first & low
        k, m = (k + 0x9E3779B9) & low, (m + 0xBB67AE85) & low
    return a, b, c, d


@pytest.mark.skipif(not philox._has_kernel("cpu"), reason="this torch has no such generator")
def test_normal_numbers_are_those_of_torch():
    named = keys(list(range(4)))
    ours = philox.box_muller(philox.integers(named, N))
    torch.testing.assert_close(philox.normal(named, N), ours, rtol=0, atol=2e-6)


def test_without_the_generator_of_torch_numbers_are_the_same(monkeypatch):
    named = keys([1, "a/b.png"])
    ours = philox.normal(named, 1001)
    monkeypatch.setattr(philox, "_has_kernel", lambda kind: False)
    torch.testing.assert_close(philox.normal(named, 1001), ours, rtol=0, atol=2e-6)


@given(rows, st.randoms())
def test_order_and_company_do_not_matter(names, shuffler):
    whole = dict(zip(names, philox.normal(keys(names), 10), strict=True))
    shuffled = list(names)
    shuffler.shuffle(shuffled)
    for name, numbers in zip(shuffled, philox.normal(keys(shuffled), 10), strict=True):
        assert torch.equal(numbers, whole[name])


def test_every_part_of_the_name_matters():
    named = [keys([1]), keys([1], seed=4), keys([1], purpose="attack"), keys([2]), keys(["1"])]
    named += [keys([1], [1]), keys([1], restart=1)]
    assert len({tuple(philox.normal(key, 3)[0].tolist()) for key in named}) == len(named)


@pytest.mark.parametrize("own", [False, True])
def test_numbers_are_standard_normal(own, monkeypatch):
    if own:
        monkeypatch.setattr(philox, "_has_kernel", lambda kind: False)
    numbers = philox.normal(keys(list(range(16))), N)
    assert kstest(numbers.flatten().numpy(), "norm").pvalue > 1e-3
    neighbours = torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]
    assert abs(neighbours.item()) < 5 / (15 * N) ** 0.5


def test_streams_of_a_device_are_those_of_their_rows_and_go_on():
    """Numbers belong to a row's name, and a second call goes on where the first one ended."""
    streams = [philox.DeviceStreams(5, "attack-start", names, CPU) for names in (["a", 7], [7])]
    first, second = ([s.uniform(3, 5), s.normal(2, 3), s.uniform(1, 2)] for s in streams)
    for both, one in zip(first, second, strict=True):
        assert torch.equal(both[1:], one)
        assert len(both[0].unique()) == both[0].numel()
    assert not torch.equal(first[0][0, 0, :2], first[2][0, 0])
    named = philox.row_keys(5, "attack-start", [7], [0], device=CPU)
    expected = philox.integers(named, 16)[:, :15].double() * 2.0**-31 - 1
    torch.testing.assert_close(first[0][1:].double().view(1, -1), expected, rtol=0, atol=2.0**-23)


def test_streams_of_a_device_are_uniform():
    numbers = philox.DeviceStreams(5, "attack-start", range(20), CPU).uniform(3, 32, 32)
    assert -1 <= numbers.min() < numbers.max() < 1
    assert kstest(numbers.flatten().numpy(), "uniform", (-1, 2)).pvalue > 1e-3
