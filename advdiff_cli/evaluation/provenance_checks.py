"""What an evaluation does not show, told beside it: attacks on another model, controls that are missing."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from advdiff_cli.evaluation.comparison import Evaluated
from advdiff_cli.jobs.attack import goes_through

_SETTINGS = ("defense", "t_star", "sampler", "sampler_steps")


def cautions(
    evaluated: Sequence[Evaluated], classifier: str, defence: Mapping[str, Any] | None, ddpm: str | None
) -> Iterator[str]:
    """Yield a line for each reason to doubt what is told of a set.

    Args:
        evaluated: The sets, each with its history.
        classifier: Fingerprint of the classifier that judged them.
        defence: What stood before it, with the precision and the seed of the draws, or None.
        ddpm: Fingerprint of its diffusion model, or None.
    """
    clean = {e.origin for e in evaluated if not any(made["command"] == "attack" for made in e.history)}
    for e in evaluated:
        purified = any(made["command"] == "purify" for made in e.history)
        for made in e.history:
            if made["command"] == "attack" and made["parameters"].get("method") != "random":
                yield from (f"{e.name} {why}" for why in _of_attack(made, classifier, defence, ddpm, purified))
        if purified and defence is not None:
            yield f"{e.name} is purified already, and was purified once more"
        if defence is not None and e.origin not in clean:
            yield f"{e.name} is attacked, and its clean control is not among the sets: name the set it was made from"


def _of_attack(
    made: Mapping[str, Any], classifier: str, defence: Mapping[str, Any] | None, ddpm: str | None, purified: bool
) -> Iterator[str]:  # fmt: skip
    parameters = made["parameters"]
    through = goes_through(parameters)
    others = ["classifier"] if made.get("classifier", classifier) != classifier else []
    if through and defence is None and not purified:
        yield "was attacked through a defence, and is judged without it"
    if through and defence is not None:
        pairs = {k: {parameters.get(k), defence.get(k)} for k in _SETTINGS}
        others += [k for k, pair in pairs.items() if len(pair - {None}) > 1]
        others += ["diffusion model"] if made.get("ddpm", ddpm) != ddpm else []
    if others:
        yield f"was attacked on another model ({', '.join(others)}): transfer is weaker than an attack on this one"
    elif through and defence is not None:
        if (exact := parameters["precision"]) != defence["precision"]:
            yield f"was attacked through the defence in {exact} and is judged in {defence['precision']}"
        if parameters.get("fixed_draw") and parameters["seed"] != defence["seed"]:
            yield f"was attacked on a draw of --seed {parameters['seed']}, which is none of these"
        elif parameters.get("fixed_draw"):
            yield "was attacked on the first of these draws: look at the vote of 1, not at the mean"
