"""Attack a defended classifier, which is a torch module from images in [0, 1] to logits, with foolbox and pyautoattack.

pip install foolbox pyautoattack
python examples/other_attack_libraries.py PATCHES.safetensors CLASSIFIER DDPM ADV.safetensors
advdiff evaluate PATCHES.safetensors ADV.safetensors --limit 4 -c CLASSIFIER -m DDPM --t-star 0.04

foolbox attacks the random defense, where each call draws fresh noise. Its images are written to ADV.safetensors, with
what `evaluate` needs to compare them with PATCHES in pairs. pyautoattack attacks it with fixed noise, since AutoAttack
judges a patch on one draw.
"""

import json
import sys

import foolbox
import torch
from pyautoattack import AutoAttack
from safetensors.torch import save_file

from advdiff_cli import DefendedClassifier, DiffusionPurifier
from advdiff_cli.data.patches import open_patches
from advdiff_cli.models.classifiers import read_classifier
from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.models.device import resolve_device
from advdiff_cli.models.registry import find_classifier, find_ddpm

EPS = 2 / 255

device = resolve_device("auto")
patches = open_patches(sys.argv[1]).first(4)
images = patches.read(range(len(patches))).to(device)
labels = torch.from_numpy(patches.require_labels()).to(device)
classifier = read_classifier(find_classifier(sys.argv[2])).requires_grad_(False)
ddpm = read_ddpm(find_ddpm(sys.argv[3])).requires_grad_(False)
defended = DefendedClassifier(DiffusionPurifier(ddpm, t_star=0.04, sampler_steps=1), classifier).to(device)

torch.manual_seed(0)  # calls without noise draw it from torch's global generator
attack = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=5)
_, adv, _ = attack(foolbox.PyTorchModel(defended, bounds=(0, 1), device=device), images, labels, epsilons=EPS)
correct = torch.stack([defended(adv).argmax(1) == labels for _ in range(5)]).float().mean()
print(f"foolbox PGD-5 through the defense: accuracy {correct:.2f} over 5 draws")
made = {"recipe": {"command": "foolbox LinfPGD", "parameters": {"eps": EPS, "steps": 5}}}
origins = torch.from_numpy(patches.origins())  # of the clean patches, by which `evaluate` matches rows
tensors = {"images": adv, "labels": labels, "index": torch.from_numpy(patches.index), "origin_sha256": origins}
save_file(tensors, sys.argv[4], metadata={"advdiff": json.dumps(made)})

noise = defended.noise(images[:1], rows=[0], seed=0, purpose="evaluate")
fixed = defended.fixed(noise)  # one draw for every image
# AutoAttack's standard version needs three classes, so attacks are named
library = AutoAttack(fixed, norm="Linf", eps=EPS, version="custom", attacks=["apgd-ce", "square"], device=device)
library.square.n_queries = 20
library.apgd.n_iter = 5
adv, _ = library.run_standard_evaluation(images, labels, batch_size=len(images))
print(f"pyautoattack on fixed noise: accuracy {(fixed(adv).argmax(1) == labels).float().mean():.2f}")
