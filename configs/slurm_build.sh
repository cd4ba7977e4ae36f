#!/bin/bash
# A build on Slurm machines that share storage but no Ray cluster: every array task builds its own part of the shards.
#
#     fourmill fit-tokenizers configs/cc12m.yaml                       # once, before the array (on a GPU)
#     sbatch --array=0-7 configs/slurm_build.sh configs/cc12m.yaml     # then eight parts; further arguments go to the build
#     fourmill status DATASET --watch                                  # from any machine: all parts together
#
# Which shards a part has depends on their numbers alone. What is finished is what has a receipt, so a task that was preempted,
# failed or ran out of time is simply started again, and a whole array too: nothing is done twice. Parts may run at any time, in any
# order, even twice at once: the first writer of a shard wins. Only the source must not change meanwhile.
#
#SBATCH --job-name=fourmill
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue                  # a preempted task is queued again
#SBATCH --signal=TERM@120          # before the end of its time: shards under way are finished or given up cleanly
#SBATCH --output=fourmill-%A_%a.log

set -euo pipefail

if [ "$#" -lt 1 ]; then
    echo "usage: sbatch --array=0-7 $0 CONFIG [OPTIONS of fourmill build]" >&2
    exit 2
fi
config=$1
shift

# A single task again: how many parts there are must then be said.
#     PARTS=8 sbatch --array=3 configs/slurm_build.sh configs/cc12m.yaml
parts=${PARTS:-$SLURM_ARRAY_TASK_COUNT}

export OMP_NUM_THREADS=1           # decoding and networks have threads of their own

# srun passes signals on; the exit status is 0 when this part is done, 3 when some of it is missing
exec srun "${FOURMILL:-fourmill}" build "$config" --slice "$SLURM_ARRAY_TASK_ID/$parts" \
    --set engine.address=null --no-prefect "$@"
