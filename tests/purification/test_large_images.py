"""Large images, denoised from files: the same as from memory, with hardly any memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from advdiff_cli.data.rng import row_stream
from advdiff_cli.models.ddpm import build_ddpm
from advdiff_cli.models.device import autocast
from advdiff_cli.models.registry import load_ddpm
from advdiff_cli.purification import large_images
from advdiff_cli.purification.defended_classifier import row_noise
from advdiff_cli.purification.large_images import purify_large_image
from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier, linear_alpha_bar

CPU = torch.device("cpu")


def purifiers():
    model = build_ddpm("tiny", 96, 0.3, 0).eval()
    return {
        "ddpm, one step": DiffusionPurifier(model, 0.25, "ddpm", 1),
        "ddpm, three steps": DiffusionPurifier(model, 0.1, "ddpm", 3),
        "ddim, two steps": DiffusionPurifier(model, 0.1, "ddim", 2),
        "bundled": DiffusionPurifier(load_ddpm("pcam-ddpm"), 0.25, "ddpm", 1),
        "noise": NoisePurifier(linear_alpha_bar(), 0.1),
    }


@pytest.mark.parametrize(
    ("kind", "size", "precision"),
    [
        ("ddpm, one step", (391, 97), "fp32"),
        ("ddpm, three steps", (391, 97), "fp32"),
        ("ddim, two steps", (97, 391), "fp32"),
        ("bundled", (401, 260), "fp32"),
        ("bundled", (391, 33), "bf16"),
        ("noise", (401, 520), "fp32"),
    ],
)
def test_the_result_is_that_of_the_whole_image(tmp_path, monkeypatch, kind, size, precision):
    monkeypatch.setattr(large_images, "_CHUNK", 50 * size[1])
    purifier = purifiers()[kind]
    pixels = np.random.default_rng(0).integers(0, 256, (3, *size), np.uint8)
    images = torch.from_numpy(pixels.astype(np.float32) / np.float32(255))[None]
    noise = row_noise(purifier, images, ["a.png"], seed=3, purpose="purify")
    with torch.inference_mode(), autocast(precision, CPU):
        whole = (purifier(images, noise)[0].float() * 255).round().byte().numpy()
        found = purify_large_image(purifier, pixels, row_stream(3, "purify", "a.png"), CPU, tmp_path)
    assert np.array_equal(found, whole)
    assert not list(tmp_path.iterdir())


def test_noise_is_added_on_the_device_of_the_purifier(tmp_path, monkeypatch):
    purifier, seen = purifiers()["noise"], set()

    def forward(images, noise):
        seen.update((images.device.type, noise.device.type))
        return torch.zeros(images.shape)

    monkeypatch.setattr(purifier, "forward", forward)
    pixels, meta = np.zeros((3, 8, 8), np.uint8), torch.device("meta")
    purify_large_image(purifier, pixels, row_stream(0, "purify", "a.png"), meta, tmp_path)
    assert seen == {"meta"}


def test_an_overflow_is_an_error(tmp_path):
    purifier = DiffusionPurifier(build_ddpm("tiny", 96, 0.3, 0).eval(), 0.25, "ddpm", 1)
    with torch.no_grad():
        for p in purifier.parameters():
            p.mul_(1e20)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 400, 64), np.uint8)
    with pytest.raises(FloatingPointError):
        purify_large_image(purifier, pixels, row_stream(0, "purify", "a.png"), CPU, tmp_path)


PEAK = """
import resource, sys
import numpy as np, torch
from pathlib import Path
from advdiff_cli.data.rng import row_stream
from advdiff_cli.purification import large_images
from advdiff_cli.purification.large_images import purify_large_image
from advdiff_cli.purification.purifier import DiffusionPurifier
from advdiff_cli.models.ddpm import build_ddpm

purifier = DiffusionPurifier(build_ddpm("tiny", 96, 0.3, 0).eval(), 0.25, "ddpm", 1)
large_images._CHUNK = 1 << 16  # of the memory that does not grow
large_images.add_windows = lambda predict, images, multiple, blended, total: total.fill_(1)
for side in (500, 2500):
    pixels = np.zeros((3, side, side), np.uint8)
    found = purify_large_image(purifier, pixels, row_stream(0, "purify", "a"), torch.device("cpu"), Path(sys.argv[1]))
    print([int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")][0] / 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the memory")
def test_memory_is_that_of_the_pixels(tmp_path):
    """Anonymous memory grows by the bytes of the image, in and out, and not by its floats (28 bytes a pixel)."""
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    small, large = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert large - small < 6 * 12  # MB for 6 million pixels
