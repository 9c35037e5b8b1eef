"""The parts of the report, and those about a dataset as a whole: counts, lengths, sizes, rejected clips, settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cogvideo.config import InputError
from cogvideo.data.clips import FrameRates, filled_rates, lowest_rate
from cogvideo.data.dataset import CARD, Card
from cogvideo.report.clips import Clip, frame_size
from cogvideo.report.content import NUM_COLUMNS, attributes, captions, codes, decibel, pictures
from cogvideo.report.page import (
    Column,
    Figure,
    Html,
    Section,
    bar,
    bars,
    count,
    duration,
    element,
    file_size,
    flat,
    group,
    join,
    middle,
    note,
    number,
    panel,
    paragraph,
    percent,
    plot,
    shorten,
    table,
    tiles,
)
from cogvideo.report.sample import Range, Sample, mean, quantile, spread

NUM_REASONS, NUM_SIZES, NUM_SHARDS, FEW = 40, 12, 40, 8
"""The most that are shown of reasons, sizes and shards; so many different lengths are listed, more are a plot."""


class Rejected(NamedTuple):
    """The table of rejected clips."""

    counts: dict[str, int]
    """Clips of each reason."""
    examples: dict[str, list[tuple[str, str]]]
    """The first of each reason: id and detail."""


@dataclass(frozen=True)
class Report:
    """Everything that the page says."""

    card: Card
    """Of the dataset."""
    sample: Sample
    """Counts over random rows."""
    clips: list[Clip]
    """Random rows with their pictures."""
    sizes: list[tuple[int, int]]
    """Width and height of some files of the source."""
    missing: list[str]
    """What is not there, in sentences."""
    rejected: Rejected | None
    """The table of rejected clips, if it is there."""

    @property
    def num_clips(self) -> int:
        """Clips of the dataset."""
        return sum(self.card.splits.values())

    @property
    def lengths(self) -> Counter[int]:
        """Clips of each number of frames."""
        return Counter({int(frames): clips for frames, clips in self.card.lengths.items()})


def lead(card: Card) -> Html:
    """The line below the title."""
    source, tokenizer = (element("code", middle(each, 120)) for each in (card.source, card.tokenizer))
    return element("p", "Clips of ", source, ", encoded with the image tokenizer of ", tokenizer, ".", class_="lead")


def sections(report: Report) -> list[Section]:
    """All parts, in the order of the page."""
    sample = report.sample
    shown = pictures(report.clips, report.card.fps, report.missing, sample.seed)
    return [
        Section("overview", "At a glance", overview(report)),
        Section("clips", "Clips and their reconstruction", shown),
        Section("lengths", "Splits and lengths", lengths(report)),
        Section("rates", "Frame rates", rates(report)),
        Section("sizes", "Picture sizes", sizes(report)),
        Section("captions", "Captions", captions(sample)),
        Section("attributes", "Attributes", attributes(sample)),
        Section("codes", "Codes", codes(sample)),
        Section("rejected", "Rejected clips", rejected(report)),
        Section("settings", "Settings and hashes", settings(report.card)),
    ]


def overview(report: Report) -> Html:
    """The figures that one looks for first."""
    card, sample, num_clips = report.card, report.sample, report.num_clips
    seconds, num_rejected = card.num_frames / card.fps, card.num_rejected
    splits = ", ".join(f"{number(clips)} {middle(split, 20)}" for split, clips in list(card.splits.items())[:4])
    average = f"{duration(seconds / num_clips)} a clip on average" if num_clips else ""
    values = [
        ("Clips", number(num_clips), splits),
        ("Length", duration(seconds), average),
        ("Frames", number(card.num_frames), f"{card.fps:g} a second"),
        ("Codes a frame", f"{card.grid} × {card.grid}", f"of {number(card.num_codes)} in the tokenizer"),
        ("Codes that occur", percent(sample.usage, 1), f"perplexity {number(round(sample.perplexity, 1))}"),
        ("Reconstruction", *_psnr(report.clips)),
        ("Rejected", number(num_rejected), f"{percent(num_rejected, num_clips + num_rejected)} of all clips"),
        ("On disk", file_size(sum(each.num_bytes for each in card.shards)), f"in {count(len(card.shards), 'shard')}"),
    ]
    return tiles(values)


def _psnr(clips: list[Clip]) -> tuple[str, str]:
    known = [clip.psnr for clip in clips if clip.psnr is not None]
    if not known:
        return "unknown", "no clip beside its original"
    return decibel(sum(known) / len(known)), f"mean PSNR of {count(len(known), 'random clip')}"


def lengths(report: Report) -> Html:
    """Clips of each split and of each length; exact, from the card."""
    counts, fps, num_clips = report.lengths, report.card.fps, report.num_clips
    if not counts:
        return paragraph("The dataset has no clips.")
    splits = panel("Splits", bars(("split", "clips"), _named(report.card.splits), num_clips))
    if len(counts) <= FEW:
        named = [(_span(Range(frames, frames, clips), fps), clips) for frames, clips in sorted(counts.items())]
        return group("two", splits, panel("Lengths", bars(("length", "clips"), named, num_clips)))
    columns = [Column(each.label, each.total, _span(each, fps)) for each in spread(counts, NUM_COLUMNS)]
    told = f"Clips by their length, from {min(counts)} to {max(counts)} frames."
    drawn = plot(columns, told, f"Clips by their length in frames; {fps:g} are one second.", ("length", "clips"))
    summary = panel("Length of a clip", table(("", "frames", "time"), _summary(counts, fps)))
    return group("stack", group("two", splits, summary), panel("Lengths", drawn))


def _named(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(middle(name), clips) for name, clips in counts.items()]


def _span(each: Range, fps: float) -> str:
    """A range of lengths in frames and seconds."""
    low, high = each.low, each.high
    if high is None:
        return f"{low} frames ({duration(low / fps)}) and more"
    if low == high:
        return f"{count(low, 'frame')} ({duration(low / fps)})"
    return f"{low} to {high} frames ({duration(low / fps)} to {duration(high / fps)})"


def _summary(counts: Counter[int], fps: float) -> Iterator[tuple[str, Figure, Figure]]:
    values = {"shortest": min(counts), "median": quantile(counts, 0.5), "mean": mean(counts), "longest": max(counts)}
    for name, frames in values.items():
        yield name, Figure(number(round(frames, 1))), Figure(duration(frames / fps))


def rates(report: Report) -> Html:
    """Which of the predefined frame rates clips fill; exact, from the card."""
    known, num_clips = training_rates(report.card.fps), report.num_clips
    fills, lowest = Counter[float](), Counter[float | None]()
    for frames, clips in report.lengths.items():
        lowest[lowest_rate(frames, known)] += clips
        fills.update(dict.fromkeys(filled_rates(frames, known), clips))
    rows = (
        (
            f"{rate:g} a second",
            bar(fills[rate] / num_clips if num_clips else 0),
            fills[rate],
            Figure(percent(fills[rate], num_clips)),
            lowest[rate],
            known.span(rate),
            Figure(duration((known.num_frames - 1) / rate)),
        )
        for rate in known.rates
    )
    names = ("rate", "", "clips that fill it", "share", "lowest rate of", "frames needed", "time spanned")
    text = (
        f"A training sequence is {known.num_frames} frames at one of these rates. The sequential stage takes a clip at "
        "the lowest rate that it fills, interpolation at the faster ones."
    )
    none = f"{count(lowest[None], 'clip')} too short for every rate, of use to the image model alone."
    return join([paragraph(text), panel("Rates", table(names, rows), note(none) if lowest[None] else "")])


def training_rates(base: float) -> FrameRates:
    """The default rates, or where they do not divide the base rate, its eighth, quarter, half and whole."""
    try:
        return FrameRates(base)
    except InputError:
        return FrameRates(base, (base / 8, base / 4, base / 2, base))


def sizes(report: Report) -> Html:
    """Sizes of the source's pictures, as far as they are known, and what became of them."""
    kept = panel("In the dataset", table(("", ""), _kept(report.card)))
    if not report.sizes:
        known = "It is rendered at any size." if report.card.source.startswith("world:") else "Not known."
        return group("two", kept, panel("In the source", note(known)))
    top = sorted(Counter(report.sizes).items(), key=lambda each: (-each[1], each[0]))
    named = [(f"{width} × {height}", files) for (width, height), files in top[:NUM_SIZES]]
    rest = sum(files for _, files in top[NUM_SIZES:])
    named += [(count(len(top) - NUM_SIZES, "other size"), rest)] if rest else []
    told = f"Pixels across and down, as stored, of {count(len(report.sizes), 'random clip')}."
    return group("two", kept, panel("In the source", bars(("size", "clips"), named, len(report.sizes), told)))


def _kept(card: Card) -> Iterator[tuple[str, Figure]]:
    size = frame_size(card)
    if size is not None:
        yield "a frame in pixels", Figure(f"{size} × {size}")
    yield "a frame in codes", Figure(f"{card.grid} × {card.grid}")
    if card.high_grid:
        yield "a frame in codes of super-resolution", Figure(f"{card.high_grid} × {card.high_grid}")


def rejected(report: Report) -> Html:
    """Reasons with their counts, and the first clips of each."""
    counts, listed = report.card.rejected, report.rejected
    if not counts:
        return paragraph("No clip was rejected.")
    top = dict(sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:NUM_REASONS])
    reasons = panel("Reasons", bars(("reason", "clips"), _named(top), report.card.num_rejected))
    if listed is None:
        return join([reasons, note("Which clips they are is not known: there is no rejected.csv.")])
    differ = "rejected.csv and the dataset's card do not agree: one of them was changed."
    rows = [
        (middle(reason), element("bdi", middle(id, 120), class_="mono"), shorten(detail))
        for reason in top
        for id, detail in listed.examples.get(reason, [])
    ]
    told = "The first clips of each reason; all are in rejected.csv."
    examples = panel("Examples", table(("reason", "clip", "detail"), rows, told))
    return group("stack", note(differ) if listed.counts != counts else "", reasons, examples)


def settings(card: Card) -> Html:
    """What the card says about how the dataset was made."""
    facts = {
        "source": card.source,
        "tokenizer": card.tokenizer,
        "sha256 of the tokenizer": card.tokenizer_sha256,
        "sha256 of the settings": card.settings_sha256,
        "made by": f"cogvideo {card.cogvideo}",
        "base rate": f"{card.fps:g} frames a second",
    }
    rows = ((name, element("code", middle(value, 200))) for name, value in facts.items())
    chosen = ((name, element("code", shorten(value))) for name, value in flat(card.settings))
    dataset, how = panel("Dataset", table(("", ""), rows)), panel("Settings", table(("", ""), chosen))
    return group("stack", group("two", dataset, how), _shards(card))


def _shards(card: Card) -> Html:
    files = card.shards[:NUM_SHARDS]
    rows = ((each.file, each.num_rows, Figure(file_size(each.num_bytes)), _hash(each.sha256)) for each in files)
    left = len(card.shards) - NUM_SHARDS
    return element(
        "details",
        element("summary", f"{count(len(card.shards), 'shard')} with their hashes"),
        table(("file", "clips", "size", "sha256"), rows),
        note(f"{count(left, 'more shard')} in {CARD}.") if left > 0 else "",
    )


def _hash(value: str) -> Html:
    return element("code", value)
