#!/bin/sh
# Open MPI: PROCESSES=16 launch/openmpi.sh --hostfile hosts -- --requests=prompts.jsonl --out=/shared/runs/a
# What stands before -- goes to mpirun. One process for each GPU, as JAX expects there. MAIN=train
# runs launch.train instead of launch.batch.
set -eu
options=
while [ $# -gt 0 ] && [ "$1" != -- ]; do options="$options $1"; shift; done
[ $# -gt 0 ] && shift
# shellcheck disable=SC2086  # several words
exec mpirun -n "${PROCESSES:-2}" $options "${PYTHON:-.venv/bin/python}" -m "launch.${MAIN:-batch}" --distributed "$@"
