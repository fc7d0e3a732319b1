#!/usr/bin/env bash
# Make the tables of docs/results.md and docs/experiments.md that use the bundled models.
#
#   benchmarks/results.sh PCAM_DIR OUT_DIR [SECTION...]
#
# Sections are blind unseen choose suite certificates steps sampler paper, and all are made by default. PCAM_DIR holds
# pcam/camelyonpatch_level_2_split_*_x.h5, and may hold images/lossless_{train,valid}. Results stay in OUT_DIR; after an
# interruption, the same command resumes. Sections can run in parallel with one thread each (OMP_NUM_THREADS=1), except for
# `blind`, `unseen` and `steps`, which write the same files. A step writes its figures to OUT_DIR/NAME.json; a sweep and an attack suite
# write a folder.
set -euo pipefail
shopt -s inherit_errexit
PCAM=$1 OUT=$2
shift 2
mkdir -p "$OUT"
split=$PCAM/pcam/camelyonpatch_level_2_split
TRAIN=${split}_train_x.h5 VALID=${split}_valid_x.h5 TEST=${split}_test_x.h5
LOSSLESS=$PCAM/images/lossless_valid
training=("$TRAIN")
[ ! -d "$PCAM/images/lossless_train" ] || training+=("$PCAM"/images/lossless_train{,})
frozen=(-c pcam-resnet18 -m pcam-ddpm) adapted=(-c pcam-resnet18-adapted -m pcam-ddpm)

evaluate() { # NAME SETS AND OPTIONS...
    local name=$1
    shift
    advdiff evaluate "$@" --json >"$OUT/$name.json.part"
    mv "$OUT/$name.json.part" "$OUT/$name.json"
}
purify() { advdiff purify "$1" -o "$OUT/$2.safetensors" -q "${@:3}"; } # SET NAME OPTIONS...

blind() { # the attack knows only the classifier
    local set
    for set in test lossless; do
        local data=$TEST
        [ $set = test ] || data=$LOSSLESS
        [ $set = test ] || [ -d "$data" ] || continue
        local adv=$OUT/$set-adv.safetensors
        advdiff attack "$data" -c pcam-resnet18 -o "$adv" -q
        local t ddpm=()
        for t in 0.2 0.25; do
            purify "$data" $set-clean-$t --t-star $t
            purify "$adv" $set-adv-$t --t-star $t
            ddpm+=("$OUT"/$set-{clean,adv}-$t.safetensors)
        done
        purify "$data" $set-clean-noise --defense noise --t-star 0.085
        purify "$adv" $set-adv-noise --defense noise --t-star 0.085
        evaluate $set-blind "$data" "$adv" "${ddpm[@]}" "$OUT"/$set-{clean,adv}-noise.safetensors -c pcam-resnet18
        evaluate $set-votes "$data" "$adv" "${frozen[@]}" --t-star 0.2 --draws 11 --predictions "$OUT/$set-votes.csv"
    done
}

unseen() { # the attack knows only a classifier that the purifier was not trained with
    local arch set
    for arch in shufflenet_v2_x1_0 mobilenet_v3_small squeezenet1_1; do
        advdiff train-classifier "${training[@]}" --valid "$VALID" --arch $arch --epochs 4 -o "$OUT/$arch" -q
        for set in test lossless; do
            local data=$TEST adv=$OUT/$arch-$set-adv.safetensors
            [ $set = test ] || data=$LOSSLESS
            [ -e "$data" ] || continue
            advdiff attack "$data" -c "$OUT/$arch" -o "$adv" -q
            purify "$data" $set-clean-0.2 --t-star 0.2
            purify "$adv" $arch-$set-purified --t-star 0.2
            evaluate $arch-$set "$data" "$adv" "$OUT"/{$set-clean-0.2,$arch-$set-purified}.safetensors -c "$OUT/$arch"
        done
    done
}

choose() { # t*, on valid and lossless patches: blind, and under an attack through the purification
    local some=(--over t-star --shuffle-seed 1 --sampler-steps 1)
    advdiff sweep "$VALID" "${some[@]}" "${frozen[@]}" --values 0.1,0.15,0.2,0.25,0.3 --limit 512 --steps 20 --draws 1 \
        -o "$OUT/choose-blind" -q
    advdiff sweep "$VALID" "${some[@]}" "${frozen[@]}" --values 0.15,0.2,0.25,0.3 --limit 256 --gradient full --steps 10 --eot 4 \
        --draws 11 -o "$OUT/choose-frozen" -q
    local through=(--values 0.1,0.15,0.2,0.25 --limit 256 --gradient full --steps 10 --eot 2 --draws 5 --rule robust --max-drop 3)
    advdiff sweep "$VALID" "${some[@]}" "${adapted[@]}" "${through[@]}" -o "$OUT/choose-adapted" -q
    [ -d "$LOSSLESS" ] || return 0
    advdiff sweep "$LOSSLESS" "${some[@]}" "${frozen[@]}" "${through[@]}" -o "$OUT/choose-frozen-lossless" -q
    advdiff sweep "$LOSSLESS" "${some[@]}" "${adapted[@]}" "${through[@]}" -o "$OUT/choose-adapted-lossless" -q
}

suite() { # the suite of attacks; then adversarial training and the purifier alone on the same patches
    local n=${N:-512}
    advdiff robustness "$TEST" "${adapted[@]}" --t-star 0.2 --limit "$n" -o "$OUT/suite"
    advdiff robustness "$TEST" "${adapted[@]}" --t-star 0.2 --limit 1581 --only clean --only blind -o "$OUT/suite-all"
    advdiff robustness "$TEST" "${frozen[@]}" --t-star 0.2 --limit "$n" --only clean --only pgd -o "$OUT/suite-frozen"
    advdiff robustness "$TEST" -c pcam-robust --limit "$n" -o "$OUT/suite-robust"
    advdiff compare "$OUT"/suite{,-robust}/predictions.csv --json >"$OUT/suite-compared.json"
    [ ! -d "$LOSSLESS" ] || evaluate lossless-adapted "$LOSSLESS" "${adapted[@]}" --t-star 0.2 --draws 11
}

certificates() { # of the bundled pairs, and of NoiseDefense with a classifier trained on its noise
    local sizes=(--eps 2/255 --eps 1/255 --eps 0.5/255 --radius 0 --radius 0.25 --radius 0.5 --radius 1)
    advdiff train-classifier "${training[@]}" --valid "$VALID" --init pcam-resnet18 --epochs 4 \
        --learning-rate 5e-4 --augment noise:0.25 --crop 64 -o "$OUT/noise64" -q
    advdiff certify "$TEST" "${adapted[@]}" "${sizes[@]}" --n 1000 -o "$OUT/certified-adapted.csv" -q
    advdiff certify "$TEST" "${frozen[@]}" "${sizes[@]}" --n 500 -o "$OUT/certified-frozen.csv" -q
    advdiff certify "$TEST" -c "$OUT/noise64" --defense noise --t-star 0.25 "${sizes[@]}" --n 500 -o "$OUT/certified-noise64.csv" -q
    advdiff compare "$OUT"/certified-{noise64,adapted,frozen}.csv --eps 2/255 --json >"$OUT/certified.json"
}

steps() { # of the same t*; then 40 of diffusers' scheduler at the t* that is best for them on valid
    local valid=("$VALID" "${frozen[@]}" --shuffle-seed 1) menu=(--over sampler-steps --values 1,2,4,8,40 --t-star 0.25)
    advdiff sweep "${valid[@]}" "${menu[@]}" --limit 200 --steps 20 --draws 1 -o "$OUT/steps-blind" -q
    advdiff sweep "${valid[@]}" "${menu[@]}" --limit 64 --gradient full --steps 10 --eot 2 --draws 5 -o "$OUT/steps-through" -q
    local t
    t=$(advdiff sweep "${valid[@]}" --over t-star --values 0.1,0.15,0.2,0.25 --sampler-steps 40 --limit 200 --steps 20 --draws 1 \
        -o "$OUT/forty" -q)
    local forty=(--t-star "$t" --sampler ddpm --sampler-steps 40) adv=$OUT/test-adv.safetensors
    advdiff attack "$TEST" -c pcam-resnet18 -o "$adv" -q
    purify "$TEST" test-clean-0.25 --t-star 0.25
    purify "$adv" test-adv-0.25 --t-star 0.25
    purify "$TEST" test-clean-40 "${forty[@]}"
    purify "$adv" test-adv-40 "${forty[@]}"
    evaluate forty-blind "$OUT"/test-{clean,adv}-{0.25,40}.safetensors -c pcam-resnet18
    local few=(--shuffle-seed 0 --limit 32) how=(--steps 10 --eot 4) one=(--t-star 0.25)
    advdiff attack "$TEST" "${few[@]}" "${frozen[@]}" "${one[@]}" "${how[@]}" -o "$OUT/through-1.safetensors" -q
    advdiff attack "$TEST" "${few[@]}" "${frozen[@]}" "${forty[@]}" "${how[@]}" -o "$OUT/through-40.safetensors" -q
    judge through-1 "$OUT/through-1.safetensors" "${few[@]}" "${one[@]}" --draws 11
    judge through-40 "$OUT/through-40.safetensors" "${few[@]}" "${forty[@]}" --draws 11
    advdiff compare "$OUT"/through-{1,40}.csv --json >"$OUT/through-compared.json"
}
judge() { # NAME ATTACKED OPTIONS...: the purified classifier on plain and attacked patches, every draw kept
    evaluate "$1" "$TEST" "$2" "${frozen[@]}" "${@:3}" --predictions "$OUT/$1.csv"
}

sampler() { # the paper's: all steps of t* 0.04, and of 0.085, where its model on [0, 1] has the same relative noise
    local n
    advdiff attack "$TEST" --shuffle-seed 0 --limit 256 -c pcam-resnet18 --steps 50 -o "$OUT/sampler-blind.safetensors" -q
    for n in 40 85; do
        local all=(--t-star "$(printf 0.%03d $n)" --sampler ddpm --sampler-steps $n)
        local name=sampler-$n few=(--shuffle-seed 0 --limit 32)
        judge $name-blind "$OUT/sampler-blind.safetensors" --shuffle-seed 0 --limit 256 "${all[@]}" --draws 1
        for gradient in full bpda; do
            advdiff attack "$TEST" "${few[@]}" "${frozen[@]}" "${all[@]}" --gradient $gradient --steps 10 --eot 4 \
                -o "$OUT/$name-$gradient.safetensors" -q
            judge $name-$gradient "$OUT/$name-$gradient.safetensors" "${few[@]}" "${all[@]}" --draws 5
        done
    done
}

paper() { # the paper's experiment with the bundled models; the other classifiers are trained, or taken from OUT_DIR/paper
    PLAIN=pcam-resnet18 DDPM=pcam-ddpm ADAPTED=pcam-resnet18-adapted EPOCHS=4 MORE_EPOCHS=2 N=200 TEST_N=256 ATTACK_STEPS=20 \
        EOT=4 DRAWS=11 ADAPTIVE_N=64 ADAPTIVE_STEPS=10 QUERIES=50 ADVERSARIAL_OPTIONS="--attack-steps 1" \
        OTHER_ARCHS="googlenet shufflenet_v2_x1_0" "$(dirname "$0")/../examples/reproduce_paper.sh" "$PCAM" "$OUT/paper"
}

[ $# -gt 0 ] || set -- blind unseen choose suite certificates steps sampler paper
for section; do
    declare -F "$section" >/dev/null || { echo "$0: no section called $section" >&2 && exit 2; }
done
for section; do "$section"; done
