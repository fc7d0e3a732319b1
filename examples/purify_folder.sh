#!/usr/bin/env bash
# Purify every image of a folder, keep the names, and list what failed.
#
#   examples/purify_folder.sh IN_DIR OUT_DIR [more options of `advdiff purify`]
set -uo pipefail
in=$1 out=$2
shift 2
advdiff purify "$in" -o "$out" -q "$@"
code=$?
if [ "$code" -eq 3 ]; then
    grep '"status":"failed"' "$out/advdiff.jsonl" >&2
fi
exit "$code"
