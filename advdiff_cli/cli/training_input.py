"""What --augment, --adversarial and --consistency ask for: which patches a classifier is trained on, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    import torch

    from advdiff_cli.data.provenance import JsonObject
    from advdiff_cli.data.rng import NoiseKind
    from advdiff_cli.data.view import View
    from advdiff_cli.models.precision import Precision
    from advdiff_cli.purification.defense_spec import DefenseRequest
    from advdiff_cli.purification.purifier import Purifier
    from advdiff_cli.training.adversarial import TrainingInput
    from advdiff_cli.training.recipes import Adversary


@dataclass(frozen=True)
class InputRequest:
    """What --augment, --adversarial and --consistency ask for."""

    augment: list[DefenseRequest | None]
    adversary: Adversary | None
    consistency: float | None = None

    @property
    def purifies(self) -> bool:
        """Whether patches pass a purifier."""
        return any(self.augment)

    @property
    def draws_noise(self) -> bool:
        """Whether numbers are drawn for each patch: the noise of purifiers, or the starts of attacks."""
        return self.purifies or self.adversary is not None

    def parameters(self) -> JsonObject:
        """Return the parameters that enter the recipe; empty for training on clean patches."""
        from advdiff_cli.purification.defense_spec import find_defense

        found: JsonObject = {}
        if self.purifies:
            defenses = [request and find_defense(request) for request in self.augment]
            found["augment"] = [d and {**d[0].parameters(), "ddpm": d[1]} for d in defenses]
        if self.adversary is not None:
            found["adversary"] = self.adversary.parameters()
        return found | ({} if self.consistency is None else {"consistency": self.consistency})

    def build(
        self, precision: Precision, seed: int, device: torch.device, view: View, noise: NoiseKind
    ) -> TrainingInput:
        """Return the training input, with frozen purifiers on the device.

        Args:
            precision: Of the purifiers; on CUDA also of the classifier behind them in an attack.
            seed: Of every stream.
            device: Where to compute.
            view: What is read of each patch.
            noise: What draws the noise of the purifiers and the starts of attacks.

        Raises:
            AdvdiffError: A setting does not fit its model, or its model was not trained on what is read.
        """
        from advdiff_cli.purification.defended_classifier import check_view
        from advdiff_cli.purification.defense import build_defense
        from advdiff_cli.training.adversarial import TrainingInput

        purifiers: list[Purifier | None] = []
        for request in self.augment:
            purifier = None if request is None else build_defense(replace(request, noise=noise)).purifier
            if purifier is not None:
                check_view(purifier, view)
                purifier.to(device).requires_grad_(False).eval()
            purifiers.append(purifier)
        return TrainingInput(purifiers, self.adversary, precision, seed, self.consistency or 0.0, noise)


def parse_augmentation(text: str, *, allow_pickle: bool) -> DefenseRequest | None:
    """Parse one --augment: none, noise:T, or purify:MODEL with an optional t* and sampler steps after it.

    Raises:
        AdvdiffError: The text has another form.
    """
    from advdiff_cli.purification.defense_spec import DefenseRequest

    kind, _, rest = text.partition(":")
    if text == "none":
        return None
    if kind == "noise" and _is_number(rest):
        return DefenseRequest("noise", t_star=float(rest))
    model = rest
    numbers: list[str] = []
    while model and len(numbers) < 2 and _is_number(model.rpartition(":")[2]):
        model, _, last = model.rpartition(":")
        numbers.insert(0, last)
    if kind != "purify" or not model or not all(n.isdecimal() for n in numbers[1:]):
        raise AdvdiffError(
            f"--augment {text}: give none, noise:T, purify:MODEL, purify:MODEL:T or purify:MODEL:T:STEPS, "
            "where T is a noise level in (0, 1]"
        )
    t_star = float(numbers[0]) if numbers else None
    steps = int(numbers[1]) if len(numbers) == 2 else None
    return DefenseRequest("ddpm", model, t_star, None, steps, allow_pickle)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
