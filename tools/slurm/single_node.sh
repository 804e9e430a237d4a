#!/usr/bin/env bash
# Trains on one node. Before the time limit, or when it has to make room, the job saves and goes back into the queue,
# until the last iteration. From the repository's folder, with the environment active:
#
#   SAVE=DIR TRAIN_ITERS=N sbatch tools/slurm/single_node.sh [flags of finetune.py]
#
# Options of sbatch before the script's name win over these:
#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# To this script, so many seconds before the time limit: an iteration and a checkpoint must fit in.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail
source tools/slurm/training_job.sh

train "$@"
requeue_if_unfinished
