"""The workloads of `advdiff bench` that certify: this package, and the loop of Carlini et al. 2023 with diffusers."""

import copy
from collections import deque
from dataclasses import replace

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from advdiff_cli.benchmark.timing import Workload, count_flops
from advdiff_cli.certification.smoothing import SmoothedClassifier
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.jobs.certify import CertifyJob
from advdiff_cli.jobs.recipes import CertifySettings
from advdiff_cli.models.classifiers import Classifier
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.defense_spec import ModelSpec
from advdiff_cli.purification.purifier import DiffusionPurifier

CERTIFY = "certify, a draw"
CENTER = ", central 64x64"
CARLINI = "Carlini et al.'s loop, a draw"

_PATCHES, _BATCHES = 4, 4  # of each run


def certify_draws(
    purifier: DiffusionPurifier, classifier: nn.Module, patches: PatchSet, batch_size: int, device: torch.device
) -> list[Workload]:
    """Return the draws of `certify` for some patches, and the same for a classifier that reads the center of each."""
    views = [("", classifier)]
    if isinstance(classifier, Classifier):
        center = copy.copy(classifier)
        center.config = replace(classifier.config, crop=64)
        views.append((CENTER, center))
    return [_certify(CERTIFY + name, purifier, one, patches, batch_size, device) for name, one in views]


def _certify(
    name: str,
    purifier: DiffusionPurifier,
    classifier: nn.Module,
    patches: PatchSet,
    batch_size: int,
    device: torch.device,
) -> Workload:
    defended = DefendedClassifier(purifier, classifier).to(device)
    smoothed = SmoothedClassifier(defended, patches.require_shape(), 0)
    settings = CertifySettings(batch_size, (_BATCHES - 1) * batch_size, 0.001)
    job = CertifyJob(smoothed, ModelSpec(""), patches, settings, batch_size, device)
    draws = _PATCHES * _BATCHES * batch_size
    flops = count_flops(lambda: smoothed.votes(patches.read([0])[0].to(device), 0, [0]))
    return Workload(name, lambda: deque(job.certificates(range(_PATCHES)), 0), draws, flops)


def carlini_loop(
    purifier: DiffusionPurifier, classifier: nn.Module, patches: PatchSet, batch_size: int, device: torch.device
) -> Workload:
    """Return the loop of a careful user of diffusers: one patch repeated in a batch, one step, fp32.

    Source: ethz-privsec/diffusion_denoised_smoothing, imagenet/core.py and DRM.py.
    """
    unet = copy.deepcopy(purifier.ddpm.unet).to(device, memory_format=torch.contiguous_format)
    factor, t = purifier.ddpm.card.space_to_depth, purifier.noised_to
    scheduler = DDPMScheduler(num_train_timesteps=purifier.ddpm.timesteps)
    alpha_bar = scheduler.alphas_cumprod[t].to(device)
    network = copy.deepcopy(classifier).to(memory_format=torch.contiguous_format)
    read = patches.read(range(_PATCHES)).to(device)

    @torch.no_grad()
    def decide(image: Tensor) -> Tensor:
        batch = image.repeat((batch_size, 1, 1, 1)) * 2 - 1
        noise, steps = torch.randn_like(batch), torch.full((batch_size,), t, device=device)
        x_t = scheduler.add_noise(batch, noise, steps)
        predicted = pixel_shuffle(unet(pixel_unshuffle(x_t, factor), steps).sample, factor)
        x_0 = (x_t - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
        decided: Tensor = network((x_0.clamp(-1, 1) + 1) / 2).argmax(1)
        return decided

    def run() -> None:
        for image in read:
            counts = torch.zeros(2, dtype=torch.long)
            for _ in range(_BATCHES):
                counts += decide(image).bincount(minlength=2).cpu()

    return Workload(CARLINI, run, _PATCHES * _BATCHES * batch_size)
