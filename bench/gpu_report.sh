#!/usr/bin/env bash
# One short spell on a GPU gives the whole picture: builds, tests, measures.
#
#   bench/gpu_report.sh [FOLDER]     tables and logs, JSON and charts go there (build/gpu_report)
#
# Every step has its own share of LIMIT seconds (530), so that one that hangs leaves the others their
# time, and a library that already has code for this GPU is not built again. It needs a torch with
# CUDA, pytest, rich and matplotlib in PYTHON (python3), and nvcc for the build. It ends with 1 if a
# step failed, after all steps.
set -uo pipefail
cd "$(dirname "$0")/.."

out=$(realpath -m "${1:-build/gpu_report}")
python=${PYTHON:-python3}
limit=${LIMIT:-530}
failed=()
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# step NAME SECONDS COMMAND...: runs it within that time and within what is left of the whole.
step() {
  local name=$1 seconds=$2 left=$((limit - SECONDS)) status
  shift 2
  if ((left < 10)); then
    echo "== $name: no time left" && failed+=("$name")
    return 1
  fi
  ((seconds < left)) || seconds=$left
  echo "== $name (at $SECONDS s, for at most $seconds s)"
  # Interrupted, pytest still says which tests have failed.
  timeout --signal=INT --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  ((status == 0)) || failed+=("$name")
  return "$status"
}

has_code() {
  "$python" -c '
import torch
from fused_ce import ops
raise SystemExit(ops.lacking("cuda", torch.cuda.current_device()) is not None)' 2> /dev/null
}

if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "bench/gpu_report.sh: $python has no torch that can use a GPU here; name one in PYTHON." >&2
  exit 2
fi

step machine 30 bash -c "nvidia-smi; $python -m torch.utils.collect_env"
if ! has_code; then
  capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  step build 200 env FUSED_CE_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}" \
    "$python" setup.py build_ext --inplace
fi
# What only CUDA has comes first; a hundred failures tell as much as a thousand.
pytest=("$python" -m pytest -q -p no:cacheprovider -m "cuda and not slow" --maxfail=100 --tb=short)
step test_cuda 120 "${pytest[@]}" tests/cuda/test_gpu.py
step test_parity 170 "${pytest[@]}" tests --ignore tests/cuda/test_gpu.py
# A head's times are written before its memory, the slower half, is measured.
step linear 80 "$python" -m bench --device cuda --linear --seconds "${BENCH_SECONDS:-1}" --out "$out"
# The losses in the order of their table; those that come too late are not in the file.
step losses 100 "$python" -m bench --device cuda --losses --seconds "${BENCH_SECONDS:-1}" --out "$out"
# The file is written after every case; the charts at the end, for which half a minute is kept.
step bench 530 "$python" -m bench --device cuda --seconds "${BENCH_SECONDS:-1}" \
  --budget $((limit - SECONDS - 40)) --out "$out"

echo "== $SECONDS s; everything is in $out"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
