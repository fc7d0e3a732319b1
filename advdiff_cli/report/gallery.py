"""Patches that tell what attack and purification do: what became of each, and the pictures of some."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from advdiff_cli.data.patches import PatchSet
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.report.plots import amplified

OUTCOMES = {
    "rescued": "the attack turned the classifier, and purification turned it back",
    "lost": "the attack turned the classifier, and purification did not help",
    "spoiled": "the attack failed, and purification turned the classifier",
    "held": "the attack failed, and purification did no harm",
    "wrong": "the classifier was wrong before the attack",
}
_BATCH = 16
_CHANGE = 0.25  # change of purification, in [0, 1] pixels, that is shown at full contrast


@dataclass(frozen=True)
class Seen:
    """What the model makes of paired patches (N,): the probability of the true class, clean, attacked and purified."""

    clean: NDArray[np.float64]
    attacked: NDArray[np.float64]
    purified: NDArray[np.float64]

    def outcomes(self) -> list[str]:
        """Return each patch's outcome, a key of OUTCOMES."""
        table = {(False, False): "lost", (False, True): "rescued", (True, False): "spoiled", (True, True): "held"}
        triples = zip(self.clean > 0.5, self.attacked > 0.5, self.purified > 0.5, strict=True)
        return [table[bool(a), bool(p)] if c else "wrong" for c, a, p in triples]


@dataclass(frozen=True)
class Pair:
    """Clean patches and what an attack made of them: positions in each set, row by row."""

    clean: PatchSet
    attacked: PatchSet
    at: NDArray[np.int64]
    attacked_at: NDArray[np.int64]

    @classmethod
    def of(cls, clean: PatchSet, attacked: PatchSet) -> "Pair":
        """Match the rows of two sets of one origin; none where they have none in common."""
        _, a, b = np.intersect1d(clean.index, attacked.index, return_indices=True)
        empty = np.empty(0, np.int64)
        return cls(clean, attacked, a, b) if clean.origin() == attacked.origin() else cls(clean, attacked, empty, empty)

    def __len__(self) -> int:
        return len(self.at)

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Return clean and attacked images (B, 3, H, W), labels (B,) and the indices that name them."""
        at, other = self.at[list(rows)], self.attacked_at[list(rows)]
        labels = torch.from_numpy(self.clean.require_labels()[at])
        return self.clean.read(at), self.attacked.read(other), labels, self.clean.index[at].tolist()


@torch.inference_mode()
def look(
    pair: Pair, model: DefendedClassifier, device: torch.device, seed: int, advance: Callable[[int], None]
) -> Seen:
    """Judge every pair: the classifier alone on clean and attacked, and the defended one on the first judging draw."""
    found: dict[str, list[Tensor]] = {"clean": [], "attacked": [], "purified": []}
    for rows in _batches(range(len(pair))):
        stages, labels, _ = _staged(pair, rows, model, device, seed)
        for name, column in found.items():
            column.append(_belief(model, stages[name], labels))
        advance(len(rows))
    return Seen(*(torch.cat(column)[: len(pair)].numpy() for column in found.values()))


def _batches(rows: Sequence[int]) -> list[list[int]]:
    return [list(rows[i : i + _BATCH]) for i in range(0, len(rows), _BATCH)]


def _staged(
    pair: Pair, rows: Sequence[int], model: DefendedClassifier, device: torch.device, seed: int
) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """Return clean, attacked, noised and purified images, labels and indices of rows, at the full batch shape."""
    full = [rows[min(i, len(rows) - 1)] for i in range(_BATCH)]
    clean, attacked, labels, index = pair.read(full)
    clean, attacked = clean.to(device), attacked.to(device)
    noise = model.noise(attacked, rows=index, seed=seed, purpose="evaluate")
    noised, purified = model.purifier.noised(attacked, noise), model.purified(attacked, noise)
    stages = {"clean": clean, "attacked": attacked, "noised": noised, "purified": purified}
    return {name: images[: len(rows)] for name, images in stages.items()}, labels[: len(rows)], index[: len(rows)]


def _belief(model: DefendedClassifier, images: Tensor, labels: Tensor) -> Tensor:
    """Return the probability of the true class (B,) under the classifier."""
    logits: Tensor = model.classifier(images)
    return logits.cpu().double().softmax(1)[torch.arange(len(labels)), labels]


def most_telling(seen: Seen, count: int) -> list[int]:
    """Return rows for a gallery, rescued and lost in turn while there are both, by how far the belief moved."""
    outcomes = np.array(seen.outcomes())
    moved = (seen.clean - seen.attacked) + np.abs(seen.purified - seen.attacked)
    most = np.argsort(-moved, kind="stable")
    rescued, lost = ([int(i) for i in most if outcomes[i] == name] for name in ("rescued", "lost"))
    first = [i for both in zip(rescued, lost, strict=False) for i in both]
    return (first + [int(i) for i in most if i not in first])[:count]


@torch.inference_mode()
def pictures(
    pair: Pair, rows: Sequence[int], seen: Seen, model: DefendedClassifier, device: torch.device, seed: int, eps: float
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the stages of some pairs: each patch's index, label and images, with the belief in its true class.

    Args:
        pair: The patches.
        rows: Positions in `pair`.
        seen: What `look` made of all of them.
        model: The defended classifier.
        device: Where to compute.
        seed: Of the first judging draw.
        eps: Of the attack, in [0, 1] pixels, that its perturbation is amplified by.
    """
    found = []
    for some in _batches(rows):
        stages, labels, index = _staged(pair, some, model, device, seed)
        noised = _belief(model, stages["noised"], labels)
        for i, row in enumerate(some):
            clean, attacked, purified = (stages[k][i : i + 1] for k in ("clean", "attacked", "purified"))
            columns = [
                ("clean", clean, float(seen.clean[row])),
                ("adversarial", attacked, float(seen.attacked[row])),
                (f"perturbation, {1 / (2 * eps):.0f}x", amplified(attacked, clean, eps), None),
                ("noised", stages["noised"][i : i + 1], float(noised[i])),
                ("purified", purified, float(seen.purified[row])),
                (f"what purification changed, {1 / (2 * _CHANGE):.0f}x", amplified(purified, attacked, _CHANGE), None),
            ]
            shown = [{"title": title, "images": x, "belief": b, "png": data_uri(x[0])} for title, x, b in columns]
            found.append({"index": index[i], "label": int(labels[i]), "stages": shown})
    return found


def data_uri(image: Tensor) -> str:
    """Return an image (3, H, W) in [0, 1] as a PNG in a data: address."""
    pixels = (image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
