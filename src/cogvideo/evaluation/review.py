"""Review of clips before training: they are cut into shots and pieces, with notes on each."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from cogvideo.config import require
from cogvideo.data.folders import find_manifest, walk
from cogvideo.data.sources import Item, Rejection, SourceOptions, list_source
from cogvideo.evaluation.motion import measure
from cogvideo.files import plain
from cogvideo.media.colors import Pixels
from cogvideo.media.video import FileInfo, VideoError, examine, read_video

CUT_FPS = 12.0
"""Frames per second at which cuts are detected."""
CUT_SIDE = 64
"""Side of these frames in pixels."""
MAX_SECONDS = 1200.0
"""Maximum number of seconds of a file that are examined."""
MAX_PIECE_SECONDS = 16.0
"""Seconds of the longest piece; a longer shot is cut into equal ones."""
BASE_RATE = 8.0
"""Frames per second in training."""
WHOLE_SECONDS = (4.0, 2.0, 1.0, 0.5)
"""Lengths of clips that fill a frame rate, in seconds."""
MIN_SECONDS = 0.5
"""Seconds below which a clip has no key frames."""
MIN_ENERGY = 1e-4
"""Energy below which a clip has little motion."""
MAX_DIFFERENCE = 2.5
"""Mean difference below which clips look the same, in levels of 255; other takes of a scene differ by 5 or more.
"""
MIN_STROKES = 9.0
"""Strokes in 48 pixels of a picture 256 pixels wide from which it may have text; without text, most have up to 7."""

NO_ROW = "no row in the table"
"""Rejection reason for videos missing from the table of their folder."""


@dataclass(frozen=True)
class ReviewedClip:
    """A piece of a file."""

    item: Item
    """Its file, part, captions and split."""
    seconds: float
    width: int
    height: int
    fps: float
    """Frames per second of the file."""
    energy: float
    """Motion, as `evaluation.motion` measures it."""
    alike: str = ""
    """ID of an earlier clip that looks the same; empty if there is none."""
    has_text: bool = False
    """True if text may be in the picture all the time."""
    is_named: bool = False
    """True if its caption is made from its file name."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Possible defects, in a few words each."""
        found = {
            "no caption": self.is_named,
            "too short for key frames": self.seconds < MIN_SECONDS - 0.5 / BASE_RATE,
            "little motion": self.energy < MIN_ENERGY,
            "may show text": self.has_text,
            f"looks like {self.alike}": self.alike != "",
        }
        return tuple(words for words, applies in found.items() if applies)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for the page, as JSON values."""
        return {
            "id": self.item.id,
            "caption": self.item.captions[0],
            "split": self.item.split,
            "seconds": round(self.seconds, 2),
            "size": f"{self.width} x {self.height}",
            "fps": self.fps,
            "notes": list(self.notes),
        }


def listed(source: str) -> tuple[list[Item], list[Rejection], frozenset[str]]:
    """Clips of a folder or a table, rejected ones, and the IDs of those captioned by their file names."""
    options = SourceOptions(validation=0.0)
    found = list_source(source, options)
    lacking = {each.id for each in found.rejected if each.reason in ("missing caption", "empty caption")}
    items, rejected, named = found.items, [each for each in found.rejected if each.id not in lacking], frozenset[str]()
    if lacking:
        bare = list_source(source, replace(options, caption_columns=())).items
        known = {each.id for each in items}
        bare = [each for each in bare if _file_of(each) in lacking and each.id not in known]
        items = sorted([*items, *(replace(each, captions=(in_words(_file_of(each)),)) for each in bare)], key=_id_of)
        named = frozenset(map(_id_of, bare))
    seen = {*map(_file_of, items), *map(_file_of, rejected)}
    rejected = [*rejected, *_unnamed(source, seen)]
    files = [each for each in items if isinstance(each.media, Path)]
    require(len(items) > 0, f"no clip in {source} can be used{_first(rejected)}")
    require(len(files) == len(items), f"{source} has clips that are no files, expected a folder of videos or a table")
    return items, rejected, named


def _unnamed(source: str, seen: set[str]) -> list[Rejection]:
    """Videos of a folder that are missing from its table."""
    folder = Path(os.path.abspath(source))
    table = find_manifest(folder) if folder.is_dir() else None
    if table is None:
        return []
    names = [plain(name) for name in walk(folder) if Path(name).suffix.lower() in SourceOptions().suffixes]
    return [Rejection(name, NO_ROW, f"{table.name} does not name it") for name in names if name not in seen]


def _first(rejected: Sequence[Rejection]) -> str:
    """The first reason, as the end of a message."""
    return f": {rejected[0].id}: {rejected[0].reason} ({rejected[0].detail})" if rejected else ""


def _id_of(item: Item) -> str:
    return item.id


def _file_of(item: Item | Rejection) -> str:
    """The ID without the part of the file, such as `#1.5-4`."""
    return re.sub(r"#[\d.]+(-[\d.]*)?$", "", item.id)


def in_words(name: str) -> str:
    """A file name as a caption: its words."""
    return " ".join(re.findall(r"[^\W_]+", Path(name).stem)) or "a clip"


def review(
    items: Sequence[Item], named: frozenset[str], on_clip: Callable[[], None] = lambda: None
) -> tuple[list[ReviewedClip], list[Rejection]]:
    """Examine each file, cut it, and compare the pieces. One piece of a still is kept, however long it is.

    Args:
        items: clips of files.
        named: IDs of those whose captions are made from their file names.
        on_clip: called after each item.

    Returns:
        pieces of the clips that can be read, and the clips that cannot.
    """
    clips: list[ReviewedClip] = []
    prints: list[Float32[np.ndarray, "frames side side 3"]] = []
    rejected: list[Rejection] = []
    facts_of = lru_cache(maxsize=1)(examine)  # parts of a file follow each other
    for item in items:
        first, num_stills = len(clips), 0
        try:
            assert isinstance(item.media, Path)
            for clip, frames in _pieces(item, facts_of(item.media), item.id in named):
                looks = _fingerprint(frames)
                near = [float(np.abs(looks - other).mean()) for other in prints]
                place = int(np.argmin(near)) if near else -1
                is_alike = place >= 0 and near[place] < MAX_DIFFERENCE
                if is_alike and place >= first and clip.energy < MIN_ENERGY:
                    num_stills += 1
                    continue
                clips.append(replace(clip, alike=clips[place].item.id if is_alike else ""))
                prints.append(looks)
        except VideoError as error:
            rejected.append(Rejection(item.id, error.reason, error.detail))
        if num_stills:
            same = f"{num_stills:,} of the pieces repeat earlier ones, without motion"
            rejected.append(Rejection(item.id, "still in part", same))
        on_clip()
    return clips, rejected


Pieces = Iterator[tuple[ReviewedClip, UInt8[np.ndarray, "frames side side 3"]]]


def _pieces(item: Item, facts: FileInfo, is_named: bool) -> Pieces:
    """The pieces of an item with their frames; parts that hold one frame for long are left out."""
    parts = _moving(item, facts)
    if not parts:
        raise VideoError("no such part", f"one frame is held from {item.start:g} seconds on")
    for part in parts:
        for clip, frames in _shots(part, facts, is_named):
            yield _numbered(clip) if len(parts) > 1 else clip, frames


def _moving(item: Item, facts: FileInfo) -> list[Item]:
    """The parts of an item between the stills of its file."""
    if not facts.stills:
        return [item]
    end = min(math.inf if item.end is None else item.end, facts.seconds)
    marks = [item.start, *chain(*facts.stills), end]
    left, parts = MAX_SECONDS, []
    for first, last in zip(marks[::2], marks[1::2], strict=True):
        start = max(first, item.start)
        stop = min(last, end, start + left)
        if stop - start > 0.5 / facts.fps:
            parts.append(replace(item, start=start, end=item.end if stop == end else stop))
            left -= stop - start
    return parts


def _numbered(clip: ReviewedClip) -> ReviewedClip:
    """A clip with its start in its ID."""
    file, start = _file_of(clip.item), clip.item.start
    return replace(clip, item=replace(clip.item, id=f"{file}#{start:.2f}"))


def _shots(item: Item, facts: FileInfo, is_named: bool) -> Pieces:
    """The pieces of an item without stills."""
    assert isinstance(item.media, Path)
    end = min(math.inf if item.end is None else item.end, facts.seconds, item.start + MAX_SECONDS)
    most = round(MAX_SECONDS * CUT_FPS)
    frames = read_video(item.media, CUT_FPS, CUT_SIDE, start=item.start, end=item.end, max_frames=most).frames
    seconds = end - item.start
    marks = [0.0, *(place / CUT_FPS for place in cuts(frames)), seconds]
    spans = [span for first, last in pairwise(marks) for span in _split(first, last)]
    for first, last in spans:
        part = frames[round(first * CUT_FPS) : max(round(last * CUT_FPS), round(first * CUT_FPS) + 1)]
        start, stop = item.start + first, item.start + last
        held = next((each for each in WHOLE_SECONDS if abs(last - first - each) < 0.5 / BASE_RATE), None)
        is_end = last == seconds
        until: float | None = stop
        if is_end and held is not None:
            until = start + held + 0.01  # both ends of a clip of whole seconds
        elif is_end and end == facts.seconds:
            until = None
        energy = measure(part).energy if len(part) > 1 else 0.0
        large = read_video(item.media, 1, 256, fit="letterbox", start=start, end=stop, max_frames=4).frames
        clip = ReviewedClip(
            item=replace(item, start=start, end=until),
            seconds=last - first,
            width=facts.width,
            height=facts.height,
            fps=facts.fps,
            energy=energy,
            has_text=strokes(large) >= MIN_STROKES,
            is_named=is_named,
        )
        yield clip if len(spans) == 1 else _numbered(clip), part


def _split(first: float, last: float) -> list[tuple[float, float]]:
    """Equal pieces of a shot that are short enough."""
    number = max(1, math.ceil((last - first) / MAX_PIECE_SECONDS - 1e-6))
    marks = [first + (last - first) * place / number for place in range(number + 1)]
    return list(pairwise(marks))


def has_detector() -> bool:
    """True if PySceneDetect is installed."""
    try:
        import scenedetect  # noqa: F401
    except ImportError:
        return False
    return True


def cuts(frames: UInt8[np.ndarray, "frames side side 3"]) -> list[int]:
    """First frames of all shots but the first, by PySceneDetect; none without it."""
    if not has_detector():
        return []
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    detector = AdaptiveDetector(min_scene_len=round(MIN_SECONDS * CUT_FPS))
    found = []
    for place, frame in enumerate(frames):
        in_blue_green_red = np.ascontiguousarray(frame[..., ::-1])
        found += detector.process_frame(FrameTimecode(place, CUT_FPS), in_blue_green_red)
    return [each.frame_num for each in found]


def strokes(frames: Pixels) -> float:
    """Strokes, as in letters, in the part of a picture that has the most: alternating edges to bright and to dark, in 6
    rows of 48 pixels, where all frames are the same. Blinds and gratings have them too."""
    still = np.median(frames, axis=0).mean(-1)
    steps = np.diff(still, axis=1)
    shares = [_box_sums(sign * steps > 40, 6, 48) for sign in (1, -1)]
    return float(np.minimum(*shares).max(initial=0.0)) / 6


def _box_sums(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sums over all boxes of a size."""
    sums = np.pad(values.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    below = sums[height:] - sums[:-height]
    return below[:, width:] - below[:, :-width]


def _fingerprint(frames: UInt8[np.ndarray, "frames side side 3"]) -> Float32[np.ndarray, "5 16 16 3"]:
    """Five reduced frames of a clip."""
    some = frames[np.linspace(0, len(frames) - 1, 5).round().astype(int)].astype(np.float32)
    return some.reshape(5, 16, CUT_SIDE // 16, 16, CUT_SIDE // 16, 3).mean((2, 4))


def with_splits(clips: Sequence[ReviewedClip], held_out: float = 0.1) -> list[ReviewedClip]:
    """The clips with a tenth of them held out, if the source has no split but `train` and there are four or more.

    Pieces of a file and clips that look the same stay together. Long clips go first: short ones have fewer frame rates.
    """
    if len(clips) < 4 or any(each.item.split != "train" for each in clips):
        return list(clips)
    groups: dict[str, list[str]] = {}
    key_of: dict[str, str] = {}
    for each in clips:
        key = key_of.setdefault(each.item.id, key_of.get(each.alike, str(each.item.media)))
        groups.setdefault(key, []).append(each.item.id)
    wanted, most = max(1, round(held_out * len(clips))), max(1, len(clips) // 4)
    median = sorted(each.seconds for each in clips)[len(clips) // 2]
    short = {each.item.id for each in clips if each.seconds < median}

    def order(ids: list[str]) -> tuple[bool, bytes]:
        return not short.isdisjoint(ids), hashlib.blake2b(ids[0].encode(), digest_size=8).digest()

    chosen: set[str] = set()
    for ids in sorted(groups.values(), key=order):
        if len(chosen) < wanted and len(chosen) + len(ids) <= most:
            chosen |= set(ids)
    splits = ("validation" if each.item.id in chosen else "train" for each in clips)
    return [replace(each, item=replace(each.item, split=split)) for each, split in zip(clips, splits, strict=True)]


def check_usable(clips: Sequence[ReviewedClip], rejected: Sequence[Rejection], source: str) -> None:
    """Refuse a source without clips to train on, with a one-line message."""
    can_train = any(each.item.split == "train" for each in clips)
    require(can_train, f"no clip in {source} can be trained on{_first(rejected)}")


def in_short(clips: Sequence[ReviewedClip], rejected: Sequence[Rejection]) -> list[str]:
    """Lines about the clips as a whole."""
    lengths = sorted(each.seconds for each in clips)
    sizes = sorted({f"{each.width} x {each.height}" for each in clips})
    size = sizes[0] if len(sizes) == 1 else f"{len(sizes)} sizes"
    held = sum(each.item.split != "train" for each in clips)
    spans = f"{lengths[0]:.1f} to {lengths[-1]:.1f} s (median {lengths[len(lengths) // 2]:.1f})"
    number = f"{len(clips):,} clips of {spans}" if len(clips) > 1 else f"1 clip of {lengths[0]:.1f} s"
    lines = [f"{number}, {size}; {held:,} held out."]
    counts = Counter[str]()
    for each in clips:
        counts.update("looks like another one" if note.startswith("looks like") else note for note in each.notes)
    lines += [f"{count:,} of them: {words}." for words, count in counts.items()]
    if any(each.is_named for each in clips):
        lines.append("File names replace missing captions; `cogvideo data captions` makes a table to fill in.")
    reasons: dict[str, list[str]] = {}
    for left in rejected:
        reasons.setdefault(left.reason, []).append(left.id)
    for reason, (first, *others) in reasons.items():
        lines.append(f"Left out: {first}{f' and {len(others):,} more' if others else ''}: {reason}.")
    return lines


def on_shape(clips: Sequence[ReviewedClip], sides: tuple[int, int], pixels: int) -> list[str]:
    """A line that says so if most clips have another shape than the frames, which keep only their center.

    Args:
        clips: the clips.
        sides: rows and columns of a frame in codes.
        pixels: side of a code.
    """
    ratio = float(np.median([each.width / each.height for each in clips]))
    most = max(sides)
    least = max(1, math.ceil(most * min(ratio, 1 / ratio) - 0.1))
    rows, columns = (most, least) if ratio < 1 else (least, most)
    if (rows, columns) == sides:
        return []
    kept = f"frames of {pixels * sides[1]}x{pixels * sides[0]} pixels keep only their center"
    return [f"Most clips have another shape: {kept}. `--size {pixels * columns}x{pixels * rows}` keeps nearly all."]
