"""The purifiers: torch modules from images in [0, 1] to images in [0, 1].

All noise is drawn before the call and passed in. A row thus has its own noise, and a step that is recomputed for the
backward pass uses the same noise again. Gradients use one checkpoint for each reverse step, so that memory hardly grows
with the number of steps. Large images are denoised in overlapping windows.
"""

from functools import partial
from math import nan, sqrt

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from advdiff_cli.data.rng import NoiseKind
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.card import SamplerName
from advdiff_cli.models.ddpm import Ddpm
from advdiff_cli.purification.defense_spec import check_t_star
from advdiff_cli.purification.equations import (
    forward_process,
    noise_levels,
    reverse_process,
    reverse_step,
    sampler_timesteps,
)
from advdiff_cli.purification.tiling import predict_in_windows

_checkpointed_step = partial(checkpoint, reverse_step, use_reentrant=False, preserve_rng_state=False)


class DiffusionPurifier(nn.Module):
    """Noise an image to t_star and denoise it with a DDPM (the paper, section 3).

    Attributes:
        sigma: The standard deviation of the noise, as added to pixels in [0, 1].
    """

    def __init__(
        self,
        ddpm: Ddpm,
        t_star: float,
        sampler: SamplerName = "ddpm",
        sampler_steps: int | None = None,
        noise_kind: NoiseKind = "numpy",
    ) -> None:
        """Set up a purifier.

        Args:
            ddpm: Noise predictor and schedule.
            t_star: Noise level as a fraction of T, in (0, 1]; 0.04 of 1000 is timesteps 39 to 0.
            sampler: `ddpm` draws from the posterior at each step, `ddim` is deterministic after the first noise.
            sampler_steps: U-Net evaluations. The default is one for each noise level; 1 gives E[x_0 | x_t].
            noise_kind: What draws the noise of rows.

        Raises:
            AdvdiffError: t_star is outside (0, 1] or above the model's max_t, or the steps do not fit it.
        """
        super().__init__()
        n = _checked_levels(t_star, ddpm.timesteps)
        if n > noise_levels(ddpm.card.max_t, ddpm.timesteps):
            raise AdvdiffError(
                f"t* = {t_star:g} is above max_t = {ddpm.card.max_t:g}, up to which this model was trained"
            )
        if sampler_steps is not None and sampler_steps < 1:
            raise AdvdiffError(f"--sampler-steps {sampler_steps}: at least one U-Net evaluation is needed")
        if sampler_steps is not None and sampler_steps > n:
            raise AdvdiffError(f"--sampler-steps {sampler_steps} is more than the {n} noise levels of t* = {t_star:g}")
        self.ddpm = ddpm
        self.t_star = t_star
        self.sampler = sampler
        self.noise_kind = noise_kind
        self.use_checkpoints = True
        self.timesteps = sampler_timesteps(n, sampler_steps or n)
        self.noised_to = min(self.timesteps[0] + ddpm.card.index_offset, ddpm.timesteps - 1)
        low, high = ddpm.card.data_range
        self.sigma = _relative_noise(ddpm.alpha_bar[self.noised_to]) / (high - low)

    def with_steps(self, sampler_steps: int) -> "DiffusionPurifier":
        """Return a purifier with the same noise level and sampler, and another number of U-Net evaluations."""
        return DiffusionPurifier(self.ddpm, self.t_star, self.sampler, sampler_steps, self.noise_kind)

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (draws, 3, H', W'), the shape of one image's noise, where the U-Net needs H' and W'."""
        draws = len(self.timesteps) if self.sampler == "ddpm" else 1
        return (draws, 3, height + -height % self.ddpm.multiple, width + -width % self.ddpm.multiple)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Purify images.

        Args:
            images: (B, 3, H, W) in [0, 1]; H and W at least 32.
            noise: (B, *noise_shape(H, W)) standard normal; drawn from torch's global generator if left out.

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        height, width = images.shape[-2:]
        if noise is None:
            noise = torch.randn((len(images), *self.noise_shape(height, width)), device=images.device)
        x_0 = self._denoise(self._add_noise(images, noise), noise)
        return self.ddpm.card.to_pixels(x_0).clamp(0, 1)[..., :height, :width]

    def purify_noised(self, noised: Tensor, noise: Tensor) -> Tensor:
        """Purify images that are noised already.

        Args:
            noised: (B, 3, H, W), x + sigma n for images x in [0, 1]; H and W are multiples of what the U-Net needs.
            noise: (B, *noise_shape(H, W)), of which the first is not used.

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        x_t = self.ddpm.alpha_bar[self.noised_to].sqrt() * self.ddpm.card.to_range(noised)
        return self.ddpm.card.to_pixels(self._denoise(x_t, noise)).clamp(0, 1)

    def noised(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the noised images that the reverse process starts from, clamped to [0, 1] for display."""
        x_t = self.ddpm.card.to_pixels(self._add_noise(images, noise))
        return x_t.clamp(0, 1)[..., : images.shape[-2], : images.shape[-1]]

    def _add_noise(self, images: Tensor, noise: Tensor) -> Tensor:
        x_0 = self.ddpm.card.to_range(_pad_to(images, noise.shape[-2], noise.shape[-1]))
        return forward_process(x_0, noise[:, 0], self.ddpm.alpha_bar[self.noised_to])

    def _denoise(self, x_t: Tensor, noise: Tensor) -> Tensor:
        later = range(1, len(self.timesteps))
        step_noise = [noise[:, k] if self.sampler == "ddpm" else None for k in later]
        needs_graph = torch.is_grad_enabled() and x_t.requires_grad
        recompute = self.use_checkpoints and needs_graph and len(self.timesteps) > 1
        step = _checkpointed_step if recompute else reverse_step
        return reverse_process(self._predict_in_windows, x_t, self.timesteps, step_noise, self.ddpm.alpha_bar, step)

    def predict_noise(self, x_t: Tensor, t: int) -> Tensor:
        """Return the noise that the U-Net predicts in x_t (B, 3, H', W') as a whole; NaN, without a graph, for inf."""
        predicted: Tensor = self.ddpm(x_t, torch.full((len(x_t),), t, device=x_t.device))
        if torch.is_grad_enabled():
            return predicted
        return predicted.where(predicted.isfinite(), nan)  # the clip of x_0 would hide an overflow

    def _predict_in_windows(self, x_t: Tensor, t: int) -> Tensor:
        return predict_in_windows(lambda x: self.predict_noise(x, t), x_t, self.ddpm.multiple)


class NoisePurifier(nn.Module):
    """NoiseDefense (the paper, section 4): the forward process without denoising, clamped to [0, 1].

    Attributes:
        sigma: The standard deviation of the noise, as added to pixels in [0, 1].
    """

    alpha_bar_t: Tensor

    def __init__(self, alpha_bar: Tensor, t_star: float, noise_kind: NoiseKind = "numpy") -> None:
        """Set up the defense.

        Args:
            alpha_bar: (T,) the schedule of data in [-1, 1].
            t_star: Noise level as a fraction of T, in (0, 1].
            noise_kind: What draws the noise of rows.

        Raises:
            AdvdiffError: t_star is outside (0, 1].
        """
        super().__init__()
        self.noise_kind = noise_kind
        self.register_buffer("alpha_bar_t", alpha_bar[_checked_levels(t_star, len(alpha_bar)) - 1].clone())
        self.sigma = _relative_noise(self.alpha_bar_t) / 2

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (1, 3, H, W), the shape of one image's noise."""
        return (1, 3, height, width)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return noised images (B, 3, H, W) in [0, 1]; noise as for DiffusionPurifier."""
        if noise is None:
            noise = torch.randn((len(images), *self.noise_shape(*images.shape[-2:])), device=images.device)
        return ((forward_process(images * 2 - 1, noise[:, 0], self.alpha_bar_t) + 1) / 2).clamp(0, 1)

    def purify_noised(self, noised: Tensor, noise: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1] of noised ones, x + sigma n; `noise` is not used."""
        return ((self.alpha_bar_t.sqrt() * (noised * 2 - 1) + 1) / 2).clamp(0, 1)

    def noised(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the module's output."""
        noised: Tensor = self(images, noise)
        return noised


Purifier = DiffusionPurifier | NoisePurifier


def linear_alpha_bar(timesteps: int = 1000) -> Tensor:
    """Return alpha_bar (T,) of the linear schedule 1e-4 to 0.02 (Ho et al. 2020, section 4), as in diffusers."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, timesteps), 0)


def _relative_noise(alpha_bar_t: Tensor) -> float:
    """Return the ratio of noise to signal in x_t."""
    alpha_bar = float(alpha_bar_t)
    return sqrt((1 - alpha_bar) / alpha_bar)


def _checked_levels(t_star: float, timesteps: int) -> int:
    check_t_star(t_star)
    return noise_levels(t_star, timesteps)


def _pad_to(images: Tensor, height: int, width: int) -> Tensor:
    """Pad by reflection at the bottom and on the right.

    The gradient of torch's own padding depends on the order of additions on CUDA.
    """
    bottom, right = height - images.shape[-2], width - images.shape[-1]
    if bottom:
        images = torch.cat((images, images[..., -1 - bottom : -1, :].flip(-2)), -2)
    return torch.cat((images, images[..., -1 - right : -1].flip(-1)), -1) if right else images
