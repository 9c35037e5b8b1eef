#!/usr/bin/env bash
# Collects everything that gpu.sh needs on a machine without a network.
# usage: recipes/pocket/pack.sh EMOJI OUT [PYTHON]
# EMOJI is the folder that layout.py writes, PYTHON the Python version of that machine (3.12). OUT becomes a folder
# below 60 MB with the package without the model in the box, this recipe, the emoji, and wheels of small packages.
# Copy it, then run: bash OUT/recipes/pocket/gpu.sh OUT/emoji WORK RESULTS
set -euo pipefail

emoji=${1:?usage: pack.sh EMOJI OUT [PYTHON]} out=${2:?usage: pack.sh EMOJI OUT [PYTHON]}
root=$(realpath "$(dirname "$0")/../..")
mkdir -p "$out/emoji" "$out/recipes/pocket/wheels"
tar -C "$root" --exclude=__pycache__ --exclude=src/cogvideo/pocket -cf - src recipes/pocket | tar -xf - -C "$out"
cp -rL "$emoji/." "$out/emoji"
"${PIP_PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --python-version "${3:-3.12}" \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d "$out/recipes/pocket/wheels" \
    docstring-parser filelock msgspec rich markdown-it-py mdurl pygments psutil pillow
du -sh --apparent-size "$out"
[ "$(du -s --bytes "$out" | cut -f1)" -lt 60000000 ] || { echo "pack.sh: $out is larger than 60 MB" >&2 && exit 1; }
