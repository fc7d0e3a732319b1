"""What the training commands share: precision and noise, random numbers for inputs, GPUs for processes."""

import pytest
import torch

from advdiff_cli.cli.compute_options import SeededComputeOptions
from advdiff_cli.cli.output_options import OutputOptions
from advdiff_cli.cli.training import train, training_compute
from advdiff_cli.cli.training_input import InputRequest
from advdiff_cli.data.distributed import check_gpus
from advdiff_cli.data.provenance import recipe
from advdiff_cli.data.view import WHOLE
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.device import resolve_precision
from advdiff_cli.purification.defense_spec import DefenseRequest
from advdiff_cli.training.recipes import Adversary

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # of which only the name is used


def test_a_model_that_is_replaced_does_not_choose_the_precision(tmp_path):
    recorded = {"parameters": {"precision": "bf16", "noise": "philox"}}
    compute = SeededComputeOptions(device="cpu")
    kept, replaced = (OutputOptions(out=tmp_path / "m", overwrite=overwrite) for overwrite in (False, True))
    assert training_compute(compute, kept, recorded, CPU) == ("bf16", "philox")
    assert training_compute(compute, replaced, recorded, CPU) == (resolve_precision("auto", CPU), "numpy")


@pytest.mark.parametrize(
    ("request_", "draws"),
    [
        (InputRequest([None], None), False),
        (InputRequest([None], Adversary(2 / 255, 1, "madry")), True),
        (InputRequest([None, DefenseRequest("noise", t_star=0.1)], None), True),
    ],
)
def test_what_draws_random_numbers(request_, draws):
    assert request_.draws_noise == draws
    built = request_.build("fp32", 0, CPU, WHOLE, "philox")
    assert built.noise == "philox"
    assert all(p.noise_kind == "philox" for p in built.purifiers if p is not None)


@pytest.mark.parametrize(
    ("started", "gpus", "processes"),
    [
        ({}, 1, 1),
        ({"LOCAL_WORLD_SIZE": "3"}, 1, 1),  # of an earlier launcher
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 2, 2),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 1, 2),
        ({"RANK": "0", "WORLD_SIZE": "3"}, 1, 3),
    ],
)
def test_training_needs_a_gpu_for_each_process(started, gpus, processes, monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    check_gpus(CPU)
    if processes <= gpus:
        check_gpus(GPU)
        return
    with pytest.raises(AdvdiffError, match=f"{processes} processes, {gpus} GPUs; start at most {gpus} "):
        train(OutputOptions(out=tmp_path / "m"), recipe("test", {}), None, GPU, lambda work, main: None)
    assert not any(tmp_path.iterdir())
