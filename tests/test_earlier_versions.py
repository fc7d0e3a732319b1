"""What version 0.1.0 (commit ffbb6f8) wrote is still up to date, resumes, merges and is reported.

`tests/fixtures/version-0.1.0` was made by the commands below, in that folder, with `--device cpu`. The weights of its
two trained models are left out, since their recipes decide.
"""

import json
import shutil
from pathlib import Path

import pytest

from advdiff_cli.data.patches import open_patches

pytestmark = pytest.mark.cpu

FIXTURE = Path(__file__).parent / "fixtures" / "version-0.1.0"
COMPUTE = "--precision fp32 --batch-size 2"
ATTACK = f"attack tissue -c synthetic-classifier {COMPUTE}"
TRAIN = "--precision fp32 --batch-size 4"

MADE = {
    "through.safetensors": f"{ATTACK} -m synthetic-ddpm --steps 2 --eot 2 --limit 4 --shuffle-seed 0",
    "part0.h5": f"{ATTACK} --steps 2 --shard 0/2",
    "purified.h5": f"purify tissue -m synthetic-ddpm {COMPUTE} --limit 4",
    "classifier": f"train-classifier tissue --valid tissue --arch shufflenet_v2_x0_5 --epochs 1 {TRAIN}",
    "ddpm": f"train-ddpm tissue --steps 1 --max-t 0.3 {TRAIN}",
}
"""Output -> the command that made it."""
UNFINISHED = f"{ATTACK} --method apgd --steps 2"
"""What made unfinished.safetensors.part, killed after its first batch."""
DEFENDED = f"tissue -c synthetic-classifier -m synthetic-ddpm {COMPUTE} --limit 4"
SUITE = f"robustness {DEFENDED} --preset quick -o ladder"
SWEEP = f"sweep {DEFENDED} --values 0.1 --steps 2 -o sweep"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    place = tmp_path / "earlier"
    shutil.copytree(FIXTURE, place)
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("out", MADE)
def test_a_result_is_up_to_date(advdiff, folder, out):
    done = advdiff(*MADE[out].split(), "-o", out, "-q")
    assert f"{out} is up to date" in done.err


def test_a_folder_is_up_to_date(advdiff, folder):
    done = advdiff(*f"purify tissue -m synthetic-ddpm {COMPUTE} -o purified --json".split()).json
    assert (done["status"], done["kept"]) == ("up to date", 8)


def test_unfinished_work_resumes(advdiff, folder):
    begun = Path("unfinished.safetensors.part").read_bytes()
    advdiff(*UNFINISHED.split(), "-o", "unfinished.safetensors", "-q")
    ended = Path("unfinished.safetensors").read_bytes()
    images = len(begun) - 8 * 3 * 32 * 32 * 4
    kept = images + 2 * 3 * 32 * 32 * 4  # the header and the first batch
    assert ended[:kept] == begun[:kept]
    assert not any(Path().glob("*.part*"))


def test_shards_merge(advdiff, folder):
    advdiff("merge", "part1.h5", "part0.h5", "-o", "whole.h5")
    advdiff(*f"{ATTACK} --steps 2 -o whole.h5 -q".split())
    assert len(open_patches("whole.h5")) == 8


def test_rows_of_a_suite_that_are_made_as_before_are_not_made_again(advdiff, folder):
    made = {p: p.read_bytes() for p in Path("ladder").glob("*.safetensors")}
    done = advdiff(*SUITE.split(), "--only", "random", "--json").json
    assert [r["name"] for r in done["rungs"]] == ["clean", "random"]
    told = advdiff(*SUITE.split(), "--only", "pgd-short", "--json", code=1).err  # PGD has momentum now
    assert "pgd-short.safetensors was made with other settings (momentum unset -> 1.0)" in told
    assert {p: p.read_bytes() for p in Path("ladder").glob("*.safetensors")} == made


def test_a_sweep_is_not_computed_again(advdiff, folder):
    made = {p: p.read_bytes() for p in Path("sweep").glob("*.safetensors")}
    before = json.loads(Path("sweep/sweep.json").read_text())
    after = advdiff(*SWEEP.split(), "--json").json
    assert after["rows"] == before["rows"]
    assert after["recipe"] == before["recipe"]
    assert {p: p.read_bytes() for p in Path("sweep").glob("*.safetensors")} == made


def test_results_are_read(advdiff, folder):
    page = advdiff(*"report --result ddpm=evaluation.json --sweep sweep -o page -q".split()).out.strip()
    assert "t_star" in Path(page).read_text()
    assert "attack: " in advdiff("info", "through.safetensors").out
    shutil.copy("predictions.csv", "others.csv")
    assert advdiff("compare", "predictions.csv", "others.csv", "--json").json["comparisons"]
