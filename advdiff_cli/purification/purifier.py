"""The purifiers, as modules.

All noise is drawn beforehand and passed in: rows own theirs, and a step computed again sees the same. For a gradient,
each reverse step is a checkpoint, so that memory hardly grows with their number. Large images are denoised in
overlapping windows.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.ddpm import Ddpm, SamplerName
from advdiff_cli.purification.equations import (
    add_noise,
    ancestral_step,
    ddim_step,
    estimate_x_0,
    noise_levels,
    step_indices,
)
from advdiff_cli.purification.tiling import in_windows


class DiffusionPurifier(nn.Module):
    """Noise an image to t_star and denoise it with a DDPM (the paper, section 3)."""

    def __init__(
        self, ddpm: Ddpm, t_star: float, sampler: SamplerName = "ddpm", sampler_steps: int | None = None
    ) -> None:
        """Set up a purifier.

        Args:
            ddpm: Noise predictor and schedule.
            t_star: Noise level, a fraction of T in (0, 1]; 0.04 of 1000 is timesteps 39..0.
            sampler: `ddpm` draws ancestral steps, `ddim` follows the deterministic path.
            sampler_steps: U-Net evaluations; every timestep by default, 1 is E[x_0 | x_t].

        Raises:
            AdvdiffError: t_star is outside (0, 1] or above the model's max_t, or the steps do not fit it.
        """
        super().__init__()
        n = _checked_levels(t_star, ddpm.timesteps)
        if n > noise_levels(ddpm.card.max_t, ddpm.timesteps):
            raise AdvdiffError(
                f"t* = {t_star:g} is above max_t = {ddpm.card.max_t:g}, the noise this model was trained on"
            )
        if sampler_steps is not None and sampler_steps < 1:
            raise AdvdiffError(f"--sampler-steps {sampler_steps}: at least one U-Net evaluation is needed")
        if sampler_steps is not None and sampler_steps > n:
            raise AdvdiffError(f"--sampler-steps {sampler_steps} is more than the {n} noise levels of t* = {t_star:g}")
        self.ddpm = ddpm
        self.t_star = t_star
        self.sampler = sampler
        self.checkpointed = True
        self.indices = step_indices(n, sampler_steps or n)
        self.noised_to = min(self.indices[0] + ddpm.card.index_offset, ddpm.timesteps - 1)

    def with_steps(self, sampler_steps: int) -> "DiffusionPurifier":
        """Return the purifier of the same noise level and sampler in another number of U-Net evaluations."""
        return DiffusionPurifier(self.ddpm, self.t_star, self.sampler, sampler_steps)

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (draws, 3, H', W'): the normal numbers one image takes, H' and W' being what the U-Net needs."""
        draws = len(self.indices) if self.sampler == "ddpm" else 1
        return (draws, 3, height + -height % self.ddpm.multiple, width + -width % self.ddpm.multiple)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Purify images.

        Args:
            images: (B, 3, H, W) in [0, 1]; any H, W of at least 32.
            noise: (B, *noise_shape(H, W)) standard normal; drawn from torch's global stream when left out.

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        height, width = images.shape[-2:]
        if noise is None:
            noise = torch.randn((len(images), *self.noise_shape(height, width)), device=images.device)
        x_0 = self._reverse(self._noised(images, noise), noise)
        return self.ddpm.card.to_pixels(x_0).clamp(0, 1)[..., :height, :width]

    def noised(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return what the reverse process starts from, clamped to [0, 1] to be looked at; shapes as for the module."""
        x_t = self.ddpm.card.to_pixels(self._noised(images, noise))
        return x_t.clamp(0, 1)[..., : images.shape[-2], : images.shape[-1]]

    def _noised(self, images: Tensor, noise: Tensor) -> Tensor:
        x_0 = self.ddpm.card.to_range(_pad_to(images, noise.shape[-2], noise.shape[-1]))
        return add_noise(x_0, noise[:, 0], self.ddpm.alpha_bar[self.noised_to])

    def _reverse(self, x_t: Tensor, noise: Tensor) -> Tensor:
        """Walk down the indices to x_0; for a gradient, the activations of a step are computed again, not kept."""
        graph = torch.is_grad_enabled() and x_t.requires_grad
        again = self.checkpointed and graph and len(self.indices) > 1
        for k in range(len(self.indices)):
            drawn = noise[:, k + 1] if self.sampler == "ddpm" and k + 1 < len(self.indices) else None
            if again:
                x_t = checkpoint(self._step, x_t, drawn, k, use_reentrant=False, preserve_rng_state=False)
            else:
                x_t = self._step(x_t, drawn, k)
        return x_t

    def _step(self, x_t: Tensor, drawn: Tensor | None, k: int) -> Tensor:
        """Step from index k to k + 1, with the noise `drawn` where the sampler takes some; the last step is x_0."""
        t = self.indices[k]
        alpha_bar = self.ddpm.alpha_bar
        predicted = in_windows(
            lambda x: self.ddpm(x, torch.full((len(x),), t, device=x.device)), x_t, self.ddpm.multiple
        )
        x_0 = estimate_x_0(x_t, predicted, alpha_bar[t])
        if k + 1 == len(self.indices):
            return x_0
        s = self.indices[k + 1]
        if drawn is None:
            return ddim_step(x_0, predicted, alpha_bar[s])
        return ancestral_step(x_t, x_0, drawn, alpha_bar[t], alpha_bar[s])


class NoisePurifier(nn.Module):
    """NoiseDefense (the paper, section 4): the forward process alone, clamped to [0, 1]."""

    alpha_bar_t: Tensor

    def __init__(self, alpha_bar: Tensor, t_star: float) -> None:
        """Set up the defence with a schedule alpha_bar (T,) on [-1, 1] data, at the fraction t_star of T in (0, 1]."""
        super().__init__()
        self.register_buffer("alpha_bar_t", alpha_bar[_checked_levels(t_star, len(alpha_bar)) - 1].clone())

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (1, 3, H, W): the normal numbers one image takes."""
        return (1, 3, height, width)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return noised images (B, 3, H, W) in [0, 1]; noise as for DiffusionPurifier."""
        if noise is None:
            noise = torch.randn((len(images), *self.noise_shape(*images.shape[-2:])), device=images.device)
        return ((add_noise(images * 2 - 1, noise[:, 0], self.alpha_bar_t) + 1) / 2).clamp(0, 1)

    def noised(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return what the module does: noise is all there is."""
        noised: Tensor = self(images, noise)
        return noised


Purifier = DiffusionPurifier | NoisePurifier


def linear_alpha_bar(timesteps: int = 1000) -> Tensor:
    """Return alpha_bar (T,) of the linear schedule 1e-4..0.02 (Ho et al. 2020, section 4), as diffusers computes it."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, timesteps), 0)


def _checked_levels(t_star: float, timesteps: int) -> int:
    if not 0 < t_star <= 1:
        raise AdvdiffError(f"t* = {t_star:g} is not in (0, 1]")
    return noise_levels(t_star, timesteps)


def _pad_to(images: Tensor, height: int, width: int) -> Tensor:
    """Pad by reflection below and to the right."""
    below, right = height - images.shape[-2], width - images.shape[-1]
    return pad(images, (0, right, 0, below), mode="reflect") if below or right else images
