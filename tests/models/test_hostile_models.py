"""Model folders that lie: loaded, or refused in one line that names a file; never executed or allocated for."""

import json
import os
import shutil
import traceback
from functools import partial

import pytest
from confined import ends
from hypothesis import given, settings
from hypothesis import strategies as st

from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models import registry
from advdiff_cli.models.classifiers import read_classifier
from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.models.fingerprint import folder_fingerprint

NASTY = [None, True, -1, 0, 3, 10**12, 1e308, float("nan"), "x", "../../../etc/passwd", [], [0, 0, 0], {}, {"a": 1}]
CLASSIFIER = ["config.json"]
DDPM = ["advdiff.json", "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"]


def places(value, path=()):
    """Yield the path of every value in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from places(below, (*path, key))


def replaced(document, path, value):
    if not path:
        return value
    changed = json.loads(json.dumps(document))
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def attempt(folder, load):
    try:
        load(folder)
        folder_fingerprint(folder), registry.recorded_provenance(folder)
    except AdvdiffError as e:
        return "refused" if str(folder) in str(e) and "\n" not in str(e) else f"does not name the file: {e}"
    except BaseException:
        return traceback.format_exc()
    return "loaded"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "file"), [*(("c", f) for f in CLASSIFIER), *(("d", f) for f in DDPM)])
def test_a_config_that_lies(kind, file, classifier, ddpm, tmp_path):
    folder, load = tmp_path / kind, read_classifier if kind == "c" else read_ddpm
    shutil.copytree(classifier if kind == "c" else ddpm, folder)
    document, seen = json.loads((folder / file).read_text()), set()
    assert attempt(folder, load) == "loaded"

    @settings(max_examples=int(os.environ.get("ADVDIFF_FUZZ", "15")), deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(list(places(document))), st.sampled_from(NASTY))
    def run(path, value):
        (folder / file).write_text(json.dumps(replaced(document, path, value)))
        told = ends(lambda: attempt(folder, load))
        assert told in ("loaded", "refused"), told
        seen.add(told)

    run()
    assert "refused" in seen or file == "model_index.json"


@pytest.mark.parametrize("text", ["", "[", "[" * 200_000, "7", "\0\0", '{"a":', b'{"a": "\xff"}'])
def test_a_config_that_is_none(text, classifier, ddpm, tmp_path):
    for kind, source, files, load in (("c", classifier, CLASSIFIER, read_classifier), ("d", ddpm, DDPM[:3], read_ddpm)):
        for file in files:
            folder = tmp_path / f"{kind} {file.replace('/', ' ')}"
            shutil.copytree(source, folder)
            (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
            assert ends(partial(attempt, folder, load)) == "refused", file


@pytest.mark.parametrize("arch", ["vit_h_14", "regnet_y_128gf", "tiatoolbox:vit_h_14"])
def test_a_small_file_of_weights_builds_no_large_network(arch, classifier, tmp_path):
    """632 and 645 million parameters, 2.4 GiB, for a file of 0.7 million."""
    folder = tmp_path / "large"
    shutil.copytree(classifier, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "arch": arch}))
    assert ends(partial(attempt, folder, read_classifier), memory=1 << 30) == "refused"
    with pytest.raises(AdvdiffError, match=r"the file holds \d+ numbers, and the network has more"):
        read_classifier(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "file"), [("c", "model.safetensors"), ("d", "unet/diffusion_pytorch_model.safetensors")]
)
def test_weights_that_lie(kind, file, classifier, ddpm, tmp_path):
    folder, load = tmp_path / kind, read_classifier if kind == "c" else read_ddpm
    shutil.copytree(classifier if kind == "c" else ddpm, folder)
    whole, seen = (folder / file).read_bytes(), set()
    header = 8 + int.from_bytes(whole[:8], "little")

    @settings(max_examples=int(os.environ.get("ADVDIFF_FUZZ", "15")), deadline=None, derandomize=True, database=None)
    @given(st.integers(0, header - 1), st.integers(0, 255), st.booleans())
    def run(at, value, cut):
        changed = bytearray(whole)
        changed[at] = value
        (folder / file).write_bytes(changed[: len(whole) - 7] if cut else changed)
        told = ends(lambda: attempt(folder, load))
        assert told in ("loaded", "refused"), told
        seen.add(told)

    run()
    assert "refused" in seen


@pytest.mark.parametrize(
    ("key", "value"),
    [("layers_per_block", 20_000), ("block_out_channels", [16, 32, 10**6]), ("num_class_embeds", 10**12)],
)
def test_a_configuration_that_the_weights_do_not_warrant(key, value, ddpm, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(ddpm, folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(AdvdiffError, match="describes a larger U-Net than"):
        read_ddpm(folder)
