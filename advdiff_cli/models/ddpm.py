"""Diffusion models: diffusers' U-Net and linear schedule, optionally on space-to-depth images.

A model folder is what `DDPMPipeline.save_pretrained` writes, plus advdiff.json with the data range, the trained noise
levels, the space-to-depth factor and the settings recommended for purification.
Source: Ho et al. 2020, arXiv:2006.11239.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from advdiff_cli.data.atomic_files import name_write_errors
from advdiff_cli.data.provenance import read_json_object
from advdiff_cli.data.safetensors_file import read_header
from advdiff_cli.errors import AdvdiffError, first_line
from advdiff_cli.models.card import PICKLED_UNET, UNET_WEIGHTS, DdpmCard, load_card, read_timesteps, save_card
from advdiff_cli.models.device import memory_layout

if TYPE_CHECKING:  # a slow import, that classifiers without a diffusion model do not need
    from diffusers import DDPMScheduler, UNet2DModel

_MAX_SETTING = 100_000  # of a whole number in a U-Net's configuration

PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "paper": (
        1,
        {
            "block_out_channels": (128, 128, 256, 256, 512, 512),
            "layers_per_block": 2,
            "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
        },
    ),
    "s2d2": (2, {"block_out_channels": (48, 96, 192), "layers_per_block": 1}),
    "tiny": (2, {"block_out_channels": (16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}),
    "s2d4": (4, {"block_out_channels": (96, 192), "layers_per_block": 1}),
}
"""Name -> space-to-depth factor, and arguments of the U-Net."""


class Ddpm(nn.Module):
    """A noise predictor with its schedule, for images of any size that `multiple` divides."""

    alpha_bar: Tensor

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler, card: DdpmCard) -> None:
        """Wrap a U-Net that works on (3 f², H/f, W/f), where f is the space-to-depth factor of the card."""
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.card = card
        self._compiled: Callable[[Ddpm, Tensor, Tensor], Tensor] | None = None
        self.register_buffer("alpha_bar", scheduler.alphas_cumprod.clone(), persistent=False)

    @property
    def timesteps(self) -> int:
        """T, the number of noise levels."""
        return len(self.alpha_bar)

    @property
    def multiple(self) -> int:
        """The number of pixels that height and width must be multiples of."""
        return int(self.card.space_to_depth * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def trained_size(self) -> tuple[int, int] | None:
        """(H, W) of the images that it was trained on, if its U-Net's configuration tells."""
        size = self.unet.config.sample_size
        sides = [size, size] if type(size) is int else size
        if not isinstance(sides, list | tuple) or [type(side) for side in sides] != [int, int]:
            return None
        return sides[0] * self.card.space_to_depth, sides[1] * self.card.space_to_depth

    def compile_unet(self) -> None:
        """Compile the U-Net for passes with gradients, at the first pass of each batch shape.

        A forward pass without gradients hardly becomes faster and is not compiled.

        Raises:
            AdvdiffError: torch cannot compile on this machine.
        """
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it reports a missing CUDA compiler
        try:
            torch.compile(torch.neg)(torch.zeros(1, device=self.alpha_bar.device))
        except Exception as e:  # the backends raise many kinds
            raise AdvdiffError(
                f"--compile: torch cannot compile on this machine ({first_line(e)}); leave the option out"
            ) from None
        self._compiled = torch.compile(Ddpm._predict, dynamic=False)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in x_t (B, 3, H, W), in the data range, at timesteps t (B,)."""
        factor = self.card.space_to_depth
        folded = pixel_unshuffle(x_t, factor).contiguous(memory_format=memory_layout(x_t.device))
        predict = self._compiled if self._compiled and torch.is_grad_enabled() else Ddpm._predict
        return pixel_shuffle(predict(self, folded, t).float(), factor)

    def _predict(self, folded: Tensor, t: Tensor) -> Tensor:
        predicted: Tensor = self.unet(folded, t, return_dict=False)[0]
        return predicted


def build_ddpm(preset: str, size: int, max_t: float, seed: int, data_range: tuple[float, float] = (-1.0, 1.0)) -> Ddpm:
    """Return a DDPM of `preset` with random weights of `seed`, for patches of size x size pixels."""
    from diffusers import DDPMScheduler, UNet2DModel

    factor, arguments = PRESETS[preset]
    levels = len(arguments["block_out_channels"])
    plain = {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}
    small = {} if preset == "paper" else {"norm_num_groups": 16, "add_attention": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # diffusers initializes from the global generator, which is restored after
        channels = 3 * factor**2
        unet = UNet2DModel(
            sample_size=size // factor,
            in_channels=channels,
            out_channels=channels,
            **{**plain, **small, **arguments},
        )
    card = DdpmCard(space_to_depth=factor, max_t=max_t, data_range=data_range)
    return Ddpm(unet, DDPMScheduler(num_train_timesteps=1000), card)


def save_ddpm(model: Ddpm, folder: Path) -> None:
    """Write the pipeline folder and advdiff.json."""
    from diffusers import DDPMPipeline

    with name_write_errors(folder):
        DDPMPipeline(unet=model.unet, scheduler=model.scheduler).save_pretrained(folder, safe_serialization=True)
    save_card(model.card, folder)


def read_ddpm(folder: Path, *, allow_pickle: bool = False) -> Ddpm:
    """Load a diffusion model folder, in eval mode, fp32.

    Raises:
        AdvdiffError: A file is missing or damaged, or the weights are pickled and that is not allowed.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    pickled = not (folder / UNET_WEIGHTS).is_file() and (folder / PICKLED_UNET).is_file()
    if pickled and not allow_pickle:
        raise AdvdiffError(
            f"{folder / PICKLED_UNET} holds pickled weights; give --allow-pickle if you trust its source"
        )
    read_timesteps(folder)
    _check_size(folder / "unet" / "config.json", folder / (PICKLED_UNET if pickled else UNET_WEIGHTS))
    try:
        unet = UNet2DModel.from_pretrained(
            folder / "unet", use_safetensors=not pickled, local_files_only=True, torch_dtype=torch.float32
        )
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    except Exception as e:  # diffusers raises many kinds for an invalid configuration
        raise AdvdiffError(f"{folder} is not a diffusion model folder: {first_line(e)}") from None
    card = load_card(folder)
    if scheduler.config.prediction_type != "epsilon":
        raise AdvdiffError(
            f"{folder} predicts {scheduler.config.prediction_type}; a purifier needs a model that predicts the noise"
        )
    if unet.config.in_channels != 3 * card.space_to_depth**2 or unet.config.out_channels != unet.config.in_channels:
        raise AdvdiffError(
            f"{folder}: a U-Net with {unet.config.in_channels} channels does not fit RGB at its space-to-depth factor"
        )
    if not all(bool(p.isfinite().all()) for p in unet.parameters()):
        raise AdvdiffError(f"{folder} holds weights that are not finite; train the model again")
    model = Ddpm(unet, scheduler, card).eval()
    if not ((model.alpha_bar > 0) & (model.alpha_bar <= 1)).all():
        raise AdvdiffError(f"{folder / 'scheduler'} is not a noise schedule: alpha_bar leaves (0, 1]")
    return model


def _check_size(config: Path, weights: Path) -> None:
    """Check that the file of weights could hold a U-Net of the configured size, before one is built.

    Every layer of a block has at least four tensors, and a pickled tensor takes at least 16 bytes. The widest layer has
    a convolution of 3 x 3 weights of two bytes or more between its channels.
    """
    if not config.is_file() or not weights.is_file():
        return  # which diffusers names
    raw, size = read_json_object(config), weights.stat().st_size
    layers, channels = raw.get("layers_per_block", 2), raw.get("block_out_channels", [])
    if not isinstance(channels, list) or not all(type(c) is int and c > 0 for c in (*channels, layers)):
        raise AdvdiffError(f"{config}: layers_per_block and block_out_channels must be whole numbers above 0")
    largest = max((abs(v) for v in raw.values() if type(v) is int), default=0)
    tensors = len(read_header(weights)[0]) if weights.suffix == ".safetensors" else size // 16
    if 4 * layers * len(channels) > tensors or 18 * max(channels, default=1) ** 2 > size or largest > _MAX_SETTING:
        raise AdvdiffError(f"{config} describes a larger U-Net than {weights.name} holds; make or download it again")
