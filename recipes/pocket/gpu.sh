#!/usr/bin/env bash
# Trains the model in the box on one GPU, a piece at a time.
# usage: recipes/pocket/gpu.sh EMOJI WORK RESULTS [LIMIT [DIFFERENCES...]]
# Works in the folder WORK for LIMIT seconds (480), then writes everything that the next piece needs to RESULTS: at most
# 8 files part-NN of 15 MB. The same command continues, also on a fresh machine with the files of the last piece in
# RESULTS. The exit status is 0 if the model is complete and 75 if another piece is needed.
# PyTorch, pyarrow, numpy, einops, safetensors, jaxtyping and sentencepiece must be installed. Other missing packages
# are installed from the folder `wheels` next to this script, which pack.sh fills.
set -euo pipefail

SECONDS=0 # bash counts
usage="usage: gpu.sh EMOJI WORK RESULTS [LIMIT [DIFFERENCES...]]"
emoji=$(realpath -e "${1:?$usage}") work=$(realpath -m "${2:?$usage}") results=$(realpath -m "${3:?$usage}")
limit=${4:-480} most=${MOST_PARTS:-8} size=${PART_BYTES:-15000000}
stopping=$((limit / 8)) # for the last checkpoint and the parts
here=$(realpath "$(dirname "$0")")
python=${PYTHON:-python3}
differences=("$here/gpu.toml")
for each in "${@:5}"; do differences+=("$(realpath -e "$each")"); done
mkdir -p "$work" "$results"

# Checkpoints that no later piece needs: those of finished stages, and all but the newest of the others.
needless() {
    local run
    for run in model/.*-run; do
        if [ -e "$run/report.json" ]; then
            ls -d "$run/checkpoints" "$run/checkpoint.pt" 2>/dev/null || true
        else
            ls -d "$run"/checkpoints/step-* 2>/dev/null | head -n -1 || true
        fi
    done
}

# Packs WORK into the parts in RESULTS. Omits the emoji and, if the rest is too large, checkpoints, then codes.
pack() {
    local less=()
    for more in --exclude=emoji --exclude='model/.*-run/checkpoints' --exclude='./*-emoji' --exclude='./*-world'; do
        less+=("$more")
        [ "$more" != "--exclude=./*-emoji" ] || continue # together with those of the World
        rm -f "$results"/part-*
        needless | tar --exclude-from=- "${less[@]}" --exclude='*.rgb' --exclude=frames.json --exclude=./site -cf - . |
            gzip -1 | split -b "$size" -d -a 2 - "$results/part-"
        [ "$(find "$results" -name 'part-*' | wc -l)" -gt "$most" ] || return 0
        echo "gpu.sh: more than $most parts: trying again with less" >&2
    done
    echo "gpu.sh: $results has more than $most parts" >&2
    return 1
}

if [ ! -e "$work/model" ] && [ -e "$results/part-00" ]; then
    cat "$results"/part-* | tar -xzf - -C "$work"
fi
if [ -d "$here/wheels" ] && [ ! -d "$work/site" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$here"/wheels/*.whl
fi
export PYTHONPATH="$work/site:$here/../../src${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
"$python" - <<'PYTHON'
import importlib.util, sys
needed = "torch pyarrow numpy einops safetensors jaxtyping sentencepiece PIL docstring_parser rich psutil msgspec filelock"
lacks = [name for name in needed.split() if importlib.util.find_spec(name) is None]
sys.exit(f"gpu.sh: missing Python packages: {', '.join(lacks)}" if lacks else 0)
PYTHON
cd "$work" # so that sources have the same name in every piece
ln -sfn "$emoji" emoji
status=0
timeout --foreground --kill-after=$((stopping / 2)) $((limit - stopping - SECONDS)) \
    "$python" "$here/run.py" . emoji "${differences[@]}" || status=$?
pack
case $status in
0) echo "complete after $SECONDS seconds: $work/model" ;;
124 | 137 | 143) status=75 ;;
esac
[ $status != 75 ] || echo "stopped after $SECONDS seconds: run again to continue" >&2
exit $status
