"""Fine-tuning on your own clips in one command: resuming after a kill; single, short, and uncaptioned clips."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import CogVideo
from cogvideo.cli import main
from cogvideo.data.sources import SourceOptions, list_source
from cogvideo.media.video import read_video, write_video
from cogvideo.report.finetune import choose
from cogvideo.runs import RunFolder
from cogvideo.training import finetune
from cogvideo.training.card import read_reports
from cogvideo.training.checkpoints import Checkpoints
from cogvideo.training.finetune import Finetuning, FinetuningRun
from cogvideo.training.launch import seconds_per_step
from cogvideo.training.stages import Choice
from gallery import make_model
from killing import kill_at

QUICK = Finetuning(steps=4, batch=2)


def write_clip(path: Path, seconds: float, shade: int, caption: str | None = None) -> None:
    """Write a clip of a square that moves to the right, at ten frames per second."""
    path.parent.mkdir(exist_ok=True)
    number = round(10 * seconds)
    frames = np.full((number, 32, 48, 3), shade, np.uint8)
    for place, frame in enumerate(frames):
        left = 8 + 24 * place // number
        frame[10:20, left : left + 10] = (255 - shade, 40, 90)
    write_video(path, frames, 10)
    if caption is not None:
        path.with_suffix(".txt").write_text(f"{caption}\n")


@pytest.fixture(scope="module", autouse=True)
def one_judge() -> Iterator[None]:
    """Let a single held-out clip suffice to choose a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "MIN_JUDGES", 1)
        yield


@pytest.fixture(scope="module")
def place(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five clips and a base model."""
    folder = tmp_path_factory.mktemp("finetune")
    make_model(folder / "base", train_text_model())
    for number, seconds in enumerate((4.0, 2.0, 3.0, 2.5, 1.0)):
        caption = None if number == 4 else "a cat runs"
        write_clip(folder / "clips" / f"the-cat_{number}.mp4", seconds, 50 * number, caption)
    return folder


@pytest.fixture(scope="module")
def tuned(place: Path) -> Path:
    """The result of an uninterrupted chain."""
    FinetuningRun(str(place / "clips"), place / "tuned", str(place / "base"), QUICK).run()
    return place / "tuned"


class Begun(Exception):
    """Raised in place of a step, to stop the chain there."""


def begin(folder: Path, place: Path, settings: Finetuning = QUICK) -> FinetuningRun:
    """Start a fine-tuning on the clips of a folder, and stop it before the second step."""
    chain = FinetuningRun(str(folder / "clips"), folder / "out", str(place / "base"), settings)
    with patch.object(FinetuningRun, "_begin", side_effect=Begun), suppress(Begun):
        chain.run()
    return chain


def content(out: Path) -> dict[str, Any]:
    """Everything that generation and later training depend on."""
    manifest = Manifest.read(out)
    found: dict[str, Any] = {name: entry.sha256 for name, entry in manifest.components.items()}
    data = sorted((out / ".finetune-run" / "data").glob("shard-*"))
    return (
        found
        | {"config": manifest.config, "table": (out / ".finetune-run" / "clips.csv").read_text()}
        | {each.name: each.read_bytes() for each in data}
    )


def test_all_stages_are_trained(tuned: Path, place: Path) -> None:
    """A chain must retrain a poor image tokenizer, fine-tune each stage, and put its best step into the bundle."""
    made, base = CogVideo.from_pretrained(tuned), CogVideo.from_pretrained(place / "base")
    assert set(made.components) == set(base.components) - {"superres"}
    for name in ("image_tokenizer", "base", "sequential", "interpolation"):
        assert made.sha256(name) != base.sha256(name)
    assert made.sha256("text") == base.sha256("text")
    assert made.config.sequential.durations == (4.0, 2.0, 1.0)
    assert made.config.seconds == 4
    table = (tuned / ".finetune-run" / "clips.csv").read_text().splitlines()
    assert table[1] == "../../clips/the-cat_0.mp4,,4.01,a cat runs,train"
    assert [line.split(",")[3] for line in table[1:]] == [*["a cat runs"] * 4, "the cat 4"]
    assert sum(line.endswith(",validation") for line in table) == 1
    reports = read_reports(tuned)
    for name in ("base", "interpolation"):
        assert reports[name]["start"]["start"] == "continue"
        stage = "image" if name == "base" else name
        rows = map(json.loads, (tuned / f".{stage}-run" / "metrics.jsonl").read_text().splitlines())
        held = {
            row["step"]: np.mean([each["loss"] for each in row["held_out"].values()])
            for row in rows
            if "held_out" in row
        }
        assert reports[name]["steps"] == min(held, key=lambda step: held[step])


def test_ctrl_c_during_a_last_step(tuned: Path, place: Path) -> None:
    """Ctrl-C while a run saves its last step must stop the chain before the next stage; when resumed, it must produce
    identical bytes."""
    chain, save = (
        partial(FinetuningRun, str(place / "clips"), place / "stopped", str(place / "base"), QUICK),
        Checkpoints.save,
    )

    def interrupted(checkpoints: Checkpoints, step: int, *rest: Any) -> None:
        save(checkpoints, step, *rest)
        if step == QUICK.steps:
            os.kill(os.getpid(), signal.SIGINT)

    with patch.object(Checkpoints, "save", interrupted), pytest.raises(KeyboardInterrupt):
        chain().run()
    assert not (place / "stopped" / ".image-run").exists()
    chain().run()
    assert content(place / "stopped") == content(tuned)


@pytest.mark.soak
def test_a_killed_chain_goes_on(tuned: Path, place: Path, tmp_path: Path) -> None:
    """A chain killed between or within steps must resume to identical bytes, and refuse changed settings."""
    out, number = place / "killed", 40

    def work() -> None:
        FinetuningRun(str(place / "clips"), out, str(place / "base"), QUICK).run()

    kills = 0
    while kill_at(number, work):
        number += 25
        kills += 1
    assert kills > 4
    assert content(out) == content(tuned)
    with pytest.raises(ValueError, match=r"another run began in .*: settings\.minutes was 20\.0 and is 3"):
        FinetuningRun(str(place / "clips"), out, str(place / "base"), replace(QUICK, minutes=3)).run()


def test_the_page(tuned: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fine-tuning must end with a page on trained and held-out prompts, and print a `generate` command that works."""
    arguments = ["finetune", str(place / "clips"), "--out", str(tuned), "--base", str(place / "base")]
    arguments += ["--steps", "4", "--batch", "2"]
    assert main(arguments) == 0
    page = (tuned / "finetune.html").read_text()
    for words in (
        "Rank of the right clip among 5 real ones",
        "Prompts that were held out",
        "Star: the best step",
        "By training step; lower is better.",
        "higher is better",
        "PSNR in dB",
        " dB at step ",
        "Looking at the clips",
        "before: rank ",
        "held out</td>",
        "no caption",
    ):
        assert words in page
    told = capsys.readouterr().out
    assert "If clips look bad: " in told
    command = told.splitlines()[-1]
    assert command == f'cogvideo generate "a cat runs" --model {tuned}'
    out = place / "x.mp4"
    assert main(["generate", "a cat runs", "--model", str(tuned), "--seconds", "1", "--output", str(out)]) == 0
    assert len(read_video(out, 8).frames) == 9
    assert main(arguments) == 0
    assert "is finished" in capsys.readouterr().out


def test_four_clips_of_a_split_are_shown() -> None:
    """Guards against a regression: with more clips than are generated, the page showed only two."""
    chosen, shown = choose([*["train"] * 181, *["validation"] * 20, "test"])
    assert [len([place for place in shown if place < 181]), len([place for place in shown if place >= 181])] == [4, 4]
    assert shown < set(chosen)
    assert choose(["train"]) == ([0], {0})


def test_adapters_leave_the_base_as_it_is(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks `finetune --lora`: adapters for all stages next to an unchanged base, identical after an interruption, a
    page, and generation with the adapters."""
    arguments = [str(place / "clips"), "--base", str(place / "base"), "--steps", "2", "--batch", "2", "--lora", "2"]
    out, again, steps = tmp_path / "tuned", tmp_path / "again", FinetuningRun._train
    assert main(["finetune", *arguments, "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "and is kept, as adapters need it" in told.err
    assert "Key frames" in (out / "finetune.html").read_text()
    base, made = CogVideo.from_pretrained(place / "base"), CogVideo.from_pretrained(out, adapters={"own": 1.0})
    assert {name: made.sha256(name) for name in base.components} == {n: base.sha256(n) for n in base.components}
    assert [each.component for each in made.adapters] == ["base", "sequential", "interpolation"]
    assert not torch.equal(made.base.blocks[0].qkv.weight, base.base.blocks[0].qkv.weight)

    def stopping(chain: FinetuningRun, stage: Any) -> None:
        if stage == "sequential":
            raise Begun
        steps(chain, stage)

    settings = Finetuning(steps=2, batch=2, lora=2)
    for method in (stopping, steps):
        monkeypatch.setattr(FinetuningRun, "_train", method)
        with suppress(Begun):
            FinetuningRun(str(place / "clips"), again, str(place / "base"), settings).run()
    for each in made.adapters:
        same = again / each.weights.relative_to(out)
        assert same.read_bytes() == each.weights.read_bytes()
    command = told.out.splitlines()[-1]
    assert command == f'cogvideo generate "a cat runs" --model {out} --adapter own'
    short = ["--seconds", "1", "--rounds", "0", "--output", str(tmp_path / "x.mp4")]
    assert main([*shlex.split(command)[1:], *short]) == 0
    elsewhere = ["--model", str(place / "base"), "--adapter", str(out / "adapters" / "own")]
    assert main(["generate", "a cat", *elsewhere, *short]) == 0
    parts = {name: base.component(name) for name in ("base", "text", "image_tokenizer")}
    CogVideo(base.config, **parts).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"the base .* has no sequential, interpolation, expected a model with"):
        FinetuningRun(str(place / "clips"), tmp_path / "x", str(tmp_path / "bare"), settings)


def test_one_short_clip(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the minimum: half a second of video without a caption. Good codes and super-resolution are kept."""
    monkeypatch.setattr(finetune, "MIN_PSNR", 0.0)
    write_clip(tmp_path / "clips" / "cat.mp4", 0.5, 90)
    FinetuningRun(str(tmp_path / "clips"), tmp_path / "out", str(place / "base"), replace(QUICK, steps=2)).run()
    made, base = CogVideo.from_pretrained(tmp_path / "out"), CogVideo.from_pretrained(place / "base")
    assert made.config.sequential.durations == (0.5,)
    assert made.sha256("image_tokenizer") == base.sha256("image_tokenizer")
    assert made.sha256("superres") == base.sha256("superres")
    assert made.base_name("superres") == "superres_base"
    assert made.sha256("superres_base") == base.sha256("base") != made.sha256("base")


@pytest.mark.parametrize(("number", "step"), [(0, None), (3, None), (4, 7)])
def test_few_held_out_clips_choose_no_step(
    number: int, step: int | None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a few held-out clips from choosing a step: an unusual one has its lowest loss before training."""
    monkeypatch.setattr(finetune, "MIN_JUDGES", 4)
    monkeypatch.setattr(finetune.Checkpoints, "best", lambda _: 7)
    chain = FinetuningRun(str(place / "clips"), tmp_path, str(place / "base"), QUICK)
    rows = [f"{place}/clips/the-cat_{row}.mp4,a cat,{'validation' if row < number else 'train'}" for row in range(5)]
    chain.folder.claim({})
    chain.table.write_text("\n".join(["file,caption,split", *rows]))
    assert chain._best("image") == step


def test_steps_fit_the_time(place: Path, tmp_path: Path) -> None:
    """Checks the number of steps: limited by the time left and by the number of clips, never zero, and unchanged once a
    run began."""
    found, told = [], []
    for minutes in (0.1, 5, 600):
        chain = FinetuningRun(
            str(place / "clips"), tmp_path / f"{minutes}", str(place / "base"), Finetuning(minutes=minutes)
        )
        chain.folder.claim({})
        chain.table.write_text(f"file,caption\n{place}/clips/the-cat_0.mp4,a cat\n")
        found.append(chain._steps_of("image", lambda: 2.0))
        told.append(chain._time_left)
    assert [words[2:6] for words in told] == ["the ", "abou", "abou"], "nothing is left of six seconds"
    assert found == [20, 64, 220]  # the image model gets 0.3 of the 0.7 left, of 5 minutes
    RunFolder(tmp_path / "600" / ".image-run").claim({"optimization": {"steps": 77}})
    assert chain._steps_of("image", lambda: 2.0) == 77


@pytest.mark.parametrize(
    ("caption", "is_trained", "words"),
    [
        (
            "一个男人在街上走路挥手微笑然后转身离开",
            True,
            "0% of the captions fit the base's text tokenizer",
        ),
        ("a man walks " * 60, False, "100% of the captions are longer than the 48 tokens that the model reads"),
    ],
)
def test_a_text_tokenizer_is_trained_where_it_helps(
    caption: str, is_trained: bool, words: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keeps the base's text tokenizer if a new one cannot shorten the captions; they were once cut silently."""
    chain = FinetuningRun(str(place / "clips"), tmp_path / "out", "pocket", Finetuning())
    chain.folder.claim({})
    chain.table.write_text(f"file,caption\n{place}/clips/the-cat_0.mp4,{caption}\n")
    assert (chain._text().model != chain.base.text.model) == is_trained
    assert words in capsys.readouterr().err


def test_the_pace_is_measured(tuned: Path, place: Path) -> None:
    """Timing a few steps, to choose their number, must leave nothing behind."""
    before = content(tuned)
    options = FinetuningRun(str(place / "clips"), tuned, str(place / "base"), QUICK)._options(1)
    assert 0 < seconds_per_step("interpolation", Choice("continue"), options) < 60
    assert content(tuned) == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "has no clips"),
        (("a.mp4",), "no clip in .* can be trained on: a.mp4: no readable video or picture"),
    ],
)
def test_clips_that_cannot_be_used(files: tuple[str, ...], message: str, place: Path, tmp_path: Path) -> None:
    """Checks the message that says why nothing was trained."""
    (tmp_path / "clips").mkdir()
    for name in files:
        (tmp_path / "clips" / name).write_bytes(b"no video")
    with pytest.raises(ValueError, match=message):
        FinetuningRun(str(tmp_path / "clips"), tmp_path / "out", str(place / "base"), QUICK).run()


def test_a_dangling_link_is_left_out(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents one unusable clip from stopping the others."""
    write_clip(tmp_path / "clips" / "cat.mp4", 0.5, 90)
    (tmp_path / "clips" / "gone.mp4").symlink_to("nowhere.mp4")
    begin(tmp_path, place)
    assert "Left out: gone.mp4: file is missing." in capsys.readouterr().err


def test_clips_may_change_until_the_first_step_is_done(place: Path, tmp_path: Path) -> None:
    """Users must be able to fix their clips after a refusal, but not after the first step is done."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"no clip in .* can be trained on"):
        FinetuningRun(str(tmp_path / "clips"), tmp_path / "out", str(place / "base"), QUICK).run()
    write_clip(tmp_path / "clips" / "cat.mp4", 0.5, 90)
    begin(tmp_path, place)
    begin(tmp_path, place)
    with pytest.raises(ValueError, match=r"settings\.steps was 4 and is 5; .* remove the folder .*out to"):
        begin(tmp_path, place, replace(QUICK, steps=5))
    write_clip(tmp_path / "clips" / "dog.mp4", 0.5, 60)
    with pytest.raises(ValueError, match=r"another run began in .*out: the clips changed; pass the same"):
        begin(tmp_path, place)


def test_batches_have_at_most_all_frames(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents running out of memory because of a typo in the batch size."""
    write_clip(tmp_path / "clips" / "cat.mp4", 1.0, 90)
    chain = begin(tmp_path, place, replace(QUICK, batch=10**8))
    assert chain.batch == 8
    assert "Batches of 8 samples, not 100,000,000" in capsys.readouterr().err


def test_paths_that_are_no_text(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Clips whose paths are not valid text, which the table cannot hold, are left out; the others are still used."""
    write_clip(tmp_path / "clips" / "cat.mp4", 0.5, 90)
    os.link(tmp_path / "clips" / "cat.mp4", tmp_path / "clips" / os.fsdecode(b"bad\xff.mp4"))
    begin(tmp_path, place)
    assert "Left out: bad\\udcff.mp4: path is not text." in capsys.readouterr().err
    odd = (tmp_path / "clips").rename(tmp_path / os.fsdecode(b"clips\xff"))
    with pytest.raises(ValueError, match=r"no clip in .* can be used: path is not text: .* rename the folder"):
        FinetuningRun(str(odd), tmp_path / "other", str(place / "base"), QUICK)


def test_no_other_model_is_touched(place: Path) -> None:
    """Prevents overwriting the base or an unrelated model."""
    base = str(place / "base")
    with pytest.raises(ValueError, match="base is the base: give the new model another folder"):
        FinetuningRun(str(place / "clips"), place / "base", base, QUICK)
    CogVideo.from_pretrained(base).save_pretrained(place / "other")
    with pytest.raises(ValueError, match="other holds another model"):
        FinetuningRun(str(place / "clips"), place / "other", base, QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "17x16"], r"size is 17x16, expected multiples of 4 pixels, at most 16x16"),
        (["--lora", "33"], r"lora is 33, expected a rank of 1 to 32"),
        (["--minutes", "inf"], r"minutes is inf, expected a positive number"),
        (["--out", "."], r"\. holds the clips: give the new model a folder of its own"),
        (["--out", "clips"], r"clips holds the clips"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    options: list[str],
    message: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches bad options before any work, and an --out with the clips in it, which users may be told to delete."""
    write_clip(tmp_path / "clips" / "cat.mp4", 0.5, 90)
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "clips", "--out", "out", "--base", str(place / "base"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [each.name for each in tmp_path.iterdir()] == ["clips"]


def test_captions_are_written_with_the_clips_in_sight(place: Path, tmp_path: Path) -> None:
    """Captions tables and pages must keep existing captions and leave others empty; training uses file names."""
    for path in (place / "clips").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert main(["data", "captions", str(tmp_path)]) == 0
    lines = (tmp_path / "captions.csv").read_text().splitlines()
    assert lines == ["file,caption", *(f"the-cat_{number}.mp4,a cat runs" for number in range(4)), "the-cat_4.mp4,"]
    page = (tmp_path / "captions.html").read_text()
    assert page.count("data:image/webp;base64,") == 5
    assert page.count(">a cat runs</textarea>") == 4
    chain = FinetuningRun(str(tmp_path), tmp_path / "out", str(place / "base"), QUICK)
    assert [each.captions[0] for each in chain.items][3:] == ["a cat runs", "the cat 4"]
    (tmp_path / "captions.csv").write_text("file,caption\nthe-cat_4.mp4,mine\n")
    assert main(["data", "captions", str(tmp_path)]) == 0
    assert (tmp_path / "captions.csv").read_text() == "file,caption\nthe-cat_4.mp4,mine\n"
    page = (tmp_path / "captions.html").read_text()
    assert ">mine</textarea>" in page
    assert page.count("data-file=") == 5  # including clips without a row


def test_captions_of_clips_with_odd_names(place: Path, tmp_path: Path) -> None:
    """File names with HTML or CSV characters must survive the page and the table; those that a page cannot hold are
    left out, with a reason."""
    clip, found = (place / "clips" / "the-cat_4.mp4").read_bytes(), []
    names = ["\"a\" & <b>, c;'d'.mp4", "url(x){{y}}%22 é #1?.mp4", "&quot;.mp4"]
    for name in (*names, "two\nlines.mp4", "\udcff.mp4"):
        (tmp_path / name).write_bytes(clip)
    with redirect_stdout(StringIO()) as told:
        assert main(["data", "captions", str(tmp_path)]) == 0
    for left_out in (r"'two\nlines.mp4'", r"'\udcff.mp4'"):
        assert f"{left_out} is left out: its name has characters that a page cannot hold: rename it" in told.getvalue()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, values: found.append(dict(values)) if tag == "textarea" else None  # type: ignore[method-assign]
    parser.feed((tmp_path / "captions.html").read_text(encoding="utf-8"))
    assert sorted(str(each["data-file"]) for each in found) == sorted(names)
    table = tmp_path / "captions.csv"
    table.write_text(table.read_text(encoding="utf-8").replace(".mp4,", ".mp4,a cat").replace('.mp4",', '.mp4",a cat'))
    listing = list_source(str(tmp_path), SourceOptions())
    assert (sorted(item.id for item in listing.items), listing.rejected) == (sorted(names), [])
