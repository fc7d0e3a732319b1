"""`advdiff bench`."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.cli.compute_options import ComputeOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import ResultOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advdiff_cli.benchmark.timing import Timing
    from advdiff_cli.benchmark.workloads import Benchmark
    from advdiff_cli.data.provenance import JsonObject


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured."""

    ddpm: Annotated[
        str,
        typer.Option("-m", "--ddpm", help="Diffusion model: folder, bundled name or Hub id."),
    ] = "pcam-ddpm"
    classifier: Annotated[
        str, typer.Option("-c", "--classifier", help="Classifier behind it, for attack gradients.")
    ] = "pcam-resnet18"
    number: Annotated[int, typer.Option("-n", "--number", min=16, help="Patches that are purified.")] = 2048
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in which all workloads take turns.")] = 3
    paper: Annotated[
        bool, typer.Option(help="Also measure the paper's loop: about a minute for each round on a CPU.")
    ] = True
    compiled: options.Compile = False


@with_option_groups
def bench(settings: BenchOptions, compute: ComputeOptions, output: ResultOptions) -> None:
    """Measure speed in one run: the paper's loop, diffusers in batches, and purify from file to file.

    Also measures the U-Net alone, a large matrix product of the same precision as the upper limit, an exact attack
    gradient, training, and the draws of certificates. Figures are medians over rounds in which all workloads take
    turns. With -q, print the patches per second of purify.

    Example: advdiff bench --number 128 --rounds 1
    """
    from advdiff_cli.benchmark.timing import measure
    from advdiff_cli.benchmark.workloads import PURIFY, Benchmark
    from advdiff_cli.datasets.synthetic import write_synthetic
    from advdiff_cli.purification.defense import build_defense
    from advdiff_cli.purification.defense_spec import DefenseRequest

    device = compute.resolve_device()
    precision = compute.resolve_precision(device)
    request = DefenseRequest("ddpm", settings.ddpm, allow_pickle=compute.allow_pickle, noise=compute.noise_kind({}))
    defense = build_defense(request)
    classifier = compute.load_classifier(settings.classifier, device).classifier
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.safetensors"
        write_synthetic(data, settings.number, 0)
        benchmark = Benchmark(defense, classifier, data, precision, device)
        workloads = benchmark.workloads(paper=settings.paper, compiled=settings.compiled)
        rounds = settings.rounds + 1
        with console.progress(rounds, "bench: rounds, the first one to warm up", quiet=output.quiet) as advance:
            found = measure(workloads, settings.rounds, device, advance)
    result = _result(found, benchmark)
    output.emit(result, _text(result), f"{1 / found[PURIFY].patch_seconds:.4g}")


def _result(found: "Mapping[str, Timing]", benchmark: "Benchmark") -> "JsonObject":
    import torch

    from advdiff_cli.benchmark.timing import ratios
    from advdiff_cli.benchmark.workloads import COPY, PAPER_STEPS, PURIFY

    precision = benchmark.precision
    product = found[f"matrix product, {precision}"]
    purified, copied, forward = found[PURIFY], found[COPY], found[f"U-Net forward, {precision}"]
    steps = purified.workload.unet_evaluations
    diffusers_evaluation = found["diffusers in batches"].patch_seconds / PAPER_STEPS
    for_each_evaluation = diffusers_evaluation / (purified.patch_seconds / steps)
    return {
        "device": benchmark.device.type,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "ratios": ratios(found, _pairs(precision))
        | {"purify, times diffusers in batches, a U-Net evaluation": for_each_evaluation},
        "of_ceiling": {
            name: timing.flops_per_second / product.flops_per_second
            for name, timing in found.items()
            if timing.workload.flops and timing is not product
        },
        "purify_outside_unet": 1 - steps * forward.patch_seconds / purified.patch_seconds,
        "reading_and_writing": {
            "time": copied.patch_seconds / purified.patch_seconds,
            "processor_time": copied.patch_processor_seconds / purified.patch_processor_seconds,
        },
        "measured": [timing.as_dict() for timing in found.values()],
    }


def _pairs(precision: str) -> dict[str, tuple[str, str]]:
    """Return the pairs of workloads whose ratio is reported: the faster one first."""
    from advdiff_cli.benchmark.certification import CARLINI, CENTER, CERTIFY
    from advdiff_cli.benchmark.workloads import COMPILED, PAPER_STEPS, PURIFY, TRAIN

    steps, gradient = f"{PAPER_STEPS} steps, fp32", f"exact gradient, {precision}"
    return {
        f"purify ({precision}, its own steps), times the paper's loop ({steps})": (PURIFY, "the paper's loop"),
        f"purify ({precision}, its own steps), times diffusers in batches ({steps})": (PURIFY, "diffusers in batches"),
        "training step, times diffusers' in fp32": (TRAIN, "diffusers training step, fp32"),
        f"training step, times diffusers' in {precision}": (TRAIN, f"diffusers training step, {precision}"),
        **{
            f"gradient {p}, in forward passes": (f"defended forward, {p}", f"exact gradient, {p}")
            for p in dict.fromkeys(("fp32", precision))
        },
        "draws of certify, times Carlini et al.'s loop": (CERTIFY, CARLINI),
        "draws of certify on the central 64x64, times the same loop": (CERTIFY + CENTER, CARLINI),
        "gradient, compiled, times uncompiled": (gradient + COMPILED, gradient),
        "training step, compiled, times uncompiled": (TRAIN + COMPILED, TRAIN),
    }


def _text(result: "JsonObject") -> str:
    ratios = [(name, f"{value:,.1f}") for name, value in result["ratios"].items()]
    shares = [(name, f"{100 * value:.0f} %") for name, value in result["of_ceiling"].items()]
    columns = ["U-Net evaluations", "patches/s", "ms a patch: median, least, most"]
    columns += ["GFLOP a patch", "GFLOP/s", "peak MB, added", "warm-up s"]
    tables = [
        console.table(("ratio of patches per second", "times"), ratios),
        console.table((f"share of the FLOP/s of a matrix product, {result['precision']}", "share"), shares),
        console.table(("measured", *columns), [_row(m) for m in result["measured"]]),
    ]
    copied = {name: f"{100 * share:.1f} %" for name, share in result["reading_and_writing"].items()}
    outside = (
        f"{100 * result['purify_outside_unet']:.0f} % of purify's time is outside its U-Net; reading and writing alone "
        f"takes {copied['time']} of it, partly during computation, and {copied['processor_time']} of its processor time"
    )
    return "\n\n".join(tables) + f"\n{outside}; {result['device']}, {result['threads']} threads"


def _row(m: "JsonObject") -> tuple[object, ...]:
    counted = bool(m["flop_per_patch"])
    return (
        m["name"],
        m["unet_evaluations"] or "-",
        f"{m['patches_per_second']:.4g}",
        " ".join(f"{1000 * m['seconds'][k]:.4g}" for k in ("median", "least", "most")),
        f"{m['flop_per_patch'] / 1e9:.2f}" if counted else "-",
        f"{m['flops_per_second'] / 1e9:.0f}" if counted else "-",
        f"{m['peak_memory'] / 2**20:.0f}",
        f"{m['warm_up_seconds']:.1f}",
    )
