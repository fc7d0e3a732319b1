"""Fine-tune a diffusion model to be a one-step purifier, for itself alone or through a classifier that stays as it is.

python examples/one_step_purifier.py DDPM TRAIN... -o OUT [--classifier C] [--steps N]

Each batch is noised to one of the levels of --t-star and denoised in one evaluation of the U-Net. The loss is the
squared error of the purified pixels (x0-weighted: Salimans and Ho 2022, arXiv:2202.00512, section 4), alone, or with -c
added to the classifier's cross-entropy on patches that one step of random-start PGD, l-inf 2/255, attacked through the
purification: adversarial training (Madry et al. 2018) of the purifier in the classifier's place. OUT is a diffusion
model folder like any other. There are no checkpoints: an interrupted run begins again.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.functional import cross_entropy, mse_loss

from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.provenance import provenance, recipe
from advdiff_cli.data.rng import stream
from advdiff_cli.models.classifiers import load_classifier
from advdiff_cli.models.ddpm import PurificationSettings, load_ddpm, save_ddpm
from advdiff_cli.models.device import autocast, resolve_device, resolve_precision
from advdiff_cli.models.registry import find_classifier, find_ddpm, folder_fingerprint
from advdiff_cli.purification import DiffusionPurifier
from advdiff_cli.training.adversarial import Adversary, TrainingInput
from advdiff_cli.training.augmentation import random_symmetry
from advdiff_cli.training.loader import TrainingRows
from advdiff_cli.training.optim import cosine

EPS = 2 / 255
PIXELS = 30.0  # weight of the squared error of pixels in [0, 1] beside the cross-entropy: both are near 0.4 at first


def main(
    ddpm: str,
    train: list[str],
    out: Annotated[Path, typer.Option("-o", "--out")],
    classifier: Annotated[str | None, typer.Option("-c", "--classifier")] = None,
    t_star: tuple[float, float, float] = (0.15, 0.2, 0.25),
    steps: int = 600,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> None:
    """Write the fine-tuned model to OUT."""
    chip = resolve_device("auto")
    precision = resolve_precision("auto", chip)
    model = load_ddpm(find_ddpm(ddpm)).to(chip).train()
    judge = classifier and load_classifier(find_classifier(classifier)).to(chip).requires_grad_(False)
    sets = [open_patches(name) for name in train]
    rows = TrainingRows(sets, labelled=bool(judge))
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    for step, (images, labels) in enumerate(rows.batches(0, steps, batch_size, seed)):
        rng = stream(seed, "augment", step)
        purifier = DiffusionPurifier(model, float(rng.choice(t_star)), sampler_steps=1)
        x, y = random_symmetry(images, rng).to(chip), labels.to(chip)
        shown = x
        if judge:
            names = range(step * batch_size, (step + 1) * batch_size)
            model.requires_grad_(False)
            shown = TrainingInput((purifier,), Adversary(EPS, 1, "madry"), precision, seed).attacked(judge, x, y, names)
            model.requires_grad_(True)
        with autocast(precision, chip):
            purified = purifier(shown).float()
        loss = PIXELS * mse_loss(purified, x)
        if judge:
            loss = loss + cross_entropy(judge(purified), y)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, learning_rate)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step + 1} of {steps}: loss {loss.item():.4f}", flush=True)
    told = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "t_star": t_star, "seed": seed}
    inputs = {"data": [s.recipe_input() for s in sets], "init": folder_fingerprint(find_ddpm(ddpm))}
    inputs["classifier"] = folder_fingerprint(find_classifier(classifier)) if classifier else None
    made_by = provenance(recipe("one_step_purifier.py", told | {"precision": precision}, **inputs), device=chip.type)
    settings = PurificationSettings(t_star[1], sampler_steps=1)
    model.card = replace(model.card, recommended=settings, provenance=made_by)
    save_ddpm(model.cpu().eval(), out)


if __name__ == "__main__":
    typer.run(main)
