"""The smoothed classifier: what a vote over draws decides, and why its decision has a certificate.

The forward process scales a noised patch, x_t = sqrt(alpha_bar) range(x + sigma n), with

    sigma = sqrt((1 - alpha_bar) / alpha_bar) / (high - low),

where range() maps pixels in [0, 1] to [low, high]. Everything after x + sigma n, denoising, clipping and classifying,
is the base classifier of randomized smoothing (Carlini et al. 2023, arXiv:2206.10550). The patch enters only through
x + sigma n, of the view that the classifier reads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from advdiff_cli.certification.grid_noise import GridNoise
from advdiff_cli.data import philox
from advdiff_cli.data.rng import RowKey, row_stream
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.classifiers import Classifier
from advdiff_cli.models.device import autocast, to_device
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.equations import MAX_UNTILED
from advdiff_cli.purification.purifier import DiffusionPurifier

_PURPOSE = "certify"
_SCALE_ERROR = 1e-6  # relative; of sigma n, which is computed in float32
_LEVELS = 255  # of an 8-bit pixel


@dataclass(frozen=True)
class SmoothedClassifier:
    """A defended classifier whose vote over draws of the noise is certified.

    Args:
        model: In eval mode.
        shape: (H, W) of the patches.
        seed: Of the noise.
        sound: Whether the noise is drawn on the grid of 8-bit pixels.
    """

    model: DefendedClassifier
    shape: tuple[int, int]
    seed: int
    sound: bool = False

    def __post_init__(self) -> None:
        """Raise AdvdiffError for what breaks the proof."""
        height, width = self.model.view.shape(*self.shape)
        if isinstance(self.model.purifier, DiffusionPurifier) and max(height, width) > MAX_UNTILED:
            raise AdvdiffError(
                f"patches of {height}x{width} are denoised in windows, which certify does not support; cut them into "
                f"patches of up to {MAX_UNTILED} pixels"
            )
        if self.noise_shape[-2:] != (height, width):
            raise AdvdiffError(
                f"patches of {height}x{width} are padded for the U-Net, so that an attack on their edges counts twice; "
                f"certify patches whose sides are multiples of {self._multiple}"
            )
        if any(module.training for module in self.model.modules()):
            raise AdvdiffError("the classifier is in training mode, where its answers change; call .eval() first")

    @property
    def _multiple(self) -> int:
        purifier = self.model.purifier
        return purifier.ddpm.multiple if isinstance(purifier, DiffusionPurifier) else 1

    @cached_property
    def noise_shape(self) -> tuple[int, int, int, int]:
        """The shape of one draw of the noise."""
        return self.model.purifier.noise_shape(*self.model.view.shape(*self.shape))

    @property
    def sigma(self) -> float:
        """The standard deviation of the noise in pixels of the patch, rounded down.

        The average of k x k pixels shrinks an l2 perturbation k times, and thus counts k-fold.
        """
        return self.model.view.pool * self.model.purifier.sigma * (1 - _SCALE_ERROR)

    @property
    def dimension(self) -> int:
        """The number of values that are read of a patch, 3 h w, before they are averaged."""
        height, width = self.model.view.cropped(*self.shape)
        return 3 * height * width

    @property
    def distance(self) -> float:
        """How much the probability of a class under normal noise may be below that under the noise that is drawn.

        It is twice the total variation between the two, for a patch and for a perturbed one; 0 if not `sound`.
        """
        return 2 * self._grid.total_variation(math.prod(self.noise_shape[1:])) if self.sound else 0.0

    @property
    def _levels(self) -> int:
        return _LEVELS * self.model.view.pool**2

    @cached_property
    def _grid(self) -> GridNoise:
        return GridNoise(self.model.purifier.sigma * self._levels)

    def noised(self, image: Tensor, row: RowKey, draws: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a patch with each draw of the noise added.

        Args:
            image: (3, H, W) in [0, 1].
            row: The name of the patch, which names its noise.
            draws: Which draws.

        Returns:
            x + sigma n (len(draws), 3, h, w), and the noise of later steps (len(draws), *noise_shape).

        Raises:
            AdvdiffError: `sound`, and the patch is not one of 8-bit pixels.
        """
        read = self.model.view.apply(image[None])
        steps = self.noise_shape[0]
        if not self.sound or steps > 1:
            noise = self._normal(row, draws, image.device)
        else:
            noise = torch.empty((len(draws), 1, 0), device=image.device)
        if not self.sound:
            return read + self.model.purifier.sigma * noise[:, 0], noise
        whole = (read * self._levels).round()
        if not torch.allclose(whole / self._levels, read, rtol=0, atol=1e-6):
            raise AdvdiffError(f"row {row} is not of 8-bit pixels, which --sound needs")
        return (whole + self._grid_steps(row, draws, image.device)) / self._levels, noise

    def _normal(self, row: RowKey, draws: Sequence[int], device: torch.device) -> Tensor:
        if self.model.purifier.noise_kind == "philox":
            drawn = philox.normal(self._keys(_PURPOSE, row, draws, device), math.prod(self.noise_shape))
            return drawn.view(-1, *self.noise_shape)
        streams = (row_stream(self.seed, _PURPOSE, row, draw=draw) for draw in draws)
        noise = (torch.from_numpy(s.standard_normal(self.noise_shape, dtype="float32")) for s in streams)
        return to_device(torch.stack(list(noise)), device)

    def _grid_steps(self, row: RowKey, draws: Sequence[int], device: torch.device) -> Tensor:
        purpose, shape = f"{_PURPOSE}-grid", self.noise_shape[1:]
        if self.model.purifier.noise_kind == "philox":
            return self._grid.normal_on_device(self._keys(purpose, row, draws, device), math.prod(shape)).view(
                -1, *shape
            )
        return to_device(self._grid.normal(self.seed, purpose, row, draws, shape), device)

    def _keys(self, purpose: str, row: RowKey, draws: Sequence[int], device: torch.device) -> Tensor:
        return philox.row_keys(self.seed, purpose, [row] * len(draws), draws, device=device)

    @torch.inference_mode()
    def votes(self, image: Tensor, row: RowKey, draws: Sequence[int]) -> Tensor:
        """Return whether each draw decides for class 1 (len(draws),); arguments and errors as for `noised`."""
        noised, noise = self.noised(image, row, draws)
        with autocast(self.model.precision, image.device):
            purified = self.model.purifier.purify_noised(noised, noise)
        logits = self.model.classify(purified.to(image.dtype))
        if not logits.isfinite().all():
            raise AdvdiffError(f"the logits of row {row} are not finite; compute with --precision fp32")
        return logits[:, 1] > logits[:, 0]

    @torch.inference_mode()
    def check_independence(self, image: Tensor) -> None:
        """Check that the classifier's answer for a patch depends on nothing else.

        Raises:
            AdvdiffError: It differs from call to call, or with the other patches of a batch.
        """
        classifier = self.model.classifier
        if isinstance(classifier, Classifier):  # a network in eval mode
            return
        batch = torch.stack([image, 1 - image, image / 2, torch.zeros_like(image)])
        once, again, backwards = classifier(batch), classifier(batch), classifier(batch.flip(0)).flip(0)
        pairs = torch.cat([classifier(batch[:2]), classifier(batch[2:])])
        for other in (again, backwards, pairs):
            if not torch.allclose(once, other, rtol=1e-3, atol=1e-3):
                raise AdvdiffError(
                    "the classifier gives other answers for the same patch from call to call, or beside other patches; "
                    "a certificate needs one that depends on the patch alone"
                )
