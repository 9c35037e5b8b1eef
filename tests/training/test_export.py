"""Export of a run to a bundle: which weights, which other components, and the contents of the model card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from cogvideo.bundle.format import MODULES, Manifest
from cogvideo.bundle.model import CogVideo, update
from cogvideo.commands import train as commands
from cogvideo.config import StageConfig
from cogvideo.models.transformer import Base
from cogvideo.training.card import read_reports, write_model_card
from cogvideo.training.export import check_codes, check_target, deliver, export_run, left_out, modules
from cogvideo.training.optim import StageOptimization
from cogvideo.training.session import DataOptions, Options, StageLogging
from cogvideo.training.stages import Choice, StageName, Target
from gallery import assert_same, loud, make_model, make_parts
from workshop import make_data, small_config

STEPS = 4


@pytest.fixture(scope="module")
def place(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle without video channels, a complete one, data, and a run with all its checkpoints."""
    folder = tmp_path_factory.mktemp("export")
    make_model(folder / "model", train_text_model(), without=("sequential", "interpolation"))
    make_model(folder / "whole", train_text_model())
    make_data(folder / "data", folder / "model")
    (folder / "model" / "training.json").write_text('{"base": {"steps": 77}, "interpolation": {"steps": 1}}')
    commands.sequential(options_of(folder, folder / "trained"))
    return folder


def options_of(place: Path, out: Path, sample_every: int = 0) -> Options:
    """Options of the run."""
    settings = StageOptimization(steps=STEPS, batch=2, warmup=0, learning_rate=1e-2, ema=0.5)
    logging = StageLogging(1, 1, 1, keep=9, evaluate_samples=4, sample_every=sample_every)
    return Options(DataOptions((place / "data",)), out, str(place / "model"), optimization=settings, logging=logging)


def run_of(place: Path) -> Path:
    return place / "trained" / ".sequential-run"


def copy_of(run: Path, folder: Path, step: int | None = None, **changes: Any) -> Path:
    """Copy the run, optionally as it was after a step, with changes to its identity."""
    shutil.copytree(run, folder)
    identity = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(identity | changes))
    if step is not None:
        (folder / "report.json").unlink()
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(folder / "checkpoints" / f"step-{later:08}")
    return folder


def tables_of(run: Path, step: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Tables of a checkpoint, read by PyTorch's own converter."""
    dcp_to_torch_save(run / "checkpoints" / f"step-{step:08}", folder / "plain.pt")
    found: dict[str, dict[str, Tensor]] = torch.load(folder / "plain.pt", weights_only=True)
    return found


@pytest.mark.parametrize("step", range(1, STEPS + 1))
@pytest.mark.parametrize("averaged", [True, False])
def test_any_checkpoint_becomes_a_bundle(step: int, averaged: bool, place: Path, tmp_path: Path) -> None:
    """Exports must contain the weights of the chosen step, averaged if there is an average, under the right names. All
    other components must be byte-identical to those of the initial bundle."""
    run = run_of(place)
    if not averaged:
        settings = json.loads((run / "run.json").read_text())["optimization"] | {"ema": 0.0}
        run = copy_of(run, tmp_path / ".sequential-run", optimization=settings)
    export_run(run, tmp_path / "out", step=step)
    tables = tables_of(run_of(place), step, tmp_path)["average" if averaged else "weights"]
    expected = {name.removeprefix("model.channel."): each.half() for name, each in tables.items()}
    assert_same(load_file(tmp_path / "out" / "sequential.safetensors"), expected)
    ours, theirs = (Manifest.read(each).components for each in (tmp_path / "out", place / "model"))
    assert ours.keys() == theirs.keys() | {"sequential"}
    assert all(ours[name].sha256 == theirs[name].sha256 for name in theirs)
    assert CogVideo.from_pretrained(tmp_path / "out").sequential.channel is not None


def test_the_run_itself_delivers_the_last_average(place: Path, tmp_path: Path) -> None:
    """A finished run must deliver the average stored in its last checkpoint, not the raw weights."""
    tables = tables_of(run_of(place), STEPS, tmp_path)
    found = load_file(place / "trained" / "sequential.safetensors")
    assert_same(found, {name.removeprefix("model.channel."): each.half() for name, each in tables["average"].items()})
    assert not torch.equal(found["positions.weight"], tables["weights"]["model.channel.positions.weight"].half())


def test_a_run_that_was_killed_behind_its_last_step_ends_as_it_would_have(place: Path, tmp_path: Path) -> None:
    """Restarting a run that was killed after its last step must give the same bundle, report, and samples."""
    copy_of(run_of(place), tmp_path / "out" / ".sequential-run", STEPS)
    commands.sequential(options_of(place, tmp_path / "out"))
    for name in ("sequential.safetensors", "base.safetensors", "bundle.json"):
        assert (tmp_path / "out" / name).read_bytes() == (place / "trained" / name).read_bytes()
    ours, theirs = (
        json.loads((run / "report.json").read_text()) for run in (tmp_path / "out" / ".sequential-run", run_of(place))
    )
    for changing in ("time", "memory"):
        assert ours.pop(changing).keys() == theirs.pop(changing).keys()
    assert ours == theirs
    assert ours["loss"] > 0
    assert not (tmp_path / "out" / ".sequential-run" / "samples").exists()
    (tmp_path / "out" / ".sequential-run" / "report.json").unlink()
    commands.sequential(options_of(place, tmp_path / "out", sample_every=STEPS))
    assert (tmp_path / "out" / ".sequential-run" / "samples" / f"step-{STEPS:08}.png").exists()


def test_what_float16_cannot_hold_stays_wide(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], train_text_model: Callable[..., bytes]
) -> None:
    """Prevents weights from overflowing in float16: such a component stays in float32, with a message."""
    source = CogVideo.from_pretrained(place / "model")
    channel = loud(make_parts(train_text_model())["sequential"], 3)
    for largest, dtype in ((65504.0, torch.float16), (65536.0, torch.float32)):
        with torch.no_grad():
            channel.positions.weight[0, 0] = largest
        out = tmp_path / str(dtype)
        deliver(target_of(source, out, "sequential", Choice("inherit")), {"sequential": channel}, {})
        stored = load_file(out / "sequential.safetensors")
        assert {each.dtype for each in stored.values()} == {dtype}
        assert stored["positions.weight"][0, 0] == largest
        assert_same(CogVideo.from_pretrained(out, torch.float32).component("sequential").state_dict(),
                    {name: each.to(dtype).float() for name, each in channel.state_dict().items()})  # fmt: skip
        assert channel.positions.weight.dtype == torch.float32
    told = "sequential is not stored in float16: positions.weight has values beyond 65,504."
    assert capsys.readouterr().err.splitlines() == [told]


def test_codes_of_another_tokenizer_are_refused(place: Path, tmp_path: Path) -> None:
    """Catches data from a different image tokenizer than the base was trained on, according to its report."""
    shutil.copytree(place / "model", tmp_path / "model")
    source = CogVideo.from_pretrained(tmp_path / "model")
    target = target_of(source, tmp_path / "out", "sequential", Choice("inherit"))
    for report, refused in (({"base": {}}, False), ({"base": {"tokenizer": "a" * 64}}, True)):
        (tmp_path / "model" / "training.json").write_text(json.dumps(report))
        check_codes(target, ["base"], "a" * 64)
        if refused:
            with pytest.raises(ValueError, match=r"base of the bundle .*model learned the codes of another image tok"):
                check_codes(target, ["base"], "b" * 64)
        else:
            check_codes(target, ["base"], "b" * 64)
    tokenizer = Manifest.read(place / "model").components["image_tokenizer"].sha256
    assert read_reports(place / "trained")["sequential"]["tokenizer"] == tokenizer


def test_newest_and_best_are_found(place: Path, tmp_path: Path) -> None:
    """Exports use the newest checkpoint by default, and the best by the mean over frame rates. Exporting from a live
    run must not touch what it is writing."""
    run = copy_of(run_of(place), tmp_path / "run", 3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: sum(each["loss"] for each in row["held_out"].values()) for row in rows if "held_out" in row}
    best = min(range(1, 4), key=lambda step: losses[step])
    (run / "checkpoints" / ".step-00000004").mkdir()
    before = sorted(str(each) for each in run.rglob("*"))
    export_run(run, tmp_path / "newest")
    export_run(run, tmp_path / "best", best=True)
    assert sorted(str(each) for each in run.rglob("*")) == before
    assert read_reports(tmp_path / "newest")["sequential"]["steps"] == 3
    assert read_reports(tmp_path / "best")["sequential"]["steps"] == best
    for step in range(1, 4):
        state = run / "checkpoints" / f"step-{step:08}" / "state.json"
        state.write_text(json.dumps({"step": step, "held_out": 1.0 if step == 2 else 2.0}))
    export_run(run, tmp_path / "chosen", best=True)
    assert read_reports(tmp_path / "chosen")["sequential"]["steps"] == 2
    state.write_text(json.dumps({"step": 3, "held_out": None}))
    for step in (1, 2):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08}")
    with pytest.raises(ValueError, match=r"has no best checkpoint: none was measured on held-out clips"):
        export_run(run, tmp_path / "none", best=True)


def test_what_is_no_run_is_refused(place: Path, tmp_path: Path) -> None:
    """Wrong folders and steps must each fail with a clear message, and nothing is written."""
    out = tmp_path / "out"
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    for content in ("", "[]", "{}", '{"stage": "tokenizer"}', '{"sources": []}'):
        (tmp_path / "other" / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"other is not a run of a stage \(run.json: .+\): pass such a folder as"):
            export_run(tmp_path / "other", out)
    for name in ("nowhere", "file"):
        with pytest.raises(ValueError, match=f"{name} is not a run of a stage"):
            export_run(tmp_path / name, out)
    with pytest.raises(ValueError, match="got both --step and --best"):
        export_run(run_of(place), out, step=1, best=True)
    with pytest.raises(ValueError, match=r"has no checkpoint of step 9, it has: 1, 2, 3, 4"):
        export_run(run_of(place), out, step=9)
    empty = copy_of(run_of(place), tmp_path / "empty", 0)
    with pytest.raises(ValueError, match="empty has no checkpoint yet"):
        export_run(empty, out)
    assert not out.exists()
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_checkpoint_leaves_the_bundle_alone(place: Path, tmp_path: Path) -> None:
    """Prevents a partial bundle: nothing is written until all weights have been read."""
    run = copy_of(run_of(place), tmp_path / "run", 3)
    tensors = next((run / "checkpoints" / "step-00000003").glob("*.distcp"))
    tensors.write_bytes(tensors.read_bytes()[:1000])
    with pytest.raises(ValueError, match="step-00000003 is damaged"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_run(run, tmp_path / "out", step=2)


def test_another_base_than_the_run_had_is_refused(
    place: Path, tmp_path: Path, train_text_model: Callable[..., bytes]
) -> None:
    """Prevents exporting a channel onto a base it was not trained on, if the initial bundle was replaced or moved."""
    shutil.copytree(place / "model", tmp_path / "model")
    run = copy_of(run_of(place), tmp_path / "run", **{"from": str(tmp_path / "model")})
    export_run(run, tmp_path / "same")
    config = small_config(train_text_model())
    update(tmp_path / "model", config, superres=loud(make_parts(train_text_model())["superres"], 5))
    export_run(run, tmp_path / "unconcerned")
    update(tmp_path / "model", config, base=loud(Base(config.transformer), 5))
    with pytest.raises(
        ValueError, match=r"base of the bundle .*model is not the one that the run started from: got .*, exp"
    ):
        export_run(run, tmp_path / "other")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match="the bundle that the run started from cannot be used: there is no folder"):
        export_run(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_bundle_that_does_not_fit_is_refused(
    place: Path, tmp_path: Path, train_text_model: Callable[..., bytes]
) -> None:
    """Protects existing bundles: their stages, a different base or configuration, and the reports of other runs."""
    out = tmp_path / "out"
    export_run(run_of(place), out, step=1)
    before = (out / "sequential.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"out already has sequential: pass --overwrite"):
        export_run(run_of(place), out, step=2)
    assert (out / "sequential.safetensors").read_bytes() == before
    export_run(run_of(place), out, step=2, overwrite=True)
    assert read_reports(out)["sequential"]["steps"] == 2
    config = small_config(train_text_model())
    update(out, config, base=loud(Base(config.transformer), 5))
    with pytest.raises(ValueError, match="have different components base: choose another --out"):
        export_run(run_of(place), out, overwrite=True)
    other = replace(config, sequential=StageConfig(2))
    CogVideo(other, base=make_parts(train_text_model())["base"]).save_pretrained(tmp_path / "windows")
    with pytest.raises(ValueError, match="windows has a different configuration from the one to be trained"):
        export_run(run_of(place), tmp_path / "windows")
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "training.json").write_text("[")
    with pytest.raises(ValueError, match=r"cannot use .*training.json: .*; remove it to do without"):
        export_run(run_of(place), tmp_path / "fresh")
    assert [each.name for each in (tmp_path / "fresh").iterdir()] == ["training.json"]


def target_of(source: CogVideo, out: Path, stage: StageName, choice: Choice) -> Target:
    return Target(out, source, source.config, stage, choice)


def test_a_base_of_its_own_comes_and_goes_with_its_stage(
    place: Path, tmp_path: Path, train_text_model: Callable[..., bytes]
) -> None:
    """Checks `sequential_base`: a stage that trained its base stores it, the next stage inherits it with the channel,
    and retraining on the shared base removes it."""
    config, parts = small_config(train_text_model()), make_parts(train_text_model())
    source, out = CogVideo.from_pretrained(place / "model"), tmp_path / "out"
    own, channel = loud(Base(config.transformer), 8), loud(make_parts(train_text_model())["sequential"], 9)
    trained = {"sequential": channel, "sequential_base": own}
    deliver(target_of(source, out, "sequential", Choice("inherit", "trained")), trained, {"steps": 1})
    model = CogVideo.from_pretrained(out)
    assert_same(model.sequential.base.state_dict(), own.half().state_dict())
    assert model.sha256("base") == source.sha256("base")

    choice = Choice("sequential")
    deliver(target_of(model, out, "interpolation", choice), {"interpolation": parts["interpolation"]}, {"steps": 2})
    model = CogVideo.from_pretrained(out)
    assert model.sha256("interpolation_base") == model.sha256("sequential_base")
    assert_same(model.interpolation.base.state_dict(), own.state_dict())

    target = target_of(model, out, "sequential", Choice("inherit"))
    with pytest.raises(ValueError, match="already has sequential"):
        check_target(target, overwrite=False)
    check_target(target, overwrite=True)
    deliver(target, {"sequential": parts["sequential"]}, {"steps": 3})
    model = CogVideo.from_pretrained(out)
    assert "sequential_base" not in model.components
    assert "interpolation_base" in model.components
    assert model.sequential.base is model.base
    assert read_reports(out).keys() >= {"sequential", "interpolation"}


def test_a_base_that_others_rely_on_stays(place: Path, tmp_path: Path, train_text_model: Callable[..., bytes]) -> None:
    """Prevents a new image model from replacing a base that other stages use, unless they have their own."""
    shutil.copytree(place / "model", tmp_path / "out")
    source = CogVideo.from_pretrained(tmp_path / "out")
    target = target_of(source, tmp_path / "out", "image", Choice("random"))
    with pytest.raises(ValueError, match=r"superres in the bundle .* rely on its base"):
        check_target(target, overwrite=True)
    config = small_config(train_text_model())
    update(tmp_path / "out", config, superres_base=loud(Base(config.transformer), 8))
    check_target(target, overwrite=True)


@pytest.mark.parametrize(
    ("stage", "gone"), [("image", "sequential, interpolation, superres"), ("sequential", "interpolation")]
)
def test_what_was_trained_on_another_component_stays_behind(
    stage: StageName, gone: str, place: Path, tmp_path: Path
) -> None:
    """Prevents copying channels of a replaced base, and an interpolation of replaced key frames, which a recipe's next
    command would find already there. In place, only the key frames are replaced."""
    shutil.copytree(place / "whole", tmp_path / "full")
    source, name = CogVideo.from_pretrained(tmp_path / "full"), "base" if stage == "image" else stage
    (tmp_path / "full" / "training.json").write_text('{"superres": {"steps": 1}, "interpolation": {"steps": 2}}')
    target = target_of(source, tmp_path / "new", stage, Choice("random"))
    assert left_out(target) == f"{tmp_path / 'new'} gets no {gone}: trained on another {name}."
    deliver(target, {name: source.component(name)}, {"steps": 1})
    kept = set(source.components) - set(gone.split(", "))
    assert set(CogVideo.from_pretrained(tmp_path / "new").components) == kept
    assert read_reports(tmp_path / "new").keys() == {"superres", name} & kept
    shutil.copytree(place / "whole", tmp_path / "same")
    target = target_of(CogVideo.from_pretrained(tmp_path / "same"), tmp_path / "same", "sequential", Choice("inherit"))
    assert left_out(target) == ""
    deliver(target, {"sequential": source.component("sequential")}, {"steps": 1})
    assert set(CogVideo.from_pretrained(tmp_path / "same").components) == set(source.components)


def test_what_is_trained_on_keeps_the_others(
    place: Path, tmp_path: Path, train_text_model: Callable[..., bytes]
) -> None:
    """Fine-tuning must keep the other stages: channels are copied for further training, super-resolution keeps the old
    base, and generation learns the key frames' durations, also in place."""
    shutil.copytree(place / "whole", tmp_path / "same")
    source = CogVideo.from_pretrained(place / "whole")
    better = loud(Base(small_config(train_text_model()).transformer), 5)
    for out, start in ((tmp_path / "new", source), (tmp_path / "same", CogVideo.from_pretrained(tmp_path / "same"))):
        target = target_of(start, out, "image", Choice("continue"))
        check_target(target, overwrite=True)
        told = "sequential, interpolation were trained on the old base: continue training them with --start continue."
        assert left_out(target) == (told if out.name == "new" else "")
        deliver(target, {"base": better}, {"steps": 1})
        made = CogVideo.from_pretrained(out)
        assert set(made.components) == {*source.components, "superres_base"}
        assert_same(made.upscaler.base.state_dict(), source.base.state_dict())
        assert not torch.equal(made.sequential.base.words.weight.float(), source.base.words.weight.float())
        assert made.config.seconds == 4
        target = target_of(made, out, "sequential", Choice("continue"))
        deliver(target, {"sequential": source.component("sequential")}, {"steps": 1, "durations": [1.0, 0.5]})
        made = CogVideo.from_pretrained(out)
        assert made.config.sequential.durations == (1.0, 0.5)
        assert made.config.seconds == 1
        assert made.config.sizes == source.config
        check_target(target_of(made, out, "interpolation", Choice("continue")), overwrite=True)


def test_weights_of_another_configuration_are_no_component(train_text_model: Callable[..., bytes]) -> None:
    """Weights that lack a tensor must be refused, with its name, before they become a component."""
    target = target_of(CogVideo(small_config(train_text_model())), Path(), "sequential", Choice("inherit"))
    state = {
        f"model.channel.{name}": each
        for name, each in make_parts(train_text_model())["sequential"].state_dict().items()
    }
    assert_same(
        modules(target, state)["sequential"].state_dict(),
        {name.removeprefix("model.channel."): each for name, each in state.items()},
    )
    del state["model.channel.positions.weight"]
    with pytest.raises(
        ValueError, match=r"does not fit the configuration as sequential: missing tensors: positions.weight"
    ):
        modules(target, state)


def test_the_card_tells_sizes_losses_and_hashes(place: Path, tmp_path: Path) -> None:
    """Checks every figure in the card and reports of a published bundle, and that no local path leaks into them."""
    out = place / "trained"
    card, reports = (out / "README.md").read_text(), read_reports(out)
    rows = [json.loads(line) for line in (run_of(place) / "metrics.jsonl").read_text().splitlines()]
    loss = next(row["loss"] for row in rows if row["step"] == STEPS and "loss" in row)
    held = next(row["held_out"] for row in rows if row["step"] == STEPS and "held_out" in row)
    assert f"| loss | {loss:.4g} |" in card
    for name, figures in held.items():
        assert re.search(
            rf"\| held out, {name} \| loss {figures['loss']:.4g}; frame 1 {figures['frame_1']:.4g}; ", card
        )
    for name, entry in Manifest.read(out).components.items():
        assert re.search(rf"\| {name} \| {re.escape(entry.file)} \| [\d.]+ \w+ \| `{entry.sha256[:12]}` \|", card)
    assert "2 layers, hidden 32, 2 heads" in card
    assert "5 frames of 4 x 4 codes" in card
    trained, frozen = (
        sum(each.numel() for each in load_file(out / f"{name}.safetensors").values()) for name in ("sequential", "base")
    )
    assert f"| parameters | trained {trained:,}; frozen {frozen:,} |" in card
    assert "| data, data | trained on 8; held out 4; source made up |" in card
    course = [row for row in rows if "loss" in row]
    seconds = sum(1 / row["tokens_per_second"] for row in course)
    assert reports["sequential"]["time"]["positions_per_second"] == pytest.approx(len(course) / seconds, abs=1)
    assert reports["sequential"]["memory"]["peak_bytes"] == max(row["peak_bytes"] for row in course) > 2**20
    assert reports["sequential"]["loss"] == loss
    assert reports["base"] == {"steps": 77}, "what is known of a component goes along with it"
    assert "interpolation" not in reports, "the bundle has none"
    export_run(run_of(place), tmp_path / "early", step=2)
    early = (tmp_path / "early" / "README.md").read_text()
    second = next(row["loss"] for row in rows if row["step"] == 2 and "loss" in row)
    assert f"| loss | {second:.4g} |" in early
    assert "| steps | 2 |" in early
    whole, part = (read_reports(each)["sequential"] for each in (out, tmp_path / "early"))
    assert part.keys() == whole.keys(), "what is known at the end is known before"
    for name in ("parameters", "data", "torch", "cogvideo"):
        assert part[name] == whole[name]
    assert part["time"]["seconds"] == course[1]["seconds"]
    for text in (card, early, (out / "training.json").read_text(), (tmp_path / "early" / "training.json").read_text()):
        assert str(place) not in text
        assert str(Path.home()) not in text
        assert not re.search(r"(?<![\w.])/\w+/\w+", text), "an absolute path"


def test_reports_survive_a_copy(place: Path, tmp_path: Path) -> None:
    """A copied bundle must keep its training reports when it is trained further."""
    shutil.copytree(place / "trained", tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    before = read_reports(tmp_path / "copy")
    source = CogVideo.from_pretrained(tmp_path / "copy")
    target = target_of(source, tmp_path / "copy", "interpolation", Choice("sequential"))
    deliver(target, {"interpolation": loud(MODULES["interpolation"](source.config), 3)}, {"steps": 9})
    assert read_reports(tmp_path / "copy") == before | {"interpolation": {"steps": 9}}
    onward = target_of(CogVideo.from_pretrained(tmp_path / "copy"), tmp_path / "onward", "superres", Choice("continue"))
    deliver(onward, {}, {"steps": 10})
    assert read_reports(tmp_path / "onward") == before | {"interpolation": {"steps": 9}, "superres": {"steps": 10}}


def test_a_readme_of_the_user_is_left_alone(place: Path, tmp_path: Path) -> None:
    """Prevents overwriting a user's README: one without our marker is kept, one with it is updated."""
    shutil.copytree(place / "whole", tmp_path / "model")
    folder = tmp_path / "model"
    write_model_card(folder, {})
    ours = (folder / "README.md").read_text()
    write_model_card(folder, {"base": {"steps": 5}})
    assert "## Training: base" in (folder / "README.md").read_text()
    assert "## Training" not in ours
    mine = "\n".join(line for line in ours.splitlines() if not line.startswith("<!-- written by")) + "\nMy words.\n"
    for content in (mine.encode(), b"", b"\xff\xfe no UTF-8"):
        (folder / "README.md").write_bytes(content)
        write_model_card(folder, {"base": {"steps": 6}})
        assert (folder / "README.md").read_bytes() == content
        assert read_reports(folder) == {"base": {"steps": 6}}


@pytest.mark.parametrize("content", ["", "[]", "3", '{"base": 3}', '{"base": [1]}', "\xff"])
def test_reports_that_cannot_be_read_are_named(content: str, tmp_path: Path) -> None:
    """Prevents losing a bundle's history: an unreadable training.json is an error, and does not count as empty."""
    (tmp_path / "training.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"cannot use .*training.json: .*; remove it to do without"):
        read_reports(tmp_path)


def test_whatever_a_report_holds_is_one_row(place: Path, tmp_path: Path) -> None:
    """Catches names of folders and clips whose Markdown or HTML characters would break the card's tables."""
    folder = tmp_path / "a|b <i>"
    shutil.copytree(place / "whole", folder)
    odd = "x | y\n## z <script>"
    report = {
        odd: 1.5,
        "data": {odd: {"clips": 12_345, "source": odd}},
        "start": {odd: odd},
        "list": [odd, 1],
        "tuple": (1.0, 2.0),
        "nothing": None,
        "yes": True,
        "small": 1.23456e-7,
        "nan": float("nan"),
    }
    write_model_card(folder, {"base": report})
    card = (folder / "README.md").read_text()
    table = card.split("## Training: base")[1].strip().splitlines()
    assert len(table) == 2 + len(report)
    assert all(line.count("|") == 3 for line in table)
    assert "<script" not in card
    assert "<i>" not in card
    cells = dict(line.strip("| ").split(" | ", 1) for line in table if line.count(" | ") == 1)
    escaped = "x &#124; y ## z &lt;script>"
    assert cells[escaped] == "1.5"
    assert cells[f"data, {escaped}"] == f"clips 12,345; source {escaped}"
    assert cells["start"] == f"{escaped} {escaped}"
    assert (cells["list"], cells["tuple"], cells["nothing"]) == (f"{escaped}, 1", "1.0, 2.0", "None")
    assert (cells["yes"], cells["small"], cells["nan"]) == ("True", "1.235e-07", "nan")
    assert sum(line.startswith("# ") for line in card.splitlines()) == 1
