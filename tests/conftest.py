"""Real patches from $ADVDIFF_TEST_PCAM where it is set, synthetic tissue otherwise; small models of random weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork of a process with a pool of threads waits for ever

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from warm import client

from advdiff_cli.data.provenance import recipe
from advdiff_cli.datasets.synthetic import SyntheticSource
from advdiff_cli.main import main
from advdiff_cli.models.classifier_config import ClassifierConfig
from advdiff_cli.models.classifiers import Classifier, save_classifier
from advdiff_cli.models.ddpm import build_ddpm, save_ddpm
from advdiff_cli.models.device import resolve_device

PCAM = os.environ.get("ADVDIFF_TEST_PCAM")
N = 40


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="Where tests and commands compute.")


def pytest_configure(config):
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # commands take the best device that they see
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")


def pytest_collection_modifyitems(config, items):
    """Run slow tests first, so that processes which share the tests end together; skip those of the other device."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    other = {"cpu": "cuda", "cuda": "cpu"}[config.getoption("--device")]
    for item in items:
        if item.get_closest_marker(other):
            item.add_marker(pytest.mark.skip(reason=f"is about a device of kind {other}"))


@pytest.fixture(scope="session")
def device(request):
    """Where to compute: --device, set up as commands set it up."""
    return resolve_device(request.config.getoption("--device"))


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def advdiff(capsys, monkeypatch):
    """Run the command line in this process, as `main()` does."""

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["advdiff", *map(str, arguments)])
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        try:
            main()
            ended = 0
        except SystemExit as e:
            ended = e.code or 0
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        printed = capsys.readouterr()
        assert code in (ended, None), f"exit {ended}: {printed.err or printed.out}"
        return Result(ended, printed.out, printed.err)

    return run


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A cache folder of the tests, so that they neither find nor leave results in the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def warm(own_cache, request):
    """An environment whose `advdiff` has its imports behind it, for scripts of many commands; see warm.py."""
    folder = Path(tempfile.mkdtemp(prefix="advdiff"))  # a socket's path must be short
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    if request.config.getoption("--device") == "cuda":  # which does not survive a fork
        (folder / "advdiff").write_text(f"#!{sys.executable}\nfrom advdiff_cli.main import main\nmain()\n")
        (folder / "advdiff").chmod(0o755)
        yield {**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).parent.parent)}
        shutil.rmtree(folder)
        return
    command = [sys.executable, str(Path(__file__).parent / "warm.py"), "serve", str(folder / "socket")]
    server = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    (folder / "advdiff").write_text(client(folder / "socket"))
    (folder / "advdiff").chmod(0o755)
    while not (folder / "socket").exists():
        assert server.poll() is None
        time.sleep(0.05)
    yield {**os.environ, "PATH": path}
    server.terminate()
    server.wait()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def patches(tmp_path_factory):
    """The layouts of PCam: <root>/pcam/*.h5 and <root>/images/<split>/{0,1}/*, N patches of each split."""
    root = tmp_path_factory.mktemp("patches")
    if PCAM:
        build = [sys.executable, str(Path(PCAM) / "build.py"), str(root), "--limit", str(N), "--gz"]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    else:
        _synthesize(root)
    return root


def _synthesize(root):
    (root / "pcam").mkdir()
    for seed, split in enumerate(("train", "valid", "test")):
        source = SyntheticSource(N, seed)
        images = source.read(np.arange(N)).transpose(0, 2, 3, 1)
        arrays = {"x": images, "y": source.labels.astype(np.uint8).reshape(-1, 1, 1, 1)}
        for key, array in arrays.items():
            file = root / "pcam" / f"camelyonpatch_level_2_split_{split}_{key}.h5"
            with h5py.File(file, "w") as h5:
                h5.create_dataset(key, data=array, chunks=(16, *array.shape[1:]))
            subprocess.run(["gzip", "-1", "-k", str(file)], check=True)
        for i, (image, label) in enumerate(zip(images, source.labels, strict=True)):
            folder = root / "images" / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"patch{i:07}.jpg", quality=90)
    for kind in ("lossless_train", "lossless_valid"):
        for i, (image, label) in enumerate(zip(images[:12], source.labels[:12], strict=True)):
            folder = root / "images" / kind / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{kind}{i}.tif")


@pytest.fixture
def threads():
    """Set the number of torch's threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def test_x(patches):
    return patches / "pcam" / "camelyonpatch_level_2_split_test_x.h5"


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """A small classifier of random weights, made sure enough of itself for an attack to turn it."""
    folder = tmp_path_factory.mktemp("models") / "classifier"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(ClassifierConfig("squeezenet1_1", (0.7, 0.55, 0.7), (0.2, 0.25, 0.2)))
    save_classifier(model, folder, {"recipe": recipe("test", {})})
    return folder


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory):
    """A small diffusion model of random weights, trained (it says) up to t = 0.3."""
    folder = tmp_path_factory.mktemp("models") / "ddpm"
    save_ddpm(build_ddpm("tiny", 96, 0.3, 0), folder)
    return folder


@pytest.fixture
def copy(tmp_path):
    """Copy a file into this test's folder."""
    return lambda path, name=None: Path(shutil.copy(path, tmp_path / (name or Path(path).name)))
