#!/usr/bin/env bash
# Purify every image of a folder, keep the names, and list the files that failed.
#
#   examples/purify_folder.sh IN_DIR OUT_DIR [more options of `advdiff purify`]
set -uo pipefail
in=$1 out=$2
shift 2
advdiff purify "$in" -o "$out" -q "$@"
code=$?
if [ "$code" -eq 3 ]; then
    python - "$out/advdiff.jsonl" >&2 <<'PY'
import json, sys
head, *lines = open(sys.argv[1])
last = {found["file"]: found for found in map(json.loads, lines)}  # the last line of a file counts
print(*(f"{name}: {found['reason']}" for name, found in last.items() if found["status"] == "failed"), sep="\n")
PY
fi
exit "$code"
