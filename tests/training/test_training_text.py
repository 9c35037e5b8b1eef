"""Training the text tokenizer: its ids match the configuration, and it can encode any text."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from cogvideo.bundle import model as bundle
from cogvideo.bundle.format import MANIFEST
from cogvideo.bundle.model import CogVideo
from cogvideo.cli import main
from cogvideo.config import CogVideoConfig, TransformerConfig, preset
from cogvideo.data.sources import SourceOptions
from cogvideo.models.transformer import Base
from cogvideo.text import TextTokenizer
from cogvideo.training.text import figures, read_captions, spread, train_model, train_text, with_unused_pieces

WORDS = ["red", "small", "large", "ball", "cat", "kite", "rolls", "jumps", "flies", "slowly", "over", "the", "moon"]
POCKET = preset("pocket")


def captions(number: int = 300) -> list[str]:
    draw = random.Random(0)
    return [f"{' '.join(draw.choices(WORDS, k=8))} {draw.choice((90, 217, 2024))}" for _ in range(number)]


def tokenizer_of(model: bytes, config: CogVideoConfig = POCKET) -> TextTokenizer:
    return TextTokenizer(model, config.text, config.transformer.num_codes)


def pieces_of(model: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return tokenizer_of(train_model(captions(), POCKET.transformer))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A source of 40 captioned clips, every fourth one in another split."""
    rows = []
    for number, caption in enumerate(captions(40)):
        (tmp_path / f"{number}.mp4").touch()
        rows.append(f"{number}.mp4,{caption} {number},{'train' if number % 4 else 'test'}")
    (tmp_path / "clips.csv").write_text("file,caption,split\n" + "\n".join(rows) + "\n")
    return tmp_path / "clips.csv"


@pytest.mark.parametrize("name", ["tiny", "pocket", "small", "cogvideo"])
@pytest.mark.parametrize("text", [["a cat"], captions(), [chr(0x4E00 + number) * 2 for number in range(20_000)]])
def test_ids_are_those_of_the_preset(name: str, text: list[str]) -> None:
    """Guards the sizes that a model expects, with too few captions and with more characters than pieces."""
    config = preset(name)
    made = tokenizer_of(train_model(text, config.transformer), config)
    made.check(config.transformer)
    assert (made.start_of_image, made.pad) == (config.transformer.start_of_image, config.transformer.pad)
    assert made.decode(made.encode(text[-1])) == text[-1]


@pytest.mark.parametrize(
    "text",
    [
        "一只猫在草地上奔跑。",
        "👨‍👩‍👧 waves ❤️ 🏳️‍🌈",
        "line one\nline two\n\nline four",
        "tab\tbell\x07null\x00end",
        "Ünïcödé, ქართული, עברית, \U0010ffff",
        "<pad> <n> <unk> <unused_3> <0x41> </s>",
        "QUICK zebra {}~^`|\\",
        "0123456789.5",
    ],
)
def test_everything_can_be_spelled(tokenizer: TextTokenizer, text: str) -> None:
    """Catches prompts that cannot be encoded, and text that is mistaken for a special token of that name."""
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    unknown = tokenizer.num_codes + pieces_of(tokenizer.model).unk_id()
    assert not {unknown, tokenizer.pad, tokenizer.start_of_image} & set(tokens)
    assert tokens.count(tokenizer.line_break) == text.count("\n")


@pytest.fixture(scope="module")
def exact() -> TextTokenizer:
    """A tokenizer that only normalizes spaces: what NFKC does to marks depends on the Unicode version."""
    return tokenizer_of(train_model(captions(), POCKET.transformer, "identity"))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_any_text_comes_back(exact: TextTokenizer, text: str) -> None:
    """Guards the byte fallback on arbitrary text; SentencePiece's own symbol counts as a space."""
    back = exact.decode(exact.encode(text))
    assert "".join(back.split()) == "".join(text.replace("\u2581", " ").split())


def test_spellings_that_look_the_same_are_the_same(tokenizer: TextTokenizer) -> None:
    """Guards prompts typed on other systems: combining accents, full-width letters, double spaces."""
    assert tokenizer.encode("cafe\u0301  ｂａｌｌ") == tokenizer.encode("café ball")


def test_capital_letters_on_request(exact: TextTokenizer) -> None:
    """Guards the choice of normalization: text is lowercased only if requested."""
    folded = tokenizer_of(train_model(captions(), POCKET.transformer, "nfkc_cf"))
    assert folded.encode("A Red BALL") == folded.encode("a red ball")
    assert exact.decode(exact.encode("Ａ Red ﬁg")) == "Ａ Red ﬁg"


def test_words_of_captions_are_single_pieces(tokenizer: TextTokenizer) -> None:
    """Catches a trainer that spells known words letter by letter, as unigram does, which fills the text slots."""
    for word in WORDS:
        assert len(tokenizer.encode(f"the {word}")) == 2, word


def test_prefixes_are_short(tokenizer: TextTokenizer) -> None:
    """Guards the frame rate prefix: one token per digit, the same in any context, then the caption."""
    whole, caption = tokenizer.encode_caption("a cat", 4.0), tokenizer.encode("a cat")
    prefix = whole[: -len(caption)]
    assert whole == prefix + caption
    assert len(prefix) == 4
    assert prefix[-1] == tokenizer.line_break
    digits = [tokenizer.encode(str(digit))[-1] for digit in range(10)]
    assert tokenizer.encode("90217")[1:] == [digits[digit] for digit in (9, 0, 2, 1, 7)]
    assert len(tokenizer.encode_caption("a cat", 0.5)) == len(whole) + 2


def test_equal_captions_give_equal_bytes() -> None:
    """Guards the hash that identifies a tokenizer in shards and bundles: the order of captions changes no byte."""
    first, second = captions(), captions()[::-1]
    assert train_model(first, POCKET.transformer) == train_model(iter(second), POCKET.transformer)
    assert train_model(first[1:], POCKET.transformer) != train_model(first, POCKET.transformer)


def test_fill_adds_pieces_that_no_text_has(tokenizer: TextTokenizer) -> None:
    """Guards unused pieces: the ids of real pieces stay, and no text encodes to an unused one."""
    filled = pieces_of(tokenizer.model)
    unused = [index for index in range(filled.vocab_size()) if filled.is_unused(index)]
    assert unused == list(range(unused[0], filled.vocab_size()))
    assert [filled.id_to_piece(index) for index in unused[:2]] == [f"<unused_{index}>" for index in unused[:2]]
    more = with_unused_pieces(tokenizer.model, filled.vocab_size() + 7)
    assert pieces_of(more).vocab_size() == filled.vocab_size() + 7
    text = " ".join(filled.id_to_piece(index) for index in unused[:50])
    assert pieces_of(more).encode(text) == filled.encode(text)
    assert not set(unused) & set(filled.encode(text))
    with pytest.raises(ValueError, match=f"has {filled.vocab_size()} pieces, expected at most 5"):
        with_unused_pieces(tokenizer.model, 5)


@pytest.mark.parametrize("text", ["▅▅ a cat", "\x00", "cat " * 300_000, "猫" * 70_000])
def test_odd_captions_do_not_stop_training(text: str) -> None:
    """Catches texts that SentencePiece skips or fails on: its own symbols, control characters, very long lines."""
    tokenizer_of(train_model([text], POCKET.transformer)).check(POCKET.transformer)


def test_refusals() -> None:
    """Checks the errors for a vocabulary that is too small and for captions without any characters."""
    with pytest.raises(ValueError, match="room for 100 text pieces, expected at least 7"):
        train_model(["a"], TransformerConfig(start_of_image=1124))
    with pytest.raises(ValueError, match="got no captions"):
        train_model([" \n"], POCKET.transformer)


def test_figures_count_what_is_fed(tokenizer: TextTokenizer) -> None:
    """Catches printed statistics that omit the prefix, count repeated captions, or miscount byte pieces."""
    some = ["a cat", "a cat", "the red ball", "a 猫"]
    lengths = [len(tokenizer.encode_caption(caption, 0.5)) for caption in ("a cat", "the red ball", "a 猫")]
    result = figures(tokenizer, some, sorted(lengths)[1])
    assert (result.longest, result.mean) == (max(lengths), pytest.approx(sum(lengths) / 3))
    assert (result.fitting, result.with_bytes) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_spread_is_even() -> None:
    """Guards the selection from too many captions: a few are all kept, more are evenly spaced."""
    assert spread(list("abc"), 9) == list("abc")
    assert spread([str(number) for number in range(100)], 4) == ["0", "25", "50", "75"]


# The command


def test_command_makes_a_bundle(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the command from source to bundle, its printed statistics, and that other splits stay unseen."""
    train_text((str(table),), tmp_path / "bundle")
    made = CogVideo.from_pretrained(tmp_path / "bundle").text
    seen = [caption for number, caption in enumerate(table.read_text().splitlines()[1:]) if number % 4]
    assert made.model == train_model([line.split(",")[1] for line in seen], POCKET.transformer)
    text = capsys.readouterr().out
    assert "captions  30 of the split train, 30 used, 30 different" in text
    assert "pieces    3,069, of which" in text
    assert "fitting   100.00% of them in the 48 text slots" in text


def test_bundle_keeps_its_configuration_and_components(table: Path, tmp_path: Path) -> None:
    """Guards an existing bundle: its own sizes apply, other components stay, and trained weights are protected."""
    sizes = replace(POCKET.transformer, vocab_size=1500, num_codes=500, pad=501, start_of_image=1400)
    config = replace(POCKET, transformer=sizes, autoencoder=replace(POCKET.autoencoder, num_codes=500))
    bundle.update(tmp_path / "bundle", config, cluster_labels=torch.zeros(500, dtype=torch.int64))
    train_text((str(table),), tmp_path / "bundle")
    model = CogVideo.from_pretrained(tmp_path / "bundle")
    assert model.components == ("cluster_labels", "text")
    assert (model.text.pad, model.text.start_of_image) == (501, 1400)
    with pytest.raises(ValueError, match="a different configuration from the preset pocket"):
        train_text((str(table),), tmp_path / "bundle", preset="pocket")
    bundle.update(tmp_path / "trained", POCKET, base=Base(POCKET.transformer))
    before = (tmp_path / "trained" / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match="has a base"):
        train_text((str(table),), tmp_path / "trained")
    assert (tmp_path / "trained" / MANIFEST).read_bytes() == before


def test_captions_of_several_sources(table: Path, tmp_path: Path) -> None:
    """Guards several sources, which are combined; copies, which count once; and the error for no captions."""
    once = read_captions([str(table)], SourceOptions())
    both = read_captions([str(table), "world:50"], SourceOptions(copies=3))
    assert once == sorted(once)
    assert set(once) < set(both)
    assert len(read_captions([str(table)], SourceOptions(copies=3))) == len(once) == 30
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.mp4").touch()
    with pytest.raises(ValueError, match=r"no clip .* has a caption .*: 1 missing caption"):
        read_captions([str(tmp_path / "none")], SourceOptions())


def test_backgrounds_are_trained(table: Path, tmp_path: Path) -> None:
    """Guards the words that `data prepare` adds to captions: unknown ones would be spelled letter by letter."""
    template = "{caption}, on {article} {background} background"
    train_text((str(table),), tmp_path / "bundle", background_template=template)
    made = CogVideo.from_pretrained(tmp_path / "bundle").text
    assert len(made.encode("cat, on an orange background")) == 6
    with pytest.raises(ValueError, match="background_template is"):
        train_text((str(table),), tmp_path / "bundle", background_template="{colour}")


def test_signature_is_a_command_line(table: Path, tmp_path: Path) -> None:
    """Guards the options generated from the signature: several sources first, then options by their own names."""
    sources = [str(table), "world:20"]
    assert main(["train", "text", *sources, "--out", str(tmp_path / "bundle"), "--caption-columns", "caption"]) == 0
    assert CogVideo.from_pretrained(tmp_path / "bundle").components == ("text",)
