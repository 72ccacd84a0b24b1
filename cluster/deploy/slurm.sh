#!/bin/bash
# Run one job on Slurm: start a Ray cluster on the nodes of the allocation, which ends with the job.
#
#   sbatch --nodes 2 cluster/deploy/slurm.sh jobs/train_adm.py imagenet64 --num-workers 16
#
# Set ADMIRAL_STORE and MLFLOW_TRACKING_URI to places that all nodes can reach. Slurm sends SIGTERM two minutes before the
# time limit, and a training then writes a checkpoint. --requeue starts the same command again, which resumes from it.
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
: "${ADMIRAL_STORE:?set it to a URI or a folder that all nodes share}"
: "${MLFLOW_TRACKING_URI:?set it to a URI that the first node can reach}"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # several jobs may share a node
ray=(ray start --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$SLURM_GPUS_ON_NODE" --disable-usage-stats --block)

srun --nodes 1 --ntasks 1 --nodelist "$head" "${ray[@]}" --head --port "$port" --dashboard-host 127.0.0.1 &
if ((SLURM_JOB_NUM_NODES > 1)); then
  sleep 15 # until the head has started; nodes that connect earlier retry for a minute
  srun --nodes $((SLURM_JOB_NUM_NODES - 1)) --ntasks $((SLURM_JOB_NUM_NODES - 1)) --exclude "$head" \
    "${ray[@]}" --address "$head:$port" &
fi

RAY_ADDRESS="$head:$port" python "$@" &
job=$!
trap 'kill -TERM $job' TERM
wait $job || wait $job # the first wait returns at the signal, the second when the job has ended
