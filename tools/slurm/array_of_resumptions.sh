#!/usr/bin/env bash
# A training longer than the time limit, where jobs must not requeue themselves: an array of jobs, one after the other.
# Each goes on where the one before it stopped, whether at its time limit or by an error; those that are left when the
# last iteration is saved end at once. From the repository's folder, with the environment active:
#
#   SAVE=DIR TRAIN_ITERS=N sbatch --nodes=4 --array=1-20%1 tools/slurm/array_of_resumptions.sh [flags of finetune.py]
#
# Options of sbatch before the script's name win over these:
#SBATCH --job-name=finetune
#SBATCH --array=1-10%1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# To this script, so many seconds before the time limit: an iteration and a checkpoint must fit in.
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%A.log
#SBATCH --open-mode=append
set -euo pipefail
source tools/slurm/training_job.sh

if is_finished; then
    echo "iteration $TRAIN_ITERS is saved: nothing is left to do"
    exit
fi
train "$@"
