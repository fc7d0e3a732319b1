"""Batches side by side on a CPU: the same results in the same order, errors where they fall, prompt ends."""

import pytest
import torch
from torch import nn

from advdiff_cli.data.patches import open_patches
from advdiff_cli.models.device import spread


@pytest.fixture
def threads():
    """Set the number of torch's threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 20])
def test_results_come_in_order(threads, at_once, n):
    threads(4)
    layer = nn.Linear(3, 3).requires_grad_(False)
    inputs = [torch.full((2, 3), float(k)) for k in range(n)]
    found = list(spread(lambda x: x + 1, layer, inputs, at_once))
    assert all(torch.equal(y, layer(x + 1)) for x, y in zip(inputs, found, strict=True))
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(("n", "share"), [(3, 2), (2, 3), (20, 1)])
def test_threads_share_the_cores(threads, n, share):
    threads(6)
    assert set(spread(lambda _: torch.get_num_threads(), lambda found: found, range(n), 6)) == {share}


def test_one_batch_has_all_cores(threads):
    threads(3)
    assert list(spread(lambda x: x, lambda _: torch.get_num_threads(), [0], 3)) == [3]


def test_an_error_falls_where_its_result_would_have_been(threads):
    threads(2)
    results = spread(lambda k: k, lambda k: 12 // k, [4, 3, 0, 1], 2)
    assert [next(results), next(results)] == [3, 4]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert torch.get_num_threads() == 2


def test_an_interrupted_caller_waits_for_a_layer_and_not_for_a_batch(threads):
    threads(2)
    layer, calls = nn.Identity(), []

    def for_ever(k):
        while k and len(calls) < 10**6:
            calls.append(layer(k))
        return k

    results = spread(lambda k: k, for_ever, range(3), 2)
    assert next(results) == 0
    results.close()
    assert len(calls) < 10**6
    assert layer(1) == 1  # which nothing stops any more


def test_the_same_rows_on_any_number_of_threads(advdiff, threads, test_x, classifier, ddpm, tmp_path):
    """purify to a file and judging, batches shared by threads or side by side: to the bit."""
    images, found = {}, {}
    defended = ["-c", classifier, "-m", ddpm, "--t-star", 0.05, "--sampler-steps", 2]
    for k in (1, 2, 3):
        threads(k)
        out = tmp_path / f"{k}.safetensors"
        advdiff("purify", test_x, *defended[2:], "--batch-size", 4, "-o", out)
        images[k] = open_patches(out).fingerprint()
        judged = advdiff("evaluate", test_x, *defended, "--draws", 3, "--json").json
        found[k] = [s["accuracy"] for s in judged["sets"]], [s["auroc"] for s in judged["sets"]]
    assert images[1] == images[2] == images[3]
    assert found[1] == found[2] == found[3]
