"""The loader: every row once per epoch, and exact resumption after any interruption, for any workers and ranks."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideo.config import Sides, both
from cogvideo.data.clips import ClipSampling, FrameRates, Mode, choose_window
from cogvideo.data.dataset import make_card, write_card
from cogvideo.data.loader import (
    ClipSample,
    ClipStream,
    Loader,
    keyed_seeds,
    keyed_uniform,
    mix,
    order,
    shares,
)
from cogvideo.data.shards import Row, ShardInfo, digest, shard_name, write_shard

GRID, NUM_CODES = 2, 60_000
LENGTHS = (33, 5, 1, 40, 2, 9, 4, 12, 33, 20, 5, 64, 8)


def codes_of(clip: int, length: int, grid: Sides = GRID) -> np.ndarray:
    """Codes that encode their clip and frame."""
    return np.broadcast_to(
        (clip * 100 + np.arange(length, dtype=np.uint16))[:, None, None], (length, *both(grid))
    ).copy()


def make_folder(folder: Path, lengths: tuple[int, ...] = LENGTHS, first: int = 0, **info: Any) -> Path:
    """A dataset with clips of these lengths in shards of 4; every fifth clip is for validation."""
    folder.mkdir()
    settings = ShardInfo(**({"grid": GRID, "num_codes": NUM_CODES, "fps": 8.0, "tokenizer_sha256": "1" * 64} | info
        | {"settings_sha256": digest({}), "work_sha256": "3"}))  # fmt: skip
    rows = [
        Row(
            f"{number}",
            tuple(f"clip {number} text {text}" for text in range(1 + number % 3)),
            {},
            settings.fps,
            codes_of(number, length, settings.grid),
            "validation" if number % 5 == 4 else "train",
            codes_of(number, length, settings.high_grid) if settings.high_grid else None,
        )
        for number, length in enumerate(lengths, first)
    ]
    files = [shard_name(index) for index in range((len(rows) + 3) // 4)]
    for index, file in enumerate(files):
        write_shard(folder / file, rows[4 * index : 4 * index + 4], settings)
    write_card(folder, make_card(folder, files, source="", tokenizer="bundle", settings={}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("loader") / "data")


@pytest.fixture(scope="module")
def stream(folder: Path) -> ClipStream:
    return ClipStream([folder], sampling=ClipSampling("interpolation", caption_dropout=0.3, seed=5))


def keep(samples: list[ClipSample]) -> list[ClipSample]:
    """A collate function that changes nothing, but copies memory-mapped codes."""
    return [sample._replace(codes=sample.codes.copy()) for sample in samples]


def plain(samples: list[ClipSample]) -> list[tuple[Any, ...]]:
    """Samples as comparable values."""
    return [(*sample._replace(codes=None), sample.codes.tolist()) for sample in samples]


def clip_of(sample: ClipSample) -> int:
    return int(sample.codes[0, 0, 0]) // 100


def clips(length: int, split: str = "train", shortest: int = 5) -> set[int]:
    """The clips of a split that are long enough, according to the list of lengths."""
    return {
        number
        for number, each in enumerate(LENGTHS[:length])
        if each >= shortest and (number % 5 == 4) == (split == "validation")
    }


# Order.


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_row_once(num_rows: int, seed: int, epoch: int) -> None:
    """Catches rows repeated or skipped within an epoch: the order must be a permutation for any number of rows."""
    assert sorted(order(num_rows, seed, epoch).tolist()) == list(range(num_rows))


def test_orders_look_random() -> None:
    """Catches an order close to that of the files, or the same order for every epoch or seed."""
    num_rows = 1000
    places = np.arange(num_rows)
    orders = [order(num_rows, seed, epoch) for seed in range(3) for epoch in range(10)]
    for each in orders:
        assert abs(np.corrcoef(places, each)[0, 1]) < 0.15  # 4.7 standard deviations
        assert np.mean(each == places) < 0.01
        assert np.mean(np.diff(each) == 1) < 0.01
        assert abs(np.corrcoef(each[:-1], each[1:])[0, 1]) < 0.15
    for one in range(len(orders)):
        for other in range(one):
            assert np.mean(orders[one] == orders[other]) < 0.01


def test_small_orders_are_all_drawn() -> None:
    """Catches a few clips that always come in the same few orders."""
    epochs = 3000
    counts = Counter(tuple(order(4, 0, epoch).tolist()) for epoch in range(epochs))
    assert set(counts) == set(permutations(range(4)))
    assert max(counts.values()) < 2.0 * epochs / 24
    assert min(counts.values()) > 0.4 * epochs / 24


def test_published_values_of_splitmix64() -> None:
    """Pins the first outputs for seed 1234567: a changed hash would reorder the samples of resumed runs."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + golden * step) % 2**64 for step in (1, 2, 3)], np.uint64)
    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_order_never_changes() -> None:
    """Catches a version that resumes old runs at different samples, or a platform with a different order."""
    assert order(10, 7, 0).tolist() == [1, 7, 6, 0, 4, 2, 8, 3, 9, 5]
    assert order(10, 7, 1).tolist() == [0, 3, 1, 4, 6, 7, 5, 9, 8, 2]
    assert keyed_seeds(7, np.array([0, 1]), np.array([3, 3])).tolist() == [4430655301375008392, 3368791360226051095]


# Keyed randomness.


def test_draws_are_uniform_and_independent() -> None:
    """Catches biased offsets, and draws that correlate across rows, epochs, or seeds, or with each other."""
    rows, epochs = np.arange(4000), np.zeros(4000, np.int64)
    draws = keyed_uniform(0, epochs, rows, 4)
    others = (keyed_uniform(1, epochs, rows, 4), keyed_uniform(0, epochs + 1, rows, 4))
    columns = np.concatenate([draws, *others, np.roll(draws, 1, axis=0)], axis=1)
    assert columns.min() >= 0
    assert columns.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in columns.T])
    assert np.all(np.abs(counts - 200) < 5 * np.sqrt(200))
    correlations = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlations).max() < 5 / np.sqrt(4000)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10**9)), min_size=1, max_size=20), st.integers(0, 2**62))
@settings(max_examples=50, deadline=None)
def test_draws_do_not_depend_on_their_batch(places: list[tuple[int, int]], seed: int) -> None:
    """Catches a sample that depends on the rest of its batch, and therefore on the number of ranks."""
    epochs, rows = (np.array(each) for each in zip(*places, strict=True))
    together = keyed_uniform(seed, epochs, rows, 4)
    alone = [keyed_uniform(seed, epochs[[index]], rows[[index]], 4)[0] for index in range(len(places))]
    assert np.array_equal(together, np.stack(alone))
    assert np.array_equal(together[:, :2], keyed_uniform(seed, epochs, rows, 2)), "nor on how many are drawn"


# Samples.


@pytest.mark.parametrize("mode", ["sequential", "interpolation", "image"])
def test_samples_are_windows_of_their_clip(folder: Path, mode: Mode) -> None:
    """Catches codes from a different clip or different frames than the caption and duration describe."""
    rates = FrameRates()
    stream = ClipStream([folder], sampling=ClipSampling(mode))
    for sample in stream.__getitems__(range(40)):
        clip, frames = clip_of(sample), sample.codes[:, 0, 0].astype(int) % 100
        length = LENGTHS[clip]
        assert np.array_equal(sample.codes, np.broadcast_to(sample.codes[:, :1, :1], sample.codes.shape))
        assert sample.caption in {f"clip {clip} text {text}" for text in range(1 + clip % 3)}
        assert frames.max() < length
        if mode == "image":
            assert (len(frames), sample.duration) == (1, 0.0)
            continue
        strides = set(np.diff(frames).tolist())
        assert (len(frames), len(strides)) == (5, 1)
        assert sample.duration == 4 * strides.pop() / 8.0
        allowed = {4.0, 2.0, 1.0, 0.5} if mode == "sequential" else {2.0, 1.0, 0.5}
        filled = {duration for duration in allowed if length >= duration * rates.base + 1}
        assert sample.duration == max(filled) if mode == "sequential" else sample.duration in filled


def test_modes_take_the_clips_that_are_long_enough(folder: Path) -> None:
    """Catches clips that are too short for a mode, and usable clips that are left out."""
    for sampling, shortest in (
        (ClipSampling(), 5),
        (ClipSampling(fixed_rate=2.0), 17),
        (ClipSampling("image"), 1),
        (ClipSampling(rates=FrameRates(rates=(1.0, 4.0))), 9),
    ):
        for split in ("train", "validation"):
            stream = ClipStream([folder], split, sampling)
            got = [clip_of(sample) for sample in stream.__getitems__(range(len(stream)))]
            assert len(got) == len(stream)
            assert set(got) == clips(len(LENGTHS), split, shortest)


def test_offsets_and_captions_vary_by_epoch(folder: Path) -> None:
    """Catches epochs that repeat the same frames and captions, and frames that are never shown."""
    stream = ClipStream([folder], sampling=ClipSampling("image"))
    seen: dict[int, set[tuple[int, str | None]]] = {}
    for sample in stream.__getitems__(range(200 * len(stream))):
        seen.setdefault(clip_of(sample), set()).add((int(sample.codes[0, 0, 0]) % 100, sample.caption))
    for clip in (1, 2, 8):
        assert {frame for frame, _ in seen[clip]} == set(range(LENGTHS[clip]))
        assert {text for _, text in seen[clip]} == {f"clip {clip} text {each}" for each in range(1 + clip % 3)}


def test_later_frames_come_with_durations(folder: Path) -> None:
    """Catches frames with a wrong duration, and durations or later frames that never come up."""
    stream = ClipStream([folder], sampling=ClipSampling("image", durations=(4.0, 0.5)))
    seen = [(int(sample.codes[0, 0, 0]) % 100, sample.duration) for sample in stream.__getitems__(range(2000))]
    assert all((frame == 0) == (duration == 0.0) for frame, duration in seen)
    later = Counter(duration for frame, duration in seen if frame > 0)
    assert later.keys() == {4.0, 0.5}
    assert min(later.values()) > 0.4 * later.total()
    assert {frame for frame, _ in seen} >= set(range(33))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_captions_are_dropped_at_their_share(folder: Path, share: float) -> None:
    """Catches captions dropped too rarely, which guidance needs for its unconditional text, or too often."""
    stream = ClipStream([folder], sampling=ClipSampling(caption_dropout=share))
    dropped = [sample.caption is None for sample in stream.__getitems__(range(2000))]
    assert abs(np.mean(dropped) - share) < 0.05
    if share in (0.0, 1.0):
        assert set(dropped) == {bool(share)}


def test_samples_do_not_depend_on_how_they_are_fetched(stream: ClipStream) -> None:
    """Catches a sample that depends on its batch, the fetch order, or the process that opened the files."""
    together = plain(stream.__getitems__(range(50)))
    assert together == plain([stream[position] for position in range(50)])
    assert together == plain(stream.__getitems__(range(49, -1, -1)))[::-1]
    assert together == plain(pickle.loads(pickle.dumps(stream)).__getitems__(range(50)))


def test_window_of_a_sample_is_that_of_the_pure_function(stream: ClipStream) -> None:
    """Prevents two sampling rules, one tested and the other used."""
    for sample in stream.__getitems__(range(20)):
        draws = keyed_uniform(5, np.array([sample.epoch]), np.array([sample.row]), 2)[0].tolist()
        length = LENGTHS[clip_of(sample)]
        window = choose_window(length, stream.sampling, *draws)
        assert window is not None
        assert (sample.codes[:, 0, 0] % 100).tolist() == list(window)


def test_several_folders_are_one_stream(tmp_path: Path) -> None:
    """Catches rows of the second folder looked up in the first."""
    one = make_folder(tmp_path / "one", (33, 5, 2, 9))
    two = make_folder(tmp_path / "two", (6, 3, 7, 8, 9, 10), first=100)
    stream = ClipStream([one, two])
    got = [(clip_of(sample), sample.caption) for sample in stream.__getitems__(range(len(stream)))]
    assert {clip for clip, _ in got} == {0, 1, 3, 100, 102, 103, 105}
    assert all(text and text.startswith(f"clip {clip} ") for clip, text in got)


def test_high_codes_are_of_the_same_frames(tmp_path: Path, folder: Path) -> None:
    """Catches super-resolution pairs of different frames, and high codes (9 times the bytes) read needlessly."""
    high = make_folder(tmp_path / "high", high_grid=3 * GRID)
    for mode in ("sequential", "image"):
        for sample in ClipStream([high], sampling=ClipSampling(mode, high_codes=True)).__getitems__(range(20)):
            assert sample.high_codes is not None
            assert sample.high_codes.shape[1:] == (3 * GRID, 3 * GRID)
            assert np.array_equal(sample.high_codes[:, 0, 0], sample.codes[:, 0, 0])
    assert ClipStream([high])[0].high_codes is None
    with pytest.raises(ValueError, match="no codes of super-resolution"):
        ClipStream([folder], sampling=ClipSampling(high_codes=True))


def test_a_batch_has_frames_of_one_shape(tmp_path: Path) -> None:
    """Checks mixed shapes: each batch has one shape, and rows repeat in an epoch only to fill a last batch."""
    shapes, counts = ((2, 3), (3, 2), (2, 3)), (8, 6, 6)
    folders = [
        make_folder(tmp_path / str(place), (9,) * count, first=20 * place, grid=shape)
        for place, (shape, count) in enumerate(zip(shapes, counts, strict=True))
    ]
    stream = ClipStream(folders, batch=4)
    train = {number for place, count in enumerate(counts) for number in range(20 * place, 20 * place + count)}
    train -= {number for number in train if number % 5 == 4}
    assert len(stream) == 12 + 8
    orders = []
    for epoch in range(2):
        samples = stream.__getitems__(range(epoch * len(stream), (epoch + 1) * len(stream)))
        batches = [samples[start : start + 4] for start in range(0, len(samples), 4)]
        assert all(len({each.codes.shape for each in batch}) == 1 for batch in batches)
        assert {each.codes.shape[1:] for each in samples} == {(2, 3), (3, 2)}
        assert {clip_of(each) for each in samples} == train
        orders.append([clip_of(each) for each in samples])
    assert orders[0] != orders[1]
    with pytest.raises(ValueError, match="frames of 3 x 2 codes, expected the"):
        ClipStream(folders)


# Batches.


def taken(loader: Loader[list[ClipSample]], num_batches: int | None = None) -> list[tuple[Any, ...]]:
    return [value for batch in islice(loader, num_batches) for value in plain(batch)]


@given(st.integers(0, 60), st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([12, 24]), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_ranks_together_are_the_stream(position: int, world_size: int, batch_size: int, num_batches: int) -> None:
    """Catches samples that two ranks share or that no rank gets, from any position and across epochs."""
    dealt = [
        [list(each) for each in islice(shares(position, batch_size, rank, world_size), num_batches)]
        for rank in range(world_size)
    ]
    for number in range(num_batches):
        first = position + number * batch_size
        together = [place for share in dealt for place in share[number]]
        assert sorted(together) == list(range(first, first + batch_size))
        assert {len(share[number]) for share in dealt} == {batch_size // world_size}


@given(st.integers(1, 50), st.sampled_from([1, 2, 3, 4]), st.sampled_from([12, 24]))
@settings(max_examples=40, deadline=None)
def test_one_epoch_is_every_row_once(num_rows: int, world_size: int, batch_size: int) -> None:
    """Catches held-out metrics in which some clips count twice or not at all."""
    together = [
        place
        for rank in range(world_size)
        for share in shares(0, batch_size, rank, world_size, num_rows)
        for place in share
    ]
    assert sorted(together) == list(range(num_rows))


@given(st.integers(0, 40), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3]), st.integers(0, 3), st.data())
@settings(max_examples=30, deadline=None)
def test_resumed_runs_are_uninterrupted_ones(
    stream: ClipStream, position: int, before: int, after: int, num_before: int, data: st.DataObject
) -> None:
    """Catches samples repeated or skipped by a resumed run, even with other numbers of ranks or batch sizes."""
    batches = data.draw(st.sampled_from([6, 12]), "batch before"), data.draw(st.sampled_from([6, 12, 18]), "after")
    got: set[tuple[Any, ...]] = set()
    positions = []
    for rank in range(before):
        loader = Loader(stream, batches[0], rank=rank, world_size=before, position=position, collate=keep)
        got |= {repr(each) for each in taken(loader, num_before)}
        positions.append(loader.position)
    assert positions == positions[:1] * before, "the position is the same on all ranks"
    for rank in range(after):
        loader = Loader(stream, batches[1], rank=rank, world_size=after, position=positions[0], collate=keep)
        got |= {repr(each) for each in taken(loader, 2)}
    end = position + num_before * batches[0] + 2 * batches[1]
    assert got == {repr(each) for each in plain(stream.__getitems__(range(position, end)))}


def test_position_is_behind_what_was_taken(stream: ClipStream) -> None:
    """Catches a position that includes prefetched batches, which a resumed run would skip."""
    loader = Loader(stream, 4, num_workers=1, collate=keep)
    seen = [(batch[-1].position, loader.position) for batch in islice(loader, 3)]
    assert seen == [(3, 4), (7, 8), (11, 12)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_give_the_same_stream(stream: ClipStream, num_workers: int) -> None:
    """Catches samples that change, repeat, or get lost with worker processes, or on resuming without them."""
    expected = plain(stream.__getitems__(range(40)))
    loader = Loader(stream, 4, num_workers=num_workers, collate=keep)
    assert taken(loader, 5) == expected[:20]
    resumed = Loader(stream, 4, position=loader.position, collate=keep)
    assert taken(resumed, 5) == expected[20:]


def test_loading_leaves_the_global_generator_alone(stream: ClipStream) -> None:
    """Catches training whose random numbers depend on how often the loader was started: resumed runs would differ."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    taken(Loader(stream, 4, collate=keep), 2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_takes_one_epoch(stream: ClipStream, world_size: int) -> None:
    """Catches an evaluation that wraps around or drops the last rows."""
    clips_seen: list[int] = []
    for rank in range(world_size):
        loader = Loader(stream, 4, rank=rank, world_size=world_size, end=len(stream), collate=keep)
        clips_seen += [clip_of(sample) for batch in loader for sample in batch]
        assert loader.position <= len(stream)
    assert sorted(clips_seen) == sorted(clips(len(LENGTHS)))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("high", [False, True])
def test_codes_out_of_range_are_named(num_workers: int, high: bool, tmp_path: Path) -> None:
    """Prevents training on data damaged on disk: one line names the shard and clip, even from a worker."""
    folder = make_folder(tmp_path / "data", (40,), high_grid=3 * GRID)
    shard, side = folder / shard_name(0), 3 * GRID if high else GRID
    content = shard.read_bytes()
    place = content.index(codes_of(0, 40, side).tobytes())
    shard.write_bytes(content[:place] + b"\xff" * 2 * 40 * side**2 + content[place + 2 * 40 * side**2 :])
    stream = ClipStream([folder], sampling=ClipSampling("image", high_codes=True))
    message = r"shard-00000.arrow is damaged: the clip '0' has the code 65535, expected codes in \[0, 60000\)"
    with pytest.raises(ValueError, match=message) as info:
        next(iter(Loader(stream, 1, keep, num_workers=num_workers)))
    assert "\n" not in str(info.value)


# Invalid input.


def test_clips_that_are_too_short_are_named(tmp_path: Path) -> None:
    """Prevents training on nothing: the error states the lengths found and the length required."""
    short = make_folder(tmp_path / "short", (4, 3, 1, 2))
    with pytest.raises(
        ValueError, match=r"mode sequential: expected 5 frames at 8 per second, got clips of 1 to 4"
    ) as error:
        ClipStream([short])
    assert str(short) in str(error.value)
    assert len(ClipStream([short], sampling=ClipSampling("image"))) == 4
    with pytest.raises(ValueError, match="no split 'validation'"):
        ClipStream([short], "validation")


def test_datasets_must_agree(tmp_path: Path, folder: Path) -> None:
    """Catches codes of different tokenizers, grids, or frame rates in one batch, or ones that do not fit the model."""
    lengths = (9, 9)
    other = make_folder(tmp_path / "tokenizer", lengths, tokenizer_sha256="2" * 64)
    larger = make_folder(tmp_path / "grid", lengths, grid=3)
    slower = make_folder(tmp_path / "fps", lengths, fps=4.0)
    for second, message in (
        (other, "another image tokenizer"),
        (larger, "3 x 3 codes, expected the 2 of"),
        (slower, "4 frames"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            ClipStream([folder, second])
        assert str(second) in str(error.value)
    with pytest.raises(ValueError, match="another image tokenizer"):
        ClipStream([folder], tokenizer_sha256="2" * 64)
    with pytest.raises(ValueError, match="3 x 3 codes, expected at most 2 x 2: the positions of the model"):
        ClipStream([folder, larger], grid=2, batch=2)
    with pytest.raises(ValueError, match="8 frames per second, expected the base rate 16"):
        ClipStream([folder], sampling=ClipSampling(rates=FrameRates(base=16.0)))
    with pytest.raises(ValueError, match="at least one"):
        ClipStream([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 7, "world_size": 2}, "not divisible by the 2 ranks"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of 2"),
        ({"position": -1}, "position is -1"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_impossible_batches_are_refused(stream: ClipStream, change: dict[str, int], message: str) -> None:
    """Rejects a fractional share of a batch or a nonexistent rank before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        Loader(stream, **({"batch_size": 4, "collate": keep} | change))


def test_samples_follow_the_order(stream: ClipStream) -> None:
    """Catches rows looked up in another epoch's order when a batch spans two epochs."""
    rows = [sample.row for sample in stream.__getitems__(range(3 * len(stream)))]
    assert rows == [row for epoch in range(3) for row in order(len(stream), 5, epoch).tolist()]


def test_identity_is_that_of_data_and_sampling(stream: ClipStream, folder: Path) -> None:
    """Catches a run resumed on different data or sampling, for which its position is meaningless."""
    changed = [
        ClipStream([folder], "validation", ClipSampling("image")),
        ClipStream([folder]),
        ClipStream([folder], sampling=replace(stream.sampling, seed=6)),
    ]
    assert stream.identity not in [other.identity for other in changed]
    assert ClipStream([folder], sampling=stream.sampling).identity == stream.identity
