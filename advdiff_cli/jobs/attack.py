"""An attack over a patch set, its rows written as they are made."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from advdiff_cli.attacks.spec import Target, run
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.prefetch import ahead
from advdiff_cli.data.provenance import Provenance, recipe
from advdiff_cli.models.device import onto


def attack_recipe(
    settings: Mapping[str, Any], seed: int, batch_size: int, data: Provenance, classifier: str,
    defence: Mapping[str, Any] | None, ddpm: str | None, precision: str = "fp32", *, compiled: bool = False,
) -> Provenance:  # fmt: skip
    """Return the recipe of an attack.

    Args:
        settings: Of `attacks.plan.resolve`.
        seed: Of every stream.
        batch_size: Patches computed at once.
        data: `PatchSet.recipe_input()` of the attacked rows.
        classifier: Fingerprint of the classifier.
        defence: Parameters of the defence, or None.
        ddpm: Fingerprint of its diffusion model, or None.
        precision: Of the purifier, where the attack goes through it.
        compiled: Whether the U-Net is compiled where gradients are taken of it; they round otherwise.
    """
    whole = {**settings, **(defence or {})}
    exact = precision if goes_through(whole) else "fp32"
    parameters = {**whole, "seed": seed, "batch_size": batch_size, "precision": exact}
    if compiled and differentiates(whole):
        parameters["compiled"] = True
    models = {"classifier": classifier} | ({} if defence is None else {"ddpm": ddpm})
    return recipe("attack", parameters, data=data, **models)


def goes_through(parameters: Mapping[str, Any]) -> bool:
    """Tell whether these are of an attack, with its defence's, that computes the purifier."""
    return (
        "t_star" in parameters
        and parameters.get("method", "random") != "random"
        and parameters.get("gradient") != "blind"
    )


def differentiates(parameters: Mapping[str, Any]) -> bool:
    """Tell whether these are of an attack, with its defence's, that takes gradients of a U-Net."""
    return parameters.get("defense") == "ddpm" and parameters.get("gradient") in ("full", "surrogate")


def attack_rows(
    target: Target, parameters: Mapping[str, Any], patches: PatchSet, sink: PatchWriter, device: torch.device
) -> Iterator[int]:
    """Attack the rows of `patches` that `sink` has not got, yielding the number of rows after each batch."""
    labels = patches.require_labels()
    with sink:
        batches = sink.batches(parameters["batch_size"])
        for batch, images in ahead(lambda batch: (batch, onto(patches.read(batch.rows), device)), batches):
            keys, index = [patches.keys[i] for i in batch.rows], patches.index[batch.rows].tolist()
            truth = torch.from_numpy(labels[batch.rows]).to(device)
            adv = run(target, parameters, images, truth, keys, parameters["seed"], index)
            sink.write(batch, adv.cpu().numpy())
            yield batch.count
