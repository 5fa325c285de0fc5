#!/bin/bash
# Slurm: sbatch launch/slurm.sh --config=configs/sdxl.py --requests=prompts.jsonl --out=/shared/runs/a
# One process for each GPU, as JAX expects there. The folder must be one that all nodes see. A job
# that is preempted or out of time is queued again and makes what is missing.
# MAIN=train sbatch launch/slurm.sh --config=configs/train_full.py ... trains instead.
#SBATCH --job-name=jaxsd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -eu
srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m "launch.${MAIN:-batch}" --distributed "$@"
