"""What is measured for speed: the paper's loop, diffusers driven in batches, and this package, in one run.

Contestants take turns, so that what else the machine does falls on all of them; each is warmed up once.
"""

import copy
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pixel_unshuffle
from torch.utils.flop_counter import FlopCounterMode

from advdiff_cli.attacks.eot import Objective
from advdiff_cli.models.ddpm import Ddpm, build_ddpm
from advdiff_cli.models.device import autocast, spread
from advdiff_cli.purification.defended_classifier import DefendedClassifier

PAPER_STEPS = 40
BATCH = 16
_SIDE = 4096  # of the square matrices whose product is the ceiling


@dataclass(frozen=True)
class Contestant:
    """A task on `patches` patches, `flops` floating-point operations each; 0 where they are not counted."""

    name: str
    run: Callable[[], object]
    patches: int = 1
    flops: int = 0
    unet_evaluations: int = 0


@dataclass
class Timing:
    """The seconds a contestant took in each round, and the most bytes it added to what stood in memory before it.

    `processor_seconds` are summed over threads; waiting for a disk is none of them. `warm_up` is the seconds of the
    round before them all, compilation included.
    """

    contestant: Contestant
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    memory: int = 0
    warm_up: float = 0.0

    @property
    def patch_seconds(self) -> float:
        """The median seconds a patch."""
        return median(self.seconds) / self.contestant.patches

    @property
    def patch_processor_seconds(self) -> float:
        """The median seconds a patch of the processors."""
        return median(self.processor_seconds) / self.contestant.patches

    def as_dict(self) -> dict[str, Any]:
        """Return the figures: median and range of the seconds a patch, processor seconds, rate, FLOP/s, memory."""
        c, each = self.contestant, sorted(s / self.contestant.patches for s in self.seconds)
        return {
            "name": c.name,
            "patches": c.patches,
            "rounds": len(each),
            "unet_evaluations": c.unet_evaluations,
            "seconds": {"median": self.patch_seconds, "least": each[0], "most": each[-1]},
            "processor_seconds": self.patch_processor_seconds,
            "warm_up_seconds": self.warm_up,
            "patches_per_second": 1 / self.patch_seconds,
            "flop_per_patch": c.flops,
            "flops_per_second": c.flops / self.patch_seconds,
            "peak_memory": self.memory,
        }


def measure(
    contestants: Sequence[Contestant], rounds: int, device: torch.device, advance: Callable[[], None]
) -> dict[str, Timing]:
    """Run every contestant once a round, after one round of warming up; `advance` is called after each round."""
    timings = {c.name: Timing(c) for c in contestants}
    for turn in range(rounds + 1):
        for timing in timings.values():
            before = _forget_memory(device)
            started, busy = time.perf_counter(), time.process_time()
            timing.contestant.run()
            _wait(device)
            if turn:
                timing.seconds.append(time.perf_counter() - started)
                timing.processor_seconds.append(time.process_time() - busy)
            else:
                timing.warm_up = time.perf_counter() - started
            timing.memory = max(timing.memory, _peak_memory(device) - before)
        advance()
    return timings


def flops(model: Callable[[], object]) -> int:
    """Return the floating-point operations of a call: two for each multiplication and addition of its products."""
    with FlopCounterMode(display=False) as counter:
        model()
    return int(counter.get_total_flops())


def matrix_product(precision: str, device: torch.device) -> Contestant:
    """Return the ceiling: a product of two square matrices, whose rate nothing here can exceed."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
    return Contestant(f"matrix product, {precision}", lambda: a @ b, flops=2 * _SIDE**3)


def papers_loop(images: Tensor, device: torch.device) -> Contestant:
    """Return the paper's purification as its code runs it: its U-Net, 40 ancestral steps, one patch at a time, fp32.

    Source: ankile/Adversarial-Diffusion, Train_diffusion.ipynb, cells 38 to 48; weights do not change its speed.
    """
    unet = build_ddpm("paper", images.shape[-1], 1.0, 0).unet.to(device).eval()
    run = _ancestral(unet, images[:1].to(device))
    return Contestant("the paper's loop", run, 1, PAPER_STEPS * _unet_flops(unet, images[:1].to(device)), PAPER_STEPS)


def diffusers_in_batches(ddpm: Ddpm, images: Tensor, device: torch.device) -> Contestant:
    """Return diffusers' own classes as a careful user drives them: our network, 40 ancestral steps, batch 16, fp32."""
    folded = pixel_unshuffle(images[:BATCH].to(device), ddpm.card.space_to_depth)
    unet = copy.deepcopy(ddpm.unet).to(memory_format=torch.contiguous_format)
    work = PAPER_STEPS * _unet_flops(unet, folded[:1])
    return Contestant("diffusers in batches", _ancestral(unet, folded), BATCH, work, PAPER_STEPS)


def _ancestral(unet: UNet2DModel, images: Tensor) -> Callable[[], Tensor]:
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
    return flops(lambda: unet(images, torch.zeros(len(images), device=images.device))) // len(images)


def forward_alone(ddpm: Ddpm, images: Tensor, precision: str, device: torch.device, at_once: int) -> Contestant:
    """Return evaluations of the U-Net alone, on a few batches as `purify` computes them: `at_once` side by side."""
    x, t = images[:BATCH].to(device), torch.zeros(BATCH, device=device)
    batches = 8 * max(1, at_once)

    def evaluate(x: Tensor) -> None:
        with torch.inference_mode(), autocast(precision, device):
            ddpm(x, t)

    def run() -> None:
        deque(spread(lambda _: x, evaluate, range(batches), at_once), 0)

    work = _ddpm_flops(ddpm, images[:1].to(device))
    return Contestant(f"U-Net forward, {precision}", run, batches * BATCH, work, 1)


@torch.no_grad()
def _ddpm_flops(ddpm: Ddpm, image: Tensor) -> int:
    return flops(lambda: ddpm(image, torch.zeros(1, device=image.device)))


def attack_step(
    defended: DefendedClassifier, images: Tensor, precision: str, device: torch.device, how: str = ""
) -> tuple[Contestant, Contestant]:  # fmt: skip
    """Return a forward pass of a defended classifier on a batch, and an exact gradient through it; `how` is told."""
    x, labels = images[:BATCH].to(device), torch.zeros(BATCH, dtype=torch.long, device=device)
    objective = Objective(defended, labels, seed=0, rows=list(range(BATCH)))
    steps = len(getattr(defended.purifier, "indices", ()))
    return (
        Contestant(f"defended forward, {precision}{how}", lambda: objective.at(x, 0), BATCH, 0, steps),
        Contestant(f"exact gradient, {precision}{how}", lambda: objective.gradient(x, 0), BATCH, 0, steps),
    )


def diffusers_training(ddpm: Ddpm, images: Tensor, precision: str, device: torch.device) -> Contestant:
    """Return a step of the inner loop of diffusers' unconditional training example, in our precision."""
    unet = UNet2DModel.from_config(ddpm.unet.config).to(device).train()
    clean = pixel_unshuffle(images[:BATCH].to(device), ddpm.card.space_to_depth) * 2 - 1
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

    return Contestant(f"diffusers training step, {precision}", run, BATCH)


def ratios(found: Mapping[str, Timing], pairs: Mapping[str, tuple[str, str]]) -> dict[str, float]:
    """Return how many times the patches a second of the second name the first makes, for each pair that is there."""
    return {
        told: found[slow].patch_seconds / found[fast].patch_seconds
        for told, (fast, slow) in pairs.items()
        if fast in found and slow in found
    }


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _forget_memory(device: torch.device) -> int:
    """Let the peak that `_peak_memory` tells begin anew, where the system can; return where it stands."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_memory(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0
