"""The report: one HTML page that asks nothing of the network, and its figures as files beside it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from advdiff_cli import __version__
from advdiff_cli.attacks.spec import describe, knows_the_defence
from advdiff_cli.data.atomic_files import replacing
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.statistics import Estimate
from advdiff_cli.report.plots import ROBUST, STANDARD, bars, ladder_bars, sweep_curves
from advdiff_cli.robustness.sweep import axis

PAGE = "report.html"


@dataclass
class Report:
    """What a page is made of: results of `evaluate --json` by name, sweeps, a ladder, a gallery."""

    title: str
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sweeps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ladder: Mapping[str, Any] | None = None
    gallery: Mapping[str, Any] | None = None

    def write(self, out: Path) -> list[str]:
        """Write the page and its figures (svg and png) to the folder `out`; return the names of the files."""
        context: dict[str, Any] = {"title": self.title, "version": __version__, "bars": None, "ladder": None}
        made: list[str] = []

        def drawn(name: str) -> list[Path]:
            made.extend(f"{name}{end}" for end in (".svg", ".png"))
            return [out / f"{name}.svg", out / f"{name}.png"]

        if self.results:
            rows = [bar(name, result) for name, result in self.results.items()]
            attacks = sorted({row["attack"] for row in rows})
            bars(rows, attacks[0] if len(attacks) == 1 else "each under the attack told in the table", drawn("bars"))
            context["bars"] = {"rows": rows, "svg": inline(out / "bars.svg", "bars", "standard and robust accuracy")}
        context["sweeps"] = []
        for k, (name, sweep) in enumerate(self.sweeps.items(), 1):
            sweep_curves(sweep, axis(sweep), drawn(f"sweep-{k}"))
            svg = inline(out / f"sweep-{k}.svg", f"sweep-{k}", f"accuracy over {axis(sweep)}")
            context["sweeps"].append({**sweep, "name": name, "axis": axis(sweep), "svg": svg})
        if self.ladder:
            ladder_bars(self.ladder, drawn("ladder"))
            context["ladder"] = {
                **self.ladder,
                "svg": inline(out / "ladder.svg", "ladder", "accuracy under each attack"),
            }
        page = _environment().get_template("page.html.j2")
        text = page.render(context | {"gallery": self.gallery, "sources": self._sources()})
        with replacing(out / PAGE) as fresh:
            fresh.write_text(text)
        return [PAGE, *made]

    def _sources(self) -> list[dict[str, str]]:
        """Return how each number was made: the recipes, without the figures themselves."""
        told: list[tuple[str, Any]] = []
        for name, result in self.results.items():
            made = {k: result.get(k) for k in ("classifier", "defence")}
            sets = [{k: s.get(k) for k in ("data", "n", "draws", "history")} for s in result["sets"][:2]]
            told.append((f"{name}: advdiff evaluate", made | {"sets": sets}))
        told += [(f"{name}: advdiff sweep", sweep["recipe"]) for name, sweep in self.sweeps.items()]
        if self.ladder:
            told.append(("the ladder: advdiff robustness", self.ladder["recipe"]))
        if self.gallery:
            told.append(("the patches: advdiff report", self.gallery["recipe"]))
        return [{"name": name, "told": json.dumps(value, indent=2)} for name, value in told]


def bar(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a bar of Figure 3 from a result of `evaluate --json`: its first set is clean, its second attacked.

    Raises:
        AdvdiffError: they are not.
    """
    sets = result.get("sets", [])
    if len(sets) < 2 or _attack(sets[0]) or not _attack(sets[1]):
        raise AdvdiffError(
            f"the result called {name} is not of a clean and an attacked set, in that order: "
            "advdiff evaluate CLEAN ATTACKED -c ... --json"
        )
    n, draws, made = sets[1]["n"], sets[1]["draws"], _attack(sets[1])
    pair = (sets[0]["data"], sets[1]["data"])
    compared = [c["n"] for c in result.get("comparisons", []) if (c["first"], c["second"]) == pair]
    if compared[:1] != [n] or sets[0]["n"] != n:
        raise AdvdiffError(
            f"the sets of the result called {name} do not hold the same rows; evaluate them with one selection"
        )
    knows = "knows the defence" if knows_the_defence(made) else "knows the classifier alone"
    told = [
        describe(made),
        *([] if made["method"] == "random" else [knows]),
        *([f"{draws} draws"] if draws > 1 else []),
    ]
    figures = {"standard": sets[0]["accuracy"], "robust": sets[1]["accuracy"]}
    return {"name": name, "n": n, **figures, "attack": "; ".join(told)}


def _attack(judged: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of the attack that led to a set; empty where there is none."""
    made = [step["parameters"] for step in judged.get("history", []) if step["command"] == "attack"]
    return dict(made[-1]) if made else {}


def inline(path: Path, prefix: str, label: str) -> str:
    """Return an SVG of matplotlib's as part of a page: ids of its own, the page's ink, no background, a label."""
    text = path.read_text()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    inks = {
        "#000000": "currentColor",
        STANDARD: "var(--standard)",
        ROBUST: "var(--robust)",
        "fill: #ffffff": "fill: none",
    }
    for ink, of_page in inks.items():
        text = text.replace(ink, of_page)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("advdiff_cli.report", "."), autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["estimate"] = lambda value: str(Estimate(**value))
    environment.filters["attack"] = describe
    return environment


def read_results(paths: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """Read named JSON results; AdvdiffError when a file is not there or no JSON object."""
    found: dict[str, Any] = {}
    for name, path in paths:
        if name in found:
            raise AdvdiffError(f"two results are called {name}; give each its own name")
        try:
            found[name] = json.loads(path.read_text())
        except OSError as e:
            raise AdvdiffError(f"{path}: {e.strerror}") from None
        except ValueError:
            found[name] = None
        if not isinstance(found[name], dict):
            raise AdvdiffError(f"{path} is not a JSON object that an advdiff command made")
    return found
