"""`cogvideo data report`: facts about a dataset, from its card and counted over random rows, and their page."""

from __future__ import annotations

import csv
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from cogvideo.config import InputError, both, require
from cogvideo.data.clips import FrameRates, filled_rates, lowest_rate
from cogvideo.data.dataset import REJECTED, Card, Dataset
from cogvideo.files import check_place
from cogvideo.media.metrics import perplexity
from cogvideo.report.clips import find_origin, frame_size
from cogvideo.report.page import Column, count, duration, file_size, middle, number, percent, shorten, write_page

NUM_ROWS = 20_000
"""Maximum number of rows to count, so that five million take no longer."""
NUM_SIZED = 200
"""Maximum number of source files whose frame size is looked up."""
SHEET_WIDTH = 640
"""Width in pixels for the frames of a clip, four to eight of which are shown."""
NUM_COLUMNS, NUM_WORDS, NUM_VALUES, NUM_ATTRIBUTES, NUM_REASONS, NUM_EXAMPLES, NUM_SHARDS = 32, 60, 10, 24, 40, 5, 40
"""Limits of what is shown."""

_FUNCTION_WORDS = (
    "a an and are as at be been but by for from had has have he her his in into is it its of off on onto "
    "or out over she so than that the their them then there these they this to under until up was were "
    "which while who with"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English words that say little about what is seen."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+(?:['’-][^\W_]+)*")


def report(folder: Path, /, out: Path | None = None, tokenizer: str = "", clips: int = 12, seed: int = 0) -> None:
    """Write a page about prepared data: counts, lengths, pictures, captions, codes, and what was rejected.

    It is one HTML file without scripts, which needs no other file and no network. Parts that need the
    source of the clips or the tokenizer are left out if these are gone, and the page says so. The same data gives the
    same bytes.

    Args:
        folder: Output of `cogvideo data prepare`.
        out: File of the page; report.html in the folder unless given.
        tokenizer: Bundle with the image tokenizer, if it has moved since the data was prepared.
        clips: Number of random clips to show.
        seed: Seed of the clips to show, and of those to count if there are too many to count all.
    """
    out = folder / "report.html" if out is None else out
    require(clips >= 0, f"clips is {clips}, expected 0 or more")
    dataset = Dataset(folder)
    check_place(out, "the page")
    found = facts(dataset, tokenizer, clips, seed)
    source, made_with = middle(dataset.card.source, 120), middle(dataset.card.tokenizer, 120)
    lead = f"Clips from {source}, encoded with the image tokenizer of {made_with}."
    write_page(out, "data report", f"{folder.resolve().name}: prepared clips", lead, "data.html", found)
    print("\n".join([*(f"missing: {each}" for each in found["missing"]), f"written: {out}"]))


def facts(dataset: Dataset, tokenizer: str, num_shown: int, seed: int) -> dict[str, Any]:
    """Everything that the page shows; `missing` describes what is not available.

    An empty `tokenizer` means the one on the card. The seed selects the clips to show and those to count.
    """
    card, size = dataset.card, frame_size(dataset.card)
    shown = [dataset.row(row) for row in draw_rows(dataset, num_shown, seed)]
    sized = [dataset.row(row).id for row in draw_rows(dataset, NUM_SIZED, seed)]
    origin = find_origin(card, tokenizer, [*(row.id for row in shown), *sized])
    num_frames = min(8, max(4, SHEET_WIDTH // both(size or SHEET_WIDTH)[0]))
    clips, sizes = [origin.clip(row, num_frames) for row in shown], origin.sizes(sized)
    sample = take_sample(dataset, seed, NUM_ROWS)
    names = sorted(sample.attributes, key=lambda name: (-sample.attributes[name].total(), name))
    shards = [(each.file, each.num_rows, file_size(each.num_bytes), each.sha256) for each in card.shards[:NUM_SHARDS]]
    return {
        "card": card,
        "seed": seed,
        "num_clips": len(dataset),
        "seconds": card.num_frames / card.fps,
        "size": size,
        "psnrs": [clip.psnr for clip in clips if clip.psnr is not None],
        "sizes": sizes,
        "frequent_sizes": top(Counter(f"{width} × {height}" for width, height in sizes), NUM_VALUES),
        "clips": clips,
        "missing": origin.missing,
        "sample": sample,
        "attributes": [(name, top(sample.attributes[name], NUM_VALUES)) for name in names[:NUM_ATTRIBUTES]],
        "shards": shards,
        **_lengths(card, len(dataset)),
        **_captions(sample),
        **_codes(sample.codes),
        **_rejected(card, read_rejected(dataset.folder / REJECTED)),
    }


def _lengths(card: Card, num_clips: int) -> dict[str, Any]:
    """Clips by length, and those that are long enough for each frame rate; exact, from the card."""
    lengths = Counter({int(frames): clips for frames, clips in card.lengths.items()})
    rates = training_rates(card.fps)
    fills, lowest = Counter[float](), Counter[float | None]()
    for frames, clips in lengths.items():
        lowest[lowest_rate(frames, rates)] += clips
        fills.update(dict.fromkeys(filled_rates(frames, rates), clips))
    rows = [
        (
            f"{rate:g} per second",
            fills[rate] / (num_clips or 1),
            fills[rate],
            percent(fills[rate], num_clips),
            lowest[rate],
            rates.span(rate),
            duration((rates.num_frames - 1) / rate),
        )
        for rate in rates.rates
    ]
    summarized = summary(lengths) if lengths else []
    return {
        "lengths": ranges(lengths, NUM_COLUMNS) if lengths else [],
        "length_rows": [(name, number(frames), duration(frames / card.fps)) for name, frames in summarized],
        "num_frames": rates.num_frames,
        "rate_rows": rows,
        "num_short": lowest[None],
    }


def training_rates(base: float) -> FrameRates:
    """The default rates, or if they do not divide the base rate, its eighth, quarter, half and whole."""
    try:
        return FrameRates(base)
    except InputError:
        return FrameRates(base, (base / 8, base / 4, base / 2, base))


def _captions(sample: SampleCounts) -> dict[str, Any]:
    if not sample.captions:
        return {}
    num_captions, num_distinct = sample.captions.total(), len(sample.captions)
    per_clip = [(count(captions, "caption"), clips) for captions, clips in sorted(sample.per_clip.items())]
    return {
        "caption_rows": [
            ("captions", num_captions),
            ("distinct captions", f"{num_distinct:,} ({percent(num_distinct, num_captions)})"),
            ("distinct words", len(sample.words)),
            *((f"words of a caption, {name}", number(words)) for name, words in summary(sample.lengths)),
        ],
        "per_clip": per_clip[:NUM_VALUES],
        "caption_lengths": ranges(sample.lengths, NUM_COLUMNS),
        "words": [(shorten(word, 40), captions) for word, captions in top(sample.words, NUM_WORDS)],
        "num_function_words": len(FUNCTION_WORDS),
    }


def _codes(counts: Int64[np.ndarray, " codes"]) -> dict[str, Any]:
    """Usage of the tokenizer's codes."""
    total, used = int(counts.sum()), int((counts > 0).sum())
    if not total:
        return {"code_rows": []}
    rows = [
        ("codes of the tokenizer", len(counts)),
        ("codes in use", f"{used:,} ({percent(used, len(counts))})"),
        ("perplexity", number(round(perplexity(torch.from_numpy(counts)), 1))),
        ("most frequent code", f"{percent(int(counts.max()), total)} of all places"),
        ("places counted", total),
        ("places per code, mean", number(round(total / len(counts), 1))),
    ]
    return {"code_rows": rows, "frequencies": frequencies(counts)}


def frequencies(counts: Int64[np.ndarray, " codes"]) -> list[Column]:
    """Codes that never occur, then those that occur once, two or three times, four to seven times and so on."""
    columns = [Column("0", "never", int((counts == 0).sum()))]
    for power in range(int(counts.max()).bit_length()):
        low, high = 2**power, 2 ** (power + 1) - 1
        meaning = "once" if power == 0 else f"{low:,} to {high:,} times"
        columns.append(Column(f"{low:,}", meaning, int(((counts >= low) & (counts <= high)).sum())))
    return columns


def read_rejected(path: Path) -> dict[str, list[tuple[str, str]]] | None:
    """Id and detail of the rejected clips in a table, by reason; None if there is no table."""
    rejected: dict[str, list[tuple[str, str]]] = {}
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                rejected.setdefault(row["reason"], []).append((row["id"] or "", row["detail"] or ""))
    except FileNotFoundError:
        return None
    except (KeyError, csv.Error, OSError) as error:
        expected = "expected a table with the columns id, reason, detail"
        raise InputError(f"cannot read {path} ({error}), {expected}") from error
    return rejected


def _rejected(card: Card, listed: dict[str, list[tuple[str, str]]] | None) -> dict[str, Any]:
    """Reasons, and the first clips of each."""
    reasons, known = top(card.rejected, NUM_REASONS), listed or {}
    examples = [
        (middle(reason), middle(id, 120), detail)
        for reason, _ in reasons
        for id, detail in known.get(reason, [])[:NUM_EXAMPLES]
    ]
    differs = {reason: len(clips) for reason, clips in known.items()} != card.rejected
    return {"rejected": listed, "reasons": reasons, "examples": examples, "do_differ": differs}


# Counts over random rows


@dataclass
class SampleCounts:
    """Counts over the rows of a sample."""

    num_rows: int
    num_clips: int
    """Number of rows in the whole dataset."""
    seed: int
    codes: Int64[np.ndarray, " codes"]
    """Occurrences of each code."""
    words: Counter[str] = field(default_factory=Counter)
    """Captions with each word, in lower case, without `FUNCTION_WORDS`."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Captions by number of words."""
    captions: Counter[int] = field(default_factory=Counter)
    """Captions by a hash of their text, to save memory."""
    per_clip: Counter[int] = field(default_factory=Counter)
    """Clips by number of captions."""
    attributes: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Clips by value of each attribute."""


def draw_rows(dataset: Dataset, number: int, seed: int) -> list[int]:
    """Distinct random rows, in ascending order; all if there are no more."""
    total = len(dataset)
    return sorted(random.Random(seed).sample(range(total), min(number, total)))


def take_sample(dataset: Dataset, seed: int, num_rows: int) -> SampleCounts:
    """Count the contents of random rows."""
    rows = draw_rows(dataset, num_rows, seed)
    sample = SampleCounts(len(rows), len(dataset), seed, np.zeros(dataset.card.num_codes, np.int64))
    for row in map(dataset.row, rows):
        sample.codes += np.bincount(row.codes.reshape(-1), minlength=len(sample.codes))
        sample.per_clip[len(row.captions)] += 1
        for name, value in row.attributes.items():
            sample.attributes[name][str(value)] += 1
        for caption in row.captions:
            words = words_of(caption)
            sample.captions[hash(caption)] += 1
            sample.lengths[len(words)] += 1
            sample.words.update(set(words) - FUNCTION_WORDS)
    return sample


def words_of(caption: str) -> list[str]:
    """Words in lower case; Chinese and Japanese, which have no spaces, by their characters."""
    return _WORD.findall(caption.lower())


def top(counts: Mapping[str, int], limit: int | None = None) -> list[tuple[str, int]]:
    """The most frequent values, most frequent first, ties by name."""
    return sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:limit]


def ranges(counts: Counter[int], limit: int) -> list[Column]:
    """Counts in at most `limit` ranges of equal width; the last one is open if half a percent lies far beyond.

    At least one value must have been counted.
    """
    values = _expand(counts)
    low, end = int(values[0]), _quantile(values, 0.995)
    width = -(-(end - low + 1) // limit)
    starts = range(low, end + 1, width)
    heights = np.bincount(((values - low) // width).clip(max=len(starts) - 1), minlength=len(starts)).tolist()
    meanings = [str(start) if width == 1 else f"{start} to {start + width - 1}" for start in starts]
    labels = [str(start) for start in starts]
    if values[-1] >= starts[-1] + width:
        labels[-1], meanings[-1] = f"{starts[-1]}+", f"{starts[-1]} or more"
    return list(map(Column, labels, meanings, heights))


def summary(counts: Counter[int]) -> list[tuple[str, float]]:
    """The shortest, median, mean and longest of the counted lengths, of which there must be at least one."""
    values = _expand(counts)
    mean = round(float(values.mean()), 1)
    figures = (int(values[0]), _quantile(values, 0.5), mean, int(values[-1]))
    return list(zip(("shortest", "median", "mean", "longest"), figures, strict=True))


def _expand(counts: Counter[int]) -> Int64[np.ndarray, " values"]:
    """All values that were counted, ascending."""
    return np.repeat(sorted(counts), [counts[value] for value in sorted(counts)])


def _quantile(values: Int64[np.ndarray, " values"], share: float) -> int:
    """The smallest value that at least a `share` of all values do not exceed."""
    return int(np.quantile(values, share, method="inverted_cdf"))
