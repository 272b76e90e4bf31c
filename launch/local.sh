#!/usr/bin/env bash
# One machine, nothing prepared: makes .venv when absent, installs, runs.
#
#   bash launch/local.sh demo [out]      trains the demo through its stages, scores it, exports it, asks it  (runs/demo)
#   bash launch/local.sh test [args]     the tests; arguments go to pytest, e.g. -m "" for the slow ones too
set -euo pipefail
cd "$(dirname "$0")/.."
command=${1:-help}; shift || true
case $command in demo | test) ;; *) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 2 ;; esac

say() { printf '\n== %s\n' "$*"; }
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
  { echo "needs Python 3.11 to 3.13, $PYTHON is $("$PYTHON" --version); set PYTHON=/path/to/python3.12"; exit 2; }
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
bin=.venv/bin

install() { # install STAMP ARGS...: pip install once for every state of pyproject.toml
  local stamp=.venv/$1-$(sha256sum pyproject.toml | cut -c1-16); shift
  [ -e "$stamp" ] && return
  [ -d .venv ] || "$PYTHON" -m venv .venv
  $bin/pip install -q --disable-pip-version-check "$@"
  touch "$stamp"
}

if [ "$command" = test ]; then
  say "installing (PyTorch on CPU is for the tests only)"
  # The CPU build first: with it in place nothing asks for the CUDA packages. torchvision has no CPU build there, so
  # without its dependencies; tests/torchvision_shim.py declares the operators it lacks.
  install test-torch "torch==2.13.0"
  install test -e ".[test]"
  install test-vision --no-deps "torchvision==0.28.0"
  exec $bin/python -m pytest -n 2 --dist worksteal "$@"
fi

say "installing"
install demo -e .
out=${1:-runs/demo}
# One CPU device a core: XLA runs them side by side, about twice as fast as one device on two cores.
export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-$(n=$(nproc); echo $((n >= 4 ? 4 : n >= 2 ? 2 : 1)))}
# Huge pages, and no trimming: glibc gives the buffers of every step back to the kernel and faults them in again: 30 times the page faults.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4000000000:glibc.malloc.arena_max=1
export TRANSFORMERS_VERBOSITY=error # it misses PyTorch, which only the tests need
stages=("the language model, from text" "vision to the frozen decoder" "alignment" "many tasks" "video and streams")
for stage in 0 1 2 3 4; do
  say "stage $stage: ${stages[$stage]}"
  $bin/python -m vlmjax.main train --config "configs/demo.py:stage=$stage,root=$out" --workdir "$out/stage$stage"
done
export JAX_NUM_CPU_DEVICES=1
say "export to Hugging Face: $out/hf"
$bin/python -m vlmjax.main export --workdir "$out/stage4" --output "$out/hf"
say "scores on held-out data: $out/report.md, $out/samples.png"
$bin/python -m vlmjax.main eval --config "configs/demo.py:stage=4,root=$out" --workdir "$out/stage4" --output "$out"
say "a question about a picture and one about a video"
$bin/python -m vlmjax.data.demo.show --output "$out/ask"
$bin/python -m vlmjax.main generate --model "$out/hf" --image "$out/ask/picture.png" --prompt "what is this?"
$bin/python -m vlmjax.main generate --model "$out/hf" --video "$out/ask/clip.mp4" --prompt "list the frames."
