"""Attack the mixture of a robust classifier and a purified one, with gradients through both.

python examples/classifier_mixture.py PATCHES -o OUT [-c pcam-resnet18-adapted] [--robust pcam-robust] [--limit 64]
advdiff compare ROBUST.csv OUT/predictions.csv

The first classifier reads the purified patch, and the second one, trained adversarially, the patch itself. Their
probabilities are averaged. It also shows how to attack a defense of your own: derive it from `DefendedClassifier`.

The attack is PGD with momentum, whose gradients average two draws of the noise. OUT/predictions.csv has the form of
`evaluate --predictions`, with 11 draws that the attack did not use. The same command resumes.
"""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from advdiff_cli import DefendedClassifier, DiffusionPurifier, load_classifier, load_ddpm, open_patches, pgd
from advdiff_cli.data.provenance import canonical_json, recipe
from advdiff_cli.data.selection import Selection, row_batches
from advdiff_cli.evaluation.comparison import EvaluatedSet
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.evaluation.predictions_csv import write_predictions
from advdiff_cli.models.device import resolve_device
from advdiff_cli.models.fingerprint import folder_fingerprint
from advdiff_cli.models.registry import find_classifier, find_ddpm
from advdiff_cli.purification.defended_classifier import logits_of_draws


class ClassifierMixture(DefendedClassifier):
    """The weighted mean of the probabilities of a purified classifier and of one that reads the patch itself."""

    def __init__(self, purifier: DiffusionPurifier, classifier: nn.Module, robust: nn.Module, weight: float) -> None:
        """Weigh the purified classifier with `weight`, in (0, 1), and the other one with the rest."""
        super().__init__(purifier, classifier)
        self.robust, self.weight = robust, weight

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return log-probabilities (B, 2) of images (B, 3, H, W) in [0, 1]."""
        purified = super().forward(images, noise).log_softmax(1) + math.log(self.weight)
        return torch.logaddexp(purified, self.robust(images).log_softmax(1) + math.log(1 - self.weight))


def main(
    patches: str,
    out: Annotated[Path, typer.Option("-o", "--out")],
    classifier: Annotated[str, typer.Option("-c", "--classifier")] = "pcam-resnet18-adapted",
    robust: str = "pcam-robust",
    weight: Annotated[float, typer.Option(min=0.01, max=0.99, help="Of the purified classifier.")] = 0.5,
    ddpm: str = "pcam-ddpm",
    t_star: float = 0.2,
    eps: Annotated[float, typer.Option(help="Radius of the l-inf ball in [0, 1] pixels.")] = 2 / 255,
    steps: int = 40,
    limit: int | None = None,
    batch_size: int = 32,
) -> None:
    """Attack PATCHES, and write the predictions of the mixture to OUT."""
    device = resolve_device("auto")
    purifier = DiffusionPurifier(load_ddpm(ddpm), t_star, sampler_steps=1)
    model = ClassifierMixture(purifier, load_classifier(classifier), load_classifier(robust), weight)
    model = model.to(device).requires_grad_(False).eval()
    rows = open_patches(patches, selection=Selection(limit=limit, shuffle_seed=0))
    models = [folder_fingerprint(find_classifier(name)) for name in (classifier, robust)]
    settings = {"weight": weight, "t_star": t_star, "eps": eps, "steps": steps, "batch_size": batch_size}
    sources = {"data": rows.recipe_input(), "classifiers": models, "ddpm": folder_fingerprint(find_ddpm(ddpm))}
    made, record = canonical_json(recipe("classifier_mixture.py", settings, **sources)), out / "recipe.json"
    if record.exists() and record.read_text() != made:
        raise typer.BadParameter(f"{out} holds batches of other settings, models or patches", param_hint="--out")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(made)
    found = []
    for number, chosen in enumerate(row_batches(len(rows), batch_size)):
        file = out / f"{number:05}.safetensors"
        if not file.exists():
            batch = rows.batch(chosen, device)
            adv = pgd(model, batch.images, batch.labels, eps=eps, steps=steps, momentum=1, eot=2, rows=batch.index)
            draws = {"rows": batch.index, "seed": 0, "purpose": "evaluate", "draws": range(11)}
            with torch.no_grad():
                clean, attacked = (
                    torch.stack([z.softmax(1)[:, 1].cpu() for z in logits_of_draws(model, x, **draws)], 1)
                    for x in (batch.images, adv)
                )
            save_file({"images": adv.cpu(), "clean": clean, "attacked": attacked}, f"{file}.part")
            Path(f"{file}.part").rename(file)
        found.append(load_file(file))
    sets = []
    for name in ("clean", "attacked"):
        p = Predictions(rows.require_labels(), torch.cat([f[name] for f in found]).double().numpy())
        sets.append((EvaluatedSet(name, rows.origins(), rows.index, p), rows.keys))
        print(f"{name}: {100 * p.share.mean():.1f} %, n = {len(rows)}")
    write_predictions(out / "predictions.csv", sets)


if __name__ == "__main__":
    typer.run(main)
