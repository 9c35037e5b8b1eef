"""The World reader: its input, its file, and the packaged reader's accuracy on unseen clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideo import world
from cogvideo.evaluation import reader as module
from cogvideo.evaluation.reader import (
    ALL,
    ATTRIBUTES,
    FILE,
    FIRST_PROMPT,
    FIRST_TRAINING,
    LABELS,
    Reader,
    ReaderConfig,
    accuracies,
    labels,
    readable,
    render,
    resized,
    unseen_scenes,
)

SMALL = ReaderConfig((4, 8, 8, 16), (0, 1, 1, 1), 16)


def small_reader(seed: int = 0) -> Reader:
    torch.manual_seed(seed)
    return Reader(SMALL).eval()


def drawn(scenes: Sequence[world.Scene]) -> np.ndarray:
    return np.stack([render(scene) for scene in scenes])


def test_every_scene_has_labels() -> None:
    """Catches attribute values that the reader has no label for, and labels at the wrong index."""
    scenes = [world.scene(number) for number in range(300)]
    for name, places in labels(scenes).items():
        assert [LABELS[name][place] for place in places] == [getattr(scene, name) for scene in scenes]


def test_clip_is_read_at_four_frames_a_second() -> None:
    """Checks which frames are read: a clip at 8 fps gives the same ones as a clip at 4 fps."""
    scene = world.scene(5)
    assert np.array_equal(readable(world.render(scene, 64, 8.0, 33), 8.0), render(scene))
    assert np.array_equal(readable(world.render(scene, 64, 4.0, 17), 4.0), render(scene))


def test_larger_frames_are_averaged() -> None:
    """Guards against aliasing: each pixel is the mean of those it covers."""
    frames = world.render(world.scene(5), 128, 4.0, 3)
    means = frames.reshape(3, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(resized(frames, 64) - means).max() <= 0.5
    assert np.abs(resized(frames, 64).astype(float) - world.render(world.scene(5), 64, 4.0, 3)).mean() < 2


@pytest.mark.parametrize(("num_frames", "fps"), [(32, 8.0), (33, 6.0), (33, 4.0)])
def test_other_clips_are_refused(num_frames: int, fps: float) -> None:
    """Prevents wrong readings of speed: clips of another length or rate are refused."""
    with pytest.raises(ValueError, match="expected"):
        readable(np.zeros((num_frames, 64, 64, 3), np.uint8), fps)


def test_file_holds_the_reader(tmp_path: Path) -> None:
    """Checks the reader's file: small, in half precision, with the configuration, and with unchanged readings."""
    reader, file, clips = small_reader(), tmp_path / "reader.safetensors", drawn([world.scene(n) for n in range(6)])
    reader.save(file)
    loaded = Reader.load(file)
    assert loaded.config == SMALL
    assert loaded.read(clips) == reader.read(clips)
    assert file.stat().st_size < 2.2 * sum(each.numel() for each in reader.parameters()) + 10_000


def test_reading_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches clips that affect each other: one by one, they must be read the same as in batches."""
    reader, clips = small_reader(), drawn([world.scene(number) for number in range(5)])
    monkeypatch.setattr(module, "BATCH", 2)
    assert reader.read(clips) == [reader.read(clip[None])[0] for clip in clips]


def test_wrong_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses files that do not hold a reader of this World."""
    with pytest.raises(ValueError, match="there is no reader"):
        Reader.load(tmp_path / "nothing.safetensors")
    file = tmp_path / "reader.safetensors"
    file.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="cannot use the reader"):
        Reader.load(file)
    small_reader().save(file)
    monkeypatch.setitem(LABELS, "speed", ("slowly", "quickly", "at once"))
    with pytest.raises(ValueError, match="another World"):
        Reader.load(file)


def test_unseen_scenes_are_of_both_kinds() -> None:
    """Checks the prompts: half have held-out pairs, and neither models nor the reader train on any of them."""
    scenes = unseen_scenes(40, FIRST_PROMPT)
    assert [world.split(scene) for scene in scenes] == ["held_out"] * 20 + ["validation"] * 20
    assert len({scene.index for scene in scenes}) == 40
    assert all(FIRST_PROMPT <= scene.index < FIRST_TRAINING for scene in scenes)


def test_unseen_simple_scenes_look_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents duplicates in the simple domain, where many numbers show the same scene: each counts once."""
    scenes = unseen_scenes(120, FIRST_PROMPT, "simple")
    assert {scene.domain for scene in scenes} == {"simple"}
    assert [world.split(scene) for scene in scenes] == ["held_out"] * 60 + ["validation"] * 60
    assert len({replace(scene, index=0) for scene in scenes}) == 120
    monkeypatch.setattr(module, "NUM_SEARCHED", 300)
    with pytest.raises(ValueError, match=r"the World has \d+ unseen simple scenes of held_out, expected 2500"):
        unseen_scenes(5000, FIRST_PROMPT, "simple")


def test_accuracies_count_what_is_right() -> None:
    """Checks the shares: the truth scores 1 everywhere, and one wrong attribute lowers exactly those it belongs to."""
    scenes = unseen_scenes(8, FIRST_PROMPT)
    truth = [{name: getattr(scene, name) for name in ATTRIBUTES} for scene in scenes]
    assert all(share == 1 for group in accuracies(truth, scenes).values() for share in group.values())
    truth[0]["colour"] = "no colour"
    shares = accuracies(truth, scenes)
    assert shares["held-out pairs"] == dict.fromkeys(ATTRIBUTES, 1.0) | {"colour": 0.75, ALL: 0.75}
    assert shares["other clips"] == dict.fromkeys((*ATTRIBUTES, ALL), 1.0)
    assert shares["all clips"]["colour"] == 0.875
    shuffled = accuracies([*truth[4:], *truth[:4]], scenes)
    assert shuffled["all clips"][ALL] == 0


@pytest.mark.skipif(not FILE.exists(), reason="the package's reader is not trained yet")
def test_packaged_reader_reads_unseen_clips() -> None:
    """Guards the judge itself: it reads unseen clips, half with held-out pairs, even when they are blurred."""
    scenes, reader = unseen_scenes(60, FIRST_PROMPT), Reader.load()
    clips = drawn(scenes)
    soft = np.stack([resized(resized(clip, 40), 64) for clip in clips])
    for seen in (clips, soft):
        shares = accuracies(reader.read(seen), scenes)["all clips"]
        assert min(shares.values()) > 0.9, shares
    assert FILE.stat().st_size < 4e6
