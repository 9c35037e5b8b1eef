"""Captions as tokens of the joint vocabulary: image codes, SentencePiece pieces, special tokens.

The video stages get the frame rate as text before the caption (paper section 3.1, multi-frame-rate training).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from cogvideo.config import InputError, TextConfig, TransformerConfig, require
from cogvideo.layout import check_code_range

PAD_PIECE = "<pad>"
LINE_BREAK_PIECE = "<n>"
SPECIAL_TOKENS = ("<start_of_image>", "<start_of_english>", "<start_of_chinese>")
"""Appended after the last piece, in this order; the text model does not know them."""


class TextTokenizer:
    """Text to tokens and back: token = `num_codes` + SentencePiece id, the special tokens follow the last piece.

    A line break is the token `<n>`. Whatever else stands in a text is text: a caption that spells `<pad>` or `<n>` gets
    the pieces of its characters, never the token of that name.

    Args:
        model: a serialized SentencePiece model with the pieces `<pad>` and `<n>` (released: `ice_text.model`).
        config: the templates that captions are put in.
        num_codes: image codes in front of the pieces.

    Raises:
        ValueError: `model` is no SentencePiece model, or one of the two pieces is missing.
    """

    def __init__(self, model: bytes, config: TextConfig, num_codes: int) -> None:
        self.model = model
        self.config = config
        self.num_codes = num_codes
        self._processor = _load(model)
        end = num_codes + self._processor.vocab_size()
        self.pad = self._named_token(PAD_PIECE)
        self.line_break = self._named_token(LINE_BREAK_PIECE)
        self.start_of_image, self.start_of_english, self.start_of_chinese = range(end, end + len(SPECIAL_TOKENS))
        self.num_tokens = end + len(SPECIAL_TOKENS)
        self._silent = {self.pad, self.start_of_image, self.start_of_english, self.start_of_chinese}
        self._spelled = {self.pad: self._spell(PAD_PIECE), self.line_break: self._spell(LINE_BREAK_PIECE)}

    @classmethod
    def from_file(cls, path: str | PathLike[str], config: TextConfig, num_codes: int) -> TextTokenizer:
        """The tokenizer whose SentencePiece model is the file `path`.

        Raises:
            ValueError: the file cannot be read or is no usable text model.
        """
        try:
            return cls(Path(path).read_bytes(), config, num_codes)
        except (OSError, InputError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"cannot use the text model {path}: {reason}") from error

    def check(self, transformer: TransformerConfig) -> None:
        """Refuse a transformer that was not made for this vocabulary.

        Raises:
            ValueError: the image codes or a token that both name differ, or the word embedding has too few rows.
        """
        for name in ("num_codes", "pad", "start_of_image"):
            ours, theirs = getattr(self, name), getattr(transformer, name)
            require(ours == theirs, f"{name} is {theirs} in the transformer, expected {ours} as in the text tokenizer")
        require(
            self.num_tokens <= transformer.vocab_size,
            f"vocab_size of the transformer is {transformer.vocab_size}, expected at least the "
            f"{self.num_tokens} tokens of the text tokenizer",
        )

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; lines are encoded one by one, as the released pipeline does with prefix and caption.

        Raises:
            ValueError: the text holds lone surrogates, which are no characters.
        """
        first, *others = text.replace("\r\n", "\n").split("\n")
        tokens = self._encode_line(first)
        for line in others:
            tokens += [self.line_break, *self._encode_line(line)]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special tokens left out; what the model normalizes away in `encode` stays lost.

        Raises:
            ValueError: a token is an image code or outside the vocabulary.
        """
        lines: list[list[int]] = [[]]
        for token in tokens:
            require(
                self.num_codes <= token < self.num_tokens,
                f"token {token} is no text, expected an id in [{self.num_codes}, {self.num_tokens})",
            )
            if token == self.line_break:
                lines.append([])
            elif token not in self._silent:
                lines[-1].append(token - self.num_codes)
        return "\n".join(self._processor.decode(line) for line in lines)

    def encode_caption(self, caption: str, duration: float) -> list[int]:
        """Tokens for the video stages: `duration_template` with the seconds that the frames of a sequence span.

        Raises:
            ValueError: nothing of the caption is left for the model, or `duration` is no positive number.
        """
        return self._encode_duration(self._strip(caption), duration)

    def encode_unconditional(self, duration: float) -> list[int]:
        """Tokens of the unconditional rows of guidance in the video stages, at the same duration.

        Raises:
            ValueError: `duration` is no positive number.
        """
        return self._encode_duration(self.config.unconditional_caption, duration)

    def encode_image_caption(self, caption: str) -> list[int]:
        """Tokens for the image model: `image_template`, which says no frame rate.

        Raises:
            ValueError: nothing of the caption is left for the model.
        """
        return self._encode_template(self.config.image_template, caption=self._strip(caption))

    def encode_unconditional_image(self) -> list[int]:
        """Tokens of the unconditional rows of guidance in the image model; may be none at all."""
        return self._encode_template(self.config.image_template, caption=self.config.unconditional_caption)

    def batch(
        self, captions: Sequence[str | None], durations: Sequence[float] | None, slots: int, truncate: bool = False
    ) -> PaddedText:
        """Captions as rows of `slots` tokens, padded on the left.

        Args:
            captions: texts; None is the unconditional one.
            durations: seconds that the frames of each sequence span; None for the image model, whose texts have no
                frame rate.
            slots: tokens of a row.
            truncate: cut captions that are longer, instead of refusing them.

        Raises:
            ValueError: a caption is empty or too long, or a duration is no positive number.
        """
        seconds = [None] * len(captions) if durations is None else durations
        rows = [self.row(*each) for each in zip(captions, seconds, strict=True)]
        return pad_left([fit(row, slots, truncate) for row in rows], slots, self.pad)

    def row(self, caption: str | None, duration: float | None) -> list[int]:
        """Tokens of one caption, as in `batch`; raises what `batch` raises, but for length."""
        if duration is None:
            return self.encode_unconditional_image() if caption is None else self.encode_image_caption(caption)
        return self.encode_unconditional(duration) if caption is None else self.encode_caption(caption, duration)

    def _encode_duration(self, caption: str, duration: float) -> list[int]:
        require(0 < duration < math.inf, f"duration is {duration}, expected a positive number of seconds")
        return self._encode_template(self.config.duration_template, caption=caption, duration=float(duration))

    def _encode_template(self, template: str, **values: str | float) -> list[int]:
        return self.encode(template.replace(LINE_BREAK_PIECE, "\n").format(**values))

    def _encode_line(self, line: str) -> list[int]:
        # As bytes: Python then refuses lone surrogates with a ValueError, SentencePiece would with a RuntimeError.
        tokens = [self.num_codes + piece for piece in self._processor.encode(line.encode())]
        return [each for token in tokens for each in self._spelled.get(token, [token])]

    def _strip(self, caption: str) -> str:
        require(is_unicode(caption), f"the prompt {caption!r:.60} is no text in Unicode")
        # Judged by what the model would see of it: normalization also removes, say, zero-width spaces.
        seen = is_visible(caption) and self.decode(self.encode(caption)).strip() != ""
        require(seen, f"the prompt is empty: {caption!r:.60}")
        return caption.strip()

    def _named_token(self, piece: str) -> int:
        index = self._processor.piece_to_id(piece)
        require(self._processor.id_to_piece(index) == piece, f"the text model has no piece {piece}")
        return self.num_codes + index

    def _spell(self, piece: str) -> list[int]:
        """Tokens of the single characters of an ASCII piece, as bytes where the model has no such characters."""
        processor = self._processor
        singles = [(processor.piece_to_id(each), processor.piece_to_id(f"<0x{ord(each):02X}>")) for each in piece]
        return [self.num_codes + (byte if single == processor.unk_id() else single) for single, byte in singles]


def fit(tokens: list[int], slots: int, truncate: bool = False) -> list[int]:
    """The tokens if they fit in `slots`; the first `slots` of them if `truncate` allows to cut.

    Raises:
        ValueError: there are more tokens than slots and `truncate` is False.
    """
    require(
        truncate or len(tokens) <= slots,
        f"the prompt has {len(tokens)} tokens, {slots} fit: shorten it",
    )
    return tokens[:slots]


class PaddedText(NamedTuple):
    """Rows of text in equally many slots."""

    tokens: Int64[Tensor, "batch text"]
    """Token of each slot."""
    mask: Bool[Tensor, "batch text"]
    """True where a slot holds real text."""


def pad_left(rows: list[list[int]], slots: int, pad: int) -> PaddedText:
    """Rows right-aligned in `slots` slots, `pad` in front of them (spec: text is padded on the left).

    Raises:
        ValueError: a row is longer than `slots`; `fit` cuts rows.
    """
    longest = max(map(len, rows), default=0)
    require(longest <= slots, f"a row of text has {longest} tokens, expected at most {slots}")
    padded = [[pad] * (slots - len(row)) + row for row in rows]
    real = [[False] * (slots - len(row)) + [True] * len(row) for row in rows]
    shape = (len(rows), slots)
    return PaddedText(
        torch.tensor(padded, dtype=torch.int64).reshape(shape),
        torch.tensor(real, dtype=torch.bool).reshape(shape),
    )


def check_text(text: PaddedText, batch: int, slots: int, vocab_size: int) -> None:
    """Refuse padded text that cannot go through a model.

    Raises:
        ValueError: its shape is not (batch, slots), a row has no real token, or a token is outside the vocabulary.
    """
    shape = (batch, slots)
    require(
        tuple(text.tokens.shape) == shape and tuple(text.mask.shape) == shape,
        f"got text of shape {tuple(text.tokens.shape)} with a mask of shape {tuple(text.mask.shape)}, expected {shape}",
    )
    require(bool(text.mask.any(1).all()), "got a text without any token, expected at least one in every row")
    check_code_range(text.tokens, vocab_size)


def _load(model: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    try:
        # Not the constructor: it takes empty bytes for "no model" and fails at the first use.
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise InputError(f"expected a SentencePiece model, got {len(model)} bytes that are none") from error
    return processor


def is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_visible(text: str) -> bool:
    """Whether it has a sign that is seen. SentencePiece's own sign for a space (U+2581) is none."""
    return any(each.isprintable() and not each.isspace() and each != "\u2581" for each in text)
