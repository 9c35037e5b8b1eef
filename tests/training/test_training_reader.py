"""Training the World reader: its clips, augmentation that keeps labels true, and resuming to the same bits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideo import world
from cogvideo.commands.train import reader as train_reader
from cogvideo.evaluation.reader import FIRST_TEST, FIRST_TRAINING, Reader, ReaderConfig, render, unseen_scenes
from cogvideo.files import exclusive_lock
from cogvideo.training import reader as module
from cogvideo.training.objectives.reader import ReaderObjective, ReaderSettings, augment, batches, clips, stills
from cogvideo.training.session import LoggingConfig
from cogvideo.training.step import Trainer

SMALL = ReaderConfig((4, 8, 8, 16), (0, 1, 1, 1), 16)


def settings(steps: int = 4) -> ReaderSettings:
    return ReaderSettings(steps=steps, batch=4, warmup=1, still_steps=1, stills=4)


def test_no_clip_is_learnt_twice_or_kept() -> None:
    """Keeps the test meaningful: every step has new clips, none of them used to evaluate models or the reader."""
    drawn = [make(step, 4) for step in range(5) for make in (clips, stills)]
    numbers = [scene.index for each in drawn for scene in each.scenes]
    assert len(set(numbers)) == 40
    assert min(numbers) >= FIRST_TRAINING > max(scene.index for scene in unseen_scenes(40, FIRST_TEST))


def test_stills_show_one_figure() -> None:
    """Guards single frames: with one figure, nobody else can be mistaken for the one who acts."""
    scenes, pixels = stills(3, 8)
    assert pixels.shape == (8, 1, 64, 64, 3)
    assert all(not scene.other_object for scene in scenes)
    backgrounds = [world.render(replace(scene, delay=0.2), 64, 8.0, 1) for scene in scenes]
    changed = [np.abs(still.astype(int) - bare).max() > 30 for still, bare in zip(pixels, backgrounds, strict=True)]
    assert all(changed)


def test_augmentation_keeps_what_a_clip_shows() -> None:
    """Guards the labels: augmentation changes a clip slightly, never mirrors it, and keeps its colors close."""
    clips = np.stack([render(scene) for scene in unseen_scenes(8, FIRST_TEST)])
    made = augment(clips, torch.Generator().manual_seed(0)).permute(0, 2, 3, 4, 1).numpy()
    seen = clips.astype(np.float32) / 255
    assert made.shape == seen.shape
    assert made.min() >= 0
    assert made.max() <= 1
    for before, after in zip(seen, made, strict=True):
        assert not np.array_equal(before, after)
        assert np.abs(before.mean((0, 1, 2)) - after.mean((0, 1, 2))).max() < 0.1
        near = min(
            np.square(np.roll(before, (down, across), (1, 2)) - after).mean()
            for down in range(-3, 4)
            for across in range(-3, 4)
        )
        mirrored = np.square(before[:, :, ::-1] - after).mean()
        assert near < 0.02
        assert near < mirrored


def test_augmentation_follows_from_its_generator() -> None:
    """Guards resuming: the same generator gives the same clips."""
    clips = np.stack([render(scene) for scene in unseen_scenes(4, FIRST_TEST)])
    one, two = (augment(clips, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


def test_it_learns() -> None:
    """Guards the training step: a few steps on the same clips lower the loss substantially."""
    recipe = replace(settings(100), learning_rate=5e-3)
    trainer = Trainer(ReaderObjective(SMALL, recipe, torch.device("cpu")), recipe)
    batch = next(batches(recipe, 1))
    losses = []
    for _ in range(20):
        trainer.step(1, batch)
        losses.append(trainer.figures(2).loss)
    assert losses[-1] < 0.6 * losses[0]


def test_a_killed_run_continues_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards checkpoints: a run stopped after two steps and restarted writes the file of an uninterrupted run; so does
    a run that has a checkpoint in the reader's old format."""
    logging = LoggingConfig(evaluate_every=3, checkpoint_every=1)
    options = {"settings": settings(), "config": SMALL, "test_clips": 8, "logging": logging, "device": "cpu"}
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    monkeypatch.setattr(module, "NUM_TEST_CLIPS", 8)
    train_reader(out=whole, **options)
    real = Trainer.step

    def step(self: Trainer, number: int, batch: object) -> None:
        if number == 2:
            raise KeyboardInterrupt
        real(self, number, batch)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train_reader(out=killed, **options)
    assert not killed.exists()
    monkeypatch.setattr(Trainer, "step", real)
    train_reader(out=killed, **options)
    assert killed.read_bytes() == whole.read_bytes()
    assert Reader.load(killed).config == SMALL
    with pytest.raises(ValueError, match="another run"):
        train_reader(out=killed, **(options | {"settings": settings(5)}))
    shutil.rmtree(tmp_path / ".killed-run" / "checkpoints")
    trainer = Trainer(ReaderObjective(SMALL, settings(), torch.device("cpu")), settings())
    for number, batch in zip(range(2), batches(settings(), 0), strict=False):
        trainer.step(number, batch)
    state = {"model": trainer.objective.model.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
    torch.save((2, state), tmp_path / ".killed-run" / "checkpoint.pt")
    killed.unlink()
    train_reader(out=killed, **options)
    assert killed.read_bytes() == whole.read_bytes()


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    """Prevents two processes from overwriting each other's checkpoints."""
    (tmp_path / ".reader-run").mkdir()
    with exclusive_lock(tmp_path / ".reader-run"), pytest.raises(ValueError, match="another process is writing to"):
        train_reader(out=tmp_path / "reader.safetensors", settings=settings(), config=SMALL, device="cpu")
