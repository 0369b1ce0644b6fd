#!/usr/bin/env bash
# Everything that wants a real CUDA chip, in under ten minutes, into one folder that says on which chip, with which driver, and when.
#
#     bash benchmarks/gpu.sh [FOLDER]          PYTHON=python3 (the one that has the CUDA torch)      or: make gpu
#
# A part that fails or runs past its time does not stop the next; the summary names each part's exit code and seconds.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-out/gpu}")
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { echo "$PYTHON has no torch that finds a CUDA chip" >&2; exit 5; }
mkdir -p "$OUT"

part() {  # NAME SECONDS COMMAND...: its words in NAME.log, one line in the summary
    local name=$1 limit=$2 began=$SECONDS code=0
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    echo "$name: exit $code, $((SECONDS - began)) s: $(grep -v '^report:' "$OUT/$name.log" | tail -n 2 | cut -c1-300 | paste -sd ' ')" | tee -a "$OUT/summary.txt"
}

bascule() { part "$1" "$2" "$PYTHON" -m bascule.cli "${@:3}"; }

{
    date -u +"%Y-%m-%d %H:%M UTC"
    git log -1 --format='commit %h' 2>/dev/null
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader
    "$PYTHON" -c "import torch; print('torch', torch.__version__, 'cuda', torch.version.cuda, 'nccl', torch.cuda.nccl.version())"
} 2>&1 | tee "$OUT/summary.txt"

bascule doctor 30 doctor
part tests 90 "$PYTHON" -m pytest -m gpu -p no:cacheprovider tests/accelerators tests/train
part train 110 "$PYTHON" benchmarks/train/throughput.py --chip cuda --seconds 6 --json "$OUT/train.json"
bascule quick 90 qualify cuda --preset nano --out "$OUT/quick" --time-limit 85
bascule planted 40 qualify sim:backward-wrong@cuda --preset tick --check numerics --out "$OUT/planted" --time-limit 35   # exits 3: unfit to train
bascule half 70 qualify cuda --preset nano --dtype bf16 --check coverage --check numerics --check exact --out "$OUT/half" --time-limit 65
bascule demo 120 run runs/demo.toml --out "$OUT/demo" --set 'pools.ascend.accelerator="sim:ascend-r2@cuda"' --set 'pools.nvidia.accelerator="cuda"'
part cost 40 "$PYTHON" benchmarks/guard/cost.py --accelerator cuda --preset nano --steps 40
# Last, with what is left of ten minutes; the longest part: `--resume` goes on from where it was cut off.
LEFT=$((570 - SECONDS))
[ "$LEFT" -gt 20 ] && bascule full "$LEFT" qualify cuda --preset nano --full --resume --out "$OUT/full" --time-limit $((LEFT - 10))
echo "all in $SECONDS s; see $OUT/summary.txt"
