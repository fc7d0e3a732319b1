"""Batches side by side on a CPU: the same results in the same order, errors where they fall, prompt ends."""

import pytest
import torch
from torch import nn

from advdiff_cli.data.patches import open_patches
from advdiff_cli.jobs.parallel_map import parallel_map

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("at_once", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 20])
def test_results_come_in_order(threads, at_once, n):
    threads(4)
    layer = nn.Linear(3, 3).requires_grad_(False)
    inputs = [torch.full((2, 3), float(k)) for k in range(n)]
    found = list(parallel_map(lambda x: x + 1, layer, inputs, at_once))
    assert all(torch.equal(y, layer(x + 1)) for x, y in zip(inputs, found, strict=True))
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("n", [1, 2, 20])
@pytest.mark.parametrize(("at_once", "cores"), [(6, 1), (1, 1), (0, 6)])
def test_a_batch_has_one_core_however_many_there_are(threads, n, at_once, cores):
    threads(6)
    assert set(parallel_map(lambda _: None, lambda _: torch.get_num_threads(), range(n), at_once)) == {cores}
    assert torch.get_num_threads() == 6


def test_an_error_falls_where_its_result_would_have_been(threads):
    threads(2)
    results = parallel_map(lambda k: k, lambda k: 12 // k, [4, 3, 0, 1], 2)
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

    results = parallel_map(lambda k: k, for_ever, range(3), 2)
    assert next(results) == 0
    results.close()
    assert len(calls) < 10**6
    assert layer(1) == 1  # which nothing stops any more


def test_the_same_rows_on_any_number_of_threads(advdiff, threads, test_x, classifier, ddpm, tmp_path):
    """purify to a file and judging, of batches side by side and of one that is left alone: to the bit, in fp32."""
    images, judged = {}, {}
    defended = ["-c", classifier, "-m", ddpm, "--t-star", 0.05, "--sampler-steps", 2, "--precision", "fp32"]
    for k in (1, 3):
        threads(k)
        for n in (4, 40):
            rows, out, told = ["--limit", n], tmp_path / f"{k}-{n}.safetensors", tmp_path / f"{k}-{n}.csv"
            advdiff("purify", test_x, *rows, *defended[2:], "--batch-size", 4, "-o", out)
            images[k, n] = open_patches(out).read(range(n))
            advdiff("evaluate", test_x, *rows, *defended, "--draws", 3, "--predictions", told)
            judged[k, n] = told.read_text().splitlines()
    for k, n in images:
        assert torch.equal(images[k, n], images[1, 40][:n])
        assert judged[k, n] == judged[1, 40][: len(judged[k, n])]
