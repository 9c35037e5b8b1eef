"""Parts of the report about what clips hold: their pictures, captions, attributes and codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64, UInt8

from cogvideo.media.images import contact_sheet
from cogvideo.report.clips import Clip
from cogvideo.report.page import (
    Column,
    Figure,
    Html,
    bars,
    compact,
    count,
    duration,
    element,
    group,
    join,
    middle,
    note,
    number,
    panel,
    paragraph,
    percent,
    picture,
    plot,
    shorten,
    table,
    word_list,
)
from cogvideo.report.sample import FUNCTION_WORDS, Range, Sample, mean, quantile, spread

NUM_WORDS, NUM_VALUES, NUM_ATTRIBUTES, NUM_CAPTIONS, NUM_COLUMNS = 60, 10, 24, 20, 32
"""The most that are shown of words, values of an attribute, attributes, captions of a clip, columns of a plot."""


def pictures(shown: Sequence[Clip], fps: float, missing: Sequence[str], seed: int) -> Html:
    """Pictures of random clips, of `fps` frames a second; `missing` says in sentences what cannot be shown."""
    lacks = element(
        "div",
        element("strong", "What cannot be shown"),
        element("ul", *(element("li", each) for each in missing)),
        class_="missing",
    )
    chosen = f"{count(len(shown), 'clip')} drawn at random (seed {seed}), with frames evenly chosen."
    above = (
        "Above, the frames as the encoder saw them; below, what the decoder makes of the stored codes. "
        "PSNR is the mean over the frames shown."
    )
    return join(
        [
            lacks if missing else "",
            paragraph(f"{chosen} {above}" if any(clip.psnr is not None for clip in shown) else chosen),
            element("div", *(_clip(clip, fps) for clip in shown), class_="clips"),
        ]
    )


def decibel(value: float) -> str:
    """A PSNR; that of equal pictures is infinite."""
    return "∞ dB" if value == float("inf") else f"{value:.1f} dB"


def _clip(clip: Clip, fps: float) -> Html:
    row = clip.row
    first, *others = row.captions
    meta = [
        *([element("b", decibel(clip.psnr))] if clip.psnr is not None else []),
        element("span", f"{count(len(row.codes), 'frame')}, {duration(len(row.codes) / fps)}"),
        element("bdi", middle(row.split)),
        element("bdi", middle(row.id, 100), class_="mono"),
    ]
    shown = _parts(clip) or "neither the original nor the reconstruction"
    about = element(
        "figcaption",
        element("p", shorten(first)),
        element("div", *meta, class_="meta"),
        _chips(row.attributes) if row.attributes else "",
        _more(others) if others else "",
        note(f"This is {shown}: {clip.problem}.") if clip.problem else "",
    )
    return element("figure", _sheet(clip), about, class_="clip card")


def _chips(attributes: dict[str, str]) -> Html:
    named = ((middle(name, 40), middle(str(value), 50)) for name, value in attributes.items())
    return element("ul", *(element("li", name, " ", element("bdi", value)) for name, value in named), class_="chips")


def _more(captions: Sequence[str]) -> Html:
    texts = (element("p", shorten(each)) for each in captions[:NUM_CAPTIONS])
    return element("details", element("summary", count(len(captions), "more caption")), *texts)


def _parts(clip: Clip) -> str:
    """What its picture is of, from top to bottom."""
    parts = ["the original"] * (clip.original is not None) + ["the reconstruction"] * (clip.decoded is not None)
    return " and ".join(parts)


def _sheet(clip: Clip) -> Html:
    rows = [frames for frames in (clip.original, clip.decoded) if frames is not None]
    if not rows:
        return Html()
    alt = f"{count(len(rows[0]), 'frame')} of “{shorten(clip.row.captions[0], 150)}”: {_parts(clip)}"
    return picture(_with_gaps(rows), alt)


def _with_gaps(rows: Sequence[UInt8[np.ndarray, "_ _ _ 3"]]) -> UInt8[np.ndarray, "height width 4"]:
    """Clips as one picture with clear gaps between the frames, through which the page shows in light and dark."""
    columns = len(rows[0])
    alpha = contact_sheet([np.full_like(each, 255) for each in rows], columns, background=(0, 0, 0))
    return np.concatenate([contact_sheet(rows, columns), alpha[..., :1]], -1)


def captions(sample: Sample) -> Html:
    """Numbers, lengths and words of captions."""
    if not sample.num_captions:
        return paragraph("There are no captions.")
    columns = [Column(each.label, each.total, _words(each)) for each in spread(sample.lengths, NUM_COLUMNS)]
    told = f"Captions by their number of words, from {min(sample.lengths)} to {max(sample.lengths)}."
    words = sorted(sample.words.items(), key=lambda each: (-each[1], each[0]))[:NUM_WORDS]
    without = f"Captions with each word, without {len(FUNCTION_WORDS)} function words such as “the” and “with”."
    return group(
        "stack",
        sampled(sample),
        group("two", panel("Numbers", table(("", ""), _numbers(sample))), _per_clip(sample)),
        panel("Lengths", plot(columns, told, "Captions by their number of words.", ("length", "captions"))),
        panel("Most frequent words", note(without), word_list(words)),
    )


def sampled(sample: Sample) -> Html:
    """Whether figures are those of all clips."""
    if sample.is_whole:
        return note(f"Counted over all {count(sample.num_rows, 'clip')}.")
    rows, clips = number(sample.num_rows), number(sample.num_clips)
    return note(f"Counted over {rows} of {clips} clips, drawn at random (seed {sample.seed}).")


def _numbers(sample: Sample) -> Iterator[tuple[str, Figure]]:
    distinct, lengths = len(sample.captions), sample.lengths
    yield "captions", Figure(number(sample.num_captions))
    yield "distinct captions", Figure(f"{number(distinct)} ({percent(distinct, sample.num_captions)})")
    yield "different words", Figure(number(len(sample.words)))
    yield "words of a caption, mean", Figure(number(round(mean(lengths), 1)))
    yield "shortest, median, longest", Figure(f"{min(lengths)}, {quantile(lengths, 0.5)}, {max(lengths)}")


def _per_clip(sample: Sample) -> Html:
    named = [(count(captions, "caption"), clips) for captions, clips in sorted(sample.per_clip.items())]
    return panel("Captions of a clip", bars(("", "clips"), named[:NUM_VALUES], sample.num_rows))


def _words(each: Range) -> str:
    if each.high is None:
        return f"{each.low} words and more"
    return count(each.low, "word") if each.low == each.high else f"{each.low} to {each.high} words"


def attributes(sample: Sample) -> Html:
    """Values of each attribute."""
    names = sorted(sample.attributes, key=lambda name: (-sample.attributes[name].total(), name))
    if not names:
        return paragraph("The clips have no attributes.")
    shown = (_attribute(name, sample.attributes[name], sample.num_rows) for name in names[:NUM_ATTRIBUTES])
    left = len(names) - NUM_ATTRIBUTES
    rest = note(f"{count(left, 'more attribute')} not shown.") if left > 0 else ""
    return join([sampled(sample), group("many", *shown), rest])


def _attribute(name: str, values: Counter[str], num_rows: int) -> Html:
    top = sorted(values.items(), key=lambda each: (-each[1], each[0]))
    differ = len(top) > 1 and top[0][1] == 1  # names of clips and the like: bars would say nothing
    limit = 3 if differ else NUM_VALUES
    named = [(middle(value, 50), clips) for value, clips in top[:limit]]
    left, lacking = len(top) - limit, num_rows - values.total()
    notes = [
        *(["another value for each clip"] if differ else []),
        *([f"{count(left, 'more value')}"] if left > 0 else []),
        *([f"{count(lacking, 'clip')} without"] if lacking else []),
    ]
    shown = table(("value",), ((value,) for value, _ in named)) if differ else bars(("value", "clips"), named, num_rows)
    return panel(middle(name), shown, note("; ".join(notes)) if notes else "")


def codes(sample: Sample) -> Html:
    """How evenly the tokenizer's codes are used."""
    if not sample.codes.any():
        return paragraph("There are no codes.")
    even = number(round(int(sample.codes.sum()) / len(sample.codes), 1))
    below = "Codes by how often they occur: never, or from the number below up to the next, on a logarithmic scale"
    equal = f"If all were equally frequent, each would occur {even} times."
    drawn = plot(list(frequencies(sample.codes)), f"{below}.", f"{below}. {equal}", ("occurs", "codes"))
    meaning = "Perplexity is the number of codes that would have the same entropy if all were equally frequent."
    return group(
        "stack",
        sampled(sample),
        group("two", panel("Usage", table(("", ""), _usage(sample)), note(meaning)), panel("Frequencies", drawn)),
    )


def _usage(sample: Sample) -> Iterator[tuple[str, Figure]]:
    counts = sample.codes
    total, used = int(counts.sum()), int((counts > 0).sum())
    yield "codes of the tokenizer", Figure(number(len(counts)))
    yield "codes that occur", Figure(f"{number(used)} ({percent(used, len(counts))})")
    yield "perplexity", Figure(number(round(sample.perplexity, 1)))
    yield "most frequent code", Figure(f"{percent(int(counts.max()), total)} of all places")
    yield "places counted", Figure(number(total))


def frequencies(counts: Int64[np.ndarray, " codes"]) -> Iterator[Column]:
    """Codes that never occur, those that do once, two or three times, four to seven times and so on."""
    yield Column("0", int((counts == 0).sum()), "never", marked=True)
    for power in range(int(counts.max()).bit_length()):
        low, high = 2**power, 2 ** (power + 1) - 1
        codes = int(((counts >= low) & (counts <= high)).sum())
        yield Column(
            str(low) if low < 10_000 else compact(low),
            codes,
            "once" if power == 0 else f"{number(low)} to {number(high)} times",
        )
