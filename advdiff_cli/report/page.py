"""The report: one HTML page that loads nothing from the network, and its plots as files next to it."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from advdiff_cli import __version__
from advdiff_cli.certification.summary import Radius
from advdiff_cli.data.atomic_files import atomic_write
from advdiff_cli.data.output_spec import OutputSpec
from advdiff_cli.data.provenance import JsonObject, Provenance, digest, recipe
from advdiff_cli.data.recorded_files import check_replaceable, record_files
from advdiff_cli.evaluation.statistics import Estimate
from advdiff_cli.report.accuracy_bar import accuracy_bar, parse_attack
from advdiff_cli.report.plots import ROBUST, STANDARD, WORST, accuracy_bars, certified_curves, suite_bars, sweep_curves
from advdiff_cli.robustness.sweep import axis_label

PAGE = "report.html"
TITLE = "Purification against adversarial attacks"
PANEL = "panel.png"
RECORD = "report.advdiff"
_PIXELS_PER_POINT = 1.7  # of figures, whose smallest letters have 7 points


@dataclass
class Report:
    """The content of a page.

    Args:
        title: Of the page.
        results: Results of `evaluate --json`, by name.
        sweeps: Contents of sweep.json, by name.
        certificates: Of `advdiff_cli.certification.summary.certificate_curves`, by name.
        suite: The content of robustness.json.
        gallery: Of `advdiff_cli.report.gallery`.
        panel: The picture that was drawn with it, which becomes panel.png.
    """

    title: str
    results: Mapping[str, JsonObject] = field(default_factory=dict)
    sweeps: Mapping[str, JsonObject] = field(default_factory=dict)
    certificates: dict[str, JsonObject] = field(default_factory=dict)
    suite: JsonObject | None = None
    gallery: JsonObject | None = None
    panel: Path | None = None

    @property
    def file_names(self) -> list[str]:
        """The page and its plots."""
        plots = ["bars"] * bool(self.results)
        plots += [f"sweep-{k}" for k in range(1, len(self.sweeps) + 1)] + ["certified"] * bool(self.certificates)
        plots += ["suite"] * (self.suite is not None)
        pictures = [PANEL] if self.panel else []
        return [PAGE, *pictures, *(f"{name}{suffix}" for name in plots for suffix in (".svg", ".png"))]

    def recipe(self) -> Provenance:
        """Return the recipe of the page: all that it shows."""
        shown = [self.results, self.sweeps, self.suite, self.gallery and self.gallery["recipe"]]
        shown += [self.certificates] if self.certificates else []  # pages of earlier versions stay up to date
        content = [json.dumps(one, sort_keys=True).encode() for one in shown]
        return recipe("report", {"title": self.title}, content=digest(content))

    def write(self, out: Path, *, overwrite: bool = False) -> list[str]:
        """Write the page and its plots (svg and png) to the folder `out`; return the file names.

        Raises:
            AdvdiffError: A file of that name was not made by the same recipe and may not be replaced.
        """
        spec = OutputSpec(out / RECORD, self.recipe(), overwrite=overwrite)
        files = [out / name for name in self.file_names]
        check_replaceable(spec, files)
        out.mkdir(parents=True, exist_ok=True)

        if self.panel:
            with atomic_write(out / PANEL) as temporary:
                shutil.copyfile(self.panel, temporary)

        def paths(name: str) -> list[Path]:
            return [out / f"{name}.svg", out / f"{name}.png"]

        context = {
            "title": self.title,
            "version": __version__,
            "bars": self._bars(paths("bars")) if self.results else None,
            "sweeps": [self._sweep(name, paths(f"sweep-{k}")) for k, name in enumerate(self.sweeps, 1)],
            "certificates": self._certificates(paths("certified")) if self.certificates else None,
            "suite": self._suite(self.suite, paths("suite")) if self.suite else None,
            "gallery": self.gallery,
            "sources": self._sources(),
        }
        text = _environment().get_template("page.html.j2").render(context)
        with atomic_write(out / PAGE) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")  # names need not be UTF-8
        record_files(spec, files)
        return self.file_names

    def _bars(self, paths: Sequence[Path]) -> JsonObject:
        rows = [accuracy_bar(name, result) for name, result in self.results.items()]
        attacks = sorted({row["attack"] for row in rows})
        accuracy_bars(rows, attacks[0] if len(attacks) == 1 else "attacks as in the table", paths)
        return {"rows": rows, "svg": inline_svg(paths[0], "standard and robust accuracy")}

    def _sweep(self, name: str, paths: Sequence[Path]) -> JsonObject:
        sweep = self.sweeps[name]
        axis = axis_label(sweep)
        sweep_curves(sweep, axis, paths)
        return {**sweep, "name": name, "axis": axis, "svg": inline_svg(paths[0], f"accuracy over {axis}")}

    def _certificates(self, paths: Sequence[Path]) -> JsonObject:
        attacks = _votes_under_attack(self.suite) if self.suite else []
        certified_curves(self.certificates, attacks, paths)
        label = "certified accuracy over the l2 radius"
        return {"tables": self.certificates, "attacks": attacks, "svg": inline_svg(paths[0], label)}

    def _suite(self, suite: JsonObject, paths: Sequence[Path]) -> JsonObject:
        suite_bars(suite, paths)
        return {**suite, "svg": inline_svg(paths[0], "accuracy under each attack")}

    def _sources(self) -> list[dict[str, str]]:
        """Return how each number was made: recipes, without the figures."""
        found: list[tuple[str, JsonObject]] = []
        for name, result in self.results.items():
            sets = [{k: s[k] for k in ("data", "n", "draws", "history")} for s in result["sets"][:2]]
            made = {"classifier": result["classifier"], "defense": result["defense"], "sets": sets}
            found.append((f"{name}: advdiff evaluate", made))
        found += [(f"{name}: advdiff sweep", sweep["recipe"]) for name, sweep in self.sweeps.items()]
        found += [(f"{name}: advdiff certify", table["recipe"]) for name, table in self.certificates.items()]
        if self.suite:
            found.append(("the suite of attacks: advdiff robustness", self.suite["recipe"]))
        if self.gallery:
            found.append(("the patches: advdiff report", self.gallery["recipe"]))
        return [{"name": name, "recipe": json.dumps(value, indent=2)} for name, value in found]


def _votes_under_attack(suite: JsonObject) -> list[JsonObject]:
    """Return the accuracy of the largest vote under each attack of a suite, at the radius of its l2 ball."""
    proved = suite.get("certified")
    if not proved:
        return []
    found = []
    for row in suite["rungs"]:
        votes = sorted((k for k in row if k.startswith("vote_")), key=lambda k: int(k.removeprefix("vote_")))
        eps = (row["attack"] or {}).get("eps")
        if eps and votes and row["kind"] in ("white-box", "black-box", "curve"):
            found.append({"name": row["name"], "l2": proved["l2"] * eps / suite["eps"], "accuracy": row[votes[-1]]})
    return found


def inline_svg(path: Path, label: str) -> str:
    """Return an SVG of matplotlib for use inside the page: with unique ids, the page's colors, and a label."""
    prefix, text = path.stem, path.read_text()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    colors = {
        "#000000": "currentColor",
        WORST: "currentColor",
        STANDARD: "var(--standard)",
        ROBUST: "var(--robust)",
        "fill: #ffffff": "fill: none",
    }
    for color, replacement in colors.items():
        text = text.replace(color, replacement)
    width = round(_PIXELS_PER_POINT * float(re.search(r'width="([\d.]+)pt"', text)[1]))  # type: ignore[index] # always
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" style="max-width: {width}px"', 1)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("advdiff_cli.report", "."),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
    )
    environment.filters["estimate"] = lambda value: str(Estimate(*(value[k] for k in ("value", "low", "high"))))
    environment.filters["attack_size"] = lambda size: Radius(*(size[k] for k in ("norm", "eps", "l2"))).describe()
    environment.filters["attack"] = lambda p: parse_attack(p).describe() if p else ""
    return environment
