"""`advdiff bench`."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advdiff_cli import console, options
from advdiff_cli.commands.running import run_command
from advdiff_cli.purification.defense import Defence, build_defence

if TYPE_CHECKING:
    from torch import device as Chip
    from torch import nn

    from advdiff_cli.benchmark.workloads import Contestant
    from advdiff_cli.models.ddpm import Ddpm

_PURIFY = "advdiff purify"
_TRAIN = "advdiff training step"
_COPY = "reading and writing alone"
_COMPILED = ", compiled"


def bench(
    ctx: typer.Context,
    ddpm: options.PurifierName = None,
    classifier: Annotated[
        str, typer.Option("-c", "--classifier", help="Classifier behind it, for the attack.")
    ] = "pcam-resnet18",
    number: Annotated[int, typer.Option("-n", "--number", min=16, help="Patches that are purified.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is measured, in turns.")] = 3,
    paper: Annotated[bool, typer.Option(help="Measure the paper's loop too: about a minute a round on a CPU.")] = True,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Measure the compiled U-Net's gradients and training too.")
    ] = False,
    allow_pickle: options.AllowPickle = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print purify's patches a second alone.")] = False,
) -> None:
    """Measure speed in one run: the paper's loop, diffusers in batches, and purify from file to file.

    Beside them the U-Net alone and the machine's ceiling (a large matrix product of the same precision), an exact
    gradient of an attack, and training. Medians over rounds in which all take turns; ratios first.

    Example: advdiff bench --number 128 --rounds 1
    """
    from advdiff_cli.benchmark.workloads import PAPER_STEPS, Contestant, measure, ratios
    from advdiff_cli.models import registry
    from advdiff_cli.models.device import resolve_device, resolve_precision

    chip = resolve_device(device)
    exact = resolve_precision(precision, chip)
    defence = build_defence("ddpm", ddpm, None, None, None, allow_pickle=allow_pickle)
    alone, _ = registry.frozen_classifier(classifier, chip, allow_pickle=allow_pickle)
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data.safetensors", Path(folder) / "out.safetensors"
        run_command(ctx, ["synthesize", "-n", str(number), "-o", str(data)], heard=False)
        command = ["purify", str(data), "-o", str(out), "--overwrite", "--device", chip.type, "--precision", exact]
        command += [*(["-m", ddpm] if ddpm else []), *(["--allow-pickle"] if allow_pickle else [])]
        purify = Contestant(_PURIFY, lambda: run_command(ctx, command, heard=False), number)
        contestants = _contestants(purify, defence, alone, paper, compiled, exact, chip, data)
        contestants.append(_copying(data, number))
        with console.progress(rounds + 1, "bench: rounds, the first to warm up", quiet=quiet) as advance:
            found = measure(contestants, rounds, chip, advance)
    product = f"matrix product, {exact}"
    purified, copied = found[_PURIFY], found[_COPY]
    steps = purified.contestant.unet_evaluations
    an_evaluation = found["diffusers in batches"].patch_seconds / PAPER_STEPS / (purified.patch_seconds / steps)
    forward = found[f"U-Net forward, {exact}"].patch_seconds
    result: dict[str, Any] = {
        "device": chip.type,
        "threads": _threads(),
        "precision": exact,
        "ratios": ratios(found, _pairs(exact))
        | {"purify, times diffusers in batches, a U-Net evaluation": an_evaluation},
        "of_ceiling": {
            name: found[name].as_dict()["flops_per_second"] / found[product].as_dict()["flops_per_second"]
            for name in (_PURIFY, f"U-Net forward, {exact}")
        },
        "purify_outside_unet": 1 - steps * forward / purified.patch_seconds,
        "reading_and_writing": {
            "time": copied.patch_seconds / purified.patch_seconds,
            "processor_time": copied.patch_processor_seconds / purified.patch_processor_seconds,
        },
        "measured": [timing.as_dict() for timing in found.values()],
    }
    rate = purified.as_dict()["patches_per_second"]
    console.emit(result, _text(result), f"{rate:.4g}", as_json=as_json, quiet=quiet)


def _pairs(exact: str) -> dict[str, tuple[str, str]]:
    """Return what the ratios are of: the faster, as told, and the slower."""
    from advdiff_cli.benchmark.workloads import PAPER_STEPS

    return {
        f"purify ({exact}, its own steps), times the paper's loop ({PAPER_STEPS} steps, fp32)": (
            _PURIFY,
            "the paper's loop",
        ),
        f"purify ({exact}, its own steps), times diffusers in batches ({PAPER_STEPS} steps, fp32)": (
            _PURIFY,
            "diffusers in batches",
        ),
        "training step, times diffusers' in fp32": (_TRAIN, "diffusers training step, fp32"),
        f"training step, times diffusers' in {exact}": (_TRAIN, f"diffusers training step, {exact}"),
        **{
            f"gradient {p}, in forward passes": (f"defended forward, {p}", f"exact gradient, {p}")
            for p in dict.fromkeys(("fp32", exact))
        },
        "gradient, compiled, times as it is": (f"exact gradient, {exact}{_COMPILED}", f"exact gradient, {exact}"),
        "training step, compiled, times as it is": (_TRAIN + _COMPILED, _TRAIN),
    }


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _contestants(
    purify: "Contestant", defence: Defence, alone: "nn.Module", paper: bool, compiled: bool, exact: str, chip: "Chip",
    data: Path,
) -> "list[Contestant]":  # fmt: skip
    """Return all that is measured, `purify` told what it computes."""
    import numpy as np
    import torch

    from advdiff_cli.benchmark import workloads as b
    from advdiff_cli.datasets.synthetic import SyntheticSource
    from advdiff_cli.jobs.memory import batches_that_fit
    from advdiff_cli.purification.purifier import DiffusionPurifier

    images = torch.from_numpy(SyntheticSource(b.BATCH, 0).read(np.arange(b.BATCH))).float() / 255
    purifier = defence.before(alone, chip, exact).purifier
    assert isinstance(purifier, DiffusionPurifier)
    model, steps = purifier.ddpm, len(purifier.indices)
    at_once = batches_that_fit(purifier, images.shape[2], images.shape[3], b.BATCH, chip)
    forward = b.forward_alone(model, images, exact, chip, at_once)
    found = [b.matrix_product(exact, chip), *([b.papers_loop(images, chip)] if paper else [])]
    found += [b.diffusers_in_batches(model, images, chip)]
    found += [replace(purify, flops=steps * forward.flops, unet_evaluations=steps), forward]
    for one in dict.fromkeys(("fp32", exact)):
        found += b.attack_step(defence.before(alone, chip, one), images, one, chip)
        found.append(b.diffusers_training(model, images, one, chip))
    found.append(_training(model, exact, chip, data))
    if compiled:
        other = copy.deepcopy(defence)  # which itself stays as it is
        other.compile_unet(chip)
        found.append(b.attack_step(other.before(alone, chip, exact), images, exact, chip, _COMPILED)[1])
        found.append(_training(model, exact, chip, data, _COMPILED))
    return found


def _training(model: "Ddpm", exact: str, chip: "Chip", data: Path, how: str = "") -> "Contestant":
    """Return a step of train-ddpm's own loop on the same batch, reading it from a file included; `how` is told."""
    from advdiff_cli.benchmark.workloads import BATCH, Contestant
    from advdiff_cli.data.patches import open_patches
    from advdiff_cli.data.provenance import recipe
    from advdiff_cli.models.ddpm import Ddpm
    from advdiff_cli.training.checkpoints import WorkFolder
    from advdiff_cli.training.fit_ddpm import DdpmPlan, fit_ddpm
    from advdiff_cli.training.loader import TrainingRows

    rows = TrainingRows([open_patches(data)], labelled=False)
    fresh = Ddpm(type(model.unet).from_config(model.unet.config), model.scheduler, model.card)
    if how == _COMPILED:
        fresh.to(chip).compile_unet()
    plan = DdpmPlan(10**6, BATCH, 1e-4, 0.999, model.card.max_t, 0, exact)
    work = WorkFolder(data.with_name(f"ddpm{how}"), recipe("bench", {}), None, overwrite=True)
    records = fit_ddpm(fresh, rows, None, plan, work, chip, checkpoint_seconds=10**6, every=10**7)
    return Contestant(_TRAIN + how, lambda: next(records), BATCH)


def _copying(data: Path, number: int) -> "Contestant":
    """Return the reading and writing of a purification of `data`, batch by batch, with nothing between them."""
    from advdiff_cli.benchmark.workloads import BATCH, Contestant
    from advdiff_cli.data.patch_writer import PatchWriter, shard_rows
    from advdiff_cli.data.patches import open_patches
    from advdiff_cli.data.provenance import recipe

    patches = open_patches(data)
    shape, part, made_by = patches.require_shape(), shard_rows(number, BATCH, None), recipe("bench", {})

    def run() -> None:
        sink = PatchWriter(data.with_name("copy.safetensors"), made_by, patches, part, shape=shape, overwrite=True)
        with sink:
            for batch in sink.batches(BATCH):
                sink.write(batch, patches.read(batch.rows).numpy())

    return Contestant(_COPY, run, number)


def _text(result: dict[str, Any]) -> str:
    ratios = [(name, f"{value:,.1f}") for name, value in result["ratios"].items()]
    shares = [(name, f"{100 * value:.0f} %") for name, value in result["of_ceiling"].items()]
    rows = [
        (
            m["name"], m["unet_evaluations"] or "-", f"{m['patches_per_second']:.4g}",
            " ".join(f"{1000 * m['seconds'][k]:.4g}" for k in ("median", "least", "most")),
            f"{m['flop_per_patch'] / 1e9:.2f}" if m["flop_per_patch"] else "-",
            f"{m['flops_per_second'] / 1e9:.0f}" if m["flop_per_patch"] else "-",
            f"{m['peak_memory'] / 2**20:.0f}", f"{m['warm_up_seconds']:.1f}",
        )
        for m in result["measured"]
    ]  # fmt: skip
    head = (
        "measured", "U-Net evaluations", "patches/s", "ms a patch: median, least, most", "GFLOP a patch", "GFLOP/s",
        "peak MB, added", "warm-up s",
    )  # fmt: skip
    tables = [
        console.table(("ratio, patches a second", "times"), ratios),
        console.table((f"FLOP/s of a matrix product's, {result['precision']}", "share"), shares),
        console.table(head, rows),
    ]
    copied = {name: f"{100 * share:.1f} %" for name, share in result["reading_and_writing"].items()}
    outside = (
        f"{100 * result['purify_outside_unet']:.0f} % of purify's time is outside its U-Net; reading and writing alone "
        f"take {copied['time']} of it, in part beside computing, and {copied['processor_time']} of its processor time"
    )
    return "\n\n".join(tables) + f"\n{outside}; {result['device']}, {result['threads']} threads"
