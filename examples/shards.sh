#!/usr/bin/env bash
# Attack one patch set in N processes and merge the shards: the same rows, to the bit, as from one process.
#
#   examples/shards.sh DATA CLASSIFIER OUT.h5 N
set -euo pipefail
data=$1 classifier=$2 out=$3 n=$4
parts="$out.parts"
mkdir -p "$parts"
seq 0 $((n - 1)) | OMP_NUM_THREADS=1 xargs -P "$n" -I{} \
    advdiff attack "$data" -c "$classifier" --shard "{}/$n" -o "$parts/{}.h5" -q ${ATTACK_OPTIONS:-}
advdiff merge "$parts"/*.h5 -o "$out"
