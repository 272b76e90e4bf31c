#!/usr/bin/env bash
# GPUs under SLURM: one process for each GPU, which find each other by SLURM's variables.
#
#   sbatch --nodes=1 launch/slurm.sh --config configs/videollama3.py:size=2b,stage=1,slice=h200-8 --workdir runs/vl3_2b/stage1 \
#       --config.init.vision=hf:DIR --config.init.connector=random --config.init.llm=hf:DIR
#
# Submit it in the repository, on a file system that all nodes share, where .venv holds
# `pip install -c launch/constraints.txt -e ".[data]" "jax[cuda13]"`.
# No XLA flags are set: XLA_FLAGS of the environment are passed on.
#SBATCH --job-name=vlmjax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM five minutes before the time limit: the run saves and leaves; started again, it resumes.
set -euo pipefail
code=0
srun --kill-on-bad-exit=1 .venv/bin/python -m vlmjax.main train "$@" || code=$?
[ "$code" != 75 ] || scontrol requeue "$SLURM_JOB_ID" # stopped by SIGTERM, saved, not done
exit "$code"
