"""The equations of diffusion purification, in terms of alpha_bar (the cumulative product of 1 - beta_t).

Forward process   x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise     Ho et al. 2020, eq. 4; the paper, eq. 1
Estimate of x_0   x_0 = (x_t - sqrt(1 - alpha_bar_t) noise_hat) / sqrt(alpha_bar_t)             Ho et al. 2020, eq. 15
Posterior         q(x_s | x_t, x_0) = N(mean, variance), for any s < t                        Ho et al. 2020, eq. 6, 7
DDIM step         x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s) noise_hat    Song et al. 2021, eq. 12, eta = 0

Here noise_hat is the U-Net's prediction of the noise in x_t, and "the paper" is Ankile, Midgley & Weisshaar 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # imported where it is used, so that commands that only read recipes answer at once
    from torch import Tensor

MAX_UNTILED = 384  # pixels: images up to this side are computed whole, larger ones in windows

NoisePredictor = Callable[["Tensor", int], "Tensor"]
"""Predicts the noise in x_t (B, 3, H, W) at timestep t."""


def noise_levels(t_star: float, timesteps: int) -> int:
    """Return n, the number of noise levels up to the fraction t_star of T timesteps; at least 1."""
    return max(1, round(t_star * timesteps))


def sampler_timesteps(n: int, steps: int) -> list[int]:
    """Return the timesteps at which the U-Net is evaluated: `steps` of them, evenly spaced from n - 1 down.

    Raises:
        ValueError: Not 1 <= steps <= n.
    """
    if not 1 <= steps <= n:
        raise ValueError(f"{steps} steps do not fit {n} noise levels")
    return [int(i) for i in np.linspace(n - 1, 0, steps).round()]


def forward_process(x_0: Tensor, noise: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Return x_t, a sample of q(x_t | x_0) made with the given standard normal noise."""
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * noise


def estimate_x_0(x_t: Tensor, predicted_noise: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Return the estimate of E[x_0 | x_t], clipped to [-1, 1]."""
    return ((x_t - (1 - alpha_bar_t).sqrt() * predicted_noise) / alpha_bar_t.sqrt()).clamp(-1, 1)


def posterior_mean(x_t: Tensor, x_0: Tensor, alpha_bar_t: Tensor, alpha_bar_s: Tensor) -> Tensor:
    """Return the mean of q(x_s | x_t, x_0)."""
    alpha = alpha_bar_t / alpha_bar_s
    weight_0 = alpha_bar_s.sqrt() * (1 - alpha) / (1 - alpha_bar_t)
    weight_t = alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    return weight_0 * x_0 + weight_t * x_t


def posterior_variance(alpha_bar_t: Tensor, alpha_bar_s: Tensor) -> Tensor:
    """Return the variance of q(x_s | x_t, x_0), at least 1e-20 (fixed_small in diffusers)."""
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
    return variance.clamp(min=1e-20)


def ddim_step(x_0: Tensor, predicted_noise: Tensor, alpha_bar_s: Tensor) -> Tensor:
    """Return x_s on the deterministic path through x_0 and the predicted noise."""
    return alpha_bar_s.sqrt() * x_0 + (1 - alpha_bar_s).sqrt() * predicted_noise


def reverse_step(
    predict_noise: NoisePredictor, x_t: Tensor, t: int, s: int | None, noise: Tensor | None, alpha_bar: Tensor
) -> Tensor:
    """Return x_s: a sample of the posterior made with `noise`, or the DDIM step without it; x_0 where s is None."""
    predicted_noise = predict_noise(x_t, t)
    x_0 = estimate_x_0(x_t, predicted_noise, alpha_bar[t])
    if s is None:
        return x_0
    if noise is None:
        return ddim_step(x_0, predicted_noise, alpha_bar[s])
    mean = posterior_mean(x_t, x_0, alpha_bar[t], alpha_bar[s])
    return mean + posterior_variance(alpha_bar[t], alpha_bar[s]).sqrt() * noise


def reverse_process(
    predict_noise: NoisePredictor,
    x_t: Tensor,
    timesteps: Sequence[int],
    noise: Sequence[Tensor | None],
    alpha_bar: Tensor,
    step: Callable[..., Tensor] = reverse_step,
) -> Tensor:
    """Return x_0, denoised along descending `timesteps` (Ho et al. 2020, algorithm 2).

    Args:
        predict_noise: The U-Net.
        x_t: (B, 3, H, W) at timesteps[0], in the data range.
        timesteps: Where the U-Net is evaluated; the last step goes to x_0.
        noise: For every step but the last, standard normal (B, 3, H, W), or None for a DDIM step.
        alpha_bar: (T,).
        step: `reverse_step`, or a wrapper of it that saves memory in the backward pass.
    """
    following = [*timesteps[1:], None]
    for t, s, z in zip(timesteps, following, [*noise, None], strict=True):
        x_t = step(predict_noise, x_t, t, s, z, alpha_bar)
    return x_t
