"""The report: nothing asked of the network, every picture there, every number with its recipe, pages by keyboard."""

import base64
import io
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from advdiff_cli.data.patches import open_patches
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.report.accuracy_bar import accuracy_bar
from advdiff_cli.report.gallery import Confidences, PairedSets, most_changed
from advdiff_cli.report.page import inline_svg

N = 24


@pytest.fixture(scope="module")
def inputs(test_x, classifier, ddpm, tmp_path_factory):
    """The files a report is made of, from small settings."""
    return {"root": tmp_path_factory.mktemp("report"), "x": test_x, "c": classifier, "m": ddpm}


@pytest.fixture
def page(advdiff, inputs):
    """A whole report; made once."""
    root, x, c, m = (inputs[k] for k in ("root", "x", "c", "m"))
    out = root / "out"
    if not out.exists():
        rows, defense = ["--limit", N], ["--t-star", "0.05", "--sampler-steps", 1]
        advdiff("attack", x, *rows, "-c", c, "--steps", 3, "-o", root / "adv.safetensors")
        for name, more in (("plain", []), ("ddpm", ["-m", m, *defense, "--draws", 2])):
            found = advdiff("evaluate", x, root / "adv.safetensors", *rows, "-c", c, *more, "--json").out
            (root / f"{name}.json").write_text(found)
        sweep = ["--values", "0.02,0.1", "--steps", 1, "--sampler-steps", 1, "--draws", 2, "-o", root / "sweep"]
        advdiff("sweep", x, "--limit", 8, "-c", c, "-m", m, *sweep)
        few = ["--limit", 4, "--preset", "quick", "--batch-size", 4, "-o", root / "suite"]
        advdiff("robustness", x, *few, "-c", c)
        made = ["--result", f"undefended={root / 'plain.json'}", "--result", f"DDPM <b>={root / 'ddpm.json'}"]
        made += ["--sweep", f"over <i>={root / 'sweep'}", "--sweep", root / "sweep"]
        made += ["--suite", root / "suite", "--patches", 5, "-o", out]
        gallery = ["--clean", x, "--attacked", root / "adv.safetensors", "-c", c, "-m", m, *defense]
        told = advdiff("report", *made, *gallery, "--json").json
        assert sorted([*told["files"], "report.advdiff"]) == sorted(p.name for p in out.iterdir())
    return out / "report.html"


class Page(HTMLParser):
    """What a page refers to, and what it says."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.pictures, self.ids, self.words = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href", "action", "srcset", "poster")]
        if tag == "img":
            self.pictures.append(found)

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_of_its_own(page):
    text = page.read_text()
    found = Page(text)
    for link in found.links:
        assert link.startswith(("#", "data:")), link
    assert "@import" not in text
    assert "url(http" not in text
    assert len(set(found.ids)) == len(found.ids)
    for link in found.links:
        assert not link.startswith("#") or link[1:] in found.ids, link
    assert len(found.pictures) == 5 * 6
    for picture in found.pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))) as image:
            assert image.size == (96, 96) == (int(picture["width"]), int(picture["height"]))
        assert picture["alt"]
    assert found.tags.count("svg") == 4
    assert "DDPM &lt;b&gt;" in text
    assert "<h3>over &lt;i&gt;: over noise level t*" in text


def test_numbers_are_the_commands_own_with_their_recipes(page, inputs):
    words = " ".join(Page(page.read_text()).words)
    for name in ("plain", "ddpm"):
        for judged in json.loads((inputs["root"] / f"{name}.json").read_text())["sets"]:
            a = judged["accuracy"]
            assert f"{100 * a['value']:.1f} [{100 * a['low']:.1f}, {100 * a['high']:.1f}]" in words
    suite = json.loads((inputs["root"] / "suite" / "robustness.json").read_text())
    assert all(alarm["reason"] in words for alarm in suite["alarms"])
    assert suite["recipe"]["classifier"] in words
    assert "pgd linf 2/255, steps 3, loss ce; knows the classifier alone; 2 draws" in words


def test_stages_are_what_the_commands_make(page, inputs):
    """The clean and adversarial pictures are the files' own rows, rounded to 8 bits."""
    found = Page(page.read_text()).pictures
    x, adv = (open_patches(p) for p in (inputs["x"], inputs["root"] / "adv.safetensors"))
    for clean, attacked in zip(found[::6], found[1::6], strict=True):
        row = int(clean["alt"].rpartition(" ")[2])
        for picture, patches in ((clean, x), (attacked, adv)):
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))))
            at = int(np.flatnonzero(patches.index == row)[0])
            expected = (patches.read([at])[0].permute(1, 2, 0) * 255).round().byte().numpy()
            assert np.array_equal(pixels, expected)


def test_outcomes_and_the_most_changed(test_x):
    seen = Confidences(
        *map(np.array, ([0.9, 0.9, 0.9, 0.9, 0.2], [0.1, 0.2, 0.8, 0.9, 0.1], [0.8, 0.3, 0.1, 0.9, 0.9]))
    )
    assert seen.outcomes() == ["rescued", "lost", "spoiled", "held", "wrong"]
    assert most_changed(seen, 3) == [0, 1, 4]
    assert len(most_changed(seen, 9)) == 5
    assert len(PairedSets.match(open_patches(test_x), open_patches(test_x))) == len(open_patches(test_x))


def test_rows_can_be_asked_for(advdiff, page, inputs, tmp_path):
    root, x, c = (inputs[k] for k in ("root", "x", "c"))
    gallery = ["report", "--clean", x, "--attacked", root / "adv.safetensors", "-c", c, "--defense", "noise"]
    out = advdiff(*gallery, "--index", "7,3", "-o", tmp_path / "r", "-q").out.strip()
    found = Page((tmp_path / "r" / "report.html").read_text())
    assert out == str(tmp_path / "r" / "report.html")
    assert [i for i in found.ids if i.startswith("patch-")] == ["patch-7", "patch-3"]
    assert "has no such row" in advdiff(*gallery, "--index", "999", "-o", tmp_path / "q", code=1).err
    assert not (tmp_path / "q").exists()
    advdiff(*gallery, "--index", "7,3", "-o", tmp_path / "r")  # the same page
    assert "made with other settings" in advdiff(*gallery, "--index", "3,7", "-o", tmp_path / "r", code=1).err


def test_who_an_attack_knew_is_told(advdiff, inputs, tmp_path):
    x, c = inputs["x"], inputs["c"]
    noise, few = ["--defense", "noise", "--t-star", "0.05"], ["--limit", 2]
    advdiff("attack", x, "-c", c, *noise, *few, "--steps", 1, "-o", tmp_path / "adv.h5")
    for told, judge in (
        ("knows the defense", noise),
        ("made on another model: transferred", [*noise[:-1], "0.1"]),
        ("made on another model: transferred", []),
    ):
        result = advdiff("evaluate", x, tmp_path / "adv.h5", *few, "-c", c, *judge, "--json").json
        assert accuracy_bar("a", result)["attack"].split("; ")[1] == told
    result["defense"] = {"t_star": 0.1}
    with pytest.raises(AdvdiffError, match="a defense that advdiff does not know"):
        accuracy_bar("a", result)


def test_the_worst_case_takes_the_pages_color(page):
    svg = page.with_name("suite.svg").read_text()
    worst, legend = "#010101", 1
    assert svg.count(f"fill: {worst}") == 1 + legend
    assert inline_svg(page.with_name("suite.svg"), "a").count("fill: currentColor") >= 1 + legend
    assert worst not in page.read_text()


def test_logits_that_are_not_finite_are_told(advdiff, inputs, tmp_path, monkeypatch):
    root, x, c = (inputs[k] for k in ("root", "x", "c"))
    monkeypatch.setattr(DefendedClassifier, "classify", lambda self, images: torch.full((len(images), 2), torch.nan))
    gallery = ["--clean", x, "--attacked", root / "adv.safetensors", "-c", c, "--defense", "noise"]
    assert "are not finite" in advdiff("report", *gallery, "-o", tmp_path / "r", code=1).err
    assert not (tmp_path / "r").exists()


def test_what_cannot_be_reported_is_said(advdiff, page, inputs, tmp_path):
    root, x = inputs["root"], inputs["x"]
    swapped = json.loads((root / "plain.json").read_text())
    swapped["sets"].reverse()
    (tmp_path / "swapped.json").write_text(json.dumps(swapped))
    (tmp_path / "no.json").write_text("[1]")
    other = json.loads((root / "plain.json").read_text())
    other["sets"][0]["n"] += 1
    (tmp_path / "other.json").write_text(json.dumps(other))
    for wrong, says in (
        ([], "nothing to report"),
        (["--result", "plain.json"], "give --result NAME=FILE"),
        (["--sweep", "nowhere"], "no such folder"),
        (["--result", f"a={tmp_path / 'nowhere.json'}"], "No such file"),
        (["--result", f"a={tmp_path / 'no.json'}"], "is not a result of advdiff evaluate"),
        (["--result", f"a={tmp_path / 'swapped.json'}"], "needs a clean and an attacked set, in this order"),
        (["--result", f"a={root / 'plain.json'}", "--result", f"a={root / 'ddpm.json'}"], "two results are called a"),
        (["--result", f"a={tmp_path / 'other.json'}"], "do not hold the same rows"),
        (["--clean", x], "a gallery needs --clean, --attacked and -c"),
        (["--clean", x, "--attacked", x, "-c", inputs["c"], "--defense", "noise"], "has no record of an attack"),
    ):
        assert says in advdiff("report", *wrong, "-o", tmp_path / "r", code=1).err
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium is installed: the page is not seen in a browser")
def test_in_a_browser(page):
    """No error, no request but the page's own, every picture drawn, and the gallery by keyboard and button."""
    playwright = pytest.importorskip("playwright.sync_api")
    said, asked = [], []
    with playwright.sync_playwright() as p:
        options = ["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        for width, scheme in ((1100, "light"), (390, "dark")):
            seen = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            seen.on("console", lambda message: said.append(message.text))
            seen.on("pageerror", lambda error: said.append(str(error)))
            seen.on("request", lambda request: asked.append(request.url))
            seen.goto(page.as_uri())
            assert seen.evaluate("[...document.images].every(i => i.complete && i.naturalWidth === 96)")
            assert seen.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
            shown = "[...document.querySelectorAll('.slide')].map(s => s.offsetHeight > 0)"
            assert seen.evaluate(shown) == [True] + [False] * 4
            seen.focus("#gallery")
            for key, at in (("ArrowRight", 1), ("End", 4), ("ArrowRight", 0), ("ArrowLeft", 4), ("Home", 0)):
                seen.keyboard.press(key)
                assert seen.evaluate(shown).index(True) == at
                assert seen.inner_text("#place") == f"{at + 1} of 5"
            seen.click("text=Next")
            assert seen.evaluate(shown).index(True) == 1
            seen.emulate_media(media="print")
            assert seen.evaluate(shown) == [True] * 5
            seen.close()
        browser.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}


ODD = [None, "", "$x_{", "\ud800", -1, 10**30, float("nan"), [], {}, [[]], {"value": 1}, True, "../x", "<script>"]


def _places(value, path=()):
    """Return where the values in a JSON document are."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, one in inner for p in _places(one, (*path, key)))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["result", "sweep", "suite"])
def test_a_result_that_was_changed_is_reported_or_refused(kind, advdiff, tmp_path, page, inputs):
    source = {"result": inputs["root"] / "ddpm.json", "sweep": inputs["root"] / "sweep" / "sweep.json"}
    document = SUITE if kind == "suite" else json.loads(source[kind].read_text())
    file = tmp_path / {"result": "r.json", "sweep": "sweep.json", "suite": "robustness.json"}[kind]
    asked = {"result": f"--result=a={file}", "sweep": f"--sweep={tmp_path}", "suite": f"--suite={tmp_path}"}[kind]
    seen, places = set(), _places(document)

    @settings(max_examples=int(os.environ.get("ADVDIFF_FUZZ", "25")), deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(places), st.sampled_from(ODD), st.booleans())
    def run(place, odd, remove):
        changed = json.loads(json.dumps(document))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        if not place:
            changed = odd
        elif remove:
            del inner[place[-1]]
        else:
            inner[place[-1]] = odd
        file.write_text(json.dumps(changed))
        done = advdiff("report", asked, "-o", tmp_path / "page", "--overwrite", code=None)
        assert done.code in (0, 1)
        assert len(done.err.splitlines()) == done.code, done.err
        seen.add(done.code)

    run()
    assert seen == {0, 1}


_ESTIMATE = {"value": 0.5, "low": 0.4, "high": 0.6}
_ROW = {"name": "pgd", "kind": "white-box", "attack": None, "accuracy": _ESTIMATE, "difference": _ESTIMATE}
SUITE = {
    "n": 8,
    "draws": 1,
    "eps": 0.01,
    "defense": None,
    "certified": None,
    "recipe": {"command": "robustness", "parameters": {}},
    "rungs": [{**_ROW, "attack": {"method": "fgsm", "norm": "linf", "eps": 0.01, "loss": "ce"}}],
    "worst": {**_ROW, "name": "worst", "clean": _ESTIMATE},
    "alarms": [{"name": "floor", "status": "pass", "reason": "fine"}],
}


def test_an_undefended_suite_is_headed_so(advdiff, tmp_path):
    (tmp_path / "robustness.json").write_text(json.dumps(SUITE))
    page = Path(advdiff("report", "--suite", tmp_path, "-o", tmp_path / "page", "-q").out.strip()).read_text()
    assert "The suite of attacks on the undefended classifier" in page
    assert "draws of the defense" not in page


def test_an_unfinished_suite(advdiff, tmp_path):
    (tmp_path / "pgd.safetensors.part").touch()
    assert (
        "is unfinished; run the same advdiff robustness command again"
        in advdiff("report", "--suite", tmp_path, "-o", tmp_path / "page", code=1).err
    )


def test_names_with_dollars(advdiff, page, inputs, tmp_path):
    made = advdiff("report", "--result", f"a $x_{{ $={inputs['root'] / 'ddpm.json'}", "-o", tmp_path / "page", "-q")
    assert "a $x_{ $" in Path(made.out.strip()).read_text()


def test_pictures_of_the_user_are_not_replaced(advdiff, page, inputs, tmp_path):
    out = tmp_path / "page"
    out.mkdir()
    (out / "bars.svg").write_text("mine")
    made = ["report", "--result", f"a={inputs['root'] / 'ddpm.json'}", "-o", out]
    assert "bars.svg exists and was not made by this command" in advdiff(*made, code=1).err
    assert [p.name for p in out.iterdir()] == ["bars.svg"]
    assert (out / "bars.svg").read_text() == "mine"
    (out / "bars.svg").unlink()
    advdiff(*made)
    advdiff(*made)  # the same page
    assert "made with other settings (title" in advdiff(*made, "--title", "Another", code=1).err
    advdiff(*made, "--title", "Another", "--overwrite")


def test_predictions_do_not_replace_a_patch_set(advdiff, page, inputs, tmp_path):
    adv = tmp_path / "adv.h5"
    advdiff("synthesize", "-n", 2, "-o", adv)
    before = adv.read_bytes()
    evaluate = ["evaluate", inputs["x"], "--limit", 2, "-c", inputs["c"], "--predictions"]
    assert "exists and was not made by this command" in advdiff(*evaluate, adv, code=1).err
    own = ["evaluate", adv, "-c", inputs["c"], "--predictions", adv]
    for extra in ([], ["--overwrite"]):
        assert "is an input of this command" in advdiff(*own, *extra, code=1).err
    assert adv.read_bytes() == before
    table = tmp_path / "p.csv"
    advdiff(*evaluate, table)
    advdiff(*evaluate, table)
    changed = [*evaluate, table, "--shuffle-seed", 1]
    assert "made with other settings" in advdiff(*changed, code=1).err
    advdiff(*changed, "--overwrite")
    table.write_text("mine")
    assert "was not made by this command" in advdiff(*changed, code=1).err
