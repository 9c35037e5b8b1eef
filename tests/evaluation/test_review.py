"""Review of clips before training: shots, pieces, ends, motion, text, copies, splits."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from cogvideo.data.frames import FrameSettings, read_item
from cogvideo.data.sources import Item
from cogvideo.evaluation import review
from cogvideo.evaluation.review import ReviewedClip, in_words, listed, with_splits
from cogvideo.media.video import write_video


def scene(seconds: float, seed: int, speed: float = 1.0, fps: int = 12) -> np.ndarray:
    """Noise of large squares, moving to the right."""
    random = np.random.default_rng(seed)
    picture = random.integers(0, 255, (6, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture, round(speed * place), 1)[:, :64] for place in range(round(seconds * fps))])


def reviewed(folder: Path) -> list[ReviewedClip]:
    items, rejected, named = listed(str(folder))
    clips, unread = review.review(items, named)
    assert not rejected
    assert not unread
    return clips


def write(path: Path, frames: Sequence[np.ndarray] | np.ndarray, fps: int = 12) -> None:
    write_video(path, np.stack(list(frames)), fps)
    path.with_suffix(".txt").write_text("a caption\n")


def test_scenes_are_cut(tmp_path: Path) -> None:
    """Keeps clips of two scenes out of training; fast motion is not a cut."""
    write(tmp_path / "a.mp4", np.concatenate([scene(2, 1), scene(1.5, 2), scene(1, 3)]))
    clips = reviewed(tmp_path)
    assert [round(each.seconds, 2) for each in clips] == [2.0, 1.5, 1.0]
    assert [each.item.start for each in clips] == [0.0, 2.0, 3.5]
    assert [each.item.end for each in clips] == [2.0, 3.5, 4.51]
    assert len({each.item.id for each in clips}) == 3
    write(tmp_path / "a.mp4", scene(2, 3, speed=6))
    assert len(reviewed(tmp_path)) == 1


def test_videos_that_the_table_does_not_name_are_reported(tmp_path: Path) -> None:
    """Reports clips that were added to a folder after its table; they used to be left out silently."""
    for name in ("a.mp4", "b.mp4", "sub/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "captions.csv").write_text("file,caption,start\na.mp4,a cat,1\ngone.mp4,a dog,\n")
    items, rejected, _ = listed(str(tmp_path))
    assert [each.id for each in items] == ["a.mp4#1-"]
    reasons = {each.id: each.reason for each in rejected}
    assert reasons == {"gone.mp4": "file is missing", "b.mp4": review.NO_ROW, "sub/c.mp4": review.NO_ROW}
    clip = ReviewedClip(items[0], seconds=1.0, width=8, height=8, fps=8.0, energy=1.0)
    told = review.in_short([clip], rejected)
    assert told[0] == "1 clip of 1.0 s, 8 x 8; 0 held out."
    assert told[-2:] == [
        "Left out: gone.mp4: file is missing.",
        "Left out: b.mp4 and 1 more: no row in the table.",
    ]


@pytest.mark.parametrize(
    ("width", "height", "sides", "advice"),
    [
        (640, 480, (8, 8), "64x48"),
        (1920, 1080, (8, 8), "64x40"),
        (1080, 1920, (8, 8), "40x64"),
        (1080, 1920, (12, 12), "56x96"),
        (1080, 1920, (8, 5), ""),
        (500, 480, (8, 8), ""),
    ],
)
def test_the_size_that_keeps_the_shape(width: int, height: int, sides: tuple[int, int], advice: str) -> None:
    """Suggests a size for clips of another shape: square frames silently cut off heads in portrait videos."""
    item = Item("a.mp4", Path("a.mp4"), ("a cat",))
    told = review.on_shape([ReviewedClip(item, 1.0, width, height, fps=8.0, energy=1.0)], sides, 8)
    assert [line.split("`")[1] for line in told] == [f"--size {advice}"] * bool(advice)


def test_the_reason_is_in_words(tmp_path: Path) -> None:
    """Reports the reason as text, not as the repr of a record."""
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes("Größe".encode("latin-1"))
    message = r"can be used: a\.mp4: caption is not text \(byte 2 of its file is not UTF-8\)"
    with pytest.raises(ValueError, match=message):
        listed(str(tmp_path))


def test_without_the_detector_nothing_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Supports installations without the `data` extra: clips stay whole."""
    write(tmp_path / "a.mp4", np.concatenate([scene(1, 1), scene(1, 2)]))
    monkeypatch.setitem(__import__("sys").modules, "scenedetect", None)
    assert not review.has_detector()
    assert len(reviewed(tmp_path)) == 1


def test_long_shots_become_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps all of a long video; only its beginning used to be kept."""
    monkeypatch.setattr(review, "MAX_PIECE_SECONDS", 2.0)
    write(tmp_path / "a.mp4", scene(5, 1))
    clips = reviewed(tmp_path)
    assert [round(each.item.start, 2) for each in clips] == [0, 1.67, 3.33]
    assert clips[-1].item.end is None


def test_one_piece_of_a_still_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps hours of black screen from filling the training set with identical pieces."""
    monkeypatch.setattr(review, "MAX_PIECE_SECONDS", 2.0)
    write(tmp_path / "a.mp4", np.concatenate([scene(4, 1, speed=0), scene(4, 2)]))
    items, _, named = listed(str(tmp_path))
    clips, rejected = review.review(items, named)
    assert [each.item.start for each in clips] == [0, 4, 6]
    assert rejected == [("a.mp4", "still in part", "1 of the pieces repeat earlier ones, without motion")]


def test_a_frame_that_is_held_is_in_no_piece(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keeps one bad timestamp from filling the training set with pieces of an hour-long freeze frame."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", 12)
        stream.width, stream.height, stream.time_base = 64, 48, Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 12)
        for number, picture in enumerate(scene(4, 1)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            frame.pts = number + (3600 * 12 if number >= 24 else 0)
            frame.time_base = Fraction(1, 12)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    path.with_suffix(".txt").write_text("a caption\n")
    clips = reviewed(tmp_path)
    assert [round(each.seconds, 2) for each in clips] == [2.0, 2.0]
    assert [round(each.item.start, 1) for each in clips] == [0.0, 3602.0]
    frames = FrameSettings(fps=12, size=32)
    assert [len(read_item(each.item, frames).frames) for each in clips] == [25, 25]
    assert capsys.readouterr().err.count("its times jump") == 1


def test_what_a_person_should_know(tmp_path: Path) -> None:
    """Checks the notes on stills, copies, text, short clips and missing captions; other clips have none."""
    write(tmp_path / "good.mp4", scene(2, 1))
    write(tmp_path / "copy.mp4", scene(2, 1) // 2 * 2)
    write(tmp_path / "still.mp4", scene(2, 4, speed=0))
    write(tmp_path / "brief.mp4", scene(0.3, 5))
    write_video(tmp_path / "IMG_0042 red-ball.mp4", scene(1, 6), 12)
    written = []
    for place in range(24):
        image = Image.new("RGB", (256, 144), (30 + 5 * place, 90, 120))
        ImageDraw.Draw(image).text((20, 120), "SUBSCRIBE to the channel, like and share", fill="white")
        written.append(np.asarray(image))
    write(tmp_path / "text.mp4", written)
    notes = {each.item.id: each.notes for each in reviewed(tmp_path)}
    assert notes == {
        "IMG_0042 red-ball.mp4": ("no caption",),
        "brief.mp4": ("too short for key frames",),
        "copy.mp4": (),
        "good.mp4": ("looks like copy.mp4",),
        "still.mp4": ("little motion",),
        "text.mp4": ("may show text",),
    }
    assert in_words("IMG_0042 red-ball.mp4") == "IMG 0042 red ball"


def test_a_tenth_is_held_out(tmp_path: Path) -> None:
    """Guards the held-out loss: copies of a held-out clip are not trained on. With very few clips, none is held out."""
    for number in range(3):
        write(tmp_path / f"{number}.mp4", scene(1, number))
    assert {each.item.split for each in with_splits(reviewed(tmp_path))} == {"train"}
    for number in range(3, 10):
        write(tmp_path / f"{number}.mp4", scene(2, number))
    (held,) = [each.item.id for each in with_splits(reviewed(tmp_path)) if each.item.split == "validation"]
    assert held not in ("0.mp4", "1.mp4", "2.mp4")  # the short ones
    write(tmp_path / "copy.mp4", scene(2, int(Path(held).stem)))
    splits = {each.item.id: each.item.split for each in with_splits(reviewed(tmp_path), 0.2)}
    assert splits["copy.mp4"] == splits[held]
    assert sum(each == "validation" for each in splits.values()) == 2


def test_upright_clips_of_telephones(tmp_path: Path) -> None:
    """Handles rotated videos from phones: they are reviewed and encoded the way they are displayed."""
    upright = [np.ascontiguousarray(np.rot90(each)) for each in scene(1, 1)]  # 64 x 48 becomes 48 x 64
    upright = [np.vstack([each[:32], np.full_like(each[32:], 250)]) for each in upright]
    with av.open(str(tmp_path / "IMG_0001.mov"), "w") as file:
        stream = file.add_stream("mpeg4", 12)
        stream.width, stream.height = 64, 48
        stream.set_display_rotation(90)
        for number, picture in enumerate(upright):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(picture, -1)))
            frame.pts, frame.time_base = number, Fraction(1, 12)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    (clip,) = reviewed(tmp_path)
    assert (clip.facts["size"], clip.facts["caption"]) == ("48 x 64", "IMG 0001")
    assert "no caption" in clip.notes
    frames = read_item(clip.item, FrameSettings(size=32, fit="letterbox", min_frames=1)).frames
    assert frames.shape == (9, 32, 32, 3)
    assert frames[0, 16:, 6:26].mean() > 220  # the white half is at the bottom
    assert frames[0, :15, 6:26].mean() < 200
    assert frames[0, :, :3].min() > 220  # letterbox bars
