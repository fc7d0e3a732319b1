"""Classifiers and diffusion models that others made, against what those others compute."""

import importlib
import json
import shutil
import sys

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import get_model

from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.datasets.synthetic import SyntheticSource
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.jobs.predict import predict
from advdiff_cli.models import external, registry
from advdiff_cli.models.card import DdpmCard, load_card
from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.models.fingerprint import folder_fingerprint

CPU = torch.device("cpu")


class Published(nn.Module):
    """TIAToolbox's CNNModel as its source describes it, softmax and all."""

    def __init__(self, backbone):
        super().__init__()
        options = {"aux_logits": False, "init_weights": False} if backbone == "googlenet" else {}
        network = get_model(backbone, weights=None, **options)
        if backbone == "googlenet":
            self.feat_extract = nn.Sequential(*list(network.children())[:-3])
        elif "resnet" in backbone:
            self.feat_extract = nn.Sequential(*list(network.children())[:-2])
        else:
            self.feat_extract = network.features
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Linear(self.feat_extract.eval()(torch.rand(2, 3, 96, 96)).shape[1], 2)

    def forward(self, images):
        return self.classifier(self.pool(self.feat_extract(images)).flatten(1)).softmax(-1)


def test_a_callables_fingerprint_leaves_out_advdiffs_own_sources(tmp_path, monkeypatch):
    for name in ("judge", "helper", "theirs/part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(f"name = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(external, "_PACKAGE", tmp_path / "theirs")
    alone = external.source_digest("judge:build")
    for name in ("theirs.part", "helper"):
        found = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, found)
        assert (external.source_digest("judge:build") == alone) == (name == "theirs.part")


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backbone", ["resnet18", "densenet121", "googlenet", "mobilenet_v3_small", "alexnet"])
def test_tiatoolbox_weights_give_its_softmaxs_logits(backbone, images, tmp_path):
    theirs = Published(backbone).eval()
    torch.save(theirs.state_dict(), tmp_path / f"{backbone}-pcam.pth")
    ours, _ = registry.load_frozen_classifier(str(tmp_path / f"{backbone}-pcam.pth"), CPU, allow_pickle=True)
    logits = ours(images)
    assert torch.allclose(logits.softmax(1), theirs(images), atol=1e-5)
    assert not torch.allclose(logits.sum(1), torch.ones(2))


def test_tiatoolboxs_own_module_where_it_is_installed(images, tmp_path):
    vanilla = pytest.importorskip("tiatoolbox.models.architecture.vanilla")
    theirs = vanilla.CNNModel("resnet18", num_classes=2).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18-pcam.pth")
    ours, _ = registry.load_frozen_classifier(str(tmp_path / "resnet18-pcam.pth"), CPU, allow_pickle=True)
    assert torch.allclose(ours(images).softmax(1), theirs(images), atol=1e-5)


def test_pickles_are_read_only_where_allowed_and_only_as_tensors(advdiff, test_x, tmp_path):
    state = Published("resnet18").state_dict()
    file = tmp_path / "resnet18-pcam.pth"
    torch.save(state, file)
    evaluate = ["evaluate", test_x, "-c", file, "--limit", 4]
    assert "holds pickled weights; give --allow-pickle" in advdiff(*evaluate, code=1).err
    pickled = advdiff(*evaluate, "--allow-pickle", "--json").json
    save_file(state, tmp_path / "resnet18-pcam.safetensors")
    evaluate[3] = tmp_path / "resnet18-pcam.safetensors"
    assert advdiff(*evaluate, "--json").json["sets"][0]["auroc"] == pickled["sets"][0]["auroc"]
    torch.save(Published("alexnet"), file)  # a whole module: code
    with pytest.raises(AdvdiffError, match="is not a file of weights only"):
        registry.load_frozen_classifier(str(file), CPU, allow_pickle=True)
    torch.save([1, 2], file)
    with pytest.raises(AdvdiffError, match="does not map names to weights"):
        registry.load_frozen_classifier(str(file), CPU, allow_pickle=True)
    save_file(state, tmp_path / "mine.safetensors")
    with pytest.raises(AdvdiffError, match=r"is not named as .* resnet101-pcam\.pth.* -c module:function \(five lines"):
        registry.load_frozen_classifier(str(tmp_path / "mine.safetensors"), CPU)
    save_file(state, tmp_path / "resnet34-pcam.safetensors")
    with pytest.raises(
        AdvdiffError, match=r"does not fit tiatoolbox:resnet34: .* tensors are missing.* -c module:function"
    ):
        registry.load_frozen_classifier(str(tmp_path / "resnet34-pcam.safetensors"), CPU)


def test_timms_folders_of_torchvision_networks_are_read(images, tmp_path):
    """As the Hub's copies of TIAToolbox's ResNets are laid out: timm's config.json, torchvision's names."""
    network = get_model("resnet18", num_classes=2).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    made = {"tag": "tiatoolbox-pcam", "mean": [0.1, 0.0, 0.0], "std": [1.0, 0.5, 1.0], "classifier": "fc"}
    config = {"architecture": "resnet18", "num_classes": 2, "num_features": 512, "pretrained_cfg": made}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, _ = registry.load_frozen_classifier(str(tmp_path), CPU)
    mean, std = torch.tensor(made["mean"]).view(3, 1, 1), torch.tensor(made["std"]).view(3, 1, 1)
    assert torch.allclose(ours(images), network((images - mean) / std), atol=1e-5)


MODULE = """
import time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, outputs, after=None):
        super().__init__()
        self.linear, self.after = nn.Linear(3, outputs), after or nn.Identity()
        self.linear.weight.data = torch.arange(3.0 * outputs).view(outputs, 3) - 2
        nn.init.zeros_(self.linear.bias)
    def forward(self, images):
        return self.after(self.linear(images.mean((2, 3))) * 9)

def two(): return Net(2)
def one(): return Net(1)
def flat(): return Net(1, nn.Flatten(0))
def softmax(): return Net(2, nn.Softmax(1))
def sigmoid(): return Net(1, nn.Sigmoid())
def three(): return Net(3)
def fixed(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
def nothing(): return 5
NUMBER = 5
def broken(): return 1 / 0
class Noisy(nn.Module):
    def forward(self, x): return x + torch.randn_like(x)
class Silent(nn.Module):
    def forward(self, x): assert x.shape[-1] == 224
def silent(): return Silent()
def noisy(): return Net(2, Noisy())
class Keeping(nn.Module):
    def forward(self, x):
        self.x = x.mean((2, 3))
        time.sleep(0.01)
        return self.x[:, :2].squeeze()
def keeping(): return Keeping()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the working directory, under a name of its own."""
    name = f"made_by_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_any_module_to_one_or_two_logits(module, images):
    two, mark = registry.load_frozen_classifier(f"{module}:two", CPU)
    assert torch.equal(two(images), two.module(images))
    assert two(images).shape == (2, 2)
    assert not any(p.requires_grad for p in two.parameters())
    for name in ("one", "flat"):
        single, other = registry.load_frozen_classifier(f"{module}:{name}", CPU)
        logits = single(images)
        assert torch.equal(logits[:, 1] - logits[:, 0], single.module(images).reshape(2))
        assert other != mark


def test_a_module_that_keeps_what_it_computes_is_judged_a_batch_at_a_time(module, threads):
    keeping, _ = registry.load_frozen_classifier(f"{module}:keeping", CPU)
    patches = PatchSet(SyntheticSource(130, 0))
    threads(4)
    logits = keeping(patches.read(range(130)))
    assert predict(keeping, patches, CPU)[:, 0] == pytest.approx(logits.softmax(1)[:, 1].numpy())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("softmax", "seems to return probabilities"),
        ("sigmoid", "seems to return probabilities"),
        ("three", r"returns \[12, 3\] for 12 patches"),
        ("fixed", "does not take patches"),
        ("silent", r"does not take patches .*\(AssertionError\)"),
        ("noisy", "returns different values for the same patches"),
        ("nothing", "returned int, not a torch module"),
        ("nowhere", "has no attribute 'nowhere'"),
        ("broken", r"made_by_\w+\.py, line \d+: ZeroDivisionError: division by zero"),
        ("NUMBER", "is int, not a callable"),
    ],
)
def test_what_is_no_module_to_logits_is_refused(module, name, says):
    with pytest.raises(AdvdiffError, match=says):
        registry.load_frozen_classifier(f"{module}:{name}", CPU)


def test_another_source_is_another_model(module, tmp_path):
    _, before = registry.load_frozen_classifier(f"{module}:two", CPU)
    (tmp_path / f"{module}.py").write_text(MODULE.replace("* 9", "* 8"))
    assert registry.load_frozen_classifier(f"{module}:two", CPU)[1] != before


@pytest.mark.parametrize("form", ["beside", "package", "namespace"])
def test_another_source_that_it_imports_is_another_model(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nets, user, stranger, package = (f"{k}_{tmp_path.name}" for k in ("nets", "user", "stranger", "package"))
    home, name = (tmp_path, user) if form == "beside" else (tmp_path / package, f"{package}.{user}")
    home.mkdir(exist_ok=True)
    if form == "package":
        (home / "__init__.py").touch()
    (home / f"{nets}.py").write_text(MODULE)
    (home / f"{stranger}.py").write_text("a = 1")
    (home / f"{user}.py").write_text(f"from {'' if form == 'beside' else '.'}{nets} import two")
    _, before = registry.load_frozen_classifier(f"{name}:two", CPU)
    (home / f"{stranger}.py").write_text("a = 2")
    assert registry.load_frozen_classifier(f"{name}:two", CPU)[1] == before
    (home / f"{nets}.py").write_text(MODULE.replace("* 9", "* 8"))
    assert registry.load_frozen_classifier(f"{name}:two", CPU)[1] != before


def test_commands_take_a_callable(advdiff, module, test_x, tmp_path):
    assert advdiff("evaluate", test_x, "-c", f"{module}:two", "--limit", 8, "--json").json["sets"][0]["n"] == 8
    attack = ["attack", test_x, "-c", f"{module}:one", "--limit", 4, "--steps", 1, "-o", tmp_path / "adv.h5"]
    advdiff(*attack)
    assert "up to date" in advdiff(*attack).err
    assert "made with other settings" in advdiff(*attack[:3], f"{module}:two", *attack[4:], code=1).err


HIDDEN = """
from pathlib import Path
import json
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = [torch.tensor(json.loads(Path("weights.json").read_text()))]
    def forward(self, images):
        return (images.mean((2, 3)) * self.kept[0]).sum(1) - float(Path("threshold.txt").read_text())

def build(): return Net()
"""


@pytest.mark.parametrize("changed", [("threshold.txt", "0.54"), ("weights.json", "[1.0, 0.0, 0.02]")])
def test_what_a_module_keeps_outside_its_parameters_is_part_of_it(changed, advdiff, test_x, tmp_path, monkeypatch):
    """Neither source nor parameters nor buffers change, but decisions do: all that exists is of the model before."""
    monkeypatch.chdir(tmp_path)
    name = f"hidden_{tmp_path.name}"
    for file, text in ((f"{name}.py", HIDDEN), ("threshold.txt", "0.5"), ("weights.json", "[1.0, 0.0, 0.0]")):
        (tmp_path / file).write_text(text)
    model, noise = ["-c", f"{name}:build"], ["--defense", "noise", "--t-star", 0.2]
    attack = ["attack", test_x, *model, "--limit", 4, "--method", "fgsm", "-o", "adv.h5"]
    certify = ["certify", test_x, *model, *noise, "--limit", 2, "--n0", 2, "--n", 8, "-o", "proved.csv"]
    evaluate = ["evaluate", test_x, *model, *noise, "--limit", 2, "--draws", 1, "--certificates", "proved.csv"]
    for command in (attack, certify):
        advdiff(*command)
        assert "up to date" in advdiff(*command).err
    advdiff(*evaluate)
    (tmp_path / changed[0]).write_text(changed[1])
    for command in (attack, certify):
        assert "was made with other settings (classifier" in advdiff(*command, code=1).err
    assert "is of another model" in advdiff(*evaluate, code=1).err


def test_rounding_does_not_make_another_model():
    answers = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)) * 40
    assert external._rounded(answers * (1 + 1e-7)) == external._rounded(answers)
    assert external._rounded(answers + 0.5) != external._rounded(answers)
    assert external._rounded(torch.zeros(12)) == "0 " + str([0] * 12)


def test_pickled_unets_are_read_only_where_allowed(ddpm, tmp_path):
    """The layout of the paper's repository: pickled weights and no card of ours."""
    shutil.copytree(ddpm, tmp_path / "m")
    weights = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(AdvdiffError, match=r"diffusion_pytorch_model\.bin holds pickled weights; give --allow-pickle"):
        read_ddpm(tmp_path / "m")
    ours, theirs = read_ddpm(ddpm), read_ddpm(tmp_path / "m", allow_pickle=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert folder_fingerprint(tmp_path / "m") == folder_fingerprint(ddpm)


def test_the_papers_model_is_known_by_its_name_on_the_hub(tmp_path):
    cached = tmp_path / "models--ankile--ddpm-pcam-96-flip" / "snapshots" / "abc"
    assert load_card(cached) == DdpmCard(data_range=(0.0, 1.0), index_offset=1)
    assert load_card(tmp_path) == DdpmCard()


def test_a_module_that_flattens_with_view_is_taken_as_it_is(tmp_path, monkeypatch, images):
    code = "import torch\nclass Flat(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    code += "        self.conv, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.LazyLinear(2)\n"
    code += "    def forward(self, x):\n        y = self.conv(x)\n        return self.head(y.view(len(y), -1))\n"
    code += "def build():\n    torch.manual_seed(0)\n    model = Flat()\n    model(torch.zeros(1, 3, 96, 96))\n"
    code += "    return model\n"
    (tmp_path / "flattening.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    model, _ = registry.load_frozen_classifier("flattening:build", CPU)
    assert model(images).shape == (2, 2)


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (
            ConnectionError("no route to host\nmore"),
            r"^nobody/model is neither .* fetched from the Hub \(no route to host\)$",
        ),
        (OSError(), r"fetched from the Hub \(OSError\)$"),
        (
            HFValidationError("no such name"),
            r"^no classifier is called nobody/model: .* does not have it \(no such name\)$",
        ),
    ],
)
def test_why_a_model_does_not_come_from_the_hub(problem, says, monkeypatch):
    def download(*_, **__):
        raise problem

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(AdvdiffError, match=says):
        registry.find_classifier("nobody/model")
