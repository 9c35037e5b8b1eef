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
"""Tokens that follow the last piece, in this order; the text model does not know them."""


class TextTokenizer:
    """Text to tokens and back: token = `num_codes` + SentencePiece id; special tokens follow the last piece.

    A line break is the token `<n>`. Everything else is plain text: a caption that spells `<pad>` or `<n>`
    gets the pieces of its characters, never the token of that name.

    Args:
        model: serialized SentencePiece model with the pieces `<pad>` and `<n>` (released: `ice_text.model`).
        config: the templates that captions are put into.
        num_codes: number of image codes, which precede the pieces.

    Raises:
        ValueError: `model` is not a SentencePiece model, or lacks one of the two pieces.
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
        """Load the tokenizer from a SentencePiece model file.

        Raises:
            ValueError: the file cannot be read or is not a usable text model.
        """
        try:
            return cls(Path(path).read_bytes(), config, num_codes)
        except (OSError, InputError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"cannot use the text model {path}: {reason}") from error

    def check(self, transformer: TransformerConfig) -> None:
        """Refuse a transformer that does not fit this vocabulary.

        Raises:
            ValueError: the image codes or a special token differ, or the word embedding has too few rows.
        """
        for name in ("num_codes", "pad", "start_of_image"):
            ours, theirs = getattr(self, name), getattr(transformer, name)
            require(ours == theirs, f"{name} is {theirs} in the transformer, expected {ours} as in the text tokenizer")
        got, expected = transformer.vocab_size, f"expected at least the {self.num_tokens} tokens of the text tokenizer"
        require(self.num_tokens <= got, f"vocab_size of the transformer is {got}, {expected}")

    def encode(self, text: str) -> list[int]:
        """Encode a text line by line, as the released pipeline does with prefix and caption.

        Raises:
            ValueError: the text has lone surrogates, which are not characters.
        """
        first, *others = text.replace("\r\n", "\n").split("\n")
        tokens = self._encode_line(first)
        for line in others:
            tokens += [self.line_break, *self._encode_line(line)]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode tokens to text without special tokens; normalization in `encode` is not undone.

        Raises:
            ValueError: a token is an image code or outside the vocabulary.
        """
        lines: list[list[int]] = [[]]
        for token in tokens:
            expected = f"expected an id in [{self.num_codes}, {self.num_tokens})"
            require(self.num_codes <= token < self.num_tokens, f"token {token} is not text, {expected}")
            if token == self.line_break:
                lines.append([])
            elif token not in self._silent:
                lines[-1].append(token - self.num_codes)
        return "\n".join(self._processor.decode(line) for line in lines)

    def encode_caption(self, caption: str | None, duration: float) -> list[int]:
        """Encode a caption for the video stages, with the seconds that the frames of a sequence span.

        Args:
            caption: a text; None is the unconditional text.
            duration: seconds.

        Raises:
            ValueError: normalization leaves nothing of the caption, or `duration` is not a positive number.
        """
        require(0 < duration < math.inf, f"duration is {duration}, expected a positive number of seconds")
        return self._encode_template(self.config.duration_template, caption, duration=float(duration))

    def encode_image_caption(self, caption: str | None) -> list[int]:
        """Encode a caption for the image model, without a duration; None is the unconditional text, which may be empty.

        Raises:
            ValueError: normalization leaves nothing of the caption.
        """
        return self._encode_template(self.config.image_template, caption)

    def batch(
        self, captions: Sequence[str | None], durations: Sequence[float] | None, slots: int, truncate: bool = False
    ) -> PaddedText:
        """Encode captions as rows of `slots` tokens, padded on the left.

        Args:
            captions: texts; None is the unconditional text.
            durations: seconds that the frames of each sequence span; None for the image model.
            slots: tokens per row.
            truncate: cut captions that are too long, instead of refusing them.

        Raises:
            ValueError: a caption is empty or too long, or a duration is not a positive number.
        """
        seconds = [None] * len(captions) if durations is None else durations
        rows = [self.row(*each) for each in zip(captions, seconds, strict=True)]
        return pad_left([fit(row, slots, truncate) for row in rows], slots, self.pad)

    def row(self, caption: str | None, duration: float | None) -> list[int]:
        """Encode one caption as in `batch`, with any number of tokens."""
        return self.encode_image_caption(caption) if duration is None else self.encode_caption(caption, duration)

    def _encode_template(self, template: str, caption: str | None, **duration: float) -> list[int]:
        text = self.config.unconditional_caption if caption is None else self._strip(caption)
        return self.encode(template.replace(LINE_BREAK_PIECE, "\n").format(caption=text, **duration))

    def _encode_line(self, line: str) -> list[int]:
        # As bytes: Python refuses lone surrogates with a ValueError, SentencePiece with a RuntimeError.
        tokens = [self.num_codes + piece for piece in self._processor.encode(line.encode())]
        return [each for token in tokens for each in self._spelled.get(token, [token])]

    def _strip(self, caption: str) -> str:
        require(is_unicode(caption), f"the prompt {caption!r:.60} is not valid Unicode")
        # Judged by what the model would see: normalization also removes, for example, zero-width spaces.
        seen = is_visible(caption) and self.decode(self.encode(caption)).strip() != ""
        require(seen, f"the prompt is empty: {caption!r:.60}")
        return caption.strip()

    def _named_token(self, piece: str) -> int:
        index = self._processor.piece_to_id(piece)
        require(self._processor.id_to_piece(index) == piece, f"the text model has no piece {piece}")
        return self.num_codes + index

    def _spell(self, piece: str) -> list[int]:
        """Tokens of the characters of an ASCII piece; bytes for characters that the model does not have."""
        tokens = []
        for character in piece:
            index = self._processor.piece_to_id(character)
            if index == self._processor.unk_id():
                index = self._processor.piece_to_id(f"<0x{ord(character):02X}>")
            tokens.append(self.num_codes + index)
        return tokens


def fit(tokens: list[int], slots: int, truncate: bool = False) -> list[int]:
    """Return the first `slots` tokens; more are refused unless `truncate` is True."""
    fits = truncate or len(tokens) <= slots
    require(fits, f"the prompt has {len(tokens)} tokens, {slots} fit: shorten it")
    return tokens[:slots]


class PaddedText(NamedTuple):
    """Rows of text, padded to equal length."""

    tokens: Int64[Tensor, "batch text"]
    mask: Bool[Tensor, "batch text"]
    """True for real text."""


def pad_left(rows: list[list[int]], slots: int, pad: int) -> PaddedText:
    """Right-align rows in `slots` slots, with `pad` before them (spec: text is padded on the left).

    Raises:
        ValueError: a row is longer than `slots`; `fit` cuts rows.
    """
    longest = max(map(len, rows), default=0)
    require(longest <= slots, f"a row of text has {longest} tokens, expected at most {slots}")
    tokens = torch.full((len(rows), slots), pad)
    mask = torch.zeros(len(rows), slots, dtype=torch.bool)
    for place, row in enumerate(rows):
        tokens[place, slots - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[place, slots - len(row) :] = True
    return PaddedText(tokens, mask)


def check_text(text: PaddedText, batch: int, slots: int, vocab_size: int) -> None:
    """Refuse padded text that a model cannot take: every row must have a real token."""
    shape, tokens, mask = (batch, slots), tuple(text.tokens.shape), tuple(text.mask.shape)
    got = f"got text of shape {tokens} with a mask of shape {mask}"
    require(tokens == mask == shape, f"{got}, expected {shape}")
    require(bool(text.mask.any(1).all()), "got a text without any token, expected at least one in every row")
    check_code_range(text.tokens, vocab_size)


def _load(model: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    try:
        # Not the constructor: it takes empty bytes as "no model" and fails at the first use.
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise InputError(f"expected a SentencePiece model, got {len(model)} bytes that are not one") from error
    return processor


def is_unicode(text: str) -> bool:
    """Return False for text with lone surrogates, which JSON can represent but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_visible(text: str) -> bool:
    """Return True if there is a visible character. SentencePiece's mark for a space (U+2581) is not one."""
    return any(each.isprintable() and not each.isspace() and each != "\u2581" for each in text)
