"""`advdiff demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from advdiff_cli import console, options
from advdiff_cli.commands.running import run_command

CLASSIFIER, DDPM = "synthetic-classifier", "synthetic-ddpm"
EPS = "2/255"
PICTURE = "pipeline.png"
_SHOWN = 4


def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the files and the picture.")] = Path(
        "advdiff-demo"
    ),
    number: Annotated[int, typer.Option("-n", "--number", min=16, help="Number of synthetic patches.")] = 256,
    seed: options.Seed = 7,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Attack, purify and evaluate synthetic tissue with the bundled models: the paper's table and pipeline picture.

    Each step is a command of its own, printed as it runs, and is kept in the folder: run again, nothing is done twice.

    Example: advdiff demo
    """
    out.mkdir(parents=True, exist_ok=True)
    where = ["--device", device]
    files = {
        k: str(out / f"{k}.safetensors") for k in ("clean", "adv", "clean-noise", "adv-noise", "clean-ddpm", "adv-ddpm")
    }
    _run(ctx, ["synthesize", "-n", str(number), "--seed", str(seed), "-o", files["clean"]], quiet)
    _run(ctx, ["attack", files["clean"], "-c", CLASSIFIER, "--eps", EPS, "-o", files["adv"], *where], quiet)
    for kind in ("clean", "adv"):
        level = str(_recommended_level())
        noise = ["--defense", "noise", "--t-star", level]
        _run(ctx, ["purify", files[kind], *noise, "-o", files[f"{kind}-noise"], *where], quiet)
        _run(ctx, ["purify", files[kind], "-m", DDPM, "-o", files[f"{kind}-ddpm"], *where], quiet)
    sets = _run(ctx, ["evaluate", *files.values(), "-c", CLASSIFIER, *where], quiet)["sets"]
    accuracy = {kind: s["accuracy"] for kind, s in zip(files, sets, strict=True)}
    _picture({k: Path(v) for k, v in files.items()}, out / PICTURE, device)
    rows = {
        "undefended": ("clean", "adv"),
        "NoiseDefense": ("clean-noise", "adv-noise"),
        "DDPM": ("clean-ddpm", "adv-ddpm"),
    }
    result = {
        "out": str(out),
        "picture": str(out / PICTURE),
        "n": number,
        "eps": EPS,
        "rows": {name: {"standard": accuracy[a], "robust": accuracy[b]} for name, (a, b) in rows.items()},
    }
    console.emit(result, _text(result), out, as_json=as_json, quiet=quiet)


def _run(ctx: typer.Context, arguments: list[str], quiet: bool) -> dict[str, Any]:
    """Run a command of this program in this process and return its JSON."""
    if not quiet:
        console.log("$ advdiff " + " ".join(arguments))
    return run_command(ctx, arguments)


def _recommended_level() -> float:
    from advdiff_cli.models import registry
    from advdiff_cli.models.ddpm import load_card

    return load_card(registry.find_ddpm(DDPM)).recommended.t_star


def _picture(files: dict[str, Path], path: Path, device: str) -> None:
    """Draw the patches that the attack turned: clean, adversarial, their difference, noised, purified."""
    import numpy as np
    import torch

    from advdiff_cli.cli.options import fraction
    from advdiff_cli.data.patches import open_patches
    from advdiff_cli.models import registry
    from advdiff_cli.models.device import resolve_device
    from advdiff_cli.report.plots import Column, amplified, panel

    model = registry.frozen_classifier(CLASSIFIER, resolve_device(device))[0].cpu()
    sets = {k: open_patches(v) for k, v in files.items()}
    labels = torch.from_numpy(sets["clean"].require_labels())
    everything = np.arange(len(labels))

    def belief(kind: str) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(sets[kind].read(everything))
        return logits.softmax(1)[everything, labels]

    believed = {k: belief(k) for k in ("clean", "adv", "adv-noise", "adv-ddpm")}
    fall = believed["clean"] - believed["adv"]
    rows = torch.cat([torch.where(labels == k, fall, -1).topk(_SHOWN // 2).indices for k in (1, 0)]).numpy()
    shown = {k: sets[k].read(rows) for k in believed}
    judged = {k: [float(believed[k][row]) for row in rows] for k in believed}
    eps = fraction(EPS)
    columns = [
        Column("clean", shown["clean"], judged["clean"]),
        Column(f"adversarial, {EPS}", shown["adv"], judged["adv"]),
        Column(f"difference, {1 / (2 * eps):.0f}x", amplified(shown["adv"], shown["clean"], eps)),
        Column("noised", shown["adv-noise"], judged["adv-noise"]),
        Column("purified", shown["adv-ddpm"], judged["adv-ddpm"]),
    ]
    panel(columns, ["tumour in centre" if labels[row] else "no tumour in centre" for row in rows], path)


def _text(result: dict[str, Any]) -> str:
    from advdiff_cli.evaluation.statistics import Estimate

    rows = [
        (name, str(Estimate(**row["standard"])), str(Estimate(**row["robust"]))) for name, row in result["rows"].items()
    ]
    head = (f"synthetic, n = {result['n']}", "standard % [95 %]", f"robust, PGD-40 {EPS} % [95 %]")
    note = "robust: the attack knows the classifier and not the defence"
    return f"{console.table(head, rows)}\n{note}\npicture: {result['picture']}"
