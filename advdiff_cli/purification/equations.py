"""The forward process, the estimate of x_0 and the reverse steps, on alpha_bar alone.

Forward (Ho et al. 2020, eq. 4; the paper's eq. 1):  x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise
Ancestral step (Ho et al., eq. 6-7):                x_s ~ N(mean(x_t, x_0), variance), for any s < t
DDIM step (Song et al. 2021, eq. 12, eta = 0):       x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s) noise
"""

import numpy as np
import torch
from torch import Tensor


def noise_levels(t_star: float, timesteps: int) -> int:
    """Return n, the number of noise levels that the fraction t_star of T stands for: at least 1."""
    return max(1, round(t_star * timesteps))


def step_indices(n: int, steps: int) -> list[int]:
    """Return the timesteps at which the U-Net is evaluated, from n - 1 down; ValueError unless 1 <= steps <= n."""
    if not 1 <= steps <= n:
        raise ValueError(f"{steps} steps do not fit {n} noise levels")
    return [int(i) for i in np.linspace(n - 1, 0, steps).round()]


def add_noise(x_0: Tensor, noise: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_0), with the given standard normal noise."""
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * noise


def estimate_x_0(x_t: Tensor, predicted: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Return the posterior-mean estimate E[x_0 | x_t], clipped to [-1, 1] (Ho et al., eq. 15)."""
    return ((x_t - (1 - alpha_bar_t).sqrt() * predicted) / alpha_bar_t.sqrt()).clamp(-1, 1)


def ancestral_step(x_t: Tensor, x_0: Tensor, noise: Tensor, alpha_bar_t: Tensor, alpha_bar_s: Tensor) -> Tensor:
    """Draw x_s from q(x_s | x_t, x_0), whose variance is diffusers' fixed_small."""
    alpha = alpha_bar_t / alpha_bar_s  # of the step from s to t
    mean_0 = alpha_bar_s.sqrt() * (1 - alpha) / (1 - alpha_bar_t)
    mean_t = alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha)
    return mean_0 * x_0 + mean_t * x_t + torch.clamp(variance, min=1e-20).sqrt() * noise


def ddim_step(x_0: Tensor, predicted: Tensor, alpha_bar_s: Tensor) -> Tensor:
    """Return x_s on the deterministic path through x_0 and the predicted noise."""
    return alpha_bar_s.sqrt() * x_0 + (1 - alpha_bar_s).sqrt() * predicted
