"""Attack a defended classifier with foolbox and pyautoattack: it is a plain module, images in [0, 1] to logits.

pip install foolbox 'advdiff[autoattack]'
python examples/other_attack_libraries.py PATCHES.safetensors CLASSIFIER DDPM

A randomised defence is given to foolbox as it is (each call draws fresh noise), and to pyautoattack with its noise
frozen: AutoAttack judges a patch on one draw, which is only fair where there is but one.
"""

import sys

import foolbox
import torch
from pyautoattack import AutoAttack

from advdiff_cli.data.patches import open_patches
from advdiff_cli.models.classifiers import load_classifier
from advdiff_cli.models.ddpm import load_ddpm
from advdiff_cli.models.registry import find_classifier, find_ddpm
from advdiff_cli.purification import DefendedClassifier, DiffusionPurifier

EPS = 2 / 255

patches = open_patches(sys.argv[1]).first(4)
images, labels = patches.read(range(len(patches))), torch.from_numpy(patches.require_labels())
classifier = load_classifier(find_classifier(sys.argv[2])).requires_grad_(False)
ddpm = load_ddpm(find_ddpm(sys.argv[3])).requires_grad_(False)
defended = DefendedClassifier(DiffusionPurifier(ddpm, t_star=0.04, sampler_steps=1), classifier).eval()

torch.manual_seed(0)  # the noise of calls with images alone comes from torch's global stream
attack = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=5)
_, adv, _ = attack(foolbox.PyTorchModel(defended, bounds=(0, 1)), images, labels, epsilons=EPS)
right = torch.stack([defended(adv).argmax(1) == labels for _ in range(5)]).float().mean()
print(f"foolbox PGD-5 through the defence: accuracy {right:.2f} over 5 draws")

noise = defended.noise(images[:1], rows=[0], seed=0, purpose="evaluate")
fixed = defended.fixed(noise)  # one draw for every image
# two classes: AutoAttack's own versions need three or more, so its attacks are named
library = AutoAttack(fixed, norm="Linf", eps=EPS, version="custom", attacks=["apgd-ce", "square"], device="cpu")
library.square.n_queries = 20
library.apgd.n_iter = 5
adv, _ = library.run_standard_evaluation(images, labels, batch_size=len(images))
print(f"pyautoattack on frozen noise: accuracy {(fixed(adv).argmax(1) == labels).float().mean():.2f}")
