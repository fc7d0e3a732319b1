"""Climb the ladder: make each rung's patch set and judge it, and look at what the attacks are made of."""

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
from advdiff_cli.attacks.eot import Objective
from advdiff_cli.attacks.spec import aim
from advdiff_cli.data.patch_writer import PatchWriter, is_made, shard_rows
from advdiff_cli.data.patches import PatchSet, open_patches
from advdiff_cli.data.provenance import Provenance, recipe
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.jobs.attack import attack_recipe, attack_rows
from advdiff_cli.jobs.result_cache import keep_result, kept_predictions, kept_result, predict_and_keep
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.purifier import NoisePurifier, Purifier, linear_alpha_bar
from advdiff_cli.robustness.binarization_test import PROBES
from advdiff_cli.robustness.gradient_checks import look_at_gradients, unit_test
from advdiff_cli.robustness.sanity_checks import Gradients, UnitTest
from advdiff_cli.robustness.suite import Preset, Rung
from advdiff_cli.robustness.timing_log import Stopwatch

Advance = Callable[[int], None]
LOOKED_AT = 64  # patches whose gradients are looked at, and that the attack's unit test is made of


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a classifier, alone or behind a purifier, and what names each in a recipe."""

    classifier: nn.Module
    fingerprint: str
    purifier: Purifier | None = None
    defence: Mapping[str, Any] | None = None
    ddpm: str | None = None
    precision: str = "fp32"
    compiled: bool = False

    @cached_property
    def model(self) -> nn.Module:
        """The classifier, or the defended one."""
        if self.purifier is None:
            return self.classifier
        return DefendedClassifier(self.purifier, self.classifier, self.precision).eval()

    @property
    def settings(self) -> dict[str, Any]:
        """What of the defence enters a recipe; nothing where there is none."""
        return {} if self.defence is None else {**self.defence, "precision": self.precision}

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
        out: Folder of the rungs, NAME.safetensors and NAME.predictions.safetensors each, of checks, NAME.json, and
            of the seconds all that took.
        seed: Of attacks and judging draws.
        batch_size: Patches attacked at once.
        device: Where to compute.
        overwrite: Whether what another recipe made may be replaced.
        label: What the names of predictions begin with, where several subjects share the folder.
    """

    subject: Subject
    patches: PatchSet
    spend: Preset
    out: Path
    seed: int
    batch_size: int
    device: torch.device
    overwrite: bool = False
    label: str = ""

    @cached_property
    def _data(self) -> Provenance:
        return self.patches.recipe_input()

    def recipe(self, rung: Rung) -> Provenance:
        """Return the recipe of a rung's attack: that of the attack command where the defence itself is attacked."""
        s = self.subject
        defence, ddpm = s.defence, s.ddpm
        if rung.before != "defence":
            defence, ddpm = self._taken_for(rung)[1], None
        return attack_recipe(
            rung.settings, self.seed, self.batch_size, self._data, s.fingerprint, defence, ddpm, s.precision,
            compiled=s.compiled,
        )  # fmt: skip

    def _taken_for(self, rung: Rung) -> tuple[Purifier | None, Mapping[str, Any] | None]:
        """Return what a rung's attack takes for the defence, with its parameters.

        `noise` is NoiseDefense at the defence's t*: a model like it that has no diffusion model in it.
        """
        if rung.before == "defence":
            return self.subject.purifier, self.subject.defence
        if rung.before == "nothing":
            return None, None
        t_star = (self.subject.defence or {})["t_star"]
        return NoisePurifier(linear_alpha_bar(), t_star).to(self.device), {"defense": "noise", "t_star": t_star}

    def attack(self, rung: Rung) -> Iterator[int]:
        """Make the patch set of a rung, yielding rows as they are done; those of an earlier run come first."""
        made_by, out = self.recipe(rung), self.out / f"{rung.name}.safetensors"
        sink = PatchWriter(
            out, made_by, self.patches, shard_rows(len(self.patches), self.batch_size, None),
            shape=self.patches.require_shape(), device=self.device.type,
            overwrite=self.overwrite and not is_made(out, made_by),
        )  # fmt: skip
        if sink.up_to_date:
            yield len(self.patches)
            return
        yield int(sink.finished.sum())
        target = aim(self.subject.classifier, self._taken_for(rung)[0], rung.settings, self.subject.precision)
        with self._watch(made_by, anew=not sink.finished.any()) as watch:
            for count in attack_rows(target, made_by["parameters"], self.patches, sink, self.device):
                watch.lap()
                yield count

    def _judging(self, rung: Rung) -> tuple[dict[str, Any], Provenance]:
        """Return how a rung is judged, and the recipe of that."""
        defended = isinstance(self.subject.model, DefendedClassifier)
        judging: dict[str, Any] = {}
        if defended:
            draws = self.spend.draws if rung.judged == "all" else 1
            judging = {"draws": draws, "seed": self.seed}
        made_by = recipe(
            "judge", {**judging, **self.subject.settings},
            data=self.recipe(rung) if rung.settings else self._data,
            classifier=self.subject.fingerprint, ddpm=self.subject.ddpm,
        )  # fmt: skip
        return judging, made_by

    def judge(self, rung: Rung, advance: Advance) -> Predictions:
        """Return the predictions on a rung, over the draws that judge every rung alike."""
        judging, made_by = self._judging(rung)
        kept = self.out / f"{self.label}{rung.name}.predictions.safetensors"
        if found := kept_predictions(kept, made_by, overwrite=self.overwrite):
            advance(len(found.labels))
            return found
        patches = open_patches(self.out / f"{rung.name}.safetensors") if rung.settings else self.patches
        with self._watch(made_by, anew=True):
            return predict_and_keep(self.subject.model, patches, kept, made_by, self.device, advance, **judging)

    def gradients(self, advance: Advance) -> Gradients:
        """Return what the gradients at the first clean patches look like."""
        settings = {"eot": self.spend.eot, "seed": self.seed, "rows": LOOKED_AT}

        def look() -> dict[str, Any]:
            few = self.patches.first(LOOKED_AT)
            found = look_at_gradients(
                self.subject.model, few, self.device, eot=self.spend.eot, seed=self.seed, batch_size=self.batch_size,
                advance=advance,
            )  # fmt: skip
            return found.as_dict()

        return Gradients.of(self._check("gradients", settings, look))

    def unit_test(self, settings: Mapping[str, Any], advance: Advance) -> UnitTest | None:
        """Return what an attack of `settings` finds of examples known to exist; None where none can be planted."""

        def test() -> dict[str, Any]:
            few, s = self.patches.first(LOOKED_AT), self.subject
            found = unit_test(s.model, s.classifier, few, self.device, settings, self.seed, self.batch_size, advance)
            return {} if found is None else found.as_dict()

        made = self._check("unit-test", {**settings, "seed": self.seed, "rows": LOOKED_AT}, test)
        return UnitTest.of(made) if made else None

    def _check(self, name: str, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        s, kept = self.subject, self.out / f"{name}.json"
        made_by = recipe(name, {**settings, **s.settings}, data=self._data, classifier=s.fingerprint, ddpm=s.ddpm)
        found = kept_result(kept, made_by, overwrite=self.overwrite)
        if found is None:
            found = make()
            keep_result(kept, made_by, found)
        return found

    def seconds(self, rung: Rung) -> float:
        """Return how long a rung took to make and to judge, over every run it took."""
        watches = [self._watch(self._judging(rung)[1])] + ([self._watch(self.recipe(rung))] if rung.settings else [])
        return round(sum(w.spent() for w in watches), 1)

    def _watch(self, made_by: Provenance, *, anew: bool = False) -> Stopwatch:
        return Stopwatch(self.out / "seconds.jsonl", made_by, anew=anew)

    def costs(self, rungs: Sequence[Rung], tested: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return what making and judging each rung costs, and the checks after them where an attack is `tested`.

        Each is its U-Net evaluations a patch, on how many patches n, and the seconds for all of them, measured here.
        """
        measured, n = self._measure(), len(self.patches)
        found = [_cost(r.name, n, self._passes(r), self.subject.sampler_steps, measured) for r in rungs]
        if tested is None:
            return found
        few, halves = min(LOOKED_AT, n), max(self.spend.eot // 2, 1)
        checks = {
            "gradients": Cost(forward=1, gradient=2 * halves + 1 if self.subject.purifier else 2),
            "unit-test": Cost(forward=PROBES, gradient=tested["steps"] + 1),
        }
        return found + [_cost(k, few, v, self.subject.sampler_steps, measured) for k, v in checks.items()]

    def _passes(self, rung: Rung) -> Cost:
        defended = self.subject.purifier is not None and rung.before != "nothing"
        cost = attack_cost(rung.settings, defended=defended) if rung.settings else Cost()
        if self.subject.purifier is not None and rung.before != "defence":  # noise costs nothing beside the classifier
            cost = Cost(classifier=cost.classifier + cost.gradient + cost.forward)
        draws = self.spend.draws if self.subject.purifier is not None and rung.judged == "all" else 1
        return cost + Cost(forward=draws)

    def _measure(self) -> tuple[float, float, float]:
        """Return the seconds a patch of a forward and a gradient of the subject, and a gradient of the classifier."""
        rows = np.arange(min(self.batch_size, len(self.patches)))
        images = self.patches.read(rows).to(self.device)
        labels = torch.from_numpy(self.patches.require_labels()[rows]).to(self.device)
        keys = [self.patches.keys[i] for i in rows]
        whole = Objective(self.subject.model, labels, seed=self.seed, rows=keys)
        alone = Objective(self.subject.classifier, labels, seed=self.seed, rows=keys)
        return (
            _fastest(lambda: whole.at(images, 0), self.device) / len(rows),
            _fastest(lambda: whole.gradient(images, 0), self.device) / len(rows),
            _fastest(lambda: alone.gradient(images, 0), self.device) / len(rows),
        )


def _cost(
    name: str, n: int, passes: Cost, sampler_steps: int, measured: tuple[float, float, float]
) -> dict[str, Any]:  # fmt: skip
    forward, backward = passes.unet(sampler_steps)
    each = passes.forward * measured[0] + passes.gradient * measured[1] + passes.classifier * measured[2]
    return {"name": name, "n": n, "unet_forward": forward, "unet_backward": backward, "seconds": round(each * n, 1)}


def _fastest(task: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        task()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
