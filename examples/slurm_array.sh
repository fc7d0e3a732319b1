#!/usr/bin/env bash
# Attack a patch set on many GPUs of a Slurm cluster, one shard for each task, then merge the shards.
#
#   sbatch --array=0-99 examples/slurm_array.sh DATA CLASSIFIER PARTS_DIR
#   sbatch --dependency=afterany:JOB --wrap "advdiff merge PARTS_DIR/*.h5 -o OUT.h5"     # JOB is the array's number
#
# Submit the same line again when tasks failed: finished shards are kept, unfinished ones resume, and merge says which
# rows are missing. --requeue does this after preemption. To submit only some of a hundred tasks, give the total:
# SHARDS=100 sbatch --array=3,17 ...
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
set -euo pipefail
data=$1 classifier=$2 parts=$3
n=${SHARDS:-${SLURM_ARRAY_TASK_COUNT:?run it with sbatch --array=0-N}}
mkdir -p "$parts"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
exec advdiff attack "$data" -c "$classifier" --shard "$SLURM_ARRAY_TASK_ID/$n" \
    -o "$parts/$SLURM_ARRAY_TASK_ID.h5" -q ${ATTACK_OPTIONS:-}
