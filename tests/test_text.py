"""Captions to tokens: ids, templates, user input, padding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from cogvideo.config import TextConfig, TransformerConfig, preset
from cogvideo.text import TextTokenizer, fit, pad_left

NUM_CODES = 1024


@pytest.fixture(scope="session")
def normalizing_model(train_text_model: Callable[..., bytes]) -> bytes:
    """A small SentencePiece model with SentencePiece's own normalization: compatibility forms, spaces, controls."""
    return train_text_model()


@pytest.fixture(scope="session")
def pieces(text_model: bytes) -> SentencePieceProcessor:
    """The plain SentencePiece processor: the oracle for ids."""
    return SentencePieceProcessor(model_proto=text_model)


@pytest.fixture(scope="session")
def tokenizer(text_model: bytes) -> TextTokenizer:
    return TextTokenizer(text_model, TextConfig(), NUM_CODES)


@pytest.fixture(scope="session")
def released(text_model: bytes) -> TextTokenizer:
    config = preset("cogvideo")
    return TextTokenizer(text_model, config.text, config.transformer.num_codes)


def shifted(pieces: SentencePieceProcessor, text: str, num_codes: int = NUM_CODES) -> list[int]:
    return [num_codes + each for each in pieces.encode(text)]


def test_ids_are_shifted_by_the_codes(tokenizer: TextTokenizer, pieces: SentencePieceProcessor) -> None:
    """Guards against text tokens that collide with image codes or miss their embedding row."""
    assert tokenizer.encode("a cat 猫") == shifted(pieces, "a cat 猫")
    assert tokenizer.pad == NUM_CODES + pieces.piece_to_id("<pad>")
    assert tokenizer.line_break == NUM_CODES + pieces.piece_to_id("<n>")


def test_special_tokens_follow_the_pieces(released: TextTokenizer, pieces: SentencePieceProcessor) -> None:
    """Guards the released ids: pad is 20003, and the start tokens follow the last piece in their order."""
    end = 20_000 + pieces.vocab_size()
    assert released.pad == 20_003
    assert [released.start_of_image, released.start_of_english, released.start_of_chinese] == [end, end + 1, end + 2]
    assert released.num_tokens == end + 3


def test_released_prompt(released: TextTokenizer, pieces: SentencePieceProcessor) -> None:
    """Guards against encoding prefix and caption together: the released code encodes them separately, so ids differ."""

    def released_recipe(duration: str, caption: str) -> list[int]:
        return [*shifted(pieces, duration, 20_000), released.line_break, *shifted(pieces, caption, 20_000)]

    assert released.encode_caption("一只猫", 4.0) == released_recipe("4.0秒", "一只猫")
    assert released.encode_caption(None, 0.5) == released_recipe("0.5秒", "视频")
    assert released.encode_image_caption("一只猫") == shifted(pieces, "一只猫 高清摄影", 20_000)
    assert released.encode_image_caption(None) == shifted(pieces, "视频 高清摄影", 20_000)


@pytest.mark.parametrize("duration", [4, 4.0])
def test_duration_is_written_as_a_float(released: TextTokenizer, tokenizer: TextTokenizer, duration: float) -> None:
    """Guards against '4秒' for an integer duration, a prefix the released model has never seen."""
    assert released.decode(released.encode_caption("猫", duration)) == "4.0秒\n猫"
    assert tokenizer.decode(tokenizer.encode_caption("cat", duration)) == "4s\ncat"


@pytest.mark.parametrize("duration", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_duration_is_refused(tokenizer: TextTokenizer, duration: float) -> None:
    """Guards against prompts like 'nans', which would only show up as bad clips."""
    with pytest.raises(ValueError, match="duration is"):
        tokenizer.encode_caption("cat", duration)


@pytest.mark.parametrize(
    "caption",
    [
        "a cat",
        "一只猫在奔跑",
        "🦊 naïve Ω",
        "bell \x07 nul \x00 tab \t end",
        "{caption} {0} {} %s {{",
        "\"quoted\" 'single' `x` $(rm) \\n",
        "one line\nanother",
        "  two  spaces  ",
        "",
        "\n",
    ],
)
def test_round_trip(tokenizer: TextTokenizer, caption: str) -> None:
    """Guards against characters that are lost or replaced between prompt and model."""
    assert tokenizer.decode(tokenizer.encode(caption)) == caption


@given(st.text().filter(lambda text: "▁" not in text and "\r\n" not in text))
def test_any_text_round_trips_without_special_tokens(tokenizer: TextTokenizer, text: str) -> None:
    """Guards against text that decodes to something else, or that yields a special token."""
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokens.count(tokenizer.line_break) == text.count("\n")
    assert tokenizer.pad not in tokens
    assert all(NUM_CODES <= token < tokenizer.start_of_image for token in tokens)


def test_braces_in_a_caption_are_text(tokenizer: TextTokenizer) -> None:
    """Guards against formatting the caption itself, which would raise a KeyError or fill in fields."""
    assert tokenizer.decode(tokenizer.encode_caption("{duration} {x} }{", 2.0)) == "2s\n{duration} {x} }{"


@pytest.mark.parametrize("typed", ["<pad>", "<n>", "a<pad>b", "<start_of_image>", "<unk>", "</s>", "＜pad＞", "＜n＞"])
def test_typed_special_pieces_are_text(
    tokenizer: TextTokenizer, normalizing_model: bytes, pieces: SentencePieceProcessor, typed: str
) -> None:
    """Guards against captions that inject special tokens by name, also in forms that normalize to the name."""
    assert tokenizer.decode(tokenizer.encode_caption(typed, 1.0)) == f"1s\n{typed}"
    for each in (tokenizer, TextTokenizer(normalizing_model, TextConfig(), NUM_CODES)):
        tokens = each.encode_caption(typed, 1.0)
        assert tokens.count(each.line_break) == 1
        assert not {each.pad, each.start_of_image, NUM_CODES + pieces.piece_to_id("</s>")} & set(tokens)


def test_special_pieces_are_spelled_in_characters_or_bytes(text_model: bytes) -> None:
    """Guards against unknown tokens when a user types `<pad>` and the model has no piece for `<`."""
    sparse = SentencePieceProcessor(model_proto=text_model)
    assert sparse.piece_to_id("<") == sparse.unk_id()
    tokens = TextTokenizer(text_model, TextConfig(), 0).encode("<pad>")
    assert [sparse.id_to_piece(token) for token in tokens] == ["▁", "<0x3C>", "p", "a", "d", "<0x3E>"]


def test_line_ends_of_a_browser_are_one_line_break(tokenizer: TextTokenizer) -> None:
    """Guards against carriage returns that web forms and Windows files put into prompts."""
    assert tokenizer.encode("a\r\nb") == tokenizer.encode("a\nb")


def test_space_around_a_caption_is_dropped(tokenizer: TextTokenizer) -> None:
    """Guards against a different clip, and a trailing line break token, for a prompt read from a line of a file."""
    assert tokenizer.encode_caption(" a cat\n", 4.0) == tokenizer.encode_caption("a cat", 4.0)
    assert tokenizer.encode_image_caption(" a cat\n") == tokenizer.encode_image_caption("a cat")


@pytest.mark.parametrize("caption", ["", "  ", "\n\t", "\u3000", "\u200b"])
def test_empty_prompt_is_refused(normalizing_model: bytes, caption: str) -> None:
    """Guards against minutes of work for a prompt the model cannot see; normalization removes a zero-width space."""
    tokenizer = TextTokenizer(normalizing_model, TextConfig(), NUM_CODES)
    with pytest.raises(ValueError, match="prompt is empty"):
        tokenizer.encode_caption(caption, 4.0)
    with pytest.raises(ValueError, match="prompt is empty"):
        tokenizer.encode_image_caption(caption)


def test_unconditional_text_may_be_empty(tokenizer: TextTokenizer) -> None:
    """Guards against rejecting guidance when the unconditional caption is empty."""
    assert tokenizer.encode_caption(None, 4.0)[-1] == tokenizer.line_break
    assert tokenizer.encode_image_caption(None) == [tokenizer.line_break]


def test_lone_surrogates_are_refused(tokenizer: TextTokenizer) -> None:
    """Guards against a library's RuntimeError for half an emoji from a JSON request."""
    with pytest.raises(ValueError, match="is not valid Unicode"):
        tokenizer.encode_caption("\ud83d", 4.0)


def test_decode_leaves_special_tokens_out(tokenizer: TextTokenizer) -> None:
    """Guards against padding and start tokens in text shown to users."""
    tokens = [tokenizer.pad, tokenizer.start_of_english, *tokenizer.encode("a cat"), tokenizer.start_of_image]
    assert tokenizer.decode(tokens) == "a cat"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("token", [-1, 0, NUM_CODES - 1])
def test_decode_refuses_what_is_no_text(tokenizer: TextTokenizer, token: int) -> None:
    """Guards against decoding image codes as text, also by way of negative ids."""
    with pytest.raises(ValueError, match="is not text"):
        tokenizer.decode([token])
    with pytest.raises(ValueError, match="is not text"):
        tokenizer.decode([tokenizer.num_tokens])


def test_fit() -> None:
    """Guards against silently truncated prompts, and against truncating the frame rate prefix."""
    assert fit([1, 2, 3], slots=3) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"has 4 tokens, 3 fit: shorten it"):
        fit([1, 2, 3, 4], slots=3)
    assert fit([1, 2, 3, 4], slots=3, truncate=True) == [1, 2, 3]


def test_pad_left_aligns_right() -> None:
    """Guards against text away from the frames, and masks that show padding; a row may contain the pad id."""
    padded = pad_left([[5, 6], [], [9, 7, 8]], slots=3, pad=9)
    assert padded.tokens.tolist() == [[9, 5, 6], [9, 9, 9], [9, 7, 8]]
    assert padded.mask.tolist() == [[False, True, True], [False] * 3, [True] * 3]
    assert (padded.tokens.dtype, padded.mask.dtype) == (torch.int64, torch.bool)


def test_pad_left_keeps_its_shape_without_rows() -> None:
    """Guards against an empty batch with the wrong number of dimensions."""
    assert [each.shape for each in pad_left([], slots=3, pad=9)] == [(0, 3), (0, 3)]


def test_pad_left_refuses_long_rows() -> None:
    """Guards against ragged batches that fail later with a tensor error."""
    with pytest.raises(ValueError, match="has 4 tokens, expected at most 3"):
        pad_left([[1], [1, 2, 3, 4]], slots=3, pad=9)


def test_check_against_the_transformer(tokenizer: TextTokenizer) -> None:
    """Guards against running a model on ids from another vocabulary."""
    fitting = {"vocab_size": tokenizer.num_tokens, "num_codes": NUM_CODES}
    fitting |= {"pad": tokenizer.pad, "start_of_image": tokenizer.start_of_image}
    tokenizer.check(TransformerConfig(**fitting))
    tokenizer.check(TransformerConfig(**fitting | {"vocab_size": tokenizer.num_tokens + 7}))
    for name in ("vocab_size", "num_codes", "pad", "start_of_image"):
        with pytest.raises(ValueError, match=name):
            tokenizer.check(TransformerConfig(**fitting | {name: fitting[name] - 1}))


@pytest.mark.parametrize("missing", ["<pad>", "<n>"])
def test_model_without_a_needed_piece_is_refused(missing: str, train_text_model: Callable[..., bytes]) -> None:
    """Guards against the unknown piece in place of pad or line break, which SentencePiece returns silently."""
    others = tuple({"<pad>", "<n>"} - {missing})
    with pytest.raises(ValueError, match=f"no piece {missing}"):
        TextTokenizer(train_text_model(symbols=others), TextConfig(), NUM_CODES)


def test_pad_may_be_a_control_piece(train_text_model: Callable[..., bytes]) -> None:
    """Guards the preset whose pad is the first token after the codes: SentencePiece makes it a control piece."""
    model = train_text_model(symbols=("<n>",), pad_id=0, unk_id=1, bos_id=-1, eos_id=-1)
    tokenizer = TextTokenizer(model, TextConfig(), NUM_CODES)
    assert tokenizer.pad == NUM_CODES
    assert tokenizer.decode([tokenizer.pad, *tokenizer.encode("<pad> a\nb")]) == "<pad> a\nb"


def test_reads_a_file(text_model: bytes, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """Guards against a model that changes when it is written and read."""
    path = tmp_path / "text.model"
    path.write_bytes(text_model)
    again = TextTokenizer.from_file(path, TextConfig(), NUM_CODES)
    assert again.model == text_model
    assert again.encode("a cat\n猫") == tokenizer.encode("a cat\n猫")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x00" * 50, "cut"])
def test_broken_model_file_is_one_clear_error(text_model: bytes, tmp_path: Path, content: bytes | str) -> None:
    """Guards against protobuf messages, or a failure at the first prompt, after a failed download."""
    path = tmp_path / "text.model"
    path.write_bytes(text_model[: len(text_model) // 2] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"text\.model: expected a SentencePiece model, got \d+ bytes"):
        TextTokenizer.from_file(path, TextConfig(), NUM_CODES)


def test_missing_model_file_is_one_clear_error(tmp_path: Path) -> None:
    """Guards against a bare operating system error for a wrong path or a folder."""
    with pytest.raises(ValueError, match=r"text\.model: No such file"):
        TextTokenizer.from_file(tmp_path / "text.model", TextConfig(), NUM_CODES)
    with pytest.raises(ValueError, match="cannot use the text model"):
        TextTokenizer.from_file(tmp_path, TextConfig(), NUM_CODES)


@pytest.mark.parametrize(
    "template",
    [
        "{duration}s",
        "{duration} {caption} {style}",
        "{} {}",
        "{duration.real} {caption}",
        "{",
        "{duration} {caption:>99999999}",
        "{duration} {caption!r}",
        "{duration} {caption} {caption}",
        "{duration:99999999f} {caption}",
        "{duration:.9999999f} {caption}",
        "{duration:{caption}} {caption}",
    ],
)
def test_broken_template_is_refused(template: str) -> None:
    """Guards against a template that ignores the prompt, or fails when the first prompt arrives."""
    with pytest.raises(ValueError):
        TextConfig(duration_template=template)


def test_the_rate_can_be_left_out(text_model: bytes) -> None:
    """Guards the ablation of the rate in the text: all durations give the same tokens."""
    text = TextTokenizer(text_model, TextConfig(duration_template="<n>{caption}"), NUM_CODES)
    assert text.encode_caption("a cat runs", 4.0) == text.encode_caption("a cat runs", 0.5)
    assert text.encode_caption("a cat runs", 4.0) == text.encode_image_caption("a cat runs")
