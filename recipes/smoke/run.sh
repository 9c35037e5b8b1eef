#!/usr/bin/env bash
# The whole chain: clips -> tokenizer -> text -> codes -> image model -> video stages -> super-resolution -> an mp4.
# usage: recipes/smoke/run.sh OUT [CLIPS]
set -euo pipefail

out=${1:?usage: run.sh OUT [CLIPS]}
clips=world:${2:-80}
recipe=$(dirname "$0")/recipe.toml

cogvideo train tokenizer "$clips" --out "$out/model" --recipe "$recipe"
cogvideo train text "$clips" --out "$out/model"
cogvideo data prepare "$clips" --out "$out/data" --tokenizer "$out/model" --recipe "$recipe"
for stage in image sequential interpolation superres; do
    cogvideo train $stage --data "$out/data" --out "$out/model" --recipe "$recipe"
done
cogvideo train report "$out/model" --out "$out/report.html"
cogvideo generate "a red ball rolls in from the left" --model "$out/model" --output "$out/ball.mp4" --seed 1
