"""Training of the model in the box: `python recipes/pocket/run.py OUT EMOJI [DIFFERENCES ...]`.

EMOJI is the folder that layout.py writes. Codes, the bundle `model` and `report.html` go into OUT. If interrupted, run
it again: it skips finished parts and continues. DIFFERENCES are TOML files whose values replace those of recipe.toml,
such as gpu.toml. All parts run in this process, so PyTorch is imported only once.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cogvideo.cli import main as cogvideo
from cogvideo.files import write_text

RECIPE = Path(__file__).with_name("recipe.toml")
KEY_FRAMES = ("--fps", "1", "--max-seconds", "5", "--loop-to", "5")
"""Five frames to train the image model and key frames on; super-resolution uses them one by one."""
WHOLE = ("--fps", "8", "--max-seconds", "4.125", "--loop-to", "4.125")
"""All frames of a clip, to train interpolation on."""

Recipe = dict[str, dict[str, Any]]


def parts(out: str, emoji: str, data: dict[str, list[int]]) -> Iterator[tuple[str, list[str]]]:
    """Yield name and command of each part in order. Codes are made before the first stage that needs them."""
    model = f"{out}/model"
    copies, scenes = data["tokenizer"]
    yield (
        "tokenizer",
        ["train", "tokenizer", emoji, f"world:simple:{scenes}", "--out", model, "--copies", str(copies)],
    )
    yield "text", ["train", "text", emoji, f"world:simple:{data['text'][1]}", "--out", model]
    for name, time, stages in (
        ("frames", KEY_FRAMES, ("image", "sequential")),
        ("moves", WHOLE, ("interpolation",)),
        ("large", (*KEY_FRAMES, "--superres"), ("superres",)),
    ):
        copies, scenes, repeats, others = data[name]
        sources = {f"{name}-emoji": emoji, f"{name}-world": f"world:simple:{scenes}"}
        if others:
            sources[f"{name}-others"] = f"world:{others}"
        for folder, source in sources.items():
            number = ("--copies", str(copies)) if source == emoji else ()
            made = ("--out", f"{out}/{folder}", "--tokenizer", model)
            yield folder, ["data", "prepare", source, *made, *time, *number]
        first, *rest = [f"{out}/{folder}" for folder in sources]
        for stage in stages:  # a repeated folder counts several times
            yield stage, ["train", stage, "--data", *[first] * repeats, *rest, "--out", model]
    yield "report", ["train", "report", model, "--out", f"{out}/report.html"]


def merged(paths: Sequence[Path]) -> Recipe:
    """Merge TOML files; values of later files replace those of earlier ones."""
    tables: Recipe = {}
    for path in paths:
        for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
            tables[name] = tables.get(name, {}) | table
    return tables


def written(recipe: Recipe) -> str:
    """Format the recipe as TOML, in which strings, numbers, booleans and lists are written as in JSON."""
    lines = [
        line
        for name, table in recipe.items()
        for line in (f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()))
    ]
    return "\n".join(lines) + "\n"


def main(out: str, emoji: str, differences: Sequence[str]) -> int:
    """Run the remaining parts; returns the exit status of the first one that fails, otherwise 0."""
    recipe, path = merged([RECIPE, *map(Path, differences)]), Path(out) / "recipe.toml"
    (Path(out) / "done").mkdir(parents=True, exist_ok=True)
    write_text(path, written(recipe))
    for name, command in parts(out, emoji, recipe["data"]):
        table = recipe.get(command[1])
        made = hashlib.sha256(json.dumps([command, table]).encode()).hexdigest()
        mark = Path(out) / "done" / name
        if mark.exists() and mark.read_text() == made:
            continue
        print(f"-- {name}", file=sys.stderr, flush=True)
        if status := cogvideo([*command, *(("--recipe", str(path)) if table is not None else ())]):
            return status
        write_text(mark, made)
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python recipes/pocket/run.py OUT EMOJI [DIFFERENCES ...]")
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
