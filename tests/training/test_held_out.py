"""Held-out losses: each clip counts once, without randomness, for any batch size and number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogvideo.bundle.model import CogVideo
from cogvideo.data.clips import ClipSampling, FrameRates, Mode
from cogvideo.data.dataset import Dataset
from cogvideo.data.loader import ClipStream
from cogvideo.training import held_out as module
from cogvideo.training.held_out import HeldOut, held_out, measure
from cogvideo.training.objectives.task import BatchLosses
from cogvideo.training.optim import StageOptimization
from cogvideo.training.stages import StageName
from cogvideo.training.step import Trainer
from gallery import make_model, make_trainer
from workshop import make_data

STAGES: tuple[StageName, ...] = ("image", "sequential", "interpolation", "superres")
NUM_CLIPS = 5


@pytest.fixture(scope="module")
def place(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete model, and data with five held-out clips."""
    folder = tmp_path_factory.mktemp("held-out")
    make_model(folder / "model", train_text_model())
    make_data(folder / "data", folder / "model", held_out=NUM_CLIPS)
    return folder


@pytest.fixture(scope="module")
def source(place: Path) -> CogVideo:
    return CogVideo.from_pretrained(place / "model")


def entries_of(
    stage: StageName, folders: list[Path], split: str = "validation", limit: int = 100, fixed_rate: float | None = None
) -> list[HeldOut]:
    """Entries of a run of that stage, whose training samples have random offsets and dropped captions."""
    mode: Mode = "image" if stage in ("image", "superres") else stage  # type: ignore[assignment]
    sampling = ClipSampling(mode, FrameRates(), fixed_rate, True, 0.5, stage == "superres", seed=3)
    return held_out(ClipStream(folders, "train", sampling), split, limit)


@pytest.mark.parametrize(
    ("stage", "num_frames", "fixed_rate", "names"),
    [
        ("image", 1, None, ["all"]),
        ("superres", 1, None, ["all"]),
        ("sequential", 33, None, ["1 fps"]),
        ("interpolation", 33, None, ["2 fps", "4 fps", "8 fps"]),
        ("sequential", 32, None, ["2 fps"]),
        ("interpolation", 9, None, ["4 fps", "8 fps"]),
        ("sequential", 33, 4.0, ["4 fps"]),
        ("interpolation", 33, 1.0, ["1 fps"]),
    ],
)
def test_there_is_an_entry_for_each_rate_that_is_trained_at(
    stage: StageName, num_frames: int, fixed_rate: float | None, names: list[str], place: Path, tmp_path: Path
) -> None:
    """Held-out losses, which choose the best checkpoint, must cover exactly the frame rates of the training samples."""
    data = make_data(tmp_path / "data", place / "model", num_frames=num_frames, held_out=NUM_CLIPS)
    entries = entries_of(stage, [data], fixed_rate=fixed_rate)
    assert [entry.name for entry in entries] == names
    assert all(entry.number == NUM_CLIPS for entry in entries)
    assert all(entry.number == 2 for entry in entries_of(stage, [data], limit=2, fixed_rate=fixed_rate))


def test_a_rate_needs_a_held_out_clip_that_fills_it(place: Path, tmp_path: Path) -> None:
    """Checks mixed lengths: each training clip adds its rates, minus those that no held-out clip fills."""
    folders = [make_data(tmp_path / f"{n}", place / "model", num_frames=n, held_out=0) for n in (33, 16, 5)]
    short, middle = (make_data(tmp_path / f"held-{n}", place / "model", num_frames=n, held_out=5) for n in (4, 20))
    assert [entry.name for entry in entries_of("sequential", [*folders, middle])] == ["2 fps", "4 fps", "8 fps"]
    assert [entry.name for entry in entries_of("sequential", [folders[1], middle])] == ["2 fps", "4 fps"]
    assert [entry.name for entry in entries_of("interpolation", [folders[2], middle])] == ["2 fps", "4 fps", "8 fps"]
    assert entries_of("sequential", [*folders, short]) == []


def test_no_split_is_no_entry(place: Path, tmp_path: Path) -> None:
    """Datasets without held-out clips must add no entry, and not hide the clips of other datasets."""
    without = make_data(tmp_path / "without", place / "model", held_out=0)
    assert entries_of("sequential", [without]) == []
    assert entries_of("sequential", [place / "data"], split="elsewhere") == []
    both = entries_of("sequential", [without, place / "data"])
    assert [(entry.name, entry.number) for entry in both] == [("1 fps", NUM_CLIPS)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_clip_is_measured_once_from_its_first_frame(stage: StageName, place: Path) -> None:
    """Prevents randomness in held-out losses: no offset, no dropped caption, no clip repeated or left out."""
    dataset = Dataset(place / "data")
    rows = [dataset.row(int(number)) for number in dataset.rows("validation")]
    for entry in entries_of(stage, [place / "data"]):
        stride = 1 if entry.name == "all" else int(8 / float(entry.name.removesuffix(" fps")))
        frames = slice(0, 1) if entry.name == "all" else slice(0, 4 * stride + 1, stride)
        samples = [entry.stream[position] for position in range(entry.number)]
        assert sorted(str(each.caption) for each in samples) == sorted(row.captions[0] for row in rows)
        for each in samples:
            row = next(row for row in rows if row.captions[0] == each.caption)
            assert np.array_equal(each.codes, row.codes[frames])
            assert each.duration == (0 if entry.name == "all" else 4 * stride / 8)
            if stage == "superres":
                assert each.high_codes is not None
                assert row.high_codes is not None
                assert np.array_equal(each.high_codes, row.high_codes[frames])


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_a_plain_loop(stage: StageName, place: Path, source: CogVideo) -> None:
    """Checks the means for any batch size: each sample counts once, each part over the samples that have it."""
    trainer, entries = make_trainer(stage, source, StageOptimization(batch=4)), entries_of(stage, [place / "data"])
    task, model = trainer.objective.task, trainer.objective.model
    expected = {}
    for entry in entries:
        losses, parts = [], {name: [] for name in task.parts}  # type: ignore[var-annotated]
        for position in range(NUM_CLIPS):
            with torch.no_grad():
                loss, values = task.losses(model, task.collate([entry.stream[position]]))
            losses.append(float(loss))
            for name, value in zip(task.parts, values[0].tolist(), strict=True):
                parts[name] += [value] if value == value else []
        means = {name: sum(values) / len(values) for name, values in parts.items() if values}
        expected[entry.name] = {"loss": sum(losses) / len(losses)} | means
    for batch in (1, 2, 3, NUM_CLIPS, 100):
        found = measure(trainer, entries, batch)
        assert found.keys() == expected.keys()
        for name, row in expected.items():
            assert found[name] == pytest.approx(row, rel=1e-5)


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_ranks_share_the_clips(num_ranks: int, place: Path, source: CogVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks must cover each clip once between them, run equally many passes, and ignore samples past the end."""
    trainer, entries = make_trainer("image", source, StageOptimization(batch=4)), entries_of("image", [place / "data"])
    expected = measure(trainer, entries, 1)
    for batch in (1, 2):
        sums: list[torch.Tensor] = []
        passes = [0] * num_ranks
        for rank in range(num_ranks):

            def counted(batch: Any, rank: int = rank) -> BatchLosses:
                passes[rank] += 1  # noqa: B023
                return Trainer.measure(trainer, batch)

            trainer.ranks = trainer.ranks._replace(data_rank=rank, data_size=num_ranks)
            monkeypatch.setattr(module, "mean_over_ranks", lambda each: sums.append(each) or torch.ones_like(each))  # noqa: B023
            monkeypatch.setattr(trainer, "measure", counted)
            measure(trainer, entries, batch)
        assert set(passes) == {-(-NUM_CLIPS // (num_ranks * batch))}
        monkeypatch.setattr(module, "mean_over_ranks", lambda _: torch.stack(sums).mean(0))  # noqa: B023
        found = measure(trainer, entries, batch)
        assert torch.stack(sums).sum(0)[1] == NUM_CLIPS
        assert found["all"] == pytest.approx(expected["all"], rel=1e-5)


def test_the_average_is_what_is_measured(place: Path, source: CogVideo) -> None:
    """Held-out losses must use the average, which is what gets exported, and leave the training state unchanged."""
    trainer = make_trainer("sequential", source, StageOptimization(batch=4, ema=0.5))
    entries = entries_of("sequential", [place / "data"])
    live = measure(trainer, entries, 2)
    assert trainer.average is not None
    with torch.no_grad():
        for each in trainer.average.state.values():
            each.mul_(1.5)
    weights = {name: each.detach().clone() for name, each in trainer.objective.named_parameters()}
    average = {name: each.clone() for name, each in trainer.average.state.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda _: 1 / 0, lambda each: each):  # nothing is saved for backward
        measured = measure(trainer, entries, 2)
    assert all(torch.equal(each, weights[name]) for name, each in trainer.objective.named_parameters())
    assert all(torch.equal(each, average[name]) for name, each in trainer.average.state.items())
    assert all(each.grad is None for each in trainer.objective.parameters())
    assert all(each.training for each in trainer.objective.modules())
    plain = make_trainer("sequential", source, StageOptimization(batch=4))
    plain.objective.load_state_dict(weights | average)
    assert measured == measure(plain, entries, 2)
    assert measured != live


def test_clips_beyond_the_limit_are_left_out(place: Path, source: CogVideo) -> None:
    """Limits the time of a measurement: only the first clips of the stream count."""
    trainer = make_trainer("sequential", source, StageOptimization(batch=4))
    entry = entries_of("sequential", [place / "data"], limit=3)[0]
    samples = [entry.stream[position] for position in range(3)]
    with torch.no_grad():
        loss = trainer.objective(trainer.objective.task.collate(samples)).loss.mean()
    assert measure(trainer, [entry], 2)["1 fps"]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert measure(trainer, [replace(entry, number=1)], 2)["1 fps"]["loss"] != pytest.approx(float(loss), rel=1e-5)
    assert measure(trainer, [], 2) == {}
