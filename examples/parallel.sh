#!/usr/bin/env bash
# Purify a folder of images with GNU parallel, N processes at a time: the shards share the output folder.
#
#   examples/parallel.sh IN_DIR OUT_DIR N [more options of `advdiff purify`]
#
# After a failure, run the same line again to resume. The last command merges the journals and names the files that failed.
set -uo pipefail
in=$1 out=$2 n=$3
shift 3
OMP_NUM_THREADS=1 parallel -j "$n" --line-buffer advdiff purify "$in" -o "$out" --shard {}/"$n" -q "$@" \
    ::: $(seq 0 $((n - 1))) >/dev/null
again=() # the last command must not repeat the work of the shards
for option in "$@"; do [ "$option" = --overwrite ] || again+=("$option"); done
advdiff purify "$in" -o "$out" -q "${again[@]}"
