"""The gallery: what an attack and a purifier do to patches, in numbers for all of them and in pictures for some."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.provenance import JsonObject, history, recipe
from advdiff_cli.data.row_fingerprints import shared_rows
from advdiff_cli.data.selection import row_batches
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.statistics import wilson
from advdiff_cli.purification.defended_classifier import DefendedClassifier, check_finite
from advdiff_cli.purification.defense import EvaluatedModel
from advdiff_cli.report import GALLERY_PATCHES
from advdiff_cli.report.plots import Column, amplified, panel

OUTCOMES = {
    "rescued": "the attack changed the decision, and purification restored it",
    "lost": "the attack changed the decision, and purification did not restore it",
    "spoiled": "the attack failed, and purification changed the decision",
    "held": "the attack failed, and the decision after purification is still correct",
    "wrong": "the classifier was wrong before the attack",
}
TRUTHS = ("no tumor in the center", "tumor in the center")
"""The meaning of each label."""

_BATCH = 16
_IN_PANEL = 4  # patches in the picture
_L2_CONTRAST = 8 / 255  # l2 spreads its budget over the patch
_FULL_CONTRAST = 0.25  # change by purification, in [0, 1] pixels, that is shown at full contrast


@dataclass(frozen=True)
class Confidences:
    """The probability of the true class for paired patches (N,): clean, attacked and purified."""

    clean: NDArray[np.float64]
    attacked: NDArray[np.float64]
    purified: NDArray[np.float64]

    def outcomes(self) -> list[str]:
        """Return each patch's outcome, a key of OUTCOMES."""
        table = {(False, False): "lost", (False, True): "rescued", (True, False): "spoiled", (True, True): "held"}
        triples = zip(self.clean > 0.5, self.attacked > 0.5, self.purified > 0.5, strict=True)
        return [table[bool(a), bool(p)] if c else "wrong" for c, a, p in triples]


@dataclass(frozen=True)
class PairedSets:
    """A clean set and an attacked set, with the positions of the rows that both hold."""

    clean: PatchSet
    attacked: PatchSet
    clean_rows: NDArray[np.int64]
    attacked_rows: NDArray[np.int64]

    @classmethod
    def match(cls, clean: PatchSet, attacked: PatchSet) -> "PairedSets":
        """Match the rows of two sets that were first made from the same patches."""
        rows = shared_rows((clean.origins(), clean.index), (attacked.origins(), attacked.index))
        return cls(clean, attacked, *rows)

    def __len__(self) -> int:
        return len(self.clean_rows)


@dataclass(frozen=True)
class Stages:
    """What the classifier reads in each stage (B, 3, H, W), in [0, 1], with labels (B,) and origin indices."""

    clean: Tensor
    attacked: Tensor
    noised: Tensor
    purified: Tensor
    labels: Tensor
    index: list[int]


@dataclass(frozen=True)
class GalleryModel:
    """The model that judges the gallery: a defended one, its device, and the seed of the judging draw."""

    model: EvaluatedModel
    device: torch.device
    seed: int

    @cached_property
    def defended(self) -> DefendedClassifier:
        """The defended classifier; ValueError without a defense."""
        if not isinstance(self.model.module, DefendedClassifier):
            raise ValueError("a gallery needs a defense")
        return self.model.module

    def stages(self, pairs: PairedSets, rows: Sequence[int]) -> Stages:
        """Return the stages of some pairs, computed at the full batch size."""
        full = np.array([rows[min(i, len(rows) - 1)] for i in range(_BATCH)])
        clean = pairs.clean.batch(pairs.clean_rows[full], self.device)
        noise = self.defended.noise(clean.images, rows=clean.index, seed=self.seed, purpose="evaluate")
        view = self.defended.view
        attacked = view.apply(pairs.attacked.read(pairs.attacked_rows[full]).to(self.device))
        noised, purified = self.defended.purifier.noised(attacked, noise), self.defended.purify(attacked, noise)
        n = len(rows)  # without the padding
        labels, index = clean.labels[:n].cpu(), clean.index[:n]
        return Stages(view.apply(clean.images[:n]), attacked[:n], noised[:n], purified[:n], labels, index)

    def confidence(self, images: Tensor, stages: Stages, path: Path) -> Tensor:
        """Return the classifier's probability of the true class (B,) for images of one stage of rows of `path`.

        Raises:
            AdvdiffError: A logit is not finite, so that there is no decision.
        """
        logits = check_finite(self.defended.classify(images), stages.index, path)
        return logits.cpu().double().softmax(1)[torch.arange(len(stages.labels)), stages.labels]


@torch.inference_mode()
def judge_pairs(pairs: PairedSets, by: GalleryModel, advance: Callable[[int], None]) -> Confidences:
    """Judge every pair: the classifier alone on clean and attacked patches, and the defense on one judging draw."""
    found: dict[str, list[Tensor]] = {"clean": [], "attacked": [], "purified": []}
    for rows in row_batches(len(pairs), _BATCH):
        stages = by.stages(pairs, rows.tolist())
        for name, column in found.items():
            column.append(by.confidence(getattr(stages, name), stages, pairs.attacked.path))
        advance(len(rows))
    return Confidences(*(torch.cat(column).numpy() for column in found.values()))


def most_changed(judged: Confidences, count: int) -> list[int]:
    """Return the rows whose confidence changed most, rescued and lost alternately as long as there are both."""
    outcomes = np.array(judged.outcomes())
    change = (judged.clean - judged.attacked) + np.abs(judged.purified - judged.attacked)
    order = np.argsort(-change, kind="stable")
    rescued, lost = ([int(i) for i in order if outcomes[i] == name] for name in ("rescued", "lost"))
    first = [i for both in zip(rescued, lost, strict=False) for i in both]
    return (first + [int(i) for i in order if i not in first])[:count]


@torch.inference_mode()
def pictures(
    pairs: PairedSets, rows: Sequence[int], judged: Confidences, by: GalleryModel, eps: float
) -> list[JsonObject]:
    """Return index, label, size and stages of some pairs; each stage has its image and the confidence in the truth.

    Args:
        pairs: The patches.
        rows: Positions in `pairs`.
        judged: Of all pairs.
        by: The model that judged them.
        eps: Of the attack, in [0, 1] pixels, by which its perturbation is amplified.
    """
    found = []
    for chosen in row_batches(len(rows), _BATCH):
        batch = [rows[i] for i in chosen]
        stages = by.stages(pairs, batch)
        noised = by.confidence(stages.noised, stages, pairs.attacked.path)
        for i, row in enumerate(batch):
            clean, attacked, purified = (x[i : i + 1] for x in (stages.clean, stages.attacked, stages.purified))
            change = amplified(purified, attacked, _FULL_CONTRAST)
            columns = [
                ("clean", clean, float(judged.clean[row])),
                ("adversarial", attacked, float(judged.attacked[row])),
                (f"perturbation, {1 / (2 * eps):.0f}x", amplified(attacked, clean, eps), None),
                ("noised", stages.noised[i : i + 1], float(noised[i])),
                ("purified", purified, float(judged.purified[row])),
                (f"change by purification, {1 / (2 * _FULL_CONTRAST):.0f}x", change, None),
            ]
            shown = [{"title": title, "images": x, "belief": b, "png": data_uri(x[0])} for title, x, b in columns]
            label, (height, width) = int(stages.labels[i]), clean.shape[-2:]
            patch = {"index": stages.index[i], "label": label, "truth": TRUTHS[label], "stages": shown}
            found.append({**patch, "height": height, "width": width})
    return found


def build_gallery(
    pairs: PairedSets, judged: Confidences, by: GalleryModel, eps: float, chosen: list[int] | int, panel_path: Path
) -> JsonObject:
    """Return the content of the gallery, and draw its first patches as one picture.

    Args:
        pairs: The patches.
        judged: Of all pairs.
        by: The model that judged them.
        eps: Of the attack, in [0, 1] pixels.
        chosen: Positions of the patches shown, or the number of those that changed most.
        panel_path: Where the picture goes.
    """
    rows = most_changed(judged, chosen) if isinstance(chosen, int) else chosen
    shown, outcomes = pictures(pairs, rows, judged, by, eps), judged.outcomes()
    _draw_panel(shown[:_IN_PANEL], panel_path)
    by_change = "whose confidence changed most, rescued and lost alternately"
    is_default = isinstance(chosen, int) and len(shown) == min(GALLERY_PATCHES, len(pairs))
    made_by = recipe(
        "report",
        {
            **by.model.parameters,
            "seed": by.seed,
            **({} if is_default else {"index": [patch["index"] for patch in shown]}),
        },
        data=pairs.clean.recipe_input(),
        attacked=pairs.attacked.recipe_input(),
        classifier=by.model.fingerprint,
        ddpm=by.model.ddpm_fingerprint,
    )
    return {
        "n": len(pairs),
        "outcomes": OUTCOMES,
        "counts": {name: outcomes.count(name) for name in OUTCOMES},
        "shares": {name: wilson(outcomes.count(name), len(pairs)).as_dict() for name in OUTCOMES},
        "chosen": f"The patches shown are those {by_change if isinstance(chosen, int) else 'chosen by index'}.",
        "patches": [patch | {"outcome": outcomes[row]} for patch, row in zip(shown, rows, strict=True)],
        "recipe": made_by,
    }


def _draw_panel(shown: Sequence[JsonObject], path: Path) -> None:
    columns = []
    for k, stage in enumerate(shown[0]["stages"]):
        images = torch.cat([patch["stages"][k]["images"] for patch in shown]).cpu()
        confidences = None if stage["belief"] is None else [patch["stages"][k]["belief"] for patch in shown]
        columns.append(Column(stage["title"].replace("change by purification", "change"), images, confidences))
    panel(columns, [f"row {patch['index']}\n{patch['truth']}" for patch in shown], path)


def amplification_eps(attacked: PatchSet) -> float:
    """Return the eps, in [0, 1] pixels, that a perturbation is amplified by: that of the attack, for l-inf.

    Raises:
        AdvdiffError: The set has no record of an attack.
    """
    attacks = [step["parameters"] for step in history(attacked.provenance) if step["command"] == "attack"]
    if not attacks:
        raise AdvdiffError(f"{attacked.path} has no record of an attack; give a set made by advdiff attack")
    return float(attacks[-1]["eps"]) if attacks[-1]["norm"] == "linf" else _L2_CONTRAST


def data_uri(image: Tensor) -> str:
    """Return an image (3, H, W) in [0, 1] as a PNG in a data: URI."""
    pixels = (image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
