"""The tables of a suite of attacks: its plan, and its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from advdiff_cli import console
from advdiff_cli.cli.progress import duration
from advdiff_cli.cli.tables import cell

if TYPE_CHECKING:
    from advdiff_cli.data.provenance import JsonObject
    from advdiff_cli.robustness.cost_estimate import RowCost


def plan_text(plan: Sequence[RowCost]) -> str:
    """Return the table of what each row costs."""
    rows = [(c.name, f"{c.unet_forward:,}", f"{c.unet_backward:,}", duration(c.seconds)) for c in plan]
    rows.append(("all", "", "", duration(sum(c.seconds for c in plan))))
    return console.table(("row", "U-Net forward a patch", "backward", "about, from nothing"), rows)


def suite_text(result: JsonObject) -> str:
    """Return the table of a suite, what is proved beside it, and its checks."""
    from advdiff_cli.attacks.spec import AttackSpec

    largest = [k for k in result["rungs"][0] if k.startswith("vote_")][-1:] if result["draws"] > 1 else []
    votes = [*largest, "all_correct"] if largest else []
    rows = []
    for r in [*result["rungs"], result["worst"]]:
        attack = AttackSpec.from_parameters(r["attack"]).describe() if r["attack"] else ""
        if "after" in r:
            attack += f", {'from' if r['starts_there'] else 'after'} {r['after']}"
        figures = (cell(r["accuracy"]), *(cell(r.get(k)) for k in votes), cell(r["difference"]))
        rows.append((r["name"], attack, *figures, duration(r["seconds"]) if "seconds" in r else ""))
    proved = result["certified"]
    if proved is not None:  # of the vote, and thus behind a defense, which several draws judge
        proof = "proof, of the vote over infinitely many draws"
        rows.append(("certified", proof, "", cell(proved), "", "", duration(proved["seconds"])))
    names = [k.replace("vote_", "vote of ").replace("all_correct", "all draws correct") for k in votes]
    accuracy = "accuracy, mean of draws" if votes else "accuracy"
    text = console.table(("% [95 %]", "attack", accuracy, *names, "minus clean, points", "time"), rows)
    if proved is not None:
        text += f"\n\n{_bracket(result)}"
    if any("after" in r for r in result["rungs"]):
        text += "\n\nafter, from: patches that the named row broke under every draw keep its example"
    checks = [f"{a['status']:4}  {a['name']}: {a['reason']}" for a in result["alarms"]]
    return text + "\n\n" + "\n".join(checks)


def _bracket(result: JsonObject) -> str:
    """Say between which figures the true robust accuracy lies."""
    proved, worst = result["certified"], result["worst"]
    vote = max((k for k in worst if k.startswith("vote_")), key=lambda k: int(k.removeprefix("vote_")))
    size = f"l-inf {result['eps'] * 255:g}/255 (l2 {proved['l2']:.3f}, sigma {proved['sigma']:.3f})"
    return (
        f"the true robust accuracy of the vote at {size} lies between {cell(proved)} % (proved, for infinitely many "
        f"draws, in fp32) and about {cell(worst[vote])} % (worst attack of each patch, by votes of "
        f"{vote.removeprefix('vote_')} draws, which may be too low)"
    )
