"""The recipes of jobs, which decide whether an output is up to date. They are known without loading a model."""

from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.provenance import Provenance, recipe
from advdiff_cli.models.precision import Precision
from advdiff_cli.purification.defense_spec import DefenseSpec, ModelSpec


def attack_recipe(
    model: ModelSpec, attack: AttackSpec, patches: PatchSet, *, seed: int, batch_size: int, compiled: bool = False
) -> Provenance:
    """Return the recipe of attacked patches.

    Args:
        model: What is attacked.
        attack: How.
        patches: The rows.
        seed: Of every stream.
        batch_size: Patches computed together.
        compiled: Whether gradients of a U-Net are taken, and compiled; they round differently.
    """
    defense = model.defense
    through = defense is not None and attack.computes_defense
    parameters = {
        **attack.parameters(),
        **({} if defense is None else defense.parameters()),
        "seed": seed,
        "batch_size": batch_size,
        "precision": model.precision if through else "fp32",
        **({"compiled": True} if compiled else {}),
    }
    models = {"classifier": model.classifier} | ({} if defense is None else {"ddpm": model.ddpm})
    return recipe("attack", parameters, data=patches.recipe_input(), **models)


def judging_batch_size(*, defended: bool) -> int:
    """Return how many patches are judged together: fewer with a U-Net before the classifier."""
    return 16 if defended else 64


def differentiates_unet(model: ModelSpec, attack: AttackSpec) -> bool:
    """Return whether an attack takes gradients of a U-Net."""
    return model.defense is not None and model.defense.defense == "ddpm" and attack.takes_exact_gradients


def purify_recipe(
    defense: DefenseSpec,
    ddpm: str | None,
    patches: PatchSet | None,
    *,
    seed: int,
    batch_size: int,
    precision: Precision,
) -> Provenance:
    """Return the recipe of purified patches.

    Args:
        defense: The settings of the purifier.
        ddpm: The fingerprint of its diffusion model, if there is one.
        patches: The rows; None for a folder of images.
        seed: Of the noise.
        batch_size: Patches computed together.
        precision: Of the purifier.
    """
    settings = {"seed": seed, "batch_size": batch_size, "precision": precision}
    data = {} if patches is None else {"data": patches.recipe_input()}
    return recipe("purify", defense.parameters() | settings, **data, ddpm=ddpm)


def predict_recipe(model: ModelSpec, patches: PatchSet, *, draws: int, alpha: float, seed: int) -> Provenance:
    """Return the recipe of a table of predictions.

    Args:
        model: The classifier, alone or behind a defense.
        patches: The rows.
        draws: Draws of the noise.
        alpha: The level at which votes are decided.
        seed: Of the draws.
    """
    settings = {"draws": draws, "alpha": alpha, "seed": seed, "precision": model.precision}
    models = {"classifier": model.classifier, "ddpm": model.ddpm}
    return recipe("predict", {**settings, **model.parameters}, data=patches.recipe_input(), **models)
