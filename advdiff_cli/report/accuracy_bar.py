"""A bar of the report: standard and robust accuracy of a result of `evaluate --json`, and the attack behind it."""

from collections.abc import Mapping
from typing import Any

from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.data.provenance import JsonObject, Provenance
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.provenance_checks import Judge, transfer_differences
from advdiff_cli.purification.defense_spec import DefenseSpec


def accuracy_bar(name: str, result: Mapping[str, Any]) -> JsonObject:
    """Return a bar of the paper's Figure 3 from a result of `evaluate --json` on a clean and an attacked set.

    Raises:
        AdvdiffError: The first two sets are not a clean and an attacked set of the same rows.
    """
    sets = result.get("sets", [])
    attack = _attack(sets[1]) if len(sets) > 1 else None
    if attack is None or _attack(sets[0]):
        raise AdvdiffError(
            f"the result called {name} needs a clean and an attacked set, in this order: "
            "advdiff evaluate CLEAN ATTACKED -c ... --json, where ATTACKED was made by advdiff attack"
        )
    n, draws = sets[1]["n"], sets[1]["draws"]
    pair = (sets[0]["data"], sets[1]["data"])
    compared = [c["n"] for c in result.get("comparisons", []) if (c["first"], c["second"]) == pair]
    if compared[:1] != [n] or sets[0]["n"] != n:
        raise AdvdiffError(
            f"the sets of the result called {name} do not hold the same rows; evaluate them with the same selection"
        )
    knowledge = "knows the defense" if attack.knows_defense else "knows the classifier alone"
    if _is_transferred(sets[1], result):
        knowledge = "made on another model: transferred"
    notes = [attack.describe()]
    notes += [] if attack.method == "random" else [knowledge]
    notes += [f"{draws} draws"] if draws > 1 else []
    accuracies = {"standard": sets[0]["accuracy"], "robust": sets[1]["accuracy"]}
    return {"name": name, "n": n, **accuracies, "attack": "; ".join(notes)}


def _is_transferred(attacked: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Return whether a set of a result was attacked on another model than that which judged it.

    Raises:
        AdvdiffError: The result does not describe its defense.
    """
    defense = result["defense"] or {}
    attack = _steps(attacked, "attack")[-1]
    purified = bool(_steps(attacked, "purify"))
    try:
        judge = Judge(result["classifier"]["fingerprint"], DefenseSpec.from_parameters(defense), defense.get("ddpm"))
        return bool(transfer_differences(attack, judge, purified=purified))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise AdvdiffError(f"a result file describes a defense that advdiff does not know ({e!r:.80})") from None


def _attack(evaluated: Mapping[str, Any]) -> AttackSpec | None:
    """Return the last attack in the history of a set, or None."""
    made = _steps(evaluated, "attack")
    return parse_attack(made[-1]["parameters"]) if made else None


def _steps(evaluated: Mapping[str, Any], command: str) -> list[Provenance]:
    """Return the steps of one command in the history of a set, oldest first."""
    return [step for step in evaluated.get("history", []) if step["command"] == command]


def parse_attack(parameters: JsonObject) -> AttackSpec:
    """Return the attack that a result file describes.

    Raises:
        AdvdiffError: It is not a description of an attack.
    """
    try:
        spec = AttackSpec.from_parameters(parameters)
        spec.describe()
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise AdvdiffError(f"a result file describes an attack that advdiff does not know ({e!r:.80})") from None
    return spec
