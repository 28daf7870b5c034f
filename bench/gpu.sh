#!/usr/bin/env bash
# All that a machine with a GPU is asked, in one call of at most five minutes, on a bare copy of the tree:
#
#     bash bench/gpu.sh              # writes $OUT, which is build/gpu unless it is set; 8 files
#     bash bench/gpu.sh --dry-run    # the same stages on the CPU, with tiny shapes
#
# PYTHON (python3) must have torch, triton, transformers and pytest. The wheels in .whl/ (`make gpu-wheels`) are put beside them
# where they are; without, the stages and rows that need them say so.
# The stages are processes of their own, the most valuable first, each under a limit of its own, and write line by line: what
# one has written, no other can lose. Settings of the card are left alone.
set -u
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
out=${OUT:-build/gpu}
log=$out/log.txt
mkdir -p "$out" build/types
rm -f "$out"/{card,tests,head,trainer}.jsonl "$out"/{profile.txt,trace.json.gz,tables.md,log.txt}

ln -sfn "$PWD/kernels" build/types/tbrm_kernels  # the kernels' import name differs from their folder's
export PYTHONPATH=$PWD:$PWD/build/types PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export BENCH_DEVICE=cuda TBRM_TEST_DEVICE=cuda TEST_ROWS=$out/tests.jsonl
# Of the Makefile's list all but the compilation for other GPUs, which needs none.
tests=$(sed -n 's/^KERNEL_TESTS := $(addprefix \(.*\),\(.*\))$/\1 \2/p' Makefile | while read -r prefix names; do
  for name in ${names/backends\/test_triton_aot.py/}; do echo "$prefix$name"; done
done)
limits=(30 70 120 35 20 30 25 30) left=283
if [ "${1:-}" = --dry-run ]; then
  export BENCH_DEVICE=cpu TBRM_TEST_DEVICE=cpu CUDA_VISIBLE_DEVICES="" TRITON_INTERPRET=1
  tests+=" -k bitwise"
  limits=(90 90 90 90 90 90 90 90) left=600
fi

say() { echo "$*" | tee -a "$log"; }

# stage NAME COMMAND...: the next of the limits, and no more than is left of all.
number=0
stage() {
  local name=$1 limit=${limits[number++]} begun=$SECONDS
  shift
  if ((limit > left - SECONDS)); then limit=$((left - SECONDS)); fi
  if ((limit < 1)); then say "== $name: no time is left"; return; fi
  say "== $name, at most $limit s"
  timeout --kill-after 5 "$limit" "$@" >>"$log" 2>&1
  local status=$?
  say "== $name: exit status $status after $((SECONDS - begun)) s"
  return $status
}

if compgen -G ".whl/*.whl" >/dev/null; then
  if "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target build/site .whl/*.whl >>"$log" 2>&1
  then export PYTHONPATH=$PYTHONPATH:$PWD/build/site
  else say "the wheels of .whl cannot be installed: $(tail -n 1 "$log")"
  fi
fi

has() { "$python" -c "import $1" 2>/dev/null; }
pytest=("$python" -m pytest -p bench.gpu.pytest_rows --continue-on-collection-errors --tb=short)
# What speeds it up, or ends a test that hangs, where it is there.
if has xdist; then pytest+=(-n "$((($(nproc) * 3 + 3) / 4))" --max-worker-restart 20); fi
if has pytest_timeout; then pytest+=(--timeout 40 --timeout-method thread); fi

stage card "$python" -m bench.gpu.card "$out/card.jsonl"
if (($? == 3)); then tail -n 2 "$log"; exit 1; fi
CUBLAS_WORKSPACE_CONFIG=:4096:8 stage tests "${pytest[@]}" $tests
stage head bash -c 'for _ in {1..8}; do "$0" -m bench.gpu.head "$1" && exit; done; exit 1' "$python" "$out/head.jsonl"
unset TRITON_INTERPRET  # a whole step in it takes minutes
stage trainer "$python" -m bench.gpu.trainer "$out/trainer.jsonl"
stage profile "$python" -m bench.gpu.profile "$out/profile.txt" "$out/trace.json.gz"
CUBLAS_WORKSPACE_CONFIG=:4096:8 stage attention "${pytest[@]}" --noconftest $(find tests/tbrm -name 'test_gpu_*.py')
stage sdpa "$python" -m bench.gpu.trainer "$out/trainer.jsonl" model.attention=sdpa
stage compiled "$python" -m bench.gpu.trainer "$out/trainer.jsonl" model.compile=true
"$python" -m bench.gpu.table "$out" "$out/tables.md" >>"$log" 2>&1 || { say "no tables"; tail -n 5 "$log"; }
cat "$out/tables.md"
