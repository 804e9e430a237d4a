#!/usr/bin/env bash
# Trains on several nodes: one torchrun on each, which meet at the first. Before the time limit, or when it has to make
# room, the job saves and goes back into the queue, until the last iteration. From the repository's folder, which every
# node must see, with the environment active:
#
#   SAVE=DIR TRAIN_ITERS=N sbatch --nodes=4 tools/slurm/multi_node.sh [flags of finetune.py]
#
# Options of sbatch before the script's name win over these:
#SBATCH --job-name=finetune
#SBATCH --nodes=2
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

# Where NCCL chooses the wrong network, name the right one (docs/slurm.md):
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

train "$@"
requeue_if_unfinished
