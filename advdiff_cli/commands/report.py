"""`advdiff report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from advdiff_cli import console, options
from advdiff_cli.commands.opening import open_selected
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.purification.defense import Defence, build_defence

if TYPE_CHECKING:
    from torch import device as Chip

    from advdiff_cli.data.patches import PatchSet
    from advdiff_cli.purification.defended_classifier import DefendedClassifier
    from advdiff_cli.report.gallery import Pair


def report(
    out: options.Out,
    result: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: a bar of accuracies, from evaluate CLEAN ATTACKED --json. May be repeated."),
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="FOLDER of a sweep, or NAME=FOLDER to head it. May be repeated.")
    ] = None,
    ladder: Annotated[Path | None, typer.Option(help="Folder of robustness.")] = None,
    clean: Annotated[str | None, typer.Option(help="Patches of the gallery, clean.")] = None,
    attacked: Annotated[str | None, typer.Option(help="The same, attacked.")] = None,
    classifier: Annotated[str | None, typer.Option("-c", "--classifier", help="Classifier of the gallery.")] = None,
    ddpm: options.DdpmName = None,
    patches: Annotated[int, typer.Option(min=1, help="Patches in the gallery.")] = 12,
    index: Annotated[
        str | None, typer.Option(help="Rows of the gallery by index, as 3,17.", show_default="the most telling")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Purification against adversarial attacks",
    seed: options.Seed = 0,
    defense: Annotated[
        Literal["none", "noise", "ddpm"],
        typer.Option(help="What stands before the classifier.", rich_help_panel=options.DEFENCE),
    ] = "ddpm",
    t_star: options.TStar = None,
    sampler: options.Sampler = None,
    sampler_steps: options.SamplerSteps = None,
    split: options.Split = None,
    limit: options.Limit = None,
    allow_pickle: options.AllowPickle = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write results to one self-contained HTML page, and its figures as SVG and PNG beside it.

    Bars come from evaluate's JSON, curves from sweep, the ladder from robustness, and the gallery is made here of clean
    and attacked patches, purified on the first judging draw. Every number tells the recipe that made it.

    Example: advdiff report --result undefended=plain.json --sweep sweep/ --ladder ladder/ -o report/
    """
    from advdiff_cli.models import registry
    from advdiff_cli.models.device import resolve_device, resolve_precision
    from advdiff_cli.report.page import PAGE, Report, bar, read_results

    if out.exists() and not out.is_dir():
        raise AdvdiffError(f"--out {out} is a file; a report goes to a folder")
    if not (result or sweep or ladder or clean):
        raise AdvdiffError("nothing to report: give --result, --sweep, --ladder, or --clean and --attacked")
    made = Report(title, read_results([_named(text, "give NAME=FILE to --result") for text in result or []]))
    for name, found in made.results.items():
        bar(name, found)  # refused before anything is written
    unknown = "no such folder; --sweep takes FOLDER or NAME=FOLDER"
    sweeps = [(text, Path(text)) if Path(text).is_dir() else _named(text, unknown) for text in sweep or []]
    made.sweeps = read_results([(name, folder / "sweep.json") for name, folder in sweeps])
    made.ladder = read_results([("ladder", ladder / "robustness.json")])["ladder"] if ladder else None
    if clean or attacked:
        if not (clean and attacked and classifier):
            raise AdvdiffError("a gallery needs --clean, --attacked and -c")
        chip = resolve_device(device)
        alone, mark = registry.frozen_classifier(classifier, chip, allow_pickle=allow_pickle)
        defence = build_defence(defense, ddpm, t_star, sampler, sampler_steps, allow_pickle=allow_pickle)
        model = defence.before(alone, chip, resolve_precision(precision, chip))
        pair = _pair(*(open_selected(name, split, None, limit, None, None) for name in (clean, attacked)))
        made.gallery = _gallery(pair, _Judge(model, mark, defence, chip, seed), patches, index, out, quiet)
    out.mkdir(parents=True, exist_ok=True)
    files = made.write(out)
    told = {"out": str(out), "page": str(out / PAGE), "files": files}
    console.emit(
        told, f"{out / PAGE}\n" + "\n".join(str(out / f) for f in files[1:]), out / PAGE, as_json=as_json, quiet=quiet
    )


def _named(text: str, help_: str) -> tuple[str, Path]:
    """Return the two halves of NAME=PATH; AdvdiffError with `help_` when it is not that."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise AdvdiffError(f"{text}: {help_}")
    return name, Path(path)


@dataclass(frozen=True)
class _Judge:
    """Who looks at the patches of the gallery: the defended classifier, and what names it in a recipe."""

    model: "DefendedClassifier"
    fingerprint: str
    defence: Defence
    chip: "Chip"
    seed: int


def _pair(clean: "PatchSet", attacked: "PatchSet") -> "Pair":
    from advdiff_cli.report.gallery import Pair

    pair = Pair.of(clean, attacked)
    if not len(pair):
        raise AdvdiffError(f"{attacked.path} was not made from rows of {clean.path}")
    return pair


def _gallery(
    pair: "Pair", by: _Judge, count: int, index: str | None, out: Path, quiet: bool
) -> dict[str, Any]:  # fmt: skip
    """Return what the page shows of clean and attacked patches, and draw the panel of the first few."""
    from advdiff_cli.data.provenance import recipe
    from advdiff_cli.evaluation.statistics import wilson
    from advdiff_cli.report.gallery import OUTCOMES, look, most_telling, pictures

    eps = _eps(pair.attacked.provenance, pair.attacked.path)
    rows = [] if index is None else _rows_of(index, pair.clean.index[pair.at].tolist())
    with console.progress(len(pair), "report: look", quiet=quiet) as advance:
        seen = look(pair, by.model, by.chip, by.seed, advance)
    outcomes = seen.outcomes()
    rows = rows or most_telling(seen, count)
    shown = pictures(pair, rows, seen, by.model, by.chip, by.seed, eps)
    out.mkdir(parents=True, exist_ok=True)
    _panel(shown[:4], out / "panel.png")
    truths = ("no tumour in the centre", "tumour in the centre")
    for patch, row in zip(shown, rows, strict=True):
        height, width = patch["stages"][0]["images"].shape[-2:]
        patch |= {"outcome": outcomes[row], "truth": truths[patch["label"]], "height": height, "width": width}
    those = "asked for" if index else "in which the classifier's belief moved most, rescued and lost in turn"
    return {
        "n": len(pair),
        "told": OUTCOMES,
        "counts": {name: outcomes.count(name) for name in OUTCOMES},
        "shares": {name: wilson(outcomes.count(name), len(pair)).as_dict() for name in OUTCOMES},
        "chosen": f"Shown are those {those}.",
        "patches": shown,
        "recipe": recipe(
            "report", {**by.defence.parameters, "seed": by.seed, "precision": by.model.precision},
            data=pair.clean.recipe_input(), attacked=pair.attacked.recipe_input(),
            classifier=by.fingerprint, ddpm=by.defence.model,
        ),
    }  # fmt: skip


def _panel(shown: list[dict[str, Any]], path: Path) -> None:
    """Draw the first patches of the gallery as one picture."""
    import torch

    from advdiff_cli.report.plots import Column, panel

    columns = []
    for k, stage in enumerate(shown[0]["stages"]):
        images = torch.cat([patch["stages"][k]["images"] for patch in shown]).cpu()
        beliefs = None if stage["belief"] is None else [patch["stages"][k]["belief"] for patch in shown]
        columns.append(Column(stage["title"].replace("what purification changed", "changed"), images, beliefs))
    panel(columns, [f"row {patch['index']}" for patch in shown], path)


def _rows_of(text: str, indices: list[int]) -> list[int]:
    """Return the positions of the rows whose indices `text` lists."""
    found = []
    for one in text.split(","):
        if not one.strip().isdigit() or int(one) not in indices:
            raise AdvdiffError(f"--index {one}: the attacked set has no such row")
        found.append(indices.index(int(one)))
    return found


def _eps(made: Any, name: object) -> float:
    from advdiff_cli.data.provenance import history

    attacks = [step["parameters"] for step in history(made) if step["command"] == "attack"]
    if not attacks:
        raise AdvdiffError(f"{name} does not say how it was attacked; give a set that advdiff attack made")
    eps = float(attacks[-1]["eps"])
    return eps if attacks[-1]["norm"] == "linf" else 8 / 255  # l2 spreads its budget: shown at a usual contrast
