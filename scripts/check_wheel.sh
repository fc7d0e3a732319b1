#!/usr/bin/env bash
# Build the wheel, install it into an empty environment, and run the demo there, away from the source tree.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git -C "$source" archive HEAD | tar -x -C "$work" --one-top-level=source   # without what earlier builds left
"${PYTHON:-python3}" -m venv "$work/env"
"$work/env/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$work/source"
rm -r "$work/source"
"$work/env/bin/python" -m pip install --quiet torch torchvision
"$work/env/bin/python" -m pip install --quiet "$work"/advdiff-*.whl
cd "$work"
"$work/env/bin/advdiff" demo -q
"$work/env/bin/advdiff" info advdiff-demo/adv.safetensors
test -s advdiff-demo/report.html
