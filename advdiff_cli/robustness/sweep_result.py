"""The result of a sweep: its settings and the chosen value, and the table sweep.csv."""

import csv
from collections.abc import Sequence
from pathlib import Path

from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.data.atomic_files import atomic_write
from advdiff_cli.data.provenance import JsonObject, recipe
from advdiff_cli.robustness.runner import SuiteRunner
from advdiff_cli.robustness.sweep import Criterion, SweepPoint
from advdiff_cli.robustness.sweep_points import SweepRequest


def sweep_settings(
    points: Sequence[SweepPoint],
    undefended: SuiteRunner,
    request: SweepRequest,
    criterion: Criterion,
    chosen: SweepPoint | None,
) -> JsonObject:
    """Return the settings of a sweep and the chosen value."""
    typical = chosen or points[-1]
    model, spec = typical.runner.model, typical.attack.attack
    assert spec is not None
    attack = {**spec.parameters(), **({"gradient": "blind"} if request.blind else {})}
    settings = {
        "over": request.over,
        **criterion.parameters(),
        "seed": undefended.seed,
        "batch_size": undefended.batch_size,
        "draws": undefended.budget.draws,
        "values": [p.value for p in points],
        "attack": attack,
        **({"ddpms": [p.runner.model.ddpm_fingerprint for p in points]} if request.over == "ddpm" else {}),
    }
    made_by = recipe(
        "sweep",
        {**settings, **model.parameters},
        data=undefended.patches.recipe_input(),
        classifier=undefended.model.fingerprint,
        ddpm=model.ddpm_fingerprint,
    )
    return {
        "out": str(undefended.out),
        "over": request.over,
        "recipe": made_by,
        "attack": attack,
        "attack_told": _describe_attack(attack, request.over),
        "defense": model.parameters,
        "rule": criterion.describe(),
        "chosen": chosen and chosen.name,
        "chosen_value": chosen and chosen.value,
        "chosen_told": chosen and chosen.flag_value,
    }


def _describe_attack(attack: JsonObject, over: str) -> str:
    """Describe the attack, without its eps if that is varied."""
    text = AttackSpec.from_parameters(attack).describe()
    if over != "eps":
        return text
    head, comma, rest = text.partition(",")
    return f"{head.rpartition(' ')[0]}{comma}{rest}"


def write_table(result: JsonObject, path: Path) -> None:
    """Write the accuracies at each value as a CSV file."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.writer(file)
        kinds = ("standard", "robust", *(["certified"] if "certified" in result["rows"][0] else []))
        columns = [f"{kind}{suffix}" for kind in kinds for suffix in ("", "_low", "_high")]
        table.writerow(("value", "unet_evaluations", *columns))
        for r in result["rows"]:
            figures = [f"{r[kind][k]:.6g}" for kind in kinds for k in ("value", "low", "high")]
            table.writerow((f"{r['value']:g}", r["unet_evaluations"], *figures))
