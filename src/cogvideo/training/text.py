"""The text tokenizer: a SentencePiece model of captions, with the pieces and ids that a configuration requires.

Pieces are merged pairs (BPE): on captions that repeat one another, SentencePiece's unigram models keep few pieces and
spell words letter by letter (measured on synthetic captions: 36 tokens per caption, not 12). Any text can
be encoded: characters that no piece covers become bytes. Digits are separate pieces, so that any frame rate prefix is a
few tokens. Text is normalized by NFKC (one spelling for é, ｗｉｄｅ letters, ligatures) and repeated spaces are merged.
"""

from __future__ import annotations

import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from cogvideo.bundle.format import MANIFEST, Manifest
from cogvideo.bundle.model import update as update_bundle
from cogvideo.config import CogVideoConfig, TransformerConfig, preset, require
from cogvideo.data.frames import BACKGROUNDS, FrameSettings, on_background
from cogvideo.data.sources import SourceOptions, list_source, other_splits
from cogvideo.text import LINE_BREAK_PIECE, PAD_PIECE, TextTokenizer

Normalization = Literal["nfkc", "nfkc_cf", "identity"]
"""Text normalization: NFKC, NFKC with case folding, or spaces only."""

MAX_COUNTED = 20_000
"""Maximum number of captions whose tokens are counted, evenly spaced if there are more."""
BYTES = 256
"""Number of pieces for single bytes."""
MAX_LINE_LENGTH = 1 << 16
"""Maximum number of characters of a training line; SentencePiece would skip longer lines."""
RESERVED = ("\u2581", "\u2585")
"""SentencePiece's own symbols for a space and for unknown text; it skips lines that contain the latter."""
PREFIX_SECONDS = 0.5
"""Duration in the prefix of counted captions: five frames at eight per second, the longest usual prefix."""
_ASCII = "".join(map(chr, range(0x21, 0x7F)))


def train_text(
    source: tuple[str, ...],
    /,
    out: Path,
    preset: str | None = None,
    options: SourceOptions = SourceOptions(),  # noqa: B008  # frozen
    normalization: Normalization = "nfkc",
    background_template: str = "",
    max_captions: int = 1_000_000,
) -> None:
    """Train the text tokenizer on the captions of the split `train`, and put it into a bundle.

    Args:
        source: Sources: folders, tables, tars or world:NUMBER, as for `data prepare`.
        out: Bundle to put the tokenizer into; other components stay, an older text tokenizer is replaced.
        preset: Preset that configures a new bundle, pocket unless given; an existing bundle keeps its configuration.
        options: Ways to read sources; use those of `data prepare` to keep validation captions unseen.
        normalization: Text normalization: nfkc, nfkc_cf (also lowercases), or identity (spaces only).
        background_template: Template as for `data prepare`, applied to every caption with each background in turn.
        max_captions: Maximum number of captions; if there are more, evenly spaced ones are used.
    """
    require(len(source) > 0, "got no source, expected a folder, a table, a tar or world:NUMBER")
    require(max_captions > 0, f"max_captions is {max_captions}, expected a positive number")
    FrameSettings(background_template=background_template)  # refuses a template that does not work
    config = bundle_config(out, preset)
    captions = read_captions(source, options)
    used = spread(on_backgrounds(captions, background_template), max_captions)
    model = train_model(used, config.transformer, normalization)
    tokenizer = TextTokenizer(model, config.text, config.transformer.num_codes)
    update_bundle(out, config, text=tokenizer)
    distinct = sorted(set(used))
    counted = spread(distinct, MAX_COUNTED)
    slots = config.layout.text_slots
    found = figures(tokenizer, counted, slots)
    unused = f", of which {found.unused:,} unused: the captions have no more pieces" if found.unused else ""
    print(f"captions  {len(captions):,} of the split train, {len(used):,} used, {len(distinct):,} different")
    print(f"pieces    {found.pieces:,}{unused}")
    print(f"tokens    {found.mean:.1f} per caption with its prefix, at most {found.longest} ({len(counted):,} counted)")
    print(f"fitting   {found.fitting:.2%} of them in the {slots} text slots")
    print(f"in bytes  {found.with_bytes:.2%} of them, in part")
    print(f"wrote the text tokenizer into {out}")


class CaptionFigures(NamedTuple):
    """Figures of a tokenizer with a number of pieces, some of them unused, on captions."""

    mean: float
    """Mean number of tokens of a caption with its prefix."""
    longest: int
    """Number of tokens of the longest caption."""
    fitting: float
    """Share of captions that fit into the text slots of the video stages, prefix included."""
    with_bytes: float
    """Share of captions with text that is spelled in bytes."""
    pieces: int
    unused: int


def read_captions(sources: Iterable[str], options: SourceOptions) -> list[str]:
    """All captions of the split `train`, sorted, with repetitions."""
    listings = [list_source(source, options) for source in sources]
    items = [item for listing in listings for item in listing.items if item.split == "train" and item.copy == 0]
    rejected = Counter(rejection.reason for listing in listings for rejection in listing.rejected)
    found = [f"{number} {reason}" for reason, number in rejected.most_common()]
    found += filter(None, [other_splits(item for listing in listings for item in listing.items)])
    why = ", ".join(found) or "they hold none"
    require(len(items) > 0, f"no clip in the split train has a caption in {', '.join(sources)}: {why}")
    return sorted(caption for item in items for caption in item.captions)


def spread(captions: Sequence[str], number: int) -> list[str]:
    """Captions evenly spaced, at most `number` of them."""
    kept = min(number, len(captions))
    return [captions[index * len(captions) // kept] for index in range(kept)]


def train_model(captions: Iterable[str], config: TransformerConfig, normalization: Normalization = "nfkc") -> bytes:
    """A serialized SentencePiece model; equal captions give equal bytes, in any order.

    Its pieces fill the ids between the image codes and `start_of_image` of a configuration, with `<pad>` at `pad`.
    If there are too few captions for so many pieces, the last ones are unused: `<unused_2000>` at the id 2000, for
    example, which no text contains.
    """
    num_pieces = config.start_of_image - config.num_codes
    least = 2 * (BYTES + len(_ASCII))
    room = f"the configuration has room for {num_pieces} text pieces, expected at least {least}"
    require(num_pieces >= least, f"{room}: bytes and letters take half of them")
    require(0 <= config.pad - config.num_codes < BYTES, f"pad is {config.pad}, expected it after the image codes")
    lines = _lines(captions, normalization, num_pieces // 2 - BYTES)
    require(len(lines) > 0, "got no captions, expected some to train on")
    return with_unused_pieces(_train(lines, num_pieces, config.pad - config.num_codes, normalization), num_pieces)


def with_unused_pieces(model: bytes, num_pieces: int) -> bytes:
    """The model with unused pieces after its own, so that it has exactly `num_pieces`.

    A model is a protocol buffer, so appending bytes extends its lists. Names of new pieces contain digits, so they
    differ from all old ones.
    """
    got = SentencePieceProcessor(model_proto=model).vocab_size()
    require(got <= num_pieces, f"the text model has {got} pieces, expected at most {num_pieces}")
    return model + b"".join(map(_unused_piece, range(got, num_pieces)))


def figures(tokenizer: TextTokenizer, captions: Iterable[str], slots: int) -> CaptionFigures:
    """Token statistics of captions, each counted once."""
    processor = SentencePieceProcessor(model_proto=tokenizer.model)
    pieces = range(processor.vocab_size())
    byte_tokens = {tokenizer.num_codes + piece for piece in pieces if processor.is_byte(piece)}
    rows = [tokenizer.encode_caption(caption, PREFIX_SECONDS) for caption in sorted(set(captions))]
    lengths = [len(row) for row in rows]
    share = 1 / len(rows)
    return CaptionFigures(
        mean=sum(lengths) * share,
        longest=max(lengths),
        fitting=sum(length <= slots for length in lengths) * share,
        with_bytes=sum(not byte_tokens.isdisjoint(row) for row in rows) * share,
        pieces=len(pieces),
        unused=sum(processor.is_unused(piece) for piece in pieces),
    )


def bundle_config(out: Path, name: str | None) -> CogVideoConfig:
    """The configuration of the bundle in `out`, else the preset."""
    if not (out / MANIFEST).exists():
        return preset(name or "pocket")
    manifest = Manifest.read(out)
    same = name is None or manifest.config.sizes == preset(name)
    require(same, f"the bundle {out} has a different configuration from the preset {name}: leave out --preset")
    trained = "base" in manifest.components
    require(not trained, f"the bundle {out} has a base, which only knows its old text tokens: choose another --out")
    return manifest.config


def on_backgrounds(captions: Sequence[str], template: str) -> list[str]:
    """Each caption with one of the backgrounds, in turn."""
    names = list(BACKGROUNDS)
    chosen = (names[number % len(names)] for number in range(len(captions)))
    return [on_background(caption, name, template) for caption, name in zip(captions, chosen, strict=True)]


def _lines(captions: Iterable[str], normalization: Normalization, num_characters: int) -> list[str]:
    """Lines of captions, sorted; rare characters become spaces, so they get no piece and are spelled in bytes."""
    texts = (caption if normalization == "identity" else unicodedata.normalize("NFKC", caption) for caption in captions)
    lines = sorted(line for text in texts for line in text.replace("\r\n", "\n").split("\n"))
    counts = Counter(character for line in lines for character in line)
    frequent = sorted(counts, key=lambda each: (-counts[each], each))[: num_characters - len(_ASCII)]
    rare = dict.fromkeys(map(ord, (counts.keys() - set(frequent) - set(_ASCII)) | set(RESERVED)), " ")
    return [kept for line in lines if (kept := line[:MAX_LINE_LENGTH].translate(rare)).strip()]


def _train(lines: list[str], num_pieces: int, pad: int, normalization: Normalization) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=num_pieces,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars=_ASCII,  # so that no English prompt is spelled in bytes, whatever the captions lack
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name=normalization,
        max_sentence_length=4 * MAX_LINE_LENGTH,
        pad_id=pad,
        pad_piece=PAD_PIECE,
        unk_id=0 if pad else 1,
        bos_id=-1,
        eos_id=-1,
        control_symbols=[LINE_BREAK_PIECE],  # control: a caption that spells it gets its characters
        num_threads=1,  # the same bytes on every machine
        minloglevel=2,
    )
    return model.getvalue()


def _unused_piece(index: int) -> bytes:
    """A piece as an entry of the model's list: its fields `piece`, `score` (0) and `type` (5, for unused)."""
    name = f"<unused_{index}>".encode()
    body = b"\x0a" + bytes([len(name)]) + name + b"\x15" + bytes(4) + b"\x18\x05"
    return b"\x0a" + bytes([len(body)]) + body
