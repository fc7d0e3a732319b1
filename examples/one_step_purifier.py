"""Fine-tune a diffusion model as a one-step purifier, alone or through a frozen classifier.

python examples/one_step_purifier.py DDPM TRAIN... -o OUT [--classifier C] [--steps N]

Each batch is noised to one of the levels of --t-star and denoised in one U-Net evaluation. The loss is the squared
error of the purified pixels (Salimans and Ho 2022, arXiv:2202.00512, section 4). With -c, the classifier's
cross-entropy is added, on patches that one step of PGD from a random start, l-inf 2/255, attacked through the purifier:
adversarial training (Madry et al. 2018) of the purifier instead of the classifier. OUT is a diffusion model folder.
There are no checkpoints; an interrupted run starts again.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.functional import cross_entropy, mse_loss

from advdiff_cli import DiffusionPurifier
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.provenance import provenance, recipe
from advdiff_cli.data.rng import stream
from advdiff_cli.models.card import PurificationSettings
from advdiff_cli.models.classifiers import read_classifier
from advdiff_cli.models.ddpm import read_ddpm, save_ddpm
from advdiff_cli.models.device import autocast, resolve_device, resolve_precision
from advdiff_cli.models.fingerprint import folder_fingerprint
from advdiff_cli.models.registry import find_classifier, find_ddpm
from advdiff_cli.training.adversarial import TrainingInput
from advdiff_cli.training.augmentation import random_symmetry
from advdiff_cli.training.loader import TrainingRows
from advdiff_cli.training.optim import cosine
from advdiff_cli.training.recipes import Adversary

EPS = 2 / 255
PIXELS = 30.0  # weight of the squared pixel error; both losses then start near 0.4


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
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    torch.manual_seed(seed)  # of the noise that training adds
    model = read_ddpm(find_ddpm(ddpm)).to(device).train()
    judge = classifier and read_classifier(find_classifier(classifier)).to(device).requires_grad_(False)
    sets = [open_patches(name) for name in train]
    rows = TrainingRows(sets, labeled=bool(judge))
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    for step, (images, labels) in enumerate(rows.batches(0, steps, batch_size, seed)):
        rng = stream(seed, "augment", step)
        purifier = DiffusionPurifier(model, float(rng.choice(t_star)), sampler_steps=1)
        x, y = random_symmetry(images, rng).to(device), labels.to(device)
        inputs = x
        if judge:
            names = range(step * batch_size, (step + 1) * batch_size)
            model.requires_grad_(False)
            inputs = TrainingInput((purifier,), Adversary(EPS, 1, "madry"), precision, seed).perturb(judge, x, y, names)
            model.requires_grad_(True)
        with autocast(precision, device):
            purified = purifier(inputs).float()
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
    parameters = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "t_star": t_star,
        "seed": seed,
    }
    sources = {"data": [s.recipe_input() for s in sets], "init": folder_fingerprint(find_ddpm(ddpm))}
    sources["classifier"] = folder_fingerprint(find_classifier(classifier)) if classifier else None
    made_by = provenance(
        recipe("one_step_purifier.py", parameters | {"precision": precision}, **sources), device=device.type
    )
    settings = PurificationSettings(t_star[1], sampler_steps=1)
    model.card = replace(model.card, recommended=settings, provenance=made_by)
    save_ddpm(model.cpu().eval(), out)


if __name__ == "__main__":
    typer.run(main)
