"""Train a DDPM to predict noise: AdamW with one cosine cycle; the moving average (EMA) of the weights is published.

Source: Ho et al. 2020, algorithm 1 and eq. 14. Timesteps are drawn below max_t, where purification uses them.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchvision.utils import make_grid

from advdiff_cli.data import philox
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.data.rng import RowStreams, stream
from advdiff_cli.models.ddpm import Ddpm
from advdiff_cli.models.device import to_device
from advdiff_cli.purification.equations import estimate_x_0, forward_process, noise_levels
from advdiff_cli.training import checkpoints
from advdiff_cli.training.augmentation import random_symmetry
from advdiff_cli.training.checkpoint_file import load_optimizer, optimizer_tensors, with_prefix
from advdiff_cli.training.checkpoints import WorkFolder
from advdiff_cli.training.loader import TrainingRows
from advdiff_cli.training.optim import (
    build_accelerator,
    check_weights,
    cosine,
    optimizer_step,
    restore_scaler,
    scaler_state,
)
from advdiff_cli.training.recipes import DdpmRecipe

SAMPLES = "samples.png"
_LEVELS = (0.02, 0.04, 0.085, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75)  # fractions of T of the validation loss
_VALID_ROWS = 96
_SHOWN = 8  # patches in the picture


@dataclass
class DdpmFit:
    """A fit of a DDPM, resumed from the last checkpoint of its work folder.

    Args:
        model: Trained in place on `device`.
        train: Rows to train on.
        valid: Rows for the validation loss and the picture, or None.
        settings: What enters the recipe.
        work: Where checkpoints, the log and the picture are written.
        device: Where to compute; processes of torch.distributed share each batch.
        checkpoint_seconds: Seconds between checkpoints.
        validate_every: Steps between validations.
    """

    model: Ddpm
    train: TrainingRows
    valid: PatchSet | None
    settings: DdpmRecipe
    work: WorkFolder
    device: torch.device
    checkpoint_seconds: float = field(default_factory=lambda: checkpoints.CHECKPOINT_SECONDS)
    validate_every: int = 500

    def run(self) -> Iterator[JsonObject]:
        """Train, yielding a record after each step; at the end the model has the weights of the EMA.

        Yields:
            {"step", "of", "loss"}; the record of a validation adds "valid_loss", by noise level.
        """
        s, model = self.settings, self.model
        accelerator = build_accelerator(s.precision, self.device)
        model.to(accelerator.device)
        optimizer = torch.optim.AdamW(model.unet.parameters(), s.learning_rate, fused=True)
        on_gpu = accelerator.device.type == "cuda"
        ema = EMAModel(model.unet.parameters(), decay=s.ema, use_ema_warmup=True, power=3 / 4, foreach=on_gpu)
        first, earlier = self._resume(optimizer, ema, accelerator)
        losses = deque(earlier, self.validate_every)
        network, optimizer = accelerator.prepare(model, optimizer)
        part = (accelerator.process_index, accelerator.num_processes)
        saved = time.monotonic()
        batches = self.train.batches(first, s.steps, s.batch_size, s.seed, part)
        for step, (images, _) in enumerate(batches, first + 1):
            rng = stream(s.seed, "augment", step - 1, part[0])
            turned = random_symmetry(to_device(images, accelerator.device), rng)
            t = torch.from_numpy(rng.integers(0, noise_levels(s.max_t, model.timesteps), len(images)))
            noise = self._noise(turned, rng, (step - 1, part[0]))
            loss = _loss(network, model, turned, to_device(t, accelerator.device), noise)
            rate = cosine(step - 1, s.steps, s.learning_rate)
            losses.append(optimizer_step(accelerator, optimizer, loss, rate, clip=1.0))
            ema.step(model.unet.parameters())
            record: JsonObject = {"step": step, "of": s.steps, "loss": losses[-1]}
            if accelerator.is_main_process:
                if step % self.validate_every == 0 or step == s.steps:
                    record |= {"loss": float(np.mean(losses)), **self._validate(ema, accelerator)}
                    self.work.log(record)
                if time.monotonic() - saved > self.checkpoint_seconds and step < s.steps:
                    state = {"step": step, "losses": list(losses), "scaler": scaler_state(accelerator)}
                    self._save(optimizer, ema, state)
                    saved = time.monotonic()
            yield record
        ema.copy_to(model.unet.parameters())
        check_weights(model)
        model.eval()
        accelerator.wait_for_everyone()
        accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # removes mixed precision

    def _noise(self, images: Tensor, rng: np.random.Generator, name: tuple[int, int]) -> Tensor:
        """Return the noise of a step of a process: from `rng`, or from the stream of its own that `name` names."""
        if self.settings.noise == "philox":
            step, process = name
            keys = philox.row_keys(self.settings.seed, "noise", [step], [process], device=images.device)
            return philox.normal(keys, images.numel()).view_as(images)
        return to_device(torch.from_numpy(rng.standard_normal(images.shape, np.float32)), images.device)

    def _save(self, optimizer: torch.optim.Optimizer, ema: EMAModel, state: JsonObject) -> None:
        shadow = {f"ema.{i:05}": p for i, p in enumerate(ema.shadow_params)}
        weights = {f"unet.{k}": v for k, v in self.model.unet.state_dict().items()}
        self.work.save(weights | shadow | optimizer_tensors(optimizer), state)

    def _resume(
        self, optimizer: torch.optim.Optimizer, ema: EMAModel, accelerator: Accelerator
    ) -> tuple[int, list[float]]:
        """Restore the last checkpoint; return its step (0 without one) and the losses before it."""
        saved = self.work.load()
        if saved is None:
            self.work.truncate_log(0)
            return 0, []
        tensors, state = saved
        self.model.unet.load_state_dict(with_prefix(tensors, "unet"))
        load_optimizer(optimizer, tensors)
        shadow = with_prefix(tensors, "ema")
        ema.shadow_params = [shadow[k].to(p.device) for k, p in zip(sorted(shadow), ema.shadow_params, strict=True)]
        ema.optimization_step = int(state["step"])
        restore_scaler(accelerator, state.get("scaler", {}))
        self.work.truncate_log(state["step"])
        return int(state["step"]), list(state.get("losses", []))

    @torch.inference_mode()
    def _validate(self, ema: EMAModel, accelerator: Accelerator) -> JsonObject:
        """Return the EMA's validation loss by noise level, and draw clean, noised and denoised patches."""
        if self.valid is None:
            return {}
        model, size = self.model, self.settings.batch_size
        ema.store(model.unet.parameters())
        ema.copy_to(model.unet.parameters())
        order = stream(0, "validation").permutation(len(self.valid))[:_VALID_ROWS]
        levels = [f for f in _LEVELS if f <= self.settings.max_t] or [self.settings.max_t]
        sums = dict.fromkeys(levels, 0.0)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            x_0 = model.card.to_range(self.valid.read(chosen)).to(accelerator.device)
            keys = [self.valid.keys[i] for i in chosen]
            noise = RowStreams(0, "validation", keys).normal(*x_0.shape[1:]).to(x_0.device)
            columns = [x_0]
            for level in levels:
                t = noise_levels(level, model.timesteps) - 1
                x_t = forward_process(x_0, noise, model.alpha_bar[t])
                with accelerator.autocast():
                    predicted = model(x_t, torch.full((len(x_0),), t, device=x_0.device))
                sums[level] += mse_loss(predicted, noise, reduction="sum").item() / (noise[0].numel() * len(order))
                columns += [x_t, estimate_x_0(x_t, predicted, model.alpha_bar[t])]
            if start == 0:
                self._draw(columns)
        ema.restore(model.unet.parameters())
        return {"valid_loss": {f"{k:g}": round(v, 6) for k, v in sums.items()}}

    def _draw(self, columns: list[Tensor]) -> None:
        """Write a grid with one row for each patch: clean, then noised and denoised at each level."""
        rows = torch.cat([torch.stack([c[i] for c in columns]) for i in range(min(_SHOWN, len(columns[0])))])
        images = self.model.card.to_pixels(rows).clamp(0, 1).float().cpu()
        grid = make_grid(images, nrow=len(columns))
        Image.fromarray((grid * 255).byte().permute(1, 2, 0).numpy()).save(self.work.part / SAMPLES)


def _loss(network: nn.Module, model: Ddpm, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error of the predicted noise at timesteps t (B,) (Ho et al., eq. 14)."""
    x_t = forward_process(model.card.to_range(images), noise, model.alpha_bar[t].view(-1, 1, 1, 1))
    return mse_loss(network(x_t, t), noise)
