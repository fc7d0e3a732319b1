"""Climb the ladder: make each rung's patch set, judge it, and draw the conclusions."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from advdiff_cli.attacks.cost import Cost, attack_cost
from advdiff_cli.attacks.objective import Objective
from advdiff_cli.attacks.plan import aim
from advdiff_cli.attacks.stored import attack_recipe, attack_rows
from advdiff_cli.data.patches import PatchSet, open_patches
from advdiff_cli.data.provenance import Provenance, recipe
from advdiff_cli.data.writer import PatchWriter, shard_rows
from advdiff_cli.evaluation.comparing import difference_of_means
from advdiff_cli.evaluation.judging import judged
from advdiff_cli.evaluation.ladder import Preset, Rung
from advdiff_cli.evaluation.metrics import Predictions, proportion, votes
from advdiff_cli.purification.defended import DefendedClassifier
from advdiff_cli.purification.purifier import NoisePurifier, Purifier, linear_alpha_bar

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a classifier, alone or behind a purifier, with what names each in a recipe."""

    classifier: nn.Module
    fingerprint: str
    purifier: Purifier | None = None
    defence: Mapping[str, Any] | None = None
    ddpm: str | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The classifier, or the defended one."""
        return self.classifier if self.purifier is None else DefendedClassifier(self.purifier, self.classifier).eval()

    @property
    def sampler_steps(self) -> int:
        """U-Net evaluations of one purification; 0 without a U-Net."""
        return len(getattr(self.purifier, "indices", ()))


@dataclass(frozen=True)
class Climb:
    """One run over a ladder.

    Args:
        subject: What is evaluated.
        patches: The rows, with labels, of one size.
        spend: The preset: what attacks may spend, and how many draws judge.
        out: Folder of the rungs, NAME.safetensors and NAME.predictions.safetensors each.
        seed: Of attacks and judging draws.
        precision: Of the purifier when it is judged.
        batch_size: Patches attacked at once.
        device: Where to compute.
        overwrite: Whether rungs of another recipe may be replaced.
    """

    subject: Subject
    patches: PatchSet
    spend: Preset
    out: Path
    seed: int
    precision: str
    batch_size: int
    device: torch.device
    overwrite: bool = False

    @cached_property
    def _data(self) -> Provenance:
        return self.patches.recipe_input()

    def recipe(self, rung: Rung) -> Provenance:
        """Return the recipe of a rung's attack: that of the attack command where the defence itself is attacked."""
        s = self.subject
        defence, ddpm = (s.defence, s.ddpm) if rung.before == "defence" else (self._substitute()[1], None)
        return attack_recipe(rung.settings, self.seed, self.batch_size, self._data, s.fingerprint, defence, ddpm)

    def _substitute(self) -> tuple[Purifier, dict[str, Any]]:
        """Return NoiseDefense at the defence's t*: a model like it that has no diffusion model in it."""
        t_star = (self.subject.defence or {})["t_star"]
        return NoisePurifier(linear_alpha_bar(), t_star).to(self.device), {"defense": "noise", "t_star": t_star}

    def attack(self, rung: Rung) -> Iterator[int]:
        """Make the patch set of a rung, yielding rows as they are done; those of an earlier run come first."""
        made_by = self.recipe(rung)
        sink = PatchWriter(
            self.out / f"{rung.name}.safetensors", made_by, self.patches,
            shard_rows(len(self.patches), self.batch_size, None),
            shape=self.patches.require_shape(), device=self.device.type, overwrite=self.overwrite,
        )  # fmt: skip
        if sink.up_to_date:
            yield len(self.patches)
            return
        yield int(sink.finished.sum())
        purifier = self.subject.purifier if rung.before == "defence" else self._substitute()[0]
        target = aim(self.subject.classifier, purifier, rung.settings)
        yield from attack_rows(target, made_by["parameters"], self.patches, sink, self.device)

    def judge(self, rung: Rung, advance: Advance) -> Predictions:
        """Return the predictions on a rung, over the draws that judge every rung alike."""
        defended = isinstance(self.subject.model, DefendedClassifier)
        draws = self.spend.draws if defended and rung.judged == "all" else 1
        judging: dict[str, Any] = {"draws": draws, "seed": self.seed, "precision": self.precision} if defended else {}
        made_by = recipe(
            "judge", {**judging, **(self.subject.defence or {})},
            data=self.recipe(rung) if rung.settings else self._data,
            classifier=self.subject.fingerprint, ddpm=self.subject.ddpm,
        )  # fmt: skip
        patches = open_patches(self.out / f"{rung.name}.safetensors") if rung.settings else self.patches
        kept = self.out / f"{rung.name}.predictions.safetensors"
        return judged(self.subject.model, patches, kept, made_by, self.device, advance, **judging)

    def costs(self, rungs: Sequence[Rung]) -> list[dict[str, Any]]:
        """Return for each rung its U-Net evaluations a patch and the seconds all patches will take, measured here."""
        seconds = self._measure()
        found = []
        for rung in rungs:
            defended = self.subject.purifier is not None and rung.before == "defence"
            cost = attack_cost(rung.settings, defended=defended) if rung.settings else Cost()
            if rung.before == "noise":
                cost = Cost(classifier=attack_cost(rung.settings, defended=True).gradient)
            draws = self.spend.draws if self.subject.purifier is not None and rung.judged == "all" else 1
            total = cost + Cost(forward=draws)
            forward, backward = total.unet(self.subject.sampler_steps)
            each = total.forward * seconds[0] + total.gradient * seconds[1] + total.classifier * seconds[2]
            found.append(
                {"name": rung.name, "unet_forward": forward, "unet_backward": backward,
                 "seconds": round(each * len(self.patches), 1)}
            )  # fmt: skip
        return found

    def _measure(self) -> tuple[float, float, float]:
        """Return the seconds a patch of a forward and a gradient of the subject, and a gradient of the classifier."""
        rows = np.arange(min(self.batch_size, len(self.patches)))
        images = self.patches.read(rows).to(self.device)
        labels = torch.from_numpy(self.patches.require_labels()[rows]).to(self.device)
        keys = [self.patches.keys[i] for i in rows]
        whole = Objective(self.subject.model, labels, seed=self.seed, rows=keys)
        alone = Objective(self.subject.classifier, labels, seed=self.seed, rows=keys)
        return (
            _fastest(lambda: whole.at(images, 0)) / len(rows),
            _fastest(lambda: whole.gradient(images, 0)) / len(rows),
            _fastest(lambda: alone.gradient(images, 0)) / len(rows),
        )


def _fastest(task: Callable[[], Any]) -> float:
    times = []
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        task()
        times.append(time.perf_counter() - started)
    return min(times)


def worst(rungs: Sequence[Rung], judged: Mapping[str, Predictions], eps: float) -> tuple[list[str], Predictions]:
    """Return each patch's worst rung at no more than eps, by the share of draws right, as predictions, and the rungs.

    A patch's worst is chosen on the draws that judge it, so that it errs, if at all, against the defence.
    """
    names = [
        r.name for r in rungs
        if r.name in judged and r.judged == "all" and r.settings.get("eps", 0) <= eps * (1 + 1e-9)
    ]  # fmt: skip
    shares = np.stack([judged[name].share for name in names])
    chosen = shares.argmin(0)
    p1 = np.stack([judged[name].p1 for name in names])[chosen, np.arange(shares.shape[1])]
    return names, Predictions(judged[names[0]].labels, p1)


def row(rung: Rung, found: Predictions, clean: Predictions) -> dict[str, Any]:
    """Return what the table says of a rung: accuracy, votes, and the paired difference from the clean control."""
    control = clean.take(np.arange(len(clean.labels))) if found.draws == clean.draws else Predictions(
        clean.labels, clean.p1[:, : found.draws]
    )  # fmt: skip
    return {
        "name": rung.name,
        "kind": rung.kind,
        "attack": dict(rung.settings),
        "draws": found.draws,
        "accuracy": proportion(found.share, found.labels).as_dict(),
        **{k: v.as_dict() for k, v in votes(found).items()},
        "clean": proportion(control.share, control.labels).as_dict(),
        "difference": difference_of_means(control, found).as_dict(),
    }
