"""--batch-size auto: what layers put out is counted, and the memory that is free bounds the batch."""

import pytest
import torch
from torch import nn

from advdiff_cli.data.resume import resume_params
from advdiff_cli.jobs import memory
from advdiff_cli.jobs.memory import auto_batch_size, parallel_batches
from advdiff_cli.models import device
from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.models.device import free_memory
from advdiff_cli.purification.purifier import DiffusionPurifier

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
# an image of 8 x 8 takes 768 bytes, and 1,024 and 2,048 are put out
LAYERS = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 8, 1)))


def fitting(monkeypatch, patches, **asked):
    """The batch where twice the memory of so many patches is free, which is more than cores ask for."""
    monkeypatch.setattr(memory, "CPU_BATCH", 10**6)
    each = 3072 * (2 if asked.get("graph") else 1) + 2 * 768
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * patches * each)
    return auto_batch_size(LAYERS, (8, 8), CPU, **asked)


@pytest.mark.parametrize("graph", [False, True])
def test_memory_bounds_the_batch(monkeypatch, graph):
    assert fitting(monkeypatch, 64, graph=graph) == 64
    assert fitting(monkeypatch, 127, graph=graph) == 64
    assert fitting(monkeypatch, 0.1, graph=graph) == 1  # the least there is, though it may not fit


def test_cores_bound_the_batch(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**15)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert auto_batch_size(LAYERS, (8, 8), CPU, graph=True) == 32
    assert auto_batch_size(LAYERS, (8, 8), CPU) == 16  # a thread has one to itself
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert auto_batch_size(LAYERS, (8, 8), CPU, graph=True) == 16


def test_memory_and_cores_bound_the_batches_side_by_side(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    each = 4 * (3072 + 2 * 768)  # of a batch of four
    for batches, fit in ((0.1, 1), (1, 1), (3.9, 3), (6, 6), (100, 6)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=batches * 2 * each: int(free))
        assert parallel_batches(LAYERS, (8, 8), 4, CPU) == fit
    assert parallel_batches(LAYERS, (8, 8), 4, torch.device("cuda")) == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert parallel_batches(LAYERS, (8, 8), 4, CPU) == 1


def test_a_batch_is_not_filled_up_for_few_images(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**15)
    monkeypatch.setattr(memory, "CPU_BATCH", 10**6)
    assert [auto_batch_size(LAYERS, (8, 8), CPU, n=n) for n in (1, 2, 3, 20)] == [1, 2, 4, 32]


def test_the_noise_of_every_step_counts_and_one_step_is_computed(monkeypatch, ddpm):
    model = read_ddpm(ddpm)
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**9)
    monkeypatch.setattr(memory, "CPU_BATCH", 10**6)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    one, many = (auto_batch_size(DiffusionPurifier(model, 0.3, "ddpm", k), (96, 96), CPU) for k in (1, 300))
    assert len(calls) == 2
    assert 1 < many < one


def test_a_control_group_bounds_what_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 250000\ninactive_file 150000\n")
    assert free_memory(CPU) == 750_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 750_000


def test_no_hook_is_left():
    auto_batch_size(LAYERS, (8, 8), CPU)
    assert not any(m._forward_hooks for m in LAYERS.modules())


def test_free_memory_is_less_than_the_machine_has():
    import psutil

    assert 0 < free_memory(CPU) <= psutil.virtual_memory().total


def test_auto_is_kept_by_the_output_and_refused_of_parts(advdiff, test_x, ddpm, tmp_path):
    out = tmp_path / "p.h5"
    made = ["purify", test_x, "-m", ddpm, "--t-star", 0.05, "--sampler-steps", 1, "-o", out]
    assert advdiff(*made, "--batch-size", "auto", "--json").json["status"] == "done"
    size = resume_params(out)["batch_size"]
    assert size >= 1
    assert size & (size - 1) == 0
    assert advdiff(*made, "--json").json["status"] == "up to date"
    assert "all parts of a result" in advdiff(*made, "--batch-size", "auto", "--shard", "0/2", code=1).err
    assert "nor auto" in advdiff(*made, "--batch-size", "0", code=2).err
    assert "nor auto" in advdiff(*made, "--batch-size", 10**12, code=2).err
