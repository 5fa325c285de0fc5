#!/bin/sh
# A TPU pod slice: TPU=name ZONE=zone launch/tpu.sh --config=configs/sdxl.py --requests=... --out=/gcs/runs/a
# On each host of the slice the repository must be at ~/jaxsd, with its .venv and jax[tpu]; the folder
# one that all hosts see, such as a mounted bucket with --weights and requests beside it. MAIN=train
# runs launch.train instead of launch.batch.
set -eu
arguments=
for word in "$@"; do
  arguments="$arguments '$(printf %s "$word" | sed "s/'/'\\\\''/g")'"
done
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ~/jaxsd && .venv/bin/python -m launch.${MAIN:-batch} --distributed $arguments"
