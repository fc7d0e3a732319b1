"""The report: one HTML page that loads nothing from the network, and its plots as files next to it."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from advdiff_cli import __version__
from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.certification.summary import Radius
from advdiff_cli.data.atomic_files import atomic_write
from advdiff_cli.data.output_spec import OutputSpec
from advdiff_cli.data.provenance import JsonObject, Provenance, digest, recipe
from advdiff_cli.data.recorded_files import check_replaceable, record_files
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.provenance_checks import Judge, transfer_differences
from advdiff_cli.evaluation.statistics import Estimate
from advdiff_cli.purification.defense_spec import DefenseSpec
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
        defense = suite.get("defense", suite.get("defence"))  # spelled so by version 0.1.0
        return {**suite, "defense": defense, "svg": inline_svg(paths[0], "accuracy under each attack")}

    def _sources(self) -> list[dict[str, str]]:
        """Return how each number was made: recipes, without the figures."""
        found: list[tuple[str, JsonObject]] = []
        for name, result in self.results.items():
            defense = result.get("defense", result.get("defence"))  # spelled so by version 0.1.0
            sets = [{k: s.get(k) for k in ("data", "n", "draws", "history")} for s in result["sets"][:2]]
            made = {"classifier": result.get("classifier"), "defense": defense, "sets": sets}
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


def accuracy_bar(name: str, result: Mapping[str, Any]) -> JsonObject:
    """Return a bar of the paper's Figure 3 from a result of `evaluate --json` on a clean and an attacked set.

    Raises:
        AdvdiffError: The first two sets are not a clean and an attacked set of the same rows.
    """
    sets = result.get("sets", [])
    attack = _attack(sets[1]) if len(sets) > 1 else None
    if attack is None or _attack(sets[0]):
        raise AdvdiffError(
            f"the result called {name} needs a clean and an attacked set, in this order: "
            "advdiff evaluate CLEAN ATTACKED -c ... --json, where ATTACKED was made by advdiff attack"
        )
    n, draws = sets[1]["n"], sets[1]["draws"]
    pair = (sets[0]["data"], sets[1]["data"])
    compared = [c["n"] for c in result.get("comparisons", []) if (c["first"], c["second"]) == pair]
    if compared[:1] != [n] or sets[0]["n"] != n:
        raise AdvdiffError(
            f"the sets of the result called {name} do not hold the same rows; evaluate them with the same selection"
        )
    knowledge = "knows the defense" if attack.knows_defense else "knows the classifier alone"
    if _is_transferred(sets[1], result):
        knowledge = "made on another model: transferred"
    notes = [attack.describe()]
    notes += [] if attack.method == "random" else [knowledge]
    notes += [f"{draws} draws"] if draws > 1 else []
    accuracies = {"standard": sets[0]["accuracy"], "robust": sets[1]["accuracy"]}
    return {"name": name, "n": n, **accuracies, "attack": "; ".join(notes)}


def _is_transferred(attacked: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Return whether a set of a result was attacked on another model than that which judged it.

    Raises:
        AdvdiffError: The result does not describe its defense.
    """
    defense = result.get("defense") or result.get("defence") or {}  # spelled so by version 0.1.0
    attack = _steps(attacked, "attack")[-1]
    purified = bool(_steps(attacked, "purify"))
    try:
        judge = Judge(
            str((result.get("classifier") or {}).get("fingerprint", attack.get("classifier"))),
            DefenseSpec.from_parameters(defense),
            defense.get("ddpm", attack.get("ddpm")),  # not told by earlier versions
        )
        return bool(transfer_differences(attack, judge, purified=purified))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise AdvdiffError(f"a result file describes a defense that advdiff does not know ({e!r:.80})") from None


def _attack(evaluated: Mapping[str, Any]) -> AttackSpec | None:
    """Return the last attack in the history of a set, or None."""
    made = _steps(evaluated, "attack")
    return parse_attack(made[-1]["parameters"]) if made else None


def _steps(evaluated: Mapping[str, Any], command: str) -> list[Provenance]:
    """Return the steps of one command in the history of a set, oldest first."""
    return [step for step in evaluated.get("history", []) if step["command"] == command]


def parse_attack(parameters: JsonObject) -> AttackSpec:
    """Return the attack that a result file describes.

    Raises:
        AdvdiffError: It is not a description of an attack.
    """
    try:
        spec = AttackSpec.from_parameters(parameters)
        spec.describe()
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise AdvdiffError(f"a result file describes an attack that advdiff does not know ({e!r:.80})") from None
    return spec


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
