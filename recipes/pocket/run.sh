#!/usr/bin/env bash
# Trains the model in the box. Killed and called again, it continues; stages that are done are passed over.
# usage: recipes/pocket/run.sh OUT EMOJI [WORLD]     (EMOJI: the folder that layout.py writes, WORLD: number of clips)
set -euo pipefail

out=${1:?usage: run.sh OUT EMOJI [WORLD]}
emoji=${2:?usage: run.sh OUT EMOJI [WORLD]}
world=${3:-12000}
recipe=$(dirname "$0")/recipe.toml
model=$out/model

cogvideo train tokenizer "$emoji" world:3000 --out "$model" --recipe "$recipe"
[ -e "$model/text.model" ] || cogvideo train text "$emoji" world:20000 --out "$model" --recipe "$recipe"
# Low codes of all clips, and high codes, which take ten times as long, of a part of them.
cogvideo data prepare "$emoji" --out "$out/emoji" --tokenizer "$model" --recipe "$recipe" --copies 6
cogvideo data prepare "world:$world" --out "$out/world" --tokenizer "$model" --recipe "$recipe"
cogvideo data prepare "$emoji" --out "$out/emoji-high" --tokenizer "$model" --recipe "$recipe" --superres --fps 1
cogvideo data prepare "world:$((world / 12))" --out "$out/world-high" --tokenizer "$model" --recipe "$recipe" --superres --fps 1
data=("$out/emoji" "$out/world")
# All frames first. Then the first ones alone, since a clip begins with what the image model draws.
cogvideo train image --data "${data[@]}" --init "$model" --out "$out/image" --recipe "$recipe"
cogvideo train image --data "${data[@]}" --init "$out/image" --out "$model" --recipe "$recipe" --start continue \
    --no-random-offset --understanding 0 --steps 2000 --learning-rate 8e-4
for stage in sequential interpolation; do
    cogvideo train $stage --data "${data[@]}" --out "$model" --recipe "$recipe"
done
cogvideo train superres --data "$out/emoji-high" "$out/world-high" --out "$model" --recipe "$recipe"
cogvideo train report "$out/image" "$model" --out "$out/report.html"
