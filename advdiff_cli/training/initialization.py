"""The models that training starts from: random weights, or those of an existing model."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from advdiff_cli.errors import AdvdiffError, first_line
from advdiff_cli.models.classifier_config import ClassifierConfig
from advdiff_cli.models.classifiers import Classifier, read_classifier
from advdiff_cli.models.ddpm import Ddpm, read_ddpm
from advdiff_cli.models.registry import find_classifier, find_ddpm


def initial_classifier(init: str | None, config: ClassifierConfig, seed: int, shape: tuple[int, int]) -> Classifier:
    """Return a classifier with random weights of `seed`, or with the weights of the classifier `init`.

    Raises:
        AdvdiffError: `init` has another architecture, or the architecture does not take patches of `shape` (H, W).
    """
    model = _random_classifier(config, seed) if init is None else read_classifier(find_classifier(init))
    model.config = replace(model.config, crop=None, pool=1)  # it is trained on patches that are cut already
    if model.config.arch != config.arch:
        raise AdvdiffError(f"--init {init} is a {model.config.arch}; give --arch {model.config.arch}")
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *shape))
    except (AssertionError, RuntimeError, ValueError) as e:
        raise AdvdiffError(f"{config.arch} does not take patches of {shape[0]}x{shape[1]} ({first_line(e)})") from None
    return model


def _random_classifier(config: ClassifierConfig, seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torchvision initializes from the global generator, which is restored after
        return Classifier(config)


def initial_ddpm(
    init: str | None, fresh: Ddpm, preset: str, shapes: Sequence[tuple[int, int]], *, allow_pickle: bool = False
) -> Ddpm:
    """Return `fresh`, or the diffusion model `init`, which must be like it.

    Args:
        init: Name of a diffusion model, or None.
        fresh: A model with random weights, of `build_ddpm`.
        preset: The preset of `fresh`, for the error.
        shapes: (H, W) of all patches.
        allow_pickle: Whether pickled weights may be read.

    Raises:
        AdvdiffError: The patches do not fit the preset, or `init` is of another preset or data range.
    """
    for height, width in shapes:
        if height % fresh.multiple or width % fresh.multiple:
            raise AdvdiffError(
                f"patches of {height}x{width} do not fit preset {preset}: sides must be multiples of {fresh.multiple}"
            )
    if init is None:
        return fresh
    start = read_ddpm(find_ddpm(init, allow_pickle=allow_pickle), allow_pickle=allow_pickle)
    if list(start.unet.config.block_out_channels) != list(fresh.unet.config.block_out_channels):
        raise AdvdiffError(f"--init {init} has another preset than {preset}; give its own --preset")
    if start.card.data_range != fresh.card.data_range:
        low, high = start.card.data_range
        raise AdvdiffError(
            f"--init {init} was trained on pixels in [{low:g}, {high:g}]; give --data-range {low:g},{high:g}"
        )
    return start
