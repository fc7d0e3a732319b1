"""Warnings about what an evaluation does not show: attacks on another model, missing controls."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.data.provenance import Provenance
from advdiff_cli.data.row_fingerprints import shared_rows
from advdiff_cli.evaluation.comparison import EvaluatedSet
from advdiff_cli.purification.defense_spec import DefenseSpec


@dataclass(frozen=True)
class Judge:
    """The model that judged the sets.

    Args:
        classifier: Fingerprint of the classifier.
        defense: The defense before it, or None.
        ddpm: Fingerprint of the diffusion model, or None.
        precision: Of the defense.
        seed: Of the draws.
    """

    classifier: str
    defense: DefenseSpec | None = None
    ddpm: str | None = None
    precision: str = "fp32"
    seed: int = 0


def provenance_warnings(sets: Sequence[EvaluatedSet], judge: Judge) -> Iterator[str]:
    """Yield one line for each reason to doubt the figures of a set, or to miss a comparison."""
    for first, second in combinations(sets, 2):
        if not second.history and not _share_rows(first, second) and _same_rows(first, second):
            yield (
                f"{second.name} has row numbers and labels of {first.name}, but is not compared with it: if it was "
                "made from it, record its origins (docs/guide.md, Attacks that know the defense)"
            )
    clean = [s for s in sets if not any(_is_attack(made) for made in s.history)]
    for s in sets:
        purified = any(made["command"] == "purify" for made in s.history)
        for made in s.history:
            if is_own_attack(made) and made["parameters"]["method"] != "random":
                yield from (f"{s.name} {reason}" for reason in _attack_warnings(made, judge, purified=purified))
        if purified and judge.defense is not None:
            yield f"{s.name} was purified before, and is purified again"
        if judge.defense is not None and not any(one is s or _share_rows(one, s) for one in clean):
            yield f"{s.name} is attacked and its clean control is missing: also name the set it was made from"


def _share_rows(first: EvaluatedSet, second: EvaluatedSet) -> bool:
    return bool(len(shared_rows((first.origins, first.index), (second.origins, second.index))[0]))


def _same_rows(first: EvaluatedSet, second: EvaluatedSet) -> bool:
    """Return whether all rows of the second set are in the first, by index, with the same labels."""
    shared, a, b = np.intersect1d(first.index, second.index, return_indices=True)
    same = first.predictions.labels[a] == second.predictions.labels[b]
    return len(shared) == len(second.index) and bool(same.all())


def _is_attack(made: Provenance) -> bool:
    """Return whether a step of a history is an attack, of advdiff or of another program."""
    return made["command"] == "attack" or "eps" in made.get("parameters", {})


def is_own_attack(made: Provenance) -> bool:
    """Return whether a step of a history was recorded by `advdiff attack`, whose parameters tell all of the attack."""
    return made["command"] == "attack" and {"method", "norm", "eps"}.issubset(made["parameters"])


def _attacked_defense(made: Provenance) -> DefenseSpec | None:
    """Return the defense that an attack computed, or None."""
    parameters = made["parameters"]
    attack = AttackSpec.from_parameters(parameters)
    return DefenseSpec.from_parameters(parameters) if attack.computes_defense else None


def transfer_differences(made: Provenance, judge: Judge, *, purified: bool) -> list[str]:
    """Return in what the model that an attack was made on differs from the one that judges it.

    Args:
        made: The record of the attack.
        judge: The model that judges.
        purified: Whether the attacked set was purified before it is judged, as a defense of its own.
    """
    through = _attacked_defense(made)
    different = ["classifier"] if made.get("classifier", judge.classifier) != judge.classifier else []
    if through is not None and judge.defense is not None:
        different += through.differences(judge.defense)
        different += ["diffusion model"] if made.get("ddpm", judge.ddpm) != judge.ddpm else []
    elif through is not None and not purified:
        different.append("no defense")
    return different


def _attack_warnings(made: Provenance, judge: Judge, *, purified: bool) -> Iterator[str]:
    parameters = made["parameters"]
    attack, through = AttackSpec.from_parameters(parameters), _attacked_defense(made)
    different = transfer_differences(made, judge, purified=purified)
    if "no defense" in different:
        yield "was attacked through a defense, and is judged without it"
        different.remove("no defense")
    if different:
        names = ", ".join(different)
        yield f"was attacked on another model ({names}): a transferred attack is weaker than one on this model"
    elif through is not None and judge.defense is not None:
        if (precision := parameters.get("precision", judge.precision)) != judge.precision:
            yield f"was attacked through the defense in {precision}, and is judged in {judge.precision}"
        if attack.fixed_draw and parameters.get("seed", judge.seed) != judge.seed:
            yield f"was attacked on a draw of --seed {parameters['seed']}, which is none of these draws"
        elif attack.fixed_draw:
            yield "was attacked on the first of these draws: look at the vote of 1, not at the mean"
