#!/usr/bin/env bash
# Reproduce the paper on PCam: train every model, choose every setting on valid, make Figures 1 to 3 on test, write one report.
#
#   examples/reproduce_paper.sh PCAM_DIR OUT_DIR
#
# PCAM_DIR holds pcam/camelyonpatch_level_2_split_*.h5, as written by `advdiff download-pcam`. It may also hold lossless patches
# in images/lossless_train/{0,1}; they count twice in training, since PCam's own files are lossless. Models and patch sets are
# kept in OUT_DIR: after an interruption the same command resumes, and only repeats evaluations. On a GPU, with the whole data
# set, raise EPOCHS, STEPS, N and TEST_N. A variable with the name of a model in capitals replaces the training of that model
# with a model of yours or a bundled one: PLAIN=pcam-resnet18 DDPM=pcam-ddpm ADAPTED=pcam-resnet18-adapted.
set -euo pipefail
shopt -s inherit_errexit
PCAM=$1 OUT=$2
: "${ARCH:=resnet18}" "${ROBUST_ARCH:=googlenet}"  # the classifier, and the one trained adversarially (the paper's)
: "${EPOCHS:=12}" "${STEPS:=12000}" "${PRESET:=tiny}" # classifier epochs, DDPM optimizer steps and size
: "${MORE_EPOCHS:=4}"                              # of the classifiers that are fine-tuned from the plain one
: "${NOISE:=0.085}"                                # t* of the noise that one of them is trained with
: "${ADAPT_T_STARS:=0.2 0.25}"                     # t* of the purified patches that another is trained with
: "${T_STARS:=0.001,0.005,0.01,0.02,0.04,0.06,0.085,0.1,0.15,0.2,0.25,0.3}" # Figure 1
: "${TRAINING_STEPS:=500 1500}"                    # of the DDPMs that show the effect of longer training
: "${SAMPLER_STEPS:=1}"                            # U-Net evaluations a patch; the paper's 40 is `--t-star 0.04` with all
: "${N:=500}" "${TEST_N:=1000}"                    # patches of valid for choices, and of test for results
: "${ATTACK_STEPS:=40}" "${EOT:=8}" "${DRAWS:=11}"
: "${ADAPTIVE_N:=128}" "${ADAPTIVE_STEPS:=40}"      # patches of test attacked through the diffusion model
: "${QUERIES:=500}"                                # of Square
: "${OTHER_ARCHS:=googlenet mobilenet_v2}"         # classifiers to be defended by the same purifier
: "${CLASSIFIER_OPTIONS:=}" "${DDPM_OPTIONS:=}" "${ADVERSARIAL_OPTIONS:=}" "${ATTACK_OPTIONS:=}" # such as --batch-size 64
mkdir -p "$OUT"
split() { echo "$PCAM/pcam/camelyonpatch_level_2_split_$1_x.h5"; }
lossless=()
if [ -d "$PCAM/images/lossless_train" ]; then
    lossless=("$PCAM/images/lossless_train" "$PCAM/images/lossless_train")
fi

# 1. The models, on the train split alone; valid chooses each classifier's epoch.
model() { # NAME: prints where the model called NAME is
    local given=${1^^}
    echo "${!given:-$OUT/$1}"
}
classifier() { # NAME ARCH EPOCHS OPTIONS...
    local name=$1 arch=$2 epochs=$3
    shift 3
    [ "$(model "$name")" = "$OUT/$name" ] || return 0
    advdiff train-classifier "$(split train)" "${lossless[@]}" --valid "$(split valid)" -o "$OUT/$name" --arch "$arch" \
        --epochs "$epochs" "$@" $CLASSIFIER_OPTIONS
}
classifier plain "$ARCH" "$EPOCHS"
diffusion() { # NAME STEPS
    [ "$(model "$1")" = "$OUT/$1" ] || return 0
    advdiff train-ddpm "$(split train)" "${lossless[@]}" --valid "$(split valid)" -o "$OUT/$1" --preset "$PRESET" \
        --max-t 0.3 --steps "$2" $DDPM_OPTIONS
}
diffusion ddpm "$STEPS"
more=(--init "$(model plain)" --learning-rate 5e-4)
classifier noised "$ARCH" "$MORE_EPOCHS" "${more[@]}" --augment "noise:$NOISE"
adapt=(--augment none)
for t in $ADAPT_T_STARS; do adapt+=(--augment "purify:$(model ddpm):$t:$SAMPLER_STEPS"); done
classifier adapted "$ARCH" "$MORE_EPOCHS" "${more[@]}" "${adapt[@]}"
classifier "$ROBUST_ARCH" "$ROBUST_ARCH" "$EPOCHS"
classifier robust "$ROBUST_ARCH" "$MORE_EPOCHS" --init "$(model "$ROBUST_ARCH")" --learning-rate 5e-4 --adversarial $ADVERSARIAL_OPTIONS

# 2. t*, chosen on valid (Figure 1): by the best mean of standard and robust accuracy.
choose() { # NAME CLASSIFIER OPTIONS...: prints the chosen value
    local name=$1 judge=$2
    shift 2
    advdiff sweep "$(split valid)" -c "$(model "$judge")" --limit "$N" --shuffle-seed 1 --steps "$ATTACK_STEPS" \
        -o "$OUT/sweep-$name" --draws "$DRAWS" "$@" $ATTACK_OPTIONS -q
}
ddpm=(-m "$(model ddpm)" --sampler-steps "$SAMPLER_STEPS")
t_noise=$(choose noise plain --values "$T_STARS" --defense noise)
t_noised=$(choose noised noised --values "$T_STARS" --defense noise)
t_frozen=$(choose frozen plain --values "$T_STARS" "${ddpm[@]}")
t_ddpm=$(choose ddpm adapted --values "$T_STARS" "${ddpm[@]}")
echo "chosen on valid: NoiseDefense t* $t_noise, with its own classifier $t_noised; DDPM t* $t_frozen, adapted $t_ddpm" >&2

# 3. Standard and robust accuracy on test (Figure 3). The attack of the paper knows only the classifier (blind). Adaptive attacks
# differentiate through the defense, with the mean gradient of EOT draws, and are evaluated over DRAWS other draws.
test=("$(split test)" --shuffle-seed 0 --limit "$TEST_N")
few=("$(split test)" --shuffle-seed 0 --limit "$ADAPTIVE_N")
attack() { # NAME CLASSIFIER OPTIONS...
    local name=$1 judge=$2
    shift 2
    advdiff attack "${rows[@]}" -c "$(model "$judge")" "$@" $ATTACK_OPTIONS -o "$OUT/adv-$name.safetensors" -q >&2
}
measure() { # NAME ATTACKED CLASSIFIER DEFENSE...
    local name=$1 adv=$2 judge=$3
    shift 3
    advdiff evaluate "${rows[@]}" "$OUT/adv-$adv.safetensors" -c "$(model "$judge")" "$@" --json \
        --predictions "$OUT/$name.csv" >"$OUT/$name.json.part"
    mv "$OUT/$name.json.part" "$OUT/$name.json"
}
pgd=(--steps "$ATTACK_STEPS") through=(--steps "$ADAPTIVE_STEPS") one=(--draws 1) many=(--draws "$DRAWS")
frozen=("${ddpm[@]}" --t-star "$t_frozen") adapted=("${ddpm[@]}" --t-star "$t_ddpm")
noise=(--defense noise --t-star "$t_noise") noised=(--defense noise --t-star "$t_noised")
rows=("${test[@]}")
for judge in plain adapted robust; do attack "$judge" "$judge" "${pgd[@]}"; done
attack paper plain --method paper
attack noise plain "${pgd[@]}" "${noise[@]}" --eot "$EOT"
attack noised noised "${pgd[@]}" "${noised[@]}" --eot "$EOT"
measure undefended plain plain
measure undefended-paper paper plain
measure noise-blind plain plain "${noise[@]}" "${many[@]}"
measure noise noise plain "${noise[@]}" "${many[@]}"
measure noised noised noised "${noised[@]}" "${many[@]}"
measure robust robust robust
measure frozen plain plain "${frozen[@]}" "${one[@]}"
measure paper paper plain "${frozen[@]}" "${one[@]}"
measure adapted adapted adapted "${adapted[@]}" "${one[@]}"
rows=("${few[@]}")
attack frozen-full plain "${through[@]}" "${frozen[@]}" --eot "$EOT"
attack adapted-full adapted "${through[@]}" "${adapted[@]}" --eot "$EOT"
measure frozen-full frozen-full plain "${frozen[@]}" "${many[@]}"
measure adapted-full adapted-full adapted "${adapted[@]}" "${many[@]}"

# 4. The claims of the paper. One frozen purifier in front of classifiers of other architectures:
for arch in $OTHER_ARCHS; do
    classifier "$arch" "$arch" "$EPOCHS"
    rows=("${test[@]}")
    attack "$arch" "$arch" "${pgd[@]}"
    measure "$arch" "$arch" "$arch"
    measure "$arch-ddpm" "$arch" "$arch" "${frozen[@]}" "${one[@]}"
done
# Adversarial training and the purifier under attacks that neither was trained against:
other() { # NAME OPTIONS...
    local name=$1
    shift
    rows=("${few[@]}")
    attack "robust-$name" robust "$@"
    measure "robust-$name" "robust-$name" robust
    attack "adapted-$name" adapted "$@" "${adapted[@]}" --eot "$EOT"
    measure "adapted-$name" "adapted-$name" adapted "${adapted[@]}" "${many[@]}"
}
other eps-4 "${through[@]}" --eps 4/255
other eps-8 "${through[@]}" --eps 8/255
other l2 "${through[@]}" --norm l2 --eps 0.5
other square --method square --queries "$QUERIES"

# 5. How faithful purified patches are.
advdiff purify "${test[@]}" "${adapted[@]}" -o "$OUT/purified.safetensors" -q >&2
advdiff evaluate "${test[@]}" "$OUT/purified.safetensors" -c "$(model adapted)" --fidelity | tee "$OUT/fidelity.txt"

# 6. Its open questions, on valid: other balls; more steps of the same t*; whether more training lets it purify more noise.
trained=
for steps in $TRAINING_STEPS; do
    diffusion "ddpm_$steps" "$steps"
    trained+="$(model "ddpm_$steps"),"
done
{
    choose eps adapted --over eps "${adapted[@]}"
    choose eps-l2 adapted --over eps --norm l2 --values 0.125,0.25,0.5,1,2 "${adapted[@]}"
    choose sampler-steps plain --over sampler-steps --values 1,2,4,8,40 -m "$(model ddpm)" --t-star 0.25
    for t in 0.2 0.3; do
        choose "training-$t" plain --over ddpm --values "$trained$(model ddpm)" --t-star "$t" --sampler-steps "$SAMPLER_STEPS"
    done
} >/dev/null

# 7. One table of everything, and one page with the most informative patches (Figure 2).
python - "$OUT"/*.json <<'PY'
import json, sys
from pathlib import Path
print(f"{'n, % [95 %]':24}{'standard':>24}{'robust':>24}")
for path in sorted(map(Path, sys.argv[1:])):
    sets = json.loads(path.read_text())["sets"]
    cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*(100 * s["accuracy"][k] for k in ("value", "low", "high"))) for s in sets]
    print(f"{path.stem:18}{sets[1]['n']:6}{cells[0]:>24}{cells[1]:>24}")
PY
# Paired comparisons on the shared patches, each model under its own attack; then the purifier under the attack of the paper:
advdiff compare "$OUT"/{undefended,noise,noised,robust,frozen-full,adapted-full}.csv | tee "$OUT/compare.txt"
advdiff compare "$OUT"/{undefended,noise,robust,frozen,adapted}.csv | tee "$OUT/compare-blind.txt"
result() { results+=(--result "$2=$OUT/$1.json"); }
results=() sweeps=()
result undefended "undefended"
result noise-blind "NoiseDefense, blind"
result noise "NoiseDefense, white-box"
result noised "NoiseDefense, own classifier, white-box"
result robust "adversarial training, white-box"
result frozen "DDPM, blind"
result frozen-full "DDPM, white-box"
result adapted "DDPM adapted, blind"
result adapted-full "DDPM adapted, white-box"
curve() { sweeps+=(--sweep "$2=$OUT/sweep-$1"); }
curve noise "NoiseDefense"
curve noised "NoiseDefense, own classifier"
curve frozen "DDPM"
curve ddpm "DDPM adapted"
curve eps "DDPM adapted, l-inf"
curve eps-l2 "DDPM adapted, l2"
curve sampler-steps "DDPM, t* 0.25"
for t in 0.2 0.3; do curve "training-$t" "DDPM, t* $t"; done
advdiff report "${results[@]}" "${sweeps[@]}" --clean "$(split test)" \
    --attacked "$OUT/adv-adapted.safetensors" -c "$(model adapted)" "${adapted[@]}" -o "$OUT/report"
