"""Interpolate between the weights of a classifier before and after fine-tuning, and calibrate the result.

python examples/weight_interpolation.py BEFORE AFTER VALID -o OUT [--weight 0.75] [--ddpm pcam-ddpm] [--t-star 0.2]

The model between the two often has the robustness of the second with less of its loss of accuracy (Wortsman et al.
2022, Robust fine-tuning of zero-shot models, arXiv:2109.01903). Its log-odds are calibrated on VALID (Platt scaling),
where each patch passes one step of --ddpm at --t-star, so that it holds at this t* only. OUT is a classifier folder.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from advdiff_cli import DiffusionPurifier
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.provenance import provenance, recipe
from advdiff_cli.models.classifiers import read_classifier, save_classifier
from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.models.device import resolve_device
from advdiff_cli.models.fingerprint import folder_fingerprint
from advdiff_cli.models.registry import find_classifier, find_ddpm
from advdiff_cli.training.adversarial import TrainingInput
from advdiff_cli.training.platt import fit_platt
from advdiff_cli.training.validation import Validation


def main(
    before: str,
    after: str,
    valid: str,
    out: Annotated[Path, typer.Option("-o", "--out")],
    weight: Annotated[float, typer.Option(min=0.0, max=1.0, help="0 is BEFORE, 1 is AFTER.")] = 0.75,
    ddpm: str = "pcam-ddpm",
    t_star: float = 0.2,
    seed: int = 0,
) -> None:
    """Write the interpolated classifier to OUT."""
    if out.exists():
        raise typer.BadParameter(f"{out} exists", param_hint="--out")
    folders = [find_classifier(name) for name in (before, after)]
    first, model = map(read_classifier, folders)
    if first.config.arch != model.config.arch:
        raise typer.BadParameter(f"{before} is a {first.config.arch}, and {after} is a {model.config.arch}")
    state, start = model.state_dict(), first.state_dict()
    model.load_state_dict({k: start[k].lerp(v, weight) if v.is_floating_point() else v for k, v in state.items()})

    view, device = model.config.view, resolve_device("auto")
    rows = open_patches(valid).viewed(view)
    model.config = replace(model.config, slope=1.0, bias=0.0, crop=None, pool=1)  # rows are cut already
    denoiser = read_ddpm(find_ddpm(ddpm)).to(device).eval().requires_grad_(False)
    inputs = TrainingInput([DiffusionPurifier(denoiser, t_star, sampler_steps=1)], None, "fp32", seed)
    slope, bias = fit_platt(*Validation(model.to(device), rows, 64, inputs, device).logits())
    model.config = replace(model.config, slope=slope, bias=bias, crop=view.crop, pool=view.pool)

    parameters = {"weight": weight, "t_star": t_star, "seed": seed}
    sources = {"classifiers": [folder_fingerprint(folder) for folder in folders], "valid": rows.recipe_input()}
    made = recipe("weight_interpolation.py", parameters, ddpm=folder_fingerprint(find_ddpm(ddpm)), **sources)
    save_classifier(model.cpu(), out, provenance(made, device=device.type))


if __name__ == "__main__":
    typer.run(main)
