#!/usr/bin/env bash
# A Cloud TPU slice: copies the last commit to every host of it, installs, trains.
#
#   bash launch/tpu_vm.sh NAME ZONE CHIP TRAIN_FLAGS...
#   bash launch/tpu_vm.sh my-slice us-west4-a v5e --config configs/videollama3.py:stage=1 --workdir /mnt/runs/stage1
#
# CHIP is v5e, v5p or v6e. The work directory and the data must be mounted on every host under the same path: process 0
# writes the metrics, all of them the checkpoints. Hosts need Python 3.11 to 3.13; PYTHON=python3.12 says which. The run
# ends with this command, so start it inside tmux; the same command resumes it.
#
# Several slices: NAME is that of a queued resource (made with --node-count=2) and NODES=all stands before the command,
# whose config says slice=2xv5e-16.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 4 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
name=$1 zone=$2 chip=$3; shift 3

archive=$(mktemp -d)/vlmjax.tgz
trap 'rm -r "$(dirname "$archive")"' EXIT
git archive --format=tar.gz --output "$archive" HEAD
tpus=(gcloud compute tpus tpu-vm) hosts=(--zone "$zone" --worker=all)
[ -z "${NODES:-}" ] || { tpus[3]=queued-resources; hosts+=(--node="$NODES"); }
"${tpus[@]}" scp "$archive" "$name:vlmjax.tgz" "${hosts[@]}"
"${tpus[@]}" ssh "$name" "${hosts[@]}" --command "set -e
mkdir -p vlmjax && cd vlmjax && tar xzf ../vlmjax.tgz
[ -d .venv ] || ${PYTHON:-python3} -m venv .venv
.venv/bin/pip install -q -c launch/constraints.txt -e '.[data]' 'jax[tpu]'
export LIBTPU_INIT_ARGS=\"\$(.venv/bin/python -m vlmjax.aot.flags $chip)\"
.venv/bin/python -m vlmjax.main train --distributed$(printf ' %q' "$@")"
