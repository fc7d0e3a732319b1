"""The defended classifier: a purifier and a classifier in one torch module, which any attack library can attack."""

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Self

from torch import Tensor, nn

from advdiff_cli.data import philox
from advdiff_cli.data.rng import RowKey, RowStreams
from advdiff_cli.data.view import WHOLE, View
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.classifiers import Classifier
from advdiff_cli.models.device import autocast, to_device
from advdiff_cli.models.precision import Precision
from advdiff_cli.purification.purifier import DiffusionPurifier, Purifier


def classifier_view(classifier: nn.Module) -> View:
    """Return what a classifier reads of a patch."""
    return classifier.config.view if isinstance(classifier, Classifier) else WHOLE


def check_view(purifier: Purifier, view: View) -> None:
    """Check that a purifier knows what a view reads.

    Raises:
        AdvdiffError: Its diffusion model was trained on less of each patch, or at another scale.
    """
    trained = purifier.ddpm.card.view if isinstance(purifier, DiffusionPurifier) else view
    if not trained.covers(view):
        raise AdvdiffError(
            f"the diffusion model was trained on {trained.describe()}, and cannot purify {view.describe()}; take "
            "models that were trained with the same --crop and --pool"
        )


def row_noise(
    purifier: Purifier,
    images: Tensor,
    rows: Sequence[RowKey],
    *,
    seed: int,
    purpose: str,
    draw: int = 0,
    restart: int = 0,
) -> Tensor:
    """Return the noise that `purifier` needs for images (B, 3, H, W), each row's from its own stream."""
    shape, device = purifier.noise_shape(*images.shape[-2:]), images.device
    if purifier.noise_kind == "philox":
        keys = philox.row_keys(seed, purpose, rows, [draw] * len(rows), restart=restart, device=device)
        return philox.normal(keys, prod(shape)).view(-1, *shape)
    streams = RowStreams(seed, purpose, rows, draw=draw, restart=restart)
    return to_device(streams.normal(*shape), device)


class DefendedClassifier(nn.Module):
    """A purifier followed by a classifier: images (B, 3, H, W) in [0, 1] to logits, differentiable throughout.

    What the classifier does not read of a patch is not purified: its view is applied first. It is always in eval mode,
    as are the classifier and the purifier that it is made of.

    Called with images only, it draws its noise from torch's global generator, as any random module does. `fixed`
    returns a deterministic module, for tools that need one.
    """

    def __init__(self, purifier: Purifier, classifier: nn.Module, precision: Precision = "fp32") -> None:
        """Put `purifier`, computed at `precision`, in front of `classifier`; see `check_view`."""
        super().__init__()
        self.precision: Precision = precision
        self.purifier = purifier
        self.classifier = classifier
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: attack libraries that restore a mode would move the statistics of batch norms."""
        return super().train(False)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return logits (B, classes); noise as for the purifier."""
        return self.classify(self.purify(self.view.apply(images), noise))

    @property
    def view(self) -> View:
        """What the classifier reads of a patch."""
        return classifier_view(self.classifier)

    def classify(self, purified: Tensor) -> Tensor:
        """Return logits (B, classes) of what `purify` returns."""
        classify = self.classifier.classify if isinstance(self.classifier, Classifier) else self.classifier
        logits: Tensor = classify(purified)
        return logits

    def purify(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return images (B, 3, H, W), to which the view was applied, purified."""
        with autocast(self.precision, images.device):
            purified: Tensor = self.purifier(images, noise)
        return purified.to(images.dtype)

    def noise(
        self, images: Tensor, *, rows: Sequence[RowKey], seed: int, purpose: str, draw: int = 0, restart: int = 0
    ) -> Tensor:
        """Return one draw of the noise for images (B, 3, H, W), each row's from its own stream."""
        return row_noise(
            self.purifier, self.view.apply(images), rows, seed=seed, purpose=purpose, draw=draw, restart=restart
        )

    def fixed(self, noise: Tensor) -> "FixedNoiseClassifier":
        """Return the deterministic module that always uses `noise`: (B, ...) for one batch, or (1, ...) for any."""
        return FixedNoiseClassifier(self, noise)


def logits_of_draws(
    model: nn.Module, images: Tensor, rows: Sequence[RowKey], *, seed: int, purpose: str, draws: range, restart: int = 0
) -> Iterator[Tensor]:
    """Yield the logits (B, classes) for each of `draws` of the defense's noise; once for a deterministic model.

    Args:
        model: A `DefendedClassifier`, or a deterministic classifier.
        images: (B, 3, H, W) in [0, 1].
        rows: The name of each row, which with the other arguments names its noise.
        seed: Of the noise.
        purpose: Of the noise; noise for one purpose is never used for another.
        draws: Which draws.
        restart: Which restart of an attack.
    """
    if not isinstance(model, DefendedClassifier):
        yield model(images)
        return
    for draw in draws:
        yield model(images, model.noise(images, rows=rows, seed=seed, purpose=purpose, draw=draw, restart=restart))


def check_finite(logits: Tensor, rows: Sequence[RowKey], path: Path) -> Tensor:
    """Return logits (B, classes) of rows of `path`.

    Raises:
        AdvdiffError: A logit is not finite, so that there is no decision.
    """
    finite = logits.isfinite().all(1)
    if not finite.all():
        row = rows[int(finite.int().argmin())]
        raise AdvdiffError(f"the logits of row {row} of {path} are not finite; compute with --precision fp32")
    return logits


class FixedNoiseClassifier(nn.Module):
    """A defended classifier with fixed noise: deterministic, so that attacks on deterministic models are valid.

    This is the "Deterministic White-Box" of arXiv:2404.14309.
    """

    frozen: Tensor

    def __init__(self, defended: DefendedClassifier, noise: Tensor) -> None:
        """Fix the noise: (B, ...), one draw for each image of a batch, or (1, ...), shared by all images."""
        super().__init__()
        self.defended = defended
        self.register_buffer("frozen", noise)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        logits: Tensor = self.defended(images, self.frozen.expand(len(images), *self.frozen.shape[1:]))
        return logits
