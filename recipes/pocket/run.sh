#!/usr/bin/env bash
# Trains the model in the box. Killed and called again, it continues; stages that are done are passed over.
# usage: recipes/pocket/run.sh OUT EMOJI [WORLD [OPTION...]]
# EMOJI is the folder that layout.py writes, WORLD the number of clips, OPTION what all parts but the text know. On a
# processor without AVX-512 this must be --precision float32: the recipe's bfloat16 is emulated there.
set -euo pipefail

out=${1:?usage: run.sh OUT EMOJI [WORLD [OPTION...]]}
emoji=${2:?usage: run.sh OUT EMOJI [WORLD [OPTION...]]}
world=${3:-12000}
recipe=$(dirname "$0")/recipe.toml
options=(--recipe "$recipe" "${@:4}")
model=$out/model

cogvideo train tokenizer "$emoji" world:3000 --out "$model" "${options[@]}"
[ -e "$model/text.model" ] || cogvideo train text "$emoji" world:20000 --out "$model" --recipe "$recipe"
# Low codes of all clips, and high codes, which take ten times as long, of a part of them.
cogvideo data prepare "$emoji" --out "$out/emoji" --tokenizer "$model" "${options[@]}" --copies 6
cogvideo data prepare "world:$world" --out "$out/world" --tokenizer "$model" "${options[@]}"
cogvideo data prepare "$emoji" --out "$out/emoji-high" --tokenizer "$model" "${options[@]}" --superres --fps 1
cogvideo data prepare "world:$((world / 12))" --out "$out/world-high" --tokenizer "$model" "${options[@]}" --superres --fps 1
data=("$out/emoji" "$out/world")
cogvideo train image --data "${data[@]}" --out "$model" "${options[@]}"
for stage in sequential interpolation; do
    cogvideo train $stage --data "${data[@]}" --out "$model" "${options[@]}"
done
cogvideo train superres --data "$out/emoji-high" "$out/world-high" --out "$model" "${options[@]}"
cogvideo train report "$model" --out "$out/report.html"
