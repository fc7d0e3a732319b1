"""`advdiff demo`."""

import json
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advdiff_cli import console
from advdiff_cli.cli.compute_options import SeededComputeOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import OutputOptions
from advdiff_cli.cli.progress import follow_rows
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    import torch

    from advdiff_cli.data.patch_set import PatchSet
    from advdiff_cli.data.provenance import JsonObject
    from advdiff_cli.models.precision import Precision
    from advdiff_cli.purification.defense import Defense, EvaluatedModel

CLASSIFIER, DDPM = "pcam-resnet18", "pcam-ddpm"
EPS, EPS_TEXT = 2 / 255, "2/255"


@dataclass(frozen=True, kw_only=True)
class DemoOutputOptions(OutputOptions):
    """Where the demo writes."""

    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for files, picture and report.")] = Path(
        "advdiff-demo"
    )


@with_option_groups
def demo(
    compute: SeededComputeOptions,
    output: DemoOutputOptions,
    data: Annotated[str | None, typer.Argument(help="Patches with labels.", show_default="the bundled patches")] = None,
) -> None:
    """Attack, purify and evaluate real patches with the bundled models, and write a report.

    Each step is printed as the command that does the same. Attacked and purified patches are kept in the folder, and
    not made again. With -q, print the folder.

    Example: advdiff demo
    """
    from advdiff_cli.data.patches import open_patches
    from advdiff_cli.purification.defense import build_defense
    from advdiff_cli.purification.defense_spec import DefenseRequest

    data = data or _example_patches()
    clean = open_patches(data)
    clean.require_labels()
    device = compute.resolve_device()
    output.out.mkdir(parents=True, exist_ok=True)
    model = compute.load_classifier(CLASSIFIER, device)
    flags = f" --seed {compute.seed}" if compute.seed else ""
    flags += f" --precision {compute.precision}" if compute.precision != "auto" else ""
    flags += f" --device {compute.device}" if compute.device != "auto" else ""
    pipeline = _Pipeline(model, compute.seed, compute.resolve_precision(device), device, flags, output)
    adv = pipeline.attack(clean)
    noise = compute.noise_kind({})
    ddpm = build_defense(DefenseRequest("ddpm", DDPM, noise=noise))
    sets = {"undefended": (clean, adv)}
    for name, defense in (
        ("NoiseDefense", build_defense(DefenseRequest("noise", noise=noise))),
        ("DDPM", ddpm),
    ):
        sets[name] = (
            pipeline.purify(clean, defense, f"clean-{defense.spec.defense}"),
            pipeline.purify(adv, defense, f"adv-{defense.spec.defense}"),
        )
    results = {name: pipeline.evaluate(name, *pair) for name, pair in sets.items()}
    page = pipeline.report(results, clean, adv, ddpm)
    accuracies = {
        name: {"standard": result["sets"][0]["accuracy"], "robust": result["sets"][1]["accuracy"]}
        for name, result in results.items()
    }
    summary = {
        "out": str(output.out),
        "picture": str(output.out / "panel.png"),
        "report": str(page),
        "n": len(clean),
        "eps": EPS_TEXT,
        "rows": accuracies,
    }
    output.emit(summary, _text(summary), output.out)


def _example_patches() -> str:
    """Return a short path to the bundled patches: in a clone, examples/patches is a link to them."""
    from advdiff_cli.datasets.example import EXAMPLE_PATCHES

    link = Path("examples/patches")
    return str(link if link.exists() and link.samefile(EXAMPLE_PATCHES) else os.path.relpath(EXAMPLE_PATCHES))


@dataclass(frozen=True)
class _Pipeline:
    """The steps of the demo, each of which prints the command that does the same."""

    model: "EvaluatedModel"
    seed: int
    precision: "Precision"
    device: "torch.device"
    flags: str
    output: DemoOutputOptions

    def _log(self, command: str, redirection: str = "") -> None:
        if not self.output.quiet:
            console.log(f"$ advdiff {command}{self.flags}{redirection}")

    def _result(self, name: str) -> Path:
        return self.output.out / f"{name}.json"

    def attack(self, clean: "PatchSet") -> "PatchSet":
        from advdiff_cli.attacks.spec import resolve
        from advdiff_cli.data.distributed import ProcessGroup
        from advdiff_cli.data.output_spec import OutputSpec
        from advdiff_cli.data.patches import open_patches
        from advdiff_cli.jobs.attack import AttackJob
        from advdiff_cli.jobs.recipes import default_batch_size
        from advdiff_cli.jobs.sharding import PatchSetOutput, ShardedOutput

        out = self.output.out / "adv.safetensors"
        self._log(f"attack {clean.path} -c {CLASSIFIER} --eps {EPS_TEXT} -o {out}")
        size = default_batch_size(self.device.type, None, graph=True)
        job = AttackJob(self.model, resolve("pgd", "linf", EPS, defended=False), clean, self.seed, size, self.device)
        spec = OutputSpec(out, job.recipe, self.device.type, self.output.overwrite)
        work = follow_rows(job.run, "attack", quiet=self.output.quiet)
        ShardedOutput(spec, len(clean), job.batch_size, PatchSetOutput(clean, work)).make(None, ProcessGroup())
        return open_patches(out)

    def purify(self, patches: "PatchSet", defense: "Defense", name: str) -> "PatchSet":
        from advdiff_cli.data.distributed import ProcessGroup
        from advdiff_cli.data.output_spec import OutputSpec
        from advdiff_cli.data.patches import open_patches
        from advdiff_cli.jobs.purify_rows import PurifyJob, purify_rows
        from advdiff_cli.jobs.recipes import default_batch_size
        from advdiff_cli.jobs.sharding import PatchSetOutput, ShardedOutput

        out = self.output.out / f"{name}.safetensors"
        noise = f"--defense noise --t-star {defense.spec.t_star:g}"
        options = noise if defense.spec.defense == "noise" else f"-m {DDPM}"
        self._log(f"purify {patches.path} {options} -o {out}")
        defense.purifier.to(self.device)
        size = default_batch_size(self.device.type, None, graph=False)
        job = PurifyJob(defense, self.seed, size, self.precision, self.device)
        spec = OutputSpec(out, job.recipe(patches), self.device.type, self.output.overwrite)
        work = follow_rows(partial(purify_rows, job, patches), "purify", quiet=self.output.quiet)
        ShardedOutput(spec, len(patches), job.batch_size, PatchSetOutput(patches, work)).make(None, ProcessGroup())
        return open_patches(out)

    def evaluate(self, name: str, clean: "PatchSet", attacked: "PatchSet") -> "JsonObject":
        from advdiff_cli.data.atomic_files import atomic_write
        from advdiff_cli.evaluation.comparison import compare
        from advdiff_cli.jobs.evaluate import evaluate_set

        out = self._result(name)
        if out.exists() and not self.output.overwrite and not _is_result(out):
            raise AdvdiffError(f"{out} exists and was not made by this command; give --overwrite or another --out")
        self._log(f"evaluate {clean.path} {attacked.path} -c {CLASSIFIER} --json", f" > {out}")
        with console.progress(len(clean) + len(attacked), "evaluate", quiet=self.output.quiet) as advance:
            sets = [
                evaluate_set(str(s.path), s, self.model, self.device, draws=range(1), seed=self.seed, advance=advance)
                for s in (clean, attacked)
            ]
        classifier = {"name": CLASSIFIER, "fingerprint": self.model.fingerprint}
        judged = [s.as_dict() for s in sets]
        result = {"classifier": classifier, "defense": None, "sets": judged, "comparisons": compare(sets)}
        with atomic_write(out) as part:
            part.write_text(json.dumps(result, indent=2) + "\n")
        return result

    def report(self, results: "dict[str, JsonObject]", clean: "PatchSet", adv: "PatchSet", defense: "Defense") -> Path:
        from advdiff_cli.report import GALLERY_PATCHES
        from advdiff_cli.report.gallery import GalleryModel, PairedSets, build_gallery, judge_pairs
        from advdiff_cli.report.page import PAGE, PANEL, TITLE, Report

        out = self.output.out
        named = " ".join(f"--result {name}={self._result(name)}" for name in results)
        gallery_options = (
            f"--clean {clean.path} --attacked {adv.path} -c {CLASSIFIER} -m {DDPM} --patches {GALLERY_PATCHES}"
        )
        self._log(f"report {named} {gallery_options} -o {out}")
        by = GalleryModel(self.model.behind(defense, self.device, self.precision), self.device, self.seed)
        pairs = PairedSets.match(clean, adv)
        with console.progress(len(pairs), "report: judge", quiet=self.output.quiet) as advance:
            judged = judge_pairs(pairs, by, advance)
        count = min(GALLERY_PATCHES, len(pairs))
        with tempfile.TemporaryDirectory() as scratch:
            panel = Path(scratch) / PANEL
            gallery = build_gallery(pairs, judged, by, EPS, count, panel)
            Report(TITLE, results, gallery=gallery, panel=panel).write(out, overwrite=self.output.overwrite)
        return out / PAGE


def _is_result(file: Path) -> bool:
    """Return whether a file is a result of an earlier demo."""
    from advdiff_cli.data.provenance import parse_json_object

    try:
        return parse_json_object(file.read_bytes(), file).keys() == {"classifier", "defense", "sets", "comparisons"}
    except (OSError, AdvdiffError):
        return False


def _text(summary: "JsonObject") -> str:
    from advdiff_cli.cli.tables import cell

    rows = [(name, cell(row["standard"]), cell(row["robust"])) for name, row in summary["rows"].items()]
    columns = (f"n = {summary['n']}", "standard % [95 %]", f"robust, PGD-40 {EPS_TEXT} % [95 %]")
    note = "the attack knows the classifier, and not the defense"
    files = f"picture: {summary['picture']}\nreport: {summary['report']}"
    return f"{console.table(columns, rows)}\n{note}\n{files}"
