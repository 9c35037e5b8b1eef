"""Export of a stage into a bundle: at the end of its run, or from any of its checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cogvideo.bundle.adapters import ADAPTERS, WEIGHTS, write_adapter
from cogvideo.bundle.format import CHANNELS, MANIFEST, SHARED, Entry, Manifest, check_tensors, in_half, module_of
from cogvideo.bundle.model import CogVideo
from cogvideo.bundle.model import update as update_bundle
from cogvideo.config import CogVideoConfig, InputError, from_dict, require
from cogvideo.files import wait_for_lock, write_json
from cogvideo.models.adapters import Delta, fuse
from cogvideo.packing import sharing
from cogvideo.runs import RunFolder
from cogvideo.training.card import REPORTS, identity_of, read_reports, report_of, write_model_card
from cogvideo.training.checkpoints import Checkpoints, read_weights
from cogvideo.training.stages import STAGES, Choice, Target, relying


def check_target(target: Target, overwrite: bool) -> None:
    """Refuse a bundle that cannot take the stage, before anything is trained."""
    out, stage, source = target.out, target.stage, target.source
    for folder in {out, source.folder or out}:
        read_reports(folder)
    advice = "pass --overwrite to replace it, or another --out"
    if target.choice.lora is not None:
        is_free = overwrite or not (target.adapter / WEIGHTS).exists()
        require(is_free, f"the adapter {out} already has {target.own[0]}: {advice}, or another --adapter")
    there = Manifest.here(out)
    if there is None:
        return
    known = there.components
    hint = f", and pass --init {out}" if target.in_place else ""
    other = f"the bundle {out} has a different configuration from the one to be trained: choose another --out{hint}"
    require(there.config.sizes == target.config.sizes, other)
    is_new = target.row.is_base and not (target.in_place and target.choice.start == "continue")
    added = [*(out / CHANNELS).glob(f"*/{MANIFEST}"), *(out / ADAPTERS).glob(f"*/{REPORTS}")]
    names = sorted(str(each.parent.relative_to(out)) for each in added)
    on_base = ", ".join([*relying(stage, known), *names]) if is_new else ""
    relies = f"{on_base} in the bundle {out} rely on its base, which would be replaced: choose another --out"
    require(not on_base, relies)
    replaced = " and ".join(name for name in target.own if name in known and (out / known[name].file).exists())
    require(overwrite or not replaced, f"the bundle {out} already has {replaced}: {advice}")
    for name in SHARED:
        if name in known and name not in target.own:
            same = known[name].sha256 == (source.sha256(name) or known[name].sha256)
            differ = f"the bundles {out} and {source.folder} have different components {name}: choose another --out"
            require(same, differ)


def check_codes(target: Target, names: Sequence[str], tokenizer: str) -> None:
    """Refuse data encoded with another image tokenizer than the one that a stage's initial components learned."""
    folder = target.source.folder
    reports = {} if folder is None else read_reports(folder)
    for name in names:
        learned = reports.get(name.removesuffix("_base"), {}).get("tokenizer", tokenizer)
        require(
            learned == tokenizer,
            f"{name} of the bundle {folder} learned the codes of another image tokenizer (sha256 {learned:.12}) than "
            f"that of the data (sha256 {tokenizer:.12}): prepare the data with that one, or take another bundle",
        )


def left_out(target: Target) -> str:
    """A line about components that were trained on what is replaced; empty if there are none."""
    there, new = _there(target.out), target.row.trains
    names = [each for each in target.stays_behind if each not in there]
    if names:
        return f"{target.out} gets no {', '.join(names)}: trained on another {new}."
    names = [each for each in target.comes_along if each in STAGES and each not in ("superres", *there)]
    advice = "continue training them with --start continue"
    return f"{', '.join(names)} were trained on the old {new}: {advice}." if names else ""


def delivered(target: Target) -> bool:
    """True if the bundle has what the stage trains, in complete files."""
    if target.choice.lora is not None:
        return (target.adapter / WEIGHTS).exists()
    for entry in map(_there(target.out).get, target.own):
        path = None if entry is None else target.out / entry.file
        if entry is None or path is None or not path.exists() or path.stat().st_size != entry.num_bytes:
            return False
    return True


def _there(out: Path) -> Mapping[str, Entry]:
    """Components of a bundle, if there is one."""
    there = Manifest.here(out)
    return {} if there is None else there.components


def deliver_state(target: Target, state: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
    """Put the trained weights of an objective into the bundle, or those of an adapter into its folder."""
    if target.choice.lora is None:
        deliver(target, modules(target, state), report)
        return
    (name,) = target.own
    facts = {"component_sha256": target.source.sha256(name), "durations": report.get("durations", [])}
    tensors = {key: each.half() for key, each in _weights(name, state).items()}
    target.out.mkdir(parents=True, exist_ok=True)
    with wait_for_lock(target.out):
        write_adapter(target.adapter, tensors, facts)
        write_json(target.out / REPORTS, read_reports(target.out) | {name: report})


def deliver(target: Target, trained: Mapping[str, nn.Module], report: Mapping[str, Any]) -> None:
    """Put the trained components into the bundle in float16, with what else it needs, and write its card."""
    out, source, special = target.out, target.source, f"{target.stage}_base"
    out.mkdir(parents=True, exist_ok=True)
    with wait_for_lock(out):  # no other stage that ends now can change what is read here
        there, config = _there(out), target.config
        if (found := Manifest.here(out)) is not None:
            config = found.config
        if "durations" in report:
            config = config.trained_on(target.stage, report["durations"])
        if "shape" in report:
            config = config.shaped(tuple(report["shape"]))
        foreign = {special, *target.stays_behind}
        lacking = [name for name in source.components if name not in there and name not in foreign]
        parts: dict[str, Any] = {name: source.component(name) for name in lacking}
        base = target.frozen_base
        if base is not None and base != "base":
            parts[special] = source.component(base)  # inherited with the channel
        if target.stage == "image" and "superres" in target.comes_along and "superres_base" not in there:
            parts["superres_base"] = source.component("base")  # so that super-resolution keeps its base
        parts |= {name: in_half(name, module, target.config) for name, module in trained.items()}
        known = {} if source.folder is None else read_reports(source.folder)
        copied = {name: known[name] for name in lacking if name in known}
        update_bundle(out, config, without={special} & there.keys() - parts.keys(), **parts)
        write_model_card(out, copied | read_reports(out) | {target.own[0]: report})


def modules(target: Target, state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The components that a stage trains, from the trained weights of its objective, by their names in it."""
    result = {}
    for name in target.own:
        weights = _weights(name, state)
        check_tensors(name, weights, target.config, "what was trained")
        result[name] = module_of(name, weights, target.config)
    return result


def fused(target: Target, state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The component of a stage with the adapter that was trained for it, by its name."""
    (name,) = target.own
    module = sharing(target.source.part(name, nn.Module))
    fuse(module, [Delta(_weights(name, state))])
    return {name: module}


def _weights(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained tensors of a component by their names in it, from those of an objective."""
    prefix = "model.base." if name.endswith("base") else "model.channel."
    return {key.removeprefix(prefix): value.cpu() for key, value in state.items() if key.startswith(prefix)}


def export_run(
    run: Path,
    /,
    out: Path,
    step: int | None = None,
    best: bool = False,
    overwrite: bool = False,
) -> None:
    """Put a checkpoint of a run into a bundle, during the run or after it. The run itself is not changed.

    Args:
        run: Folder of the run, such as my-model/.sequential-run.
        out: Bundle to put the stage into; missing components are copied from the bundle that the run started from.
        step: Step of the checkpoint; the newest one unless given.
        best: Use the checkpoint with the lowest held-out loss.
        overwrite: Replace the stage if the bundle has it.
    """
    identity = identity_of(run)
    stage, choice = identity["stage"], Choice(**identity["choice"])
    config = from_dict(CogVideoConfig, identity["config"])
    require(step is None or not best, "got both --step and --best, expected one of them")
    checkpoints = Checkpoints(run / "checkpoints", keep=0)
    chosen = _choose(run, checkpoints, step, best)
    try:
        source = CogVideo.from_pretrained((run / identity["from"]).resolve())
    except InputError as error:
        raise InputError(f"the bundle that the run started from cannot be used: {error}") from error
    target = Target(out, source, config, stage, choice)
    _check_source(target, identity["parents"])
    check_target(target, overwrite)
    if line := left_out(target):
        print(line, file=sys.stderr)
    weights = read_weights(checkpoints.path(chosen), averaged=identity["optimization"]["ema"] > 0)
    deliver_state(target, weights, report_of(RunFolder(run), chosen))
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


def _check_source(target: Target, parents: Mapping[str, str]) -> None:
    """Refuse a bundle whose components are no longer those that the stage relies on, by their hashes."""
    for name in filter(None, ("text", target.frozen_base)):
        got, expected = target.source.sha256(name), parents.get(name)
        require(
            expected in (None, got),
            f"{name} of the bundle {target.source.folder} is not the one that the run started from: "
            f"got the sha256 {got}, expected {expected}",
        )
