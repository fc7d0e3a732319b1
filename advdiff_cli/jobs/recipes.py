"""The recipes of jobs, which decide whether an output is up to date. They are known without loading a model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod

from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.provenance import JsonObject, Provenance, recipe
from advdiff_cli.models.precision import Precision
from advdiff_cli.purification.defense_spec import DefenseSpec, ModelSpec


def attack_recipe(
    model: ModelSpec,
    attack: AttackSpec,
    patches: PatchSet,
    *,
    seed: int,
    batch_size: int,
    compiled: bool = False,
    earlier: JsonObject | None = None,
) -> Provenance:
    """Return the recipe of attacked patches.

    Args:
        model: What is attacked.
        attack: How.
        patches: The rows.
        seed: Of every stream.
        batch_size: Patches computed together.
        compiled: Whether gradients of a U-Net are taken, and compiled; they round differently.
        earlier: The parameters of an earlier attack that this one goes on from.
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
        **(earlier or {}),
    }
    models = {"classifier": model.classifier} | ({} if defense is None else {"ddpm": model.ddpm})
    return recipe("attack", parameters, data=patches.recipe_input(), **models)


_CUDA_BATCH = 256  # a GPU computes small networks no faster for fewer patches


_PIXELS = 256 * 256  # larger patches are computed in smaller batches, which need no more memory


def default_batch_size(device: str, shape: tuple[int, int] | None, *, graph: bool) -> int:
    """Return how many patches (H, W) are computed together on a kind of device; `graph` for gradients."""
    return _fewer(_CUDA_BATCH if device == "cuda" else 32 if graph else 16, shape)


def judging_batch_size(shape: tuple[int, int] | None, *, defended: bool, device: str = "cpu") -> int:
    """Return how many patches (H, W) are judged together on a kind of device; fewer with a U-Net before."""
    return _fewer(_CUDA_BATCH if device == "cuda" else 16 if defended else 64, shape)


def _fewer(size: int, shape: tuple[int, int] | None) -> int:
    """Return a batch size for patches (H, W); None for sizes that are not known."""
    return size if shape is None else max(1, min(size, size * _PIXELS // prod(shape)))


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


@dataclass(frozen=True)
class CertifySettings:
    """The settings of certificates.

    Args:
        n0: Draws that choose the class.
        n: Draws that bound its probability; at most, if sizes are to be decided.
        alpha: The probability that a certificate is wrong, at most.
        eps: l-inf sizes to be decided.
        radii: l2 sizes to be decided; where there are no sizes, there are exactly n draws.
        sound: Whether noise is drawn on the grid of 8-bit pixels.
    """

    n0: int
    n: int
    alpha: float
    eps: tuple[float, ...] = ()
    radii: tuple[float, ...] = ()
    sound: bool = False

    @property
    def is_sequential(self) -> bool:
        """Whether draws stop as soon as all sizes are decided."""
        return bool(self.eps or self.radii)

    def parameters(self) -> JsonObject:
        """Return the parameters that enter a recipe."""
        return {**asdict(self), "eps": sorted(self.eps), "radii": sorted(self.radii)}


def certify_recipe(
    model: ModelSpec,
    patches: PatchSet,
    settings: CertifySettings,
    *,
    seed: int,
    batch_size: int,
    derived: Mapping[str, object],
) -> Provenance:
    """Return the recipe of a table of certificates.

    Args:
        model: The classifier behind a defense.
        patches: The rows.
        settings: How they are certified.
        seed: Of the draws.
        batch_size: Draws computed together.
        derived: Figures that follow from the rest, for readers of the table.
    """
    parameters = {**settings.parameters(), "seed": seed, "batch_size": batch_size, "precision": model.precision}
    models = {"classifier": model.classifier, "ddpm": model.ddpm}
    return recipe("certify", {**parameters, **model.parameters, **derived}, data=patches.recipe_input(), **models)
