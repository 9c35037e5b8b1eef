"""`cogvideo data report`: what is in a dataset, as one HTML page."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from cogvideo.config import InputError, require
from cogvideo.data.clips import FrameRates, filled_rates, lowest_rate
from cogvideo.data.dataset import CARD, REJECTED, Card, Dataset
from cogvideo.report.clips import Clip, find_origin, frame_size
from cogvideo.report.page import (
    Panel,
    Picture,
    Section,
    bars,
    check_place,
    count,
    duration,
    file_size,
    flat,
    middle,
    number,
    percent,
    shorten,
    write_page,
)
from cogvideo.report.sample import FUNCTION_WORDS, Column, Sample, draw_rows, ranges, summary, take_sample, top

NUM_ROWS = 20_000
"""Rows that are counted: five million take no longer than these."""
NUM_SIZED = 200
"""Files of the source whose size is looked up."""
SHEET_WIDTH = 640
"""Pixels for the frames of a clip, of which four to eight are shown."""
NUM_COLUMNS, NUM_WORDS, NUM_VALUES, NUM_ATTRIBUTES, NUM_REASONS, NUM_EXAMPLES, NUM_SHARDS = 32, 60, 10, 24, 40, 5, 40
"""Limits of what is shown."""


@dataclass(frozen=True)
class Facts:
    """Everything that the page says."""

    card: Card
    sample: Sample
    clips: list[Clip]
    sizes: list[tuple[int, int]]
    """Width and height of some files of the source."""
    missing: list[str]
    """Descriptions of what is not there."""
    rejected: dict[str, list[tuple[str, str]]] | None
    """Id and detail of rejected clips by reason, if their table is there."""
    num_clips: int
    lengths: Counter[int]
    """Clips by number of frames."""


def report(folder: Path, /, out: Path | None = None, tokenizer: str = "", clips: int = 12, seed: int = 0) -> None:
    """Write a page about prepared data: counts, lengths, pictures, captions, codes, and what was rejected.

    It is one HTML file without scripts, which needs no other file and no network. What needs the source of the clips
    or the tokenizer is left out if they are no longer there, and the page says so. The same data gives the same bytes.

    Args:
        folder: Output of `cogvideo data prepare`.
        out: File of the page; report.html in the folder unless given.
        tokenizer: Bundle with the image tokenizer, if it was moved since the data was prepared.
        clips: Number of random clips to show.
        seed: Seed of the clips to show, and of those to count if there are too many to count all.

    Raises:
        ValueError: the folder holds no dataset, or a damaged one, or an option cannot be used.
        OSError: the page cannot be written.
    """
    out = folder / "report.html" if out is None else out
    require(clips >= 0, f"clips is {clips}, expected 0 or more")
    require(not out.is_dir(), f"{out} is a folder, expected the file of the page")
    dataset = Dataset(folder)
    check_place(out)
    facts = gather(dataset, tokenizer, clips, seed)
    lead = (
        f"Clips from {middle(facts.card.source, 120)}, encoded with the image tokenizer of "
        f"{middle(facts.card.tokenizer, 120)}."
    )
    write_page(out, "data report", f"{folder.resolve().name}: prepared clips", lead, sections(facts))
    print("\n".join([*(f"missing: {each}" for each in facts.missing), f"written: {out}"]))


def gather(dataset: Dataset, tokenizer: str, num_shown: int, seed: int) -> Facts:
    """Collect everything that the page says.

    Raises:
        ValueError: a shard is damaged.
    """
    card = dataset.card
    shown = [dataset.row(row) for row in draw_rows(dataset, num_shown, seed)]
    sized = [dataset.row(row).id for row in draw_rows(dataset, NUM_SIZED, seed)]
    origin = find_origin(card, tokenizer, [*(row.id for row in shown), *sized])
    num_frames = min(8, max(4, SHEET_WIDTH // (frame_size(card) or SHEET_WIDTH)))
    return Facts(
        card=card,
        sample=take_sample(dataset, seed, NUM_ROWS),
        clips=[origin.clip(row, num_frames) for row in shown],
        sizes=origin.sizes(sized),
        missing=origin.missing,
        rejected=read_rejected(dataset.folder / REJECTED),
        num_clips=len(dataset),
        lengths=Counter({int(frames): clips for frames, clips in card.lengths.items()}),
    )


def read_rejected(path: Path) -> dict[str, list[tuple[str, str]]] | None:
    """Id and detail of the rejected clips in a table, by reason; None if there is no table.

    Raises:
        ValueError: it is no such table.
    """
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


def sections(facts: Facts) -> list[Section]:
    """All parts of the page, in their order."""
    return [
        Section("overview", "Overview", panels=_overview(facts)),
        _clips(facts),
        _lengths(facts),
        _rates(facts),
        _captions(facts.sample),
        _attributes(facts.sample),
        _codes(facts.sample),
        _rejected(facts),
        Section("settings", "Settings and hashes", panels=_settings(facts.card)),
    ]


def _overview(facts: Facts) -> list[Panel]:
    """The most important figures, splits, and the sizes of frames in the source."""
    card, num_clips, num_rejected = facts.card, facts.num_clips, facts.card.num_rejected
    seconds, size = card.num_frames / card.fps, frame_size(card)
    psnrs = [clip.psnr for clip in facts.clips if clip.psnr is not None]
    compared = f"mean PSNR of {count(psnrs, 'random clip')}" if psnrs else "no clip to compare with its original"
    rows = [
        ("Clips", number(num_clips), f"{duration(seconds / num_clips)} on average" if num_clips else ""),
        ("Total length", duration(seconds), f"{count(card.num_frames, 'frame')}, {card.fps:g} per second"),
        ("Pixels per frame", f"{size} × {size}" if size else "unknown", ""),
        ("Codes per frame", f"{card.grid} × {card.grid}", f"from a codebook of {card.num_codes:,}"),
        ("Reconstruction", f"{sum(psnrs) / len(psnrs):.1f} dB" if psnrs else "unknown", compared),
        ("Rejected", number(num_rejected), f"{percent(num_rejected, num_clips + num_rejected)} of all clips"),
        ("Size on disk", file_size(sum(each.num_bytes for each in card.shards)), f"in {count(card.shards, 'shard')}"),
    ]
    if card.high_grid:
        rows.insert(4, ("Codes for super-resolution", f"{card.high_grid} × {card.high_grid}", "per frame"))
    note = f"Width and height in pixels of {count(facts.sizes, 'random clip')}, as stored."
    if not facts.sizes:
        note = "The World is rendered at any size." if card.source.startswith("world:") else "Not known."
    sizes = top(Counter(f"{width} × {height}" for width, height in facts.sizes), NUM_VALUES)
    return [
        Panel("Key figures", heads=("", ">", ""), rows=rows),
        bars("Splits", ("split", "clips"), card.splits.items(), num_clips),
        bars("Sizes in the source", ("size", "clips"), sizes, len(facts.sizes), note),
    ]


def _clips(facts: Facts) -> Section:
    notes = [
        f"{count(facts.clips, 'clip')} drawn at random (seed {facts.sample.seed}), with evenly spaced frames. Of two "
        "rows, the upper one shows the frames as the encoder saw them, the lower one what the decoder makes of the "
        "stored codes. PSNR is the mean over the frames shown."
    ]
    pictures = [_picture(clip, facts.card.fps) for clip in facts.clips]
    return Section("clips", "Clips and reconstructions", notes, pictures=pictures, warnings=facts.missing)


def _picture(clip: Clip, fps: float) -> Picture:
    row = clip.row
    facts = [f"{count(row.codes, 'frame')}, {duration(len(row.codes) / fps)}", middle(row.split), middle(row.id, 100)]
    if clip.psnr is not None:
        facts.insert(0, f"{clip.psnr:.1f} dB")
    return Picture(
        pixels=clip.sheet,
        alt=f"Frames of “{shorten(row.captions[0], 150)}”: {clip.parts}",
        caption=row.captions[0],
        facts=facts,
        chips=[(middle(name, 40), middle(str(value), 50)) for name, value in row.attributes.items()],
        more=row.captions[1:],
        note=f"This is {clip.parts}: {clip.problem}." if clip.problem else "",
    )


def _lengths(facts: Facts) -> Section:
    """Clips by length; exact, from the card."""
    fps = facts.card.fps
    if not facts.num_clips:
        return Section("lengths", "Lengths", ["The dataset has no clips."])
    rows = [(name, number(frames), duration(frames / fps)) for name, frames in summary(facts.lengths)]
    note = f"Clips by length in frames, of which {fps:g} make one second."
    plot = _histogram("Distribution", ("frames", "clips"), ranges(facts.lengths, NUM_COLUMNS), note)
    return Section("lengths", "Lengths", panels=[Panel("Summary", heads=("", ">frames", ">time"), rows=rows), plot])


def _histogram(title: str, heads: tuple[str, str], columns: Sequence[Column], note: str, is_wide: bool = True) -> Panel:
    from cogvideo.report.plots import histogram  # matplotlib takes a second to import

    whole = sum(each.height for each in columns)
    panel = bars(title, heads, [(each.meaning, each.height) for each in columns], whole, note)
    return panel._replace(plot=histogram(columns, is_wide), is_wide=is_wide, is_folded=True)


def _rates(facts: Facts) -> Section:
    """Clips that are long enough for each of the predefined frame rates; exact, from the card."""
    rates, whole = training_rates(facts.card.fps), facts.num_clips
    fills, lowest = Counter[float](), Counter[float | None]()
    for frames, clips in facts.lengths.items():
        lowest[lowest_rate(frames, rates)] += clips
        fills.update(dict.fromkeys(filled_rates(frames, rates), clips))
    rows = [
        (
            f"{rate:g} per second",
            fills[rate] / (whole or 1),
            number(fills[rate]),
            percent(fills[rate], whole),
            number(lowest[rate]),
            number(rates.span(rate)),
            duration((rates.num_frames - 1) / rate),
        )
        for rate in rates.rates
    ]
    heads = ("rate", "", ">clips long enough", ">share", ">clips by lowest rate", ">frames needed", ">time spanned")
    text = (
        f"A training sequence has {rates.num_frames} frames at one of these rates. The sequential stage uses the "
        "lowest rate for which a clip is long enough, interpolation the faster ones."
    )
    short = f"{count(lowest[None], 'clip')} too short for every rate, of use to the image model only."
    panel = Panel("Rates", heads=heads, rows=rows, note=short if lowest[None] else "", is_wide=True)
    return Section("rates", "Frame rates", [text], [panel])


def training_rates(base: float) -> FrameRates:
    """The default rates, or if they do not divide the base rate, its eighth, quarter, half and whole."""
    try:
        return FrameRates(base)
    except InputError:
        return FrameRates(base, (base / 8, base / 4, base / 2, base))


def _counted(sample: Sample) -> str:
    if sample.num_rows == sample.num_clips:
        return f"Counted over all {count(sample.num_clips, 'clip')}."
    return f"Counted over {sample.num_rows:,} of {sample.num_clips:,} clips, drawn at random (seed {sample.seed})."


def _captions(sample: Sample) -> Section:
    num_captions, num_distinct = sample.captions.total(), len(sample.captions)
    if not num_captions:
        return Section("captions", "Captions", ["There are no captions."])
    rows = [
        ("captions", number(num_captions)),
        ("distinct captions", f"{num_distinct:,} ({percent(num_distinct, num_captions)})"),
        ("distinct words", number(len(sample.words))),
        *((f"words of a caption, {name}", number(words)) for name, words in summary(sample.lengths)),
    ]
    per_clip = [(count(captions, "caption"), clips) for captions, clips in sorted(sample.per_clip.items())]
    lengths = ranges(sample.lengths, NUM_COLUMNS)
    words = [(shorten(word, 40), number(captions)) for word, captions in top(sample.words, NUM_WORDS)]
    told = f"Captions with each word, without {len(FUNCTION_WORDS)} function words such as “the” and “with”."
    panels = [
        Panel("Numbers", heads=("", ">"), rows=rows),
        bars("Captions per clip", ("", "clips"), per_clip[:NUM_VALUES], sample.num_rows),
        _histogram("Lengths", ("words", "captions"), lengths, "Captions by number of words."),
        Panel("Most frequent words", heads=("", ">"), rows=words, note=told, is_wide=True, kind="words"),
    ]
    return Section("captions", "Captions", [_counted(sample)], panels)


def _attributes(sample: Sample) -> Section:
    """Values of each attribute."""
    names = sorted(sample.attributes, key=lambda name: (-sample.attributes[name].total(), name))
    if not names:
        return Section("attributes", "Attributes", ["The clips have no attributes."])
    notes = [_counted(sample)]
    if names[NUM_ATTRIBUTES:]:
        notes.append(f"{count(names[NUM_ATTRIBUTES:], 'more attribute')} not shown.")
    panels = []
    for name in names[:NUM_ATTRIBUTES]:
        values = sample.attributes[name]
        shown, lacking = top(values, NUM_VALUES), sample.num_rows - values.total()
        more = f"{count(len(values) - len(shown), 'more value')}. " if len(values) > len(shown) else ""
        without = f"{count(lacking, 'clip')} without this attribute." if lacking else ""
        panels.append(bars(middle(name), ("value", "clips"), shown, sample.num_rows, more + without))
    return Section("attributes", "Attributes", notes, panels)


def _codes(sample: Sample) -> Section:
    """How evenly the codes of the tokenizer are used."""
    counts = sample.codes
    total, used = int(counts.sum()), int((counts > 0).sum())
    if not total:
        return Section("codes", "Codes", ["There are no codes."])
    rows = [
        ("codes of the tokenizer", number(len(counts))),
        ("codes in use", f"{used:,} ({percent(used, len(counts))})"),
        ("perplexity", number(round(sample.perplexity, 1))),
        ("most frequent code", f"{percent(int(counts.max()), total)} of all places"),
        ("places counted", number(total)),
        ("places per code, mean", number(round(total / len(counts), 1))),
    ]
    meaning = "Perplexity is the number of codes that would have the same entropy if all were equally frequent."
    note = "Codes by how often they occur: never, or from the number below up to the next, on a logarithmic scale."
    panels = [
        Panel("Usage", heads=("", ">"), rows=rows, note=meaning),
        _histogram("Frequencies", ("occurs", "codes"), frequencies(counts), note, is_wide=False),
    ]
    return Section("codes", "Codes", [_counted(sample)], panels)


def frequencies(counts: Int64[np.ndarray, " codes"]) -> list[Column]:
    """Codes that never occur, then those that occur once, two or three times, four to seven times and so on."""
    columns = [Column("0", "never", int((counts == 0).sum()))]
    for power in range(int(counts.max()).bit_length()):
        low, high = 2**power, 2 ** (power + 1) - 1
        meaning = "once" if power == 0 else f"{low:,} to {high:,} times"
        columns.append(Column(f"{low:,}", meaning, int(((counts >= low) & (counts <= high)).sum())))
    return columns


def _rejected(facts: Facts) -> Section:
    """Reasons with their counts, and the first clips of each."""
    counts, listed, title = facts.card.rejected, facts.rejected, "Rejected clips"
    if not counts:
        return Section("rejected", title, ["No clip was rejected."])
    reasons = top(counts, NUM_REASONS)
    panels = [bars("Reasons", ("reason", "clips"), reasons, facts.card.num_rejected)]
    if listed is None:
        return Section("rejected", title, ["Which clips were rejected is not known: there is no rejected.csv."], panels)
    rows = [
        (middle(reason), middle(id, 120), detail)
        for reason, _ in reasons
        for id, detail in listed.get(reason, [])[:NUM_EXAMPLES]
    ]
    note = "The first clips for each reason; all are in rejected.csv."
    panels.append(Panel("Examples", heads=("reason", "clip", "detail"), rows=rows, note=note, is_wide=True))
    differs = {reason: len(clips) for reason, clips in listed.items()} != counts
    changed = "rejected.csv and the card of the dataset do not agree: one of them was changed."
    return Section("rejected", title, [changed] if differs else [], panels)


def _settings(card: Card) -> list[Panel]:
    """What the card says about how the dataset was made."""
    rows = [
        ("source", middle(card.source, 200)),
        ("tokenizer", middle(card.tokenizer, 200)),
        ("SHA-256 of the tokenizer", card.tokenizer_sha256),
        ("SHA-256 of the settings", card.settings_sha256),
        ("made by", f"cogvideo {card.cogvideo}"),
        ("base rate", f"{card.fps:g} frames per second"),
    ]
    shown = card.shards[:NUM_SHARDS]
    shards = [(each.file, number(each.num_rows), file_size(each.num_bytes), each.sha256) for each in shown]
    left = len(card.shards) - len(shown)
    note = f"{count(left, 'more shard')} in {CARD}." if left else ""
    return [
        Panel("Dataset", heads=("", ""), rows=rows, kind="code"),
        Panel("Settings", heads=("", ""), rows=list(flat(card.settings)), kind="code"),
        Panel(
            count(card.shards, "shard"),
            heads=("file", ">clips", ">size", "SHA-256"),
            rows=shards,
            note=note,
            is_wide=True,
            is_folded=True,
            kind="code",
        ),
    ]
