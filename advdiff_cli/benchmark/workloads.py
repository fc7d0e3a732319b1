"""The workloads of `advdiff bench`: the paper's loop, diffusers in batches, and this package."""

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pixel_unshuffle

from advdiff_cli.attacks.eot import Objective
from advdiff_cli.benchmark.certification import carlini_loop, certify_draws
from advdiff_cli.benchmark.timing import Workload, count_flops
from advdiff_cli.data.output_spec import OutputSpec, RowRange
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.provenance import recipe
from advdiff_cli.datasets.synthetic import SyntheticSource
from advdiff_cli.jobs.memory import parallel_batches
from advdiff_cli.jobs.parallel_map import parallel_map
from advdiff_cli.jobs.purify_rows import PurifyJob, purify_rows
from advdiff_cli.jobs.recipes import default_batch_size
from advdiff_cli.models.ddpm import Ddpm, build_ddpm
from advdiff_cli.models.device import autocast
from advdiff_cli.models.precision import Precision
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.defense import Defense
from advdiff_cli.purification.purifier import DiffusionPurifier
from advdiff_cli.training.checkpoints import WorkFolder
from advdiff_cli.training.fit_ddpm import DdpmFit
from advdiff_cli.training.loader import TrainingRows, in_memory_for_gpu
from advdiff_cli.training.recipes import DdpmRecipe

PAPER_STEPS = 40
PURIFY = "advdiff purify"
TRAIN = "advdiff training step"
COPY = "reading and writing alone"
COMPILED = ", compiled"

_SIDE = 4096  # of the square matrices whose product is the upper limit of speed


@dataclass(frozen=True)
class Benchmark:
    """What is compared.

    Args:
        defense: The diffusion model and its settings.
        classifier: Behind it, for attack gradients.
        data: A patch set to purify and to train on.
        precision: Of purification and training.
        device: Where to compute.
    """

    defense: Defense
    classifier: nn.Module
    data: Path
    precision: Precision
    device: torch.device

    @property
    def batch(self) -> int:
        """The number of patches computed together."""
        return default_batch_size(self.device.type, None, graph=False)

    @property
    def purifier(self) -> DiffusionPurifier:
        """The purifier."""
        purifier = self.defense.purifier.to(self.device)
        assert isinstance(purifier, DiffusionPurifier)
        return purifier

    def workloads(self, *, paper: bool, compiled: bool) -> list[Workload]:
        """Return all workloads, with the paper's loop and compiled variants if asked for."""
        images = torch.from_numpy(SyntheticSource(self.batch, 0).read(np.arange(self.batch))).float() / 255
        images, precision, device = images.to(self.device), self.precision, self.device
        model, steps = self.purifier.ddpm, len(self.purifier.timesteps)
        forward = unet_forward(self.purifier, images, precision)
        found = [matrix_product(precision, device), *([papers_loop(images)] if paper else [])]
        found += [diffusers_in_batches(model, images)]
        found += [replace(self.purify(), flops=steps * forward.flops, unet_evaluations=steps), forward]
        for each in dict.fromkeys(("fp32", precision)):
            found += attack_step(self.defense.protect(self.classifier, device, each), images)
            found.append(diffusers_training(model, images, each))
        found += [self.training(), self.copy(), *self.certification()]
        if compiled:
            separate = copy.deepcopy(self.defense)  # the other workloads stay uncompiled
            separate.compile_unet(device)
            defended = separate.protect(self.classifier, device, precision)
            found += [attack_step(defended, images, COMPILED)[1], self.training(COMPILED)]
        return found

    def purify(self) -> Workload:
        """Return a purification from file to file."""
        patches = open_patches(self.data)
        job = PurifyJob(self.defense, 0, self.batch, self.precision, self.device)
        output = OutputSpec(self.data.with_name("purified.safetensors"), job.recipe(patches), overwrite=True)
        n = len(patches)
        self.purifier.to(self.device)

        def run() -> None:
            fresh = open_patches(self.data)
            deque(purify_rows(job, fresh, PatchWriter(output, fresh, RowRange(0, n, n))), 0)

        return Workload(PURIFY, run, n)

    def certification(self) -> list[Workload]:
        """Return the draws of certificates, in fp32."""
        shared = (self.purifier, self.classifier, open_patches(self.data), self.batch, self.device)
        return [*certify_draws(*shared), carlini_loop(*shared)]

    def copy(self) -> Workload:
        """Return the reading and writing of a purification, without computation."""
        patches = open_patches(self.data)
        n, output = len(patches), OutputSpec(self.data.with_name("copy.safetensors"), recipe("bench", {}), "cpu", True)

        def run() -> None:
            with PatchWriter(output, patches, RowRange(0, n, n)) as writer:
                for batch in writer.batches(self.batch):
                    writer.write(batch, patches.read(batch.rows).numpy())

        return Workload(COPY, run, n)

    def training(self, variant: str = "") -> Workload:
        """Return a step of train-ddpm, with the reading of its patches."""
        model = self.purifier.ddpm
        rows = TrainingRows(in_memory_for_gpu([open_patches(self.data)], self.device), labeled=False)
        fresh = Ddpm(type(model.unet).from_config(model.unet.config), model.scheduler, model.card)
        if variant == COMPILED:
            fresh.to(self.device).compile_unet()
        noise = self.defense.spec.noise
        settings = DdpmRecipe(10**6, self.batch, 1e-4, 0.999, model.card.max_t, 0, self.precision, noise=noise)
        output = OutputSpec(self.data.with_name(f"ddpm{variant}"), recipe("bench", {}), overwrite=True)
        fit = DdpmFit(fresh, rows, None, settings, WorkFolder(output, None), self.device, 10**6, 10**7)
        records = fit.run()
        return Workload(TRAIN + variant, lambda: next(records), self.batch)


def matrix_product(precision: Precision, device: torch.device) -> Workload:
    """Return the upper limit of speed: products of two large square matrices."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
    products = 100 if device.type == "cuda" else 1  # one takes less time than its launch

    def run() -> None:
        for _ in range(products):
            torch.mm(a, b)

    return Workload(f"matrix product, {precision}", run, products, 2 * _SIDE**3)


def papers_loop(images: Tensor) -> Workload:
    """Return the purification of the paper's code: its U-Net, 40 ancestral steps, one patch at a time, fp32.

    Source: ankile/Adversarial-Diffusion, Train_diffusion.ipynb, cells 38 to 48. Random weights have the same speed.
    """
    unet = build_ddpm("paper", images.shape[-1], 1.0, 0).unet.to(images.device).eval()
    run = _ancestral_loop(unet, images[:1])
    return Workload("the paper's loop", run, 1, PAPER_STEPS * _unet_flops(unet, images[:1]), PAPER_STEPS)


def diffusers_in_batches(ddpm: Ddpm, images: Tensor) -> Workload:
    """Return the loop of a careful user of diffusers: the given network, 40 ancestral steps, the given batch, fp32."""
    folded = pixel_unshuffle(images, ddpm.card.space_to_depth)
    unet = copy.deepcopy(ddpm.unet).to(memory_format=torch.contiguous_format)
    flops = PAPER_STEPS * _unet_flops(unet, folded[:1])
    return Workload("diffusers in batches", _ancestral_loop(unet, folded), len(images), flops, PAPER_STEPS)


def _ancestral_loop(unet: UNet2DModel, images: Tensor) -> Callable[[], Tensor]:
    scheduler = DDPMScheduler(num_train_timesteps=1000)

    @torch.no_grad()
    def run() -> Tensor:
        noise = torch.randn_like(images)
        x: Tensor = scheduler.add_noise(images, noise, torch.tensor([PAPER_STEPS], device=images.device))
        for t in scheduler.timesteps[-PAPER_STEPS:]:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
        return x

    return run


@torch.no_grad()
def _unet_flops(unet: nn.Module, images: Tensor) -> int:
    return count_flops(lambda: unet(images, torch.zeros(len(images), device=images.device))) // len(images)


def unet_forward(purifier: DiffusionPurifier, images: Tensor, precision: Precision) -> Workload:
    """Return evaluations of the U-Net alone, on as many batches in parallel as `purify` computes."""
    ddpm, device = purifier.ddpm, images.device
    workers = parallel_batches(purifier, (images.shape[2], images.shape[3]), len(images), device)
    x, t = images, torch.zeros(len(images), device=device)
    batches = 8 * max(1, workers)

    def evaluate(x: Tensor) -> None:
        with torch.inference_mode(), autocast(precision, device):
            ddpm(x, t)

    def run() -> None:
        deque(parallel_map(lambda _: x, evaluate, range(batches), workers), 0)

    flops = _unet_flops(ddpm, images[:1])
    return Workload(f"U-Net forward, {precision}", run, batches * len(images), flops, 1)


def attack_step(defended: DefendedClassifier, images: Tensor, variant: str = "") -> tuple[Workload, Workload]:
    """Return a forward pass of a defended classifier on a batch, and an exact gradient through it."""
    x, labels = images, torch.zeros(len(images), dtype=torch.long, device=images.device)
    objective = Objective(defended, labels, list(range(len(images))))
    steps = len(getattr(defended.purifier, "timesteps", ()))
    suffix = f", {defended.precision}{variant}"
    flops = count_flops(lambda: objective.value(x, 0)) // len(images)
    return (
        Workload(f"defended forward{suffix}", lambda: objective.value(x, 0), len(images), flops, steps),
        # of a forward and a backward pass, without what checkpoints compute again
        Workload(f"exact gradient{suffix}", lambda: objective.gradient(x, 0), len(images), 2 * flops, steps),
    )


def diffusers_training(ddpm: Ddpm, images: Tensor, precision: Precision) -> Workload:
    """Return a step of the inner loop of diffusers' unconditional training example, at our precision."""
    device = images.device
    unet = UNet2DModel.from_config(ddpm.unet.config).to(device).train()
    clean = pixel_unshuffle(images, ddpm.card.space_to_depth) * 2 - 1
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)

    def run() -> None:
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=device)
        with autocast(precision, device):
            predicted = unet(scheduler.add_noise(clean, noise, t), t).sample
        loss = mse_loss(predicted.float(), noise)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.item()

    return Workload(f"diffusers training step, {precision}", run, len(images))
