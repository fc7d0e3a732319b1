"""Purify one large image with memory that hardly grows with its size.

The result is that of the purifier on the whole image, to the bit on a CPU. Floats of the whole image lie in files that
have no name and vanish with the process. The noise is drawn when it is needed, in the order of `Purifier.noise_shape`.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advdiff_cli.purification.equations import forward_process, reverse_step
from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier, Purifier
from advdiff_cli.purification.tiling import add_windows

_CHUNK = 1 << 22  # values computed together where every pixel is computed alone


@torch.inference_mode()
def purify_large_image(
    purifier: Purifier, pixels: NDArray[np.uint8], generator: np.random.Generator, device: torch.device, folder: Path
) -> NDArray[np.uint8]:
    """Return a purified image (3, H, W) uint8, in the current autocast context.

    Args:
        purifier: On `device`.
        pixels: (3, H, W) uint8 RGB.
        generator: Of the noise, which is drawn in the order of `noise_shape`.
        device: Where windows are denoised, and noise is added.
        folder: Where the files lie; it needs up to 28 bytes a pixel.

    Raises:
        FloatingPointError: The result is not finite.
    """
    height, width = pixels.shape[1:]
    _, _, padded_height, padded_width = purifier.noise_shape(height, width)
    padding = ((0, 0), (0, padded_height - height), (0, padded_width - width))
    padded = np.pad(pixels, padding, mode="reflect") if (padded_height, padded_width) != (height, width) else pixels
    if isinstance(purifier, NoisePurifier):
        found = _add_noise(purifier, padded, generator, device)
    else:
        found = _denoise(purifier, padded, generator, device, folder)
    return found[:, :height, :width]


def _add_noise(
    purifier: NoisePurifier, pixels: NDArray[np.uint8], generator: np.random.Generator, device: torch.device
) -> NDArray[np.uint8]:
    out = np.empty_like(pixels)
    for part in _chunks(pixels.shape):
        images = _as_float(pixels[part])
        noise = _normal(generator, images)[None, None]
        out[part] = _as_bytes(purifier(images[None].to(device), noise.to(device))[0].cpu())
    return out


def _denoise(
    purifier: DiffusionPurifier,
    pixels: NDArray[np.uint8],
    generator: np.random.Generator,
    device: torch.device,
    folder: Path,
) -> NDArray[np.uint8]:
    """Return the last estimate of x_0; the loop is that of `equations.reverse_process`."""
    card, alpha_bar = purifier.ddpm.card, purifier.ddpm.alpha_bar.cpu()
    x_t, blended = (_on_disk(pixels.shape, folder) for _ in range(2))
    total, out = _on_disk((1, *pixels.shape[1:]), folder), np.empty_like(pixels)
    for part in _chunks(pixels.shape):
        images = card.to_range(_as_float(pixels[part]))
        x_t[part] = forward_process(images, _normal(generator, images), alpha_bar[purifier.noised_to])
    for t, s in zip(purifier.timesteps, [*purifier.timesteps[1:], None], strict=True):

        def predict(windows: Tensor, t: int = t) -> Tensor:
            return purifier.predict_noise(windows.to(device), t).cpu()

        blended.zero_()
        total.zero_()
        add_windows(predict, x_t[None], purifier.ddpm.multiple, blended[None], total[None])
        for part in _chunks(pixels.shape):
            predicted = blended[part] / total[0][part[1:]]
            noise = _normal(generator, predicted) if s is not None and purifier.sampler == "ddpm" else None
            x_s = reverse_step(lambda *_: predicted, x_t[part], t, s, noise, alpha_bar)  # noqa: B023 (called at once)
            if s is None:
                out[part] = _as_bytes(card.to_pixels(x_s).clamp(0, 1))
            else:
                x_t[part] = x_s
    return out


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """Yield (channel, rows) for parts of an image (3, H, W), in the order in which its values lie in memory."""
    rows = max(1, _CHUNK // shape[2])
    for channel in range(shape[0]):
        for top in range(0, shape[1], rows):
            yield channel, slice(top, top + rows)


def _normal(generator: np.random.Generator, like: Tensor) -> Tensor:
    return torch.from_numpy(generator.standard_normal(tuple(like.shape), dtype=np.float32))


def _as_float(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / np.float32(255))


def _as_bytes(images: Tensor) -> NDArray[np.uint8]:
    if not images.isfinite().all():
        raise FloatingPointError
    found: NDArray[np.uint8] = (images * 255).round().byte().numpy()
    return found


def _on_disk(shape: tuple[int, ...], folder: Path) -> Tensor:
    """Return a float32 tensor in a file without a name."""
    with TemporaryFile(dir=folder) as file:
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
