#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: build, GPU tests, sanitizers, benchmarks, one Markdown report.
#
#   bench/run_gpu.sh OUTDIR [STEP...]
#
# The steps are build, tests, sanitizers, bench and tables, all of them if none is named; without build, the burnish that
# PYTHON imports is used. BUDGET: seconds for tests to begin in (150), WORKERS: their processes,
# BENCH_SECONDS: for cases to begin in (130).
# Needs no network: Python with torch (CUDA), Triton, setuptools, wheel, ninja, pybind11, safetensors and pytest, and nvcc
# (on PATH, under CUDA_HOME, /usr/local/cuda* or in NVIDIA's Python packages). PYTHON names another python3.
# Steps have time limits that add up to less than 10 minutes; one that fails is reported and the next one runs. Writes
# OUTDIR/report.md, logs.txt, bench.json and the result table; the exit status is the number of failed steps.
set -uo pipefail

STEPS=(build tests sanitizers bench tables)
for name in "${@:2}"; do
  if [[ " ${STEPS[*]} " != *" $name "* ]]; then
    echo "no step '$name', expected some of: ${STEPS[*]}" >&2
    exit 2
  fi
done
if [[ $# -lt 1 ]]; then
  sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
OUTDIR=$(cd "$1" && pwd)
[[ $# -gt 1 ]] && STEPS=("${@:2}")
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
FAILED=0
ROWS=()

# find_tool NAME: the first of the usual places that has the tool
find_tool() {
  local place
  local -a places=("${CUDA_HOME:-/nonexistent}/bin" /usr/local/cuda/bin /usr/local/cuda*/bin /opt/nvidia/*/*/bin)
  while IFS= read -r place; do places+=("$place"); done < <("$PYTHON" -c '
import glob, sysconfig
for where in sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")}):
    print(*glob.glob(where + "/nvidia/*/bin"), sep="\n")' 2>/dev/null)
  command -v "$1" && return
  for place in "${places[@]}"; do
    [[ -x $place/$1 ]] && printf '%s\n' "$place/$1" && return
  done
  return 1
}

# step NAME SECONDS COMMAND...: runs it under a time limit and keeps its output, state and time
step() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  printf '=== %s\n' "$name"
  timeout --kill-after=5 "$limit" "$@" >"$LOGS/$name" 2>&1 || status=$?
  record "$name" "$status" $((SECONDS - start)) "$limit"
}

# record NAME STATUS SECONDS LIMIT
record() {
  local state=passed
  if [[ $2 -eq 124 || $2 -eq 137 ]]; then
    state="FAILED: over its limit of $4 s"
  elif [[ $2 -ne 0 ]]; then
    state="FAILED: exit status $2"
  fi
  [[ $2 -ne 0 ]] && FAILED=$((FAILED + 1))
  ROWS+=("| $1 | $state | $3 | $(last_line "$LOGS/$1") |")
  printf '    %s, %s s\n' "$state" "$3"
}

last_line() {
  grep -v '^[[:space:]]*$' "$1" | tail -n 1 | cut -c1-160 | sed 's/|/\\|/g'
}

# shellcheck disable=SC2329  # this function and those to tables run under step's time limit, by way of bash -c
build() {
  BURNISH_BUILD_CUDA=1 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable . || return
  "$PYTHON" -m burnish.cli doctor
}

# tests: what needs a GPU, and the conformance kit on every GPU backend, in a random order for as long as there is time
# shellcheck disable=SC2329
tests() {
  local -a parallel=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "${WORKERS:-$(nproc)}")
  "$PYTHON" -m pytest "${parallel[@]}" --budget "${BUDGET:-150}" --tb=short \
    -m "not gate" -k "native or triton or gpu" \
    tests/test_gpu.py tests/test_nn_gpu.py tests/test_optim_gpu.py tests/test_instructions.py tests/test_warpgroup.py \
    tests/test_triton_descriptors.py tests/test_ops.py
}

# sanitize: the four tools at once, on a small run of every op and CUDA implementation, in shares; each allocation is
# cudaMalloc's own, so that a byte past its end is an error
# shellcheck disable=SC2329
sanitize() {
  local tool share name status=0
  local -A pids=()
  cat >"$LOGS/small_run.py" <<'PYTHON_END'
import sys

import torch
from burnish import registry
from burnish.testing import calls

share, shares = map(int, sys.argv[1:])
implementations = [(spec, impl) for spec in registry.all_ops().values() for impl in spec.impls]
ran = 0
for spec, impl in implementations[share::shares]:
    cases = [case for case in spec.cases.test if case.dtype is not torch.float32]
    # what Triton makes of each case is compiled first
    for case in cases[:: max(1, len(cases) // (8 if impl.backend == "native" else 3))]:
        args = spec.make(case, impl.backend, 0)
        if calls.objection(spec, impl.backend, args) is None:
            calls.run(spec, impl.backend, args)
            ran += 1
            print(f"{spec.stem} on {impl.backend}: {case.id}", flush=True)
torch.cuda.synchronize()
assert ran, "no implementation accepted a case"
print(f"ran {ran} calls")
PYTHON_END
  for tool in memcheck racecheck initcheck synccheck; do
    for share in 0 1 2; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 85 "$SANITIZER" --tool "$tool" --error-exitcode 9 --print-limit 5 \
        "$PYTHON" "$LOGS/small_run.py" "$share" 3 >"$LOGS/$tool-$share.log" 2>&1 &
      pids[$tool-$share]=$!
    done
  done
  for name in "${!pids[@]}"; do
    wait "${pids[$name]}" || { status=1 && printf '%s: exit status not 0\n' "$name"; }
    printf '%s: %s; %s\n' "$name" "$(grep 'ERROR SUMMARY\|RACECHECK SUMMARY' "$LOGS/$name.log" || echo 'not at its end')" \
      "$(grep '^ran ' "$LOGS/$name.log")"
  done
  for name in "${!pids[@]}"; do
    printf '\n--- %s\n' "$name"
    tail -n 80 "$LOGS/$name.log"
  done >>"$LOGS/sanitizer_logs"
  return "$status"
}

# shellcheck disable=SC2329
bench() {
  "$PYTHON" bench/on_gpu.py --seconds "${BENCH_SECONDS:-130}" --json "$OUTDIR/bench.json"
}

# shellcheck disable=SC2329
tables() {
  local gpu
  gpu=$("$PYTHON" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))') || return
  "$PYTHON" bench/report.py --name "$gpu" "$OUTDIR/bench.json" || return
  cp "bench/results/$gpu.md" "$OUTDIR/$gpu.md"
}

write_report() {
  local name
  {
    printf '# burnish on a GPU\n\n'
    printf '%s, commit %s.\n\n' "$(date -u +%FT%TZ)" "$(git describe --always --dirty 2>/dev/null || echo unknown)"
    "$PYTHON" -c 'import sys, torch, triton
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}.\n")'
    printf '| step | result | seconds | last line |\n| --- | --- | ---: | --- |\n'
    printf '%s\n' "${ROWS[@]}"
    for name in "$OUTDIR"/*.md; do
      [[ $name == */report.md ]] || { printf '\n' && sed 's/^#/##/' "$name"; }
    done
    printf '\n## Ends of the logs\n'
    for name in "$LOGS"/*; do
      [[ $name == *.py || $name == *.log || $name == */sanitizer_logs ]] && continue
      printf '\n### %s\n\n```\n' "$(basename "$name")"
      tail -n 25 "$name" | cut -c1-300
      printf '```\n'
    done
  } >"$OUTDIR/report.md" 2>&1
  for name in "$LOGS"/*; do
    printf '\n===== %s\n' "$(basename "$name")"
    cat "$name"
  done | tail -c 15000000 >"$OUTDIR/logs.txt"
}

NVCC=$(find_tool nvcc) || NVCC=
SANITIZER=$(find_tool compute-sanitizer) || SANITIZER=
if [[ -n $NVCC ]]; then
  CUDA_HOME=$(dirname "$(dirname "$NVCC")")
  export CUDA_HOME
  PATH=$(dirname "$NVCC"):$PATH
fi
export PYTHON SANITIZER LOGS OUTDIR BURNISH_BUILD_CUDA=1
export -f build tests sanitize bench tables

for name in "${STEPS[@]}"; do
  case $name in
    build) step build 150 bash -c build ;;
    tests) step tests 180 bash -c tests ;;
    sanitizers)
      if [[ -n $SANITIZER ]]; then
        step sanitizers 90 bash -c sanitize
      else
        echo "compute-sanitizer was not found" >"$LOGS/sanitizers"
        record sanitizers 127 0 0
      fi
      ;;
    bench) step bench 150 bash -c bench ;;
    tables) step tables 15 bash -c tables ;;
  esac
done
write_report
printf '%s step(s) failed; the report is %s\n' "$FAILED" "$OUTDIR/report.md"
exit "$FAILED"
