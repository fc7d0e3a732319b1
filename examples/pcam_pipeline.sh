#!/usr/bin/env bash
# The whole pipeline on real PCam patches: train a classifier and a DDPM, choose t* on valid, train the classifier on
# purified patches too, report on test.
#
#   examples/pcam_pipeline.sh PCAM_DIR OUT_DIR
#
# PCAM_DIR holds pcam/camelyonpatch_level_2_split_*.h5 (what `advdiff download-pcam` writes), and may hold lossless patches
# in images/lossless_train/{0,1} and images/lossless_valid/{0,1}: the train patches are mixed in, named twice, since real
# PCam files are lossless. Every step is cached: run it again and it goes on where it ended.
set -euo pipefail
shopt -s inherit_errexit
PCAM=$1 OUT=$2
: "${EPOCHS:=12}" "${STEPS:=4500}"         # classifier epochs, DDPM optimiser steps
: "${ADAPT_EPOCHS:=4}"                     # more epochs on train patches and on the same ones purified
: "${ADAPT_T_STARS:=0.2 0.25}"             # to these fractions of T
: "${VALID_N:=640}"                        # valid patches that choose t*
: "${T_STARS:=0.15 0.2 0.25 0.3}"          # fractions of T to choose from
: "${NOISE_T_STARS:=0.04 0.06 0.085 0.12}" # the same for NoiseDefense
: "${SAMPLER_STEPS:=1}"                    # U-Net evaluations a patch
: "${PRESET:=s2d2}" "${ARCH:=resnet18}" "${ATTACK_STEPS:=40}" "${TEST_N:=1000000}"
mkdir -p "$OUT"

split() { echo "$PCAM/pcam/camelyonpatch_level_2_split_$1_x.h5"; }
lossless=()
if [ -d "$PCAM/images/lossless_train" ]; then
    lossless=("$PCAM/images/lossless_train" "$PCAM/images/lossless_train")
fi

# 1. Two models, trained on the train split alone; valid chooses the classifier's epoch.
advdiff train-classifier "$(split train)" "${lossless[@]}" --valid "$(split valid)" -o "$OUT/classifier" \
    --arch "$ARCH" --epochs "$EPOCHS" ${CLASSIFIER_OPTIONS:-}
advdiff train-ddpm "$(split train)" "${lossless[@]}" --valid "$(split valid)" -o "$OUT/ddpm" \
    --preset "$PRESET" --max-t 0.3 --steps "$STEPS" ${DDPM_OPTIONS:-}

# 2. t* is chosen on valid: the best mean of the accuracy on purified clean and on purified attacked patches.
rows=(--shuffle-seed 1 --limit "$VALID_N")
attack=(--eps 2/255 --steps "$ATTACK_STEPS")
attack_valid() { # CLASSIFIER
    advdiff attack "$(split valid)" "${rows[@]}" -c "$1" "${attack[@]}" -o "$1-valid-adv.safetensors"
}
choose() { # NAME CLASSIFIER T_STARS DEFENCE...: prints the best t*
    local name=$1 classifier=$2 grid=$3 best=-1 chosen t mean clean adv
    shift 3
    for t in $grid; do
        clean="$OUT/valid-clean-$name-$t.safetensors" adv="$classifier-valid-adv-$name-$t.safetensors"
        advdiff purify "$(split valid)" "${rows[@]}" "$@" --t-star "$t" -o "$clean" -q >&2
        advdiff purify "$classifier-valid-adv.safetensors" "$@" --t-star "$t" -o "$adv" -q >&2
        mean=$(advdiff evaluate "$clean" "$adv" -c "$classifier" -q | awk '{ sum += $1 } END { print sum / NR }')
        echo "valid, n = $VALID_N, $classifier, $name: t* $t, mean of clean and attacked accuracy $mean" >&2
        if awk "BEGIN { exit !($mean > $best) }"; then best=$mean chosen=$t; fi
    done
    echo "$chosen"
}
ddpm=(-m "$OUT/ddpm" --sampler-steps "$SAMPLER_STEPS")
attack_valid "$OUT/classifier"
echo "before adapting, chosen on valid: t* $(choose ddpm "$OUT/classifier" "$T_STARS" "${ddpm[@]}")" >&2

# 3. The classifier sees purified patches too, and t* is chosen again.
purified=()
for t in $ADAPT_T_STARS; do
    purified+=("$OUT/train-$t.h5")
    advdiff purify "$(split train)" -m "$OUT/ddpm" --t-star "$t" --sampler-steps 1 -o "$OUT/train-$t.h5" -q
done
advdiff train-classifier "$(split train)" "${lossless[@]}" "${purified[@]}" --valid "$(split valid)" \
    --arch "$ARCH" --init "$OUT/classifier" -o "$OUT/adapted" --epochs "$ADAPT_EPOCHS" --learning-rate 5e-4 ${CLASSIFIER_OPTIONS:-}
attack_valid "$OUT/adapted"
chosen=$(choose ddpm "$OUT/adapted" "$T_STARS" "${ddpm[@]}")
noise=$(choose noise "$OUT/adapted" "$NOISE_T_STARS" --defense noise)
echo "chosen on valid: t* $chosen; NoiseDefense t* $noise" >&2
python - "$OUT/ddpm" "$chosen" "$SAMPLER_STEPS" <<'PY' # what `advdiff purify -m` takes as its default from here on
import sys
from pathlib import Path
from advdiff_cli.models.ddpm import Purification, recommend
recommend(Path(sys.argv[1]), Purification(float(sys.argv[2]), "ddpm", int(sys.argv[3])))
PY

# 4. Reported on test, and on lossless patches where they are (those share slides with train).
report() {
    local name=$1 data=$2
    shift 2
    advdiff attack "$data" "$@" -c "$OUT/adapted" "${attack[@]}" -o "$OUT/$name-adv.safetensors"
    for kind in clean adv; do
        local from=$data select=("$@")
        if [ "$kind" = adv ]; then from=$OUT/$name-adv.safetensors select=(); fi
        advdiff purify "$from" "${select[@]}" --defense noise --t-star "$noise" -o "$OUT/$name-$kind-noise.safetensors" -q
        advdiff purify "$from" "${select[@]}" "${ddpm[@]}" --t-star "$chosen" \
            -o "$OUT/$name-$kind-ddpm.safetensors" -q
    done
    advdiff evaluate "$data" "$OUT/$name"-{adv,clean-noise,adv-noise,clean-ddpm,adv-ddpm}.safetensors "$@" \
        -c "$OUT/adapted" --predictions "$OUT/$name.csv" --json >"$OUT/$name.json"
    advdiff evaluate "$data" "$OUT/$name"-{adv,clean-noise,adv-noise,clean-ddpm,adv-ddpm}.safetensors "$@" \
        -c "$OUT/adapted"
}
report test "$(split test)" --shuffle-seed 0 --limit "$TEST_N"
if [ -d "$PCAM/images/lossless_valid" ]; then
    report lossless "$PCAM/images/lossless_valid" --shuffle-seed 0 --limit "$TEST_N"
fi
