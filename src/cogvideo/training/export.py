"""Export of a stage into a bundle: at the end of its run, or from any of its checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cogvideo.bundle.format import MANIFEST, MODULES, Entry, Manifest, check_tensors, in_half
from cogvideo.bundle.model import CogVideo
from cogvideo.bundle.model import update as update_bundle
from cogvideo.config import CogVideoConfig, InputError, from_dict, require
from cogvideo.files import turn_in
from cogvideo.runs import IDENTITY, RunFolder
from cogvideo.training.card import read_reports, write_card
from cogvideo.training.checkpoints import Checkpoints, read_weights
from cogvideo.training.stages import STAGES, Choice, StageName, base_of, own, relying

SHARED = ("base", "text", "image_tokenizer")
"""Components that the stages of a bundle have in common."""


class ExportTarget(NamedTuple):
    """Stage to export, and the bundle that gets it."""

    out: Path
    """The bundle that gets them."""
    source: CogVideo
    """Bundle that the stage starts from."""
    config: CogVideoConfig
    """Configuration of the bundle."""
    stage: StageName
    choice: Choice

    @property
    def in_place(self) -> bool:
        """Whether the stage goes into the bundle that it starts from."""
        return self.source.folder is not None and self.source.folder.resolve() == self.out.resolve()


def check_target(target: ExportTarget, overwrite: bool) -> None:
    """Refuse a bundle that the stage could not be put into, before anything is trained.

    Args:
        target: what is to be put where.
        overwrite: whether the stage may be replaced.

    Raises:
        ValueError: it has another configuration or other shared components, the stage is there already, or its
            `training.json` cannot be read.
    """
    out, stage = target.out, target.stage
    for folder in {out, target.source.folder or out}:
        read_reports(folder)
    if not (out / MANIFEST).exists():
        return
    there = Manifest.read(out)
    require(
        there.config == target.config,
        f"the bundle {out} has another configuration than the one to be trained: choose another --out"
        + (f", and pass --init {out}" if target.in_place else ""),
    )
    known = there.components
    on_base = relying(stage, known) if STAGES[stage].is_base else ()
    require(
        not on_base,
        f"{', '.join(on_base)} in the bundle {out} rely on its base, which would be replaced: choose another --out",
    )
    replaced = [name for name in own(stage, target.choice) if name in known]
    require(
        overwrite or not replaced,
        f"the bundle {out} has {' and '.join(replaced)} already: pass --overwrite to replace it, or another --out",
    )
    for name in SHARED:
        if name in known and name not in own(stage, target.choice):
            same = known[name].sha256 == (target.source.sha256(name) or known[name].sha256)
            where = target.source.folder
            require(same, f"the bundles {out} and {where} have different components {name}: choose another --out")


def check_codes(target: ExportTarget, names: Sequence[str], tokenizer: str) -> None:
    """Refuse data whose codes are not those that the start of a stage has learned.

    Args:
        target: the stage, and the bundle that it starts from.
        names: components that the start is made from.
        tokenizer: hash of the image tokenizer that the data was made with.

    Raises:
        ValueError: a component was trained on codes of another one, as far as its bundle knows.
    """
    folder = target.source.folder
    reports = {} if folder is None else read_reports(folder)
    for name in names:
        learnt = reports.get(name.removesuffix("_base"), {}).get("tokenizer", tokenizer)
        require(
            learnt == tokenizer,
            f"{name} of the bundle {folder} learnt the codes of another image tokenizer (sha256 {learnt:.12}) than "
            f"that of the data (sha256 {tokenizer:.12}): prepare the data with that one, or take another bundle",
        )


def left_out(target: ExportTarget) -> str:
    """A line about components that do not go along, as they were trained on what is replaced; empty if all do.

    Raises:
        ValueError: the bundle that is there cannot be read.
    """
    names = [each for each in relying(target.stage, target.source.components) if each not in _there(target.out)]
    new = STAGES[target.stage].trains
    return f"{target.out} goes without {', '.join(names)}: trained on another {new}." if names else ""


def delivered(target: ExportTarget) -> bool:
    """Whether the bundle has what the stage trains, in whole files."""
    found = [_there(target.out).get(name) for name in own(target.stage, target.choice)]
    paths = {entry: target.out / entry.file for entry in found if entry is not None}
    whole = [path.exists() and path.stat().st_size == entry.num_bytes for entry, path in paths.items()]
    return len(whole) == len(found) and all(whole)


def _there(out: Path) -> Mapping[str, Entry]:
    """Components of a bundle, if there is one."""
    return Manifest.read(out).components if (out / MANIFEST).exists() else {}


def deliver(target: ExportTarget, trained: Mapping[str, nn.Module], report: Mapping[str, Any]) -> None:
    """Put the trained components into the bundle, with what else it needs, and write its card.

    Args:
        target: what goes where.
        trained: components by name; they are stored in float16.
        report: of the run, for the card.

    Raises:
        ValueError: the bundle changed meanwhile and no longer fits.
        OSError: it cannot be written.
    """
    target.out.mkdir(parents=True, exist_ok=True)
    with turn_in(target.out):  # what is read here is changed by no other stage that ends now
        _deliver(target, trained, report)


def _deliver(target: ExportTarget, trained: Mapping[str, nn.Module], report: Mapping[str, Any]) -> None:
    out, source, stage = target.out, target.source, target.stage
    there = _there(out)
    special = f"{stage}_base"
    foreign = {special, *relying(stage, source.components)}
    lacking = [name for name in source.components if name not in there and name not in foreign]
    parts: dict[str, Any] = {name: source.component(name) for name in lacking}
    if not STAGES[stage].is_base and target.choice.base == "frozen":
        base = base_of(stage, target.choice, source)
        parts |= {} if base == "base" else {special: source.component(base)}  # inherited with the channel
    parts |= {name: in_half(name, module, target.config) for name, module in trained.items()}
    known = {} if source.folder is None else read_reports(source.folder)
    copied = {name: known[name] for name in lacking if name in known}
    update_bundle(out, target.config, without={special} & there.keys() - parts.keys(), **parts)
    write_card(out, copied | read_reports(out) | {own(stage, target.choice)[0]: report})


def modules(
    stage: StageName, choice: Choice, config: CogVideoConfig, state: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """The components that a stage trains, from the trained weights of its objective, by their names in it.

    Raises:
        ValueError: they are not those of the configuration.
    """
    result = {}
    for name in own(stage, choice):
        prefix = "model.base." if name.endswith("base") else "model.channel."
        weights = {key.removeprefix(prefix): value.cpu() for key, value in state.items() if key.startswith(prefix)}
        check_tensors(name, weights, config, "what was trained")
        with torch.device("meta"):
            module = MODULES[name](config)
        module.load_state_dict(weights, assign=True)
        result[name] = module.requires_grad_(False)
    return result


def export_run(run: Path, out: Path, step: int | None = None, best: bool = False, overwrite: bool = False) -> None:
    """Put a checkpoint of the run in a folder, the newest unless given, into a bundle.

    Raises:
        ValueError: the run, the checkpoint or the bundle cannot be used.
        OSError: the bundle cannot be written.
    """
    identity = _identity(run)
    stage, choice = identity["stage"], Choice(**identity["choice"])
    config = from_dict(CogVideoConfig, identity["config"])
    require(step is None or not best, "got both --step and --best, expected one of them")
    checkpoints = Checkpoints(run / "checkpoints", keep=0)
    chosen = _choose(run, checkpoints, step, best)
    target = ExportTarget(out, _source(run, identity, stage, choice), config, stage, choice)
    check_target(target, overwrite)
    if line := left_out(target):
        print(line, file=sys.stderr)
    weights = read_weights(checkpoints.path(chosen), averaged=identity["optimization"]["ema"] > 0)
    deliver(target, modules(stage, choice, config, weights), report_of(RunFolder(run), chosen))
    print(f"{out}: {stage} after {chosen:,} steps")


def _choose(run: Path, checkpoints: Checkpoints, step: int | None, best: bool) -> int:
    steps = checkpoints.steps()
    require(len(steps) > 0, f"{run} has no checkpoint yet")
    if best:
        step = checkpoints.best()
        require(step is not None, f"{run} has no best checkpoint: none was measured on held-out clips, choose a --step")
    chosen = steps[-1] if step is None else step
    require(chosen in steps, f"{run} has no checkpoint of step {chosen}, it has: {', '.join(map(str, steps))}")
    return chosen


def _source(run: Path, identity: Mapping[str, Any], stage: StageName, choice: Choice) -> CogVideo:
    """Bundle that the run started from, if the components that the stage relies on are still the same."""
    try:
        source = CogVideo.from_pretrained((run / identity["from"]).resolve())
    except InputError as error:
        raise InputError(f"the bundle that the run started from cannot be used: {error}") from error
    relies = ("text",) if STAGES[stage].is_base or choice.base != "frozen" else ("text", base_of(stage, choice, source))
    for name in relies:
        got = source.sha256(name)
        expected = identity["parents"].get(name)
        require(
            expected in (None, got),
            f"{name} of the bundle {source.folder} is another than the run started from: got the sha256 {got}, "
            f"expected {expected}",
        )
    return source


def report_of(run: RunFolder, step: int) -> dict[str, Any]:
    """Result of a run at a step, for its card: everything that its folder knows.

    Raises:
        ValueError: the folder is that of no stage, or a file is damaged.
    """
    identity, about = _identity(run.path), run.about
    rows = [row for row in run.rows() if row["step"] <= step]
    measured: dict[str, Any] = {
        name: row[name] for row in rows if row["step"] == step for name in ("loss", "held_out") if name in row
    }
    start = {name: value for name, value in identity["choice"].items() if value is not None}
    settings = {name: identity[name] for name in ("task", "optimization", "clips")}
    return {
        "steps": step,
        **measured,
        **_course([row for row in rows if "loss" in row]),
        **about,
        "start": start,
        **settings,
    }


def _course(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Time, speed and memory of a run from its rows, whatever processes made them."""
    if not rows:
        return {}
    ends = [row["step"] for row in rows]
    steps = [end - before for end, before in zip(ends, [0, *ends[:-1]], strict=True)]
    slowness = sum(made / max(row["tokens_per_second"], 0.1) for made, row in zip(steps, rows, strict=True))
    return {
        "time": {"seconds": rows[-1]["seconds"], "positions_per_second": round(sum(steps) / slowness)},
        "memory": {"peak_bytes": max(row.get("peak_bytes", 0) for row in rows)},
    }


def _identity(run: Path) -> dict[str, Any]:
    path = run / IDENTITY
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(identity, dict) and identity.get("stage") in STAGES
        require(known, f"it names no stage, expected one of {', '.join(STAGES)}")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{run} is no run of a stage ({path.name}: {reason}): pass such a folder as .sequential-run"
        ) from error
    return identity
