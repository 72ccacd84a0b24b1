#!/bin/bash
# Admiral on Slurm: a Ray cluster over the allocation's nodes for one job, which ends with it.
#
#   sbatch --nodes 2 cluster/deploy/slurm.sh jobs/train_adm.py imagenet64 --num-workers 16
#
# Set ADMIRAL_STORE and MLFLOW_TRACKING_URI to what all nodes see. The same command goes on from the last checkpoint:
# Slurm sends SIGTERM two minutes before the time limit, on which a training writes one, and --requeue starts it again.
#SBATCH --job-name=admiral
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue

set -euo pipefail
: "${ADMIRAL_STORE:?set it to a URI or folder that all nodes see}"
: "${MLFLOW_TRACKING_URI:?set it to a URI that the first node sees}"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs may share a node's ports
ray=(ray start --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$SLURM_GPUS_ON_NODE" --disable-usage-stats --block)

srun --nodes 1 --ntasks 1 --nodelist "$head" "${ray[@]}" --head --port "$port" --dashboard-host 127.0.0.1 &
if ((SLURM_JOB_NUM_NODES > 1)); then
  sleep 15 # for the head; who comes earlier retries for a minute
  srun --nodes $((SLURM_JOB_NUM_NODES - 1)) --ntasks $((SLURM_JOB_NUM_NODES - 1)) --exclude "$head" \
    "${ray[@]}" --address "$head:$port" &
fi

RAY_ADDRESS="$head:$port" python "$@" &
job=$!
trap 'kill -TERM $job' TERM
wait $job || wait $job # the first returns when the signal comes, the second when the job has ended
