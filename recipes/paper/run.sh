#!/usr/bin/env bash
# Runs one step of the paper's training on your own clips, from the released image model. The same command continues an
# interrupted run. `cogvideo plan` shows which machines are needed. The number of GPUs must divide the batch (416, 160).
# usage: run.sh data BUNDLE CLIPS OUT          once, on any machine
#        run.sh sequential BUNDLE CLIPS OUT    on every machine, with torchrun's options in TORCHRUN, such as
#        run.sh interpolation BUNDLE CLIPS OUT "--nnodes 13 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400"
#   BUNDLE  from `cogvideo convert`: the image model and both tokenizers
#   CLIPS   captioned clips, as `cogvideo data prepare` takes them
#   OUT     folder for the codes and the model
set -euo pipefail

usage="usage: run.sh data|sequential|interpolation BUNDLE CLIPS OUT"
step=${1:?$usage} bundle=${2:?$usage} clips=${3:?$usage} out=${4:?$usage}
recipe=$(dirname "$0")/recipe.toml

case $step in
    data) cogvideo data prepare "$clips" --out "$out/data" --tokenizer "$bundle" --recipe "$recipe" ;;
    sequential) from=$bundle ;;
    interpolation) from=$out/model ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac
if [ "$step" != data ]; then
    # shellcheck disable=SC2086 # options are words
    torchrun ${TORCHRUN:---nproc-per-node 8} -m -- cogvideo train "$step" \
        --data "$out/data" --init "$from" --out "$out/model" --recipe "$recipe"
fi
