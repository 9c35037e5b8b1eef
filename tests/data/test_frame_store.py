"""Training frames of the tokenizer: sampled evenly, counted, and stored completely or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogvideo.config import InputError
from cogvideo.data import frame_store
from cogvideo.data.frame_store import StoreSettings, divide, fetch, remove
from cogvideo.data.frames import FrameSettings
from cogvideo.data.sources import Item, SourceOptions
from cogvideo.media.video import write_video

SIDE = 16
EVERYTHING = SourceOptions(validation=0.0)


def write_clip(folder, number, num_frames, split=None):
    """Every pixel of frame `k` of clip `i` is `16 i + k`, which identifies the frame."""
    folder.mkdir(exist_ok=True)
    values = (16 * number + np.arange(num_frames)).astype(np.uint8)
    frames = np.broadcast_to(values[:, None, None, None], (num_frames, SIDE, SIDE, 3))
    write_video(folder / f"{number}.webp", np.ascontiguousarray(frames), fps=8)
    (folder / f"{number}.txt").write_text("gray")
    if split is not None:
        (folder / f"{number}.txt").unlink()
        (folder / f"{number}.json").write_text(json.dumps({"caption": "gray", "split": split}))


def settings(num_frames=1000, num_held_out=1000, frames_per_clip=1):
    return StoreSettings(num_frames, num_held_out, frames_per_clip, clips=FrameSettings(size=SIDE, min_frames=1))


def origins(frames):
    """(clip, frame) of each frame."""
    assert all(len(np.unique(frame)) == 1 for frame in frames)
    return [divmod(int(frame[0, 0, 0]), 16) for frame in frames]


@pytest.fixture
def clips(tmp_path):
    """Five clips of 4 to 8 frames, one of them in the validation split."""
    for number in range(5):
        write_clip(tmp_path / "clips", number, 4 + number, split="validation" if number == 3 else "train")
    return str(tmp_path / "clips")


def test_everything_is_taken_where_it_fits(clips, tmp_path):
    """Catches duplicate or missing frames, and training on clips of another split."""
    store = fetch(tmp_path, [clips], EVERYTHING, settings())
    assert sorted(origins(store.train)) == [(clip, k) for clip in (0, 1, 2, 4) for k in range(4 + clip)]
    assert sorted(origins(store.held_out)) == [(3, k) for k in range(7)]
    assert (store.clips, store.rejected) == (5, {})


def test_frames_are_drawn_evenly_from_clips(clips, tmp_path):
    """Prevents a tokenizer from seeing only the first clips: each one contributes evenly spaced frames."""
    store = fetch(tmp_path, [clips], EVERYTHING, settings(num_frames=8))
    drawn = sorted(origins(store.train))
    assert len(drawn) == 8
    for clip in (0, 1, 2, 4):
        places = [k for each, k in drawn if each == clip]
        length = 4 + clip
        assert len(places) == 2
        assert places[0] < length / 2 <= places[1]


def test_a_clip_that_is_read_gives_several_frames(clips, tmp_path):
    """Prevents slow sampling, which opens a clip of thousands of frames for only one of them."""
    store = fetch(tmp_path, [clips], EVERYTHING, settings(num_frames=8, frames_per_clip=4))
    assert len({clip for clip, _ in origins(store.train)}) == 2


def test_zoom_shows_squares_of_larger_frames(tmp_path):
    """Checks that a tokenizer for super-resolution sees the texture of large frames, not just downscaled ones."""
    large = 2 * SIDE
    rows = np.arange(large, dtype=np.uint8)
    frame = np.stack(np.broadcast_arrays(4 * rows[:, None], 4 * rows, np.uint8(0)), -1)  # encodes each pixel's position
    frames = frame + np.arange(3, dtype=np.uint8)[:, None, None, None] * np.array([0, 0, 80], np.uint8)
    for number in range(8):
        (tmp_path / "clips").mkdir(exist_ok=True)
        write_video(tmp_path / "clips" / f"{number}.webp", frames, fps=8)
        (tmp_path / "clips" / f"{number}.txt").write_text("a gradient")
    zoomed = replace(settings(), zoom=2)
    store = fetch(tmp_path, [str(tmp_path / "clips")], SourceOptions(validation=0.0), zoomed)
    assert len(store.train) == 21  # seven training clips
    slopes = [np.unique(np.diff(each[:, 0, 0].astype(int))).tolist() for each in store.train]
    assert slopes.count([4]) == 9  # three of the clips at full size, the others downscaled
    corners = {tuple(each[0, 0]) for each, slope in zip(store.train, slopes, strict=True) if slope == [4]}
    assert len(corners) > 5  # crops from all over the frame


def test_sources_share_and_help_each_other(tmp_path):
    """Prevents a large source from crowding out a small one; the large one makes up for what the small one lacks."""
    for number in range(2):
        write_clip(tmp_path / "few", number, 3)
    for number in range(2, 10):
        write_clip(tmp_path / "many", number, 12)
    sources = [str(tmp_path / "few"), str(tmp_path / "many")]
    store = fetch(tmp_path, sources, EVERYTHING, settings(num_frames=20, num_held_out=4))
    clips = [clip for clip, _ in origins(store.train)]
    assert sum(clip < 2 for clip in clips) == 3  # one of its two clips is held out
    assert sum(clip >= 2 for clip in clips) == 17
    assert {clip < 2 for clip, _ in origins(store.held_out)} == {True, False}


def test_clips_that_cannot_be_read_are_counted(clips, tmp_path):
    """A damaged file among thousands must neither end a run nor be skipped silently."""
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"no video at all")
    (tmp_path / "clips" / "broken.txt").write_text("nothing")
    (tmp_path / "clips" / "mute.webp").write_bytes((tmp_path / "clips" / "0.webp").read_bytes())
    store = fetch(tmp_path, [clips], EVERYTHING, settings())
    assert store.clips == 5
    assert sum(store.rejected.values()) == 2
    assert store.rejected["missing caption"] == 1


def test_nothing_to_read_is_an_error(tmp_path):
    """Prevents training on zero frames, which would fail much later with an unrelated message."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"no video at all")
    (tmp_path / "clips" / "broken.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"no clip in .* can be trained on: 1 "):
        fetch(tmp_path, [str(tmp_path / "clips")], EVERYTHING, settings())
    assert not (tmp_path / "frames.json").exists()


def test_the_same_call_finds_its_frames(clips, tmp_path, monkeypatch):
    """A resumed run must use the same frames, and need not read the clips again."""
    first = fetch(tmp_path, [clips], EVERYTHING, settings(num_frames=9))
    monkeypatch.setattr(frame_store, "list_source", lambda *_: pytest.fail("the source was read again"))
    again = fetch(tmp_path, [clips], EVERYTHING, settings(num_frames=9))
    assert np.array_equal(first.train, again.train)
    assert np.array_equal(first.held_out, again.held_out)
    with pytest.raises(ValueError, match="holds frames from other sources or settings"):
        fetch(tmp_path, [clips], EVERYTHING, settings(num_frames=8))


def test_a_damaged_manifest_is_told(clips, tmp_path):
    """A corrupt manifest is reported in one line that names the file."""
    fetch(tmp_path, [clips], EVERYTHING, settings())
    (tmp_path / "frames.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot use .*frames.json \(.*\): remove its folder"):
        fetch(tmp_path, [clips], EVERYTHING, settings())


def test_equal_calls_draw_equal_frames(clips, tmp_path):
    """Machines with the same seed must train the same tokenizer, however many clips are read in parallel."""
    stores = []
    for readers in (0, 3):
        folder = tmp_path / str(readers)
        folder.mkdir()
        stores.append(fetch(folder, [clips], EVERYTHING, settings(num_frames=9), readers=readers))
    assert np.array_equal(stores[0].train, stores[1].train)


def test_half_written_frames_are_not_taken_for_whole(clips, tmp_path, monkeypatch):
    """Files left by a process that was killed while sampling are incomplete and must be rebuilt."""
    whole = fetch(tmp_path, [clips], EVERYTHING, settings())
    expected = np.array(whole.train)
    remove(tmp_path)
    real, calls = frame_store.read_item, []

    def dies(item, settings):
        calls.append(item)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(item, settings)

    monkeypatch.setattr(frame_store, "read_item", dies)
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path, [clips], EVERYTHING, settings())
    monkeypatch.undo()
    assert not (tmp_path / "frames.json").exists()
    assert np.array_equal(fetch(tmp_path, [clips], EVERYTHING, settings()).train, expected)


def test_damaged_files_are_refused(clips, tmp_path):
    """Rejects a truncated file, whose frames would be shifted or missing."""
    fetch(tmp_path, [clips], EVERYTHING, settings())
    path = tmp_path / "train.rgb"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes, expected"):
        fetch(tmp_path, [clips], EVERYTHING, settings())


def test_removing_frees_the_disk(clips, tmp_path):
    """Frames are larger than the model, and useless after the run."""
    fetch(tmp_path, [clips], EVERYTHING, settings())
    remove(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"clips"}


def item(name, split, copy=0):
    return Item(f"{name}~{copy}", Path(name), ("a",), split=split, copy=copy)


def test_splits_of_the_source_are_kept():
    """Prevents training on any split other than `train`."""
    items = [item("a", "train"), item("b", "held_out"), item("c", "validation"), item("d", "test")]
    train, held_out = divide(items)
    assert [each.id for each in train] == ["a~0"]
    assert [each.id for each in held_out] == ["b~0", "c~0", "d~0"]


def test_some_clips_are_held_out_where_the_source_holds_none():
    """Prevents leaks that would make metrics meaningless: copies of a clip on other backgrounds stay together."""
    items = [item(f"{n}", "train", copy) for n in range(40) for copy in range(2)]
    train, held_out = divide(items)
    assert (len(train), len(held_out)) == (76, 4)
    assert not {each.media for each in train} & {each.media for each in held_out}
    assert divide(items[:2]) == (items[:2], [])  # the only clip is needed for training


def test_figures_of_a_single_clip_are_those_of_its_frames(tmp_path):
    """A single clip leaves nothing to hold out: metrics use the training frames, and the command must not fail."""
    write_clip(tmp_path / "clips", 1, 3)
    store = fetch(tmp_path, [str(tmp_path / "clips")], EVERYTHING, settings())
    assert store.held_out is store.train


def test_a_clip_of_another_split_is_told(tmp_path):
    """A single clip that falls into the validation split is reported as such, not as unreadable."""
    write_clip(tmp_path / "clips", 1, 3, split="validation")
    told = r"no clip in .* can be trained on: 1 of the split validation; .*--validation 0$"
    with pytest.raises(ValueError, match=told):
        fetch(tmp_path, [str(tmp_path / "clips")], EVERYTHING, settings())


@pytest.mark.parametrize("name", ["num_frames", "num_held_out", "frames_per_clip"])
def test_wrong_settings_are_refused(name):
    """Rejects zero frames, from which nothing can be learned."""
    with pytest.raises(ValueError, match=f"{name} is 0, expected a positive number"):
        StoreSettings(**{name: 0})


def test_reading_counts_what_there_is(clips, tmp_path):
    """Catches a progress bar that counts toward frames that do not exist: it never ends, and its ETA is wrong."""
    said = []
    for name in ("all", "few"):
        (tmp_path / name).mkdir()
    fetch(tmp_path / "all", [clips], EVERYTHING, settings(num_frames=20_000), said.append)
    store = fetch(tmp_path / "all", [clips], EVERYTHING, settings(num_frames=20_000))
    assert {each.total for each in said} == {len(said)}
    assert [each.clips for each in said] == list(range(1, len(said) + 1))
    assert said[-1].frames == len(store.train) + len(store.held_out)
    said.clear()
    fetch(tmp_path / "few", [clips], EVERYTHING, settings(num_frames=4, num_held_out=1, frames_per_clip=2), said.append)
    assert [(each.clips, each.total) for each in said] == [(1, 3), (2, 3), (3, 3)]
