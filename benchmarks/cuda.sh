#!/usr/bin/env bash
# What a CUDA device does: the tests on it, its speed as shares of its own bf16 matrix product, and that of two cores
# of the same machine. Usage: benchmarks/cuda.sh OUT_DIR
set -euo pipefail
out=${1:?usage: benchmarks/cuda.sh OUT_DIR}
mkdir -p "$out"
cd "$(dirname "$0")/.."

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/device.csv"
status=0
python -m pytest --device cuda -q --durations=20 | tee "$out/tests.log" || status=$?
advdiff bench --device cuda --precision bf16 -n 16384 --rounds 3 --json >"$out/cuda.json"
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=2 taskset -c 0,1 \
    advdiff bench --device cpu --no-paper -n 512 --rounds 1 --json >"$out/cpu.json"
python - "$out/cuda.json" "$out/cpu.json" <<'END'
import json
import sys

gpu, cpu = (json.load(open(path)) for path in sys.argv[1:])
cores = {m["name"]: m["patches_per_second"] for m in cpu["measured"]}
other = {name.rpartition(",")[0]: speed for name, speed in cores.items()}  # at another precision, marked by a star
print(f"{'workload':45} {'a second':>12} {'of the product':>15} {'two cores, times':>17}")
for m in gpu["measured"]:
    name, share = m["name"], gpu["of_ceiling"].get(m["name"])
    on_cores = cores.get(name) or other.get(name.rpartition(",")[0])
    times = f"{m['patches_per_second'] / on_cores:.1f}{'' if name in cores else ' *'}" if on_cores else ""
    print(f"{name:45} {m['patches_per_second']:12.4g} {f'{100 * share:.1f} %' if share else '':>15} {times:>17}")
END
exit $status  # of the tests
