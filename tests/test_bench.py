"""The benchmark: what it counts is right, and it measures what it says."""

import shutil
from dataclasses import replace

import pytest
import torch

from advdiff_cli.benchmark.timing import Timing, Workload, measure, ratios
from advdiff_cli.benchmark.workloads import count_flops
from advdiff_cli.models.card import PurificationSettings, load_card, save_card

CPU = torch.device("cpu")


def test_operations_are_counted_as_the_mathematics_says():
    a, b = torch.rand(5, 7), torch.rand(7, 3)
    assert count_flops(lambda: a @ b) == 2 * 5 * 7 * 3
    convolution = torch.nn.Conv2d(3, 8, 3, padding=1)
    assert count_flops(lambda: convolution(torch.rand(1, 3, 10, 10))) == 2 * 10 * 10 * 8 * 3 * 9


def test_workloads_take_turns_and_the_first_round_does_not_count():
    order, rounds = [], []
    workloads = [Workload(name, lambda name=name: order.append(name), patches=2) for name in "ab"]
    found = measure(workloads, 2, CPU, lambda: rounds.append(len(order)))
    assert order == list("ababab")
    assert rounds == [2, 4, 6]
    assert [len(t.seconds) for t in found.values()] == [len(t.processor_seconds) for t in found.values()] == [2, 2]


def test_figures_and_ratios():
    fast = Timing(Workload("fast", lambda: 0, patches=4, flops=100), [1.0, 2.0, 9.0], [1.0, 6.0, 4.0])
    slow = Timing(Workload("slow", lambda: 0, patches=1), [5.0], [5.0])
    told = fast.as_dict()
    assert told["seconds"] == {"median": 0.5, "least": 0.25, "most": 2.25}
    assert (told["patches_per_second"], told["flops_per_second"]) == (2.0, 200.0)
    assert told["processor_seconds"] == 1.0
    assert ratios({"fast": fast, "slow": slow}, {"r": ("fast", "slow"), "none": ("fast", "nowhere")}) == {"r": 10.0}


@pytest.mark.slow
def test_bench_end_to_end(advdiff, ddpm, classifier, tmp_path):
    shutil.copytree(ddpm, tmp_path / "m")
    save_card(replace(load_card(ddpm), recommended=PurificationSettings(0.04, "ddpm", 1)), tmp_path / "m")
    found = advdiff(
        "bench", "-m", tmp_path / "m", "-c", classifier, "-n", 16, "--rounds", 1, "--no-paper", "--json"
    ).json
    names = [m["name"] for m in found["measured"]]
    assert "the paper's loop" not in names
    assert {"advdiff purify", "diffusers in batches", "advdiff training step"} <= set(names)
    purify, theirs = (
        next(m for m in found["measured"] if m["name"] == n) for n in ("advdiff purify", "diffusers in batches")
    )
    assert (purify["unet_evaluations"], theirs["unet_evaluations"]) == (1, 40)
    assert theirs["flop_per_patch"] == 40 * purify["flop_per_patch"] > 0
    times = purify["patches_per_second"] / theirs["patches_per_second"]
    (ratio,) = (v for k, v in found["ratios"].items() if "times diffusers in batches (40 steps" in k)
    assert ratio == pytest.approx(times)
    assert found["ratios"]["purify, times diffusers in batches, a U-Net evaluation"] == pytest.approx(times / 40)
    certified = [k for k in found["ratios"] if k.startswith("draws of certify")]
    assert len(certified) == 2
    assert {"certify, a draw", "certify, a draw, central 64x64", "Carlini et al.'s loop, a draw"} <= set(names)
    assert all(share > 0 for share in found["of_ceiling"].values())
    assert found["purify_outside_unet"] < 1
    copied = next(m for m in found["measured"] if m["name"] == "reading and writing alone")
    assert found["reading_and_writing"] == {
        "time": pytest.approx(purify["patches_per_second"] / copied["patches_per_second"]),
        "processor_time": pytest.approx(copied["processor_seconds"] / purify["processor_seconds"]),
    }
