"""What is documented is executed: examples, commands, figures, drawings and references of README and docs."""

from __future__ import annotations

import ast
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cogvideo.bundle.model import CogVideo
from cogvideo.cli import COMMANDS, main
from cogvideo.config import (
    AutoencoderConfig,
    CogVideoConfig,
    LayoutConfig,
    StageConfig,
    TextConfig,
    TransformerConfig,
    UpscalerConfig,
)
from cogvideo.media.video import read_video
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.transformer import Base, TemporalChannel, initialize
from cogvideo.models.upscaler import UpscaleChannel
from cogvideo.planning.info import info
from cogvideo.text import TextTokenizer
from reference import visible

ROOT = Path(__file__).parents[1]
README, SEQUENCE, PAPER_MAP = ROOT / "README.md", ROOT / "docs/sequence.md", ROOT / "docs/paper_map.md"
DATA, TRAINING = ROOT / "docs/data.md", ROOT / "docs/training.md"
EVALUATION = ROOT / "docs/evaluation.md"
PAGES = [
    README,
    DATA,
    TRAINING,
    EVALUATION,
    SEQUENCE,
    PAPER_MAP,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "tests/golden/README.md",
]
GRID, NUM_CODES = 4, 24


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: Path | str, language: str) -> list[str]:
    """The fenced blocks of a page, or of a text from one, in a language, which may be followed by more words."""
    text = page.read_text() if isinstance(page, Path) else page
    found = [Block(*each) for each in re.findall(r"^```(.*?)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
    return [block.text for block in found if block.language == language]


def run(code: str, folder: Path) -> str:
    """Run Python as a stranger would, in a process and folder of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def printed_comments(code: str) -> list[str]:
    """What an example says that it prints: `print(...)  # this: explanation`."""
    return re.findall(r"^print\(.*\)  # ([^:\n]*):", code, re.MULTILINE)


# Examples


@pytest.mark.soak
def test_first_clips(tmp_path: Path) -> None:
    """Guards the first thing that strangers try in Python: it runs, and prints what the page says."""
    code = blocks(README, "python")[0]
    said = printed_comments(code)
    assert len(said) == 2
    assert run(code, tmp_path).splitlines() == said
    assert len(read_video(tmp_path / "heart.mp4", 8).frames) == 33


def test_examples_on_a_small_model(tmp_path: Path, text_model: bytes) -> None:
    """Guards the way from prompt to pixels, with a small bundle of random weights in the place of the real ones."""
    first, second = blocks(README, "python")
    small_bundle(text_model).save_pretrained(tmp_path / "cogvideo-bundle")
    first = first.replace('"pocket"', '"cogvideo-bundle"')
    clip, stage, *stages, shape = run(first + second, tmp_path).splitlines()
    assert [clip.replace("48", "192"), stage] == printed_comments(first)
    assert len(read_video(tmp_path / "heart.mp4", 8).frames) == 33
    assert stages == ["image", *["sequential"] * 4, *["interpolation"] * 4]
    assert shape == "(1, 9, 48, 48, 3)"


def test_own_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the way from a folder of clips to one's own videos: the commands of the page, but smaller and shorter."""
    section = README.read_text().partition("## Your own clips")[2].partition("\n## ")[0]
    shown = [each.arguments for each in shown_commands(section)]
    stages = ["image", "sequential", "interpolation", "superres"]
    said = ["world", "tokenizer", "text", "prepare", "report", *stages, "report"]
    assert [arguments[1] for arguments in shown[:-1]] == said
    few = ["--steps", "2", "--batch", "2", "--sample-every", "0", "--evaluate-samples", "2"]
    fewer = dict.fromkeys(stages, few) | {
        "tokenizer": ["--preset", "tiny", "--steps", "6", "--plain-steps", "2", "--batch", "4", "--start-vectors", "1"],
        "prepare": ["--workers", "1"],
    }
    monkeypatch.chdir(tmp_path)
    for arguments in shown:
        assert main([*arguments, *fewer.get(arguments[1], [])]) == 0, arguments
    assert "my-data" in (tmp_path / "my-data" / "report.html").read_text()
    assert "superres" in (tmp_path / "report.html").read_text()
    assert len(read_video(tmp_path / "ball.mp4", 8).frames) == 33
    (code,) = blocks(DATA, "python")
    run(code, tmp_path)


def small_bundle(text_model: bytes) -> CogVideo:
    """Every component, with the released templates."""
    words = TextConfig("{duration}秒<n>{caption}", "{caption} 高清摄影", "视频")
    text = TextTokenizer(text_model, words, NUM_CODES)
    config = CogVideoConfig(
        TransformerConfig(2, 32, 2, text.num_tokens, NUM_CODES, text.start_of_image, text.pad, 96),
        LayoutConfig(GRID, 5, text_slots=64, image_text_slots=64, frame_position=64),
        StageConfig(0),
        StageConfig(2),
        UpscalerConfig(text_slots=64, low_position=65),
        AutoencoderConfig(8, (1, 2), 1, ((1, 1, 2),), 1, 8, NUM_CODES, rate=4, groups=4),
        words,
    )
    sizes = (config.transformer, config.layout)
    parts = {
        "base": Base(config.transformer),
        "sequential": TemporalChannel(*sizes, config.sequential),
        "interpolation": TemporalChannel(*sizes, config.interpolation),
        "superres": UpscaleChannel(*sizes, config.upscaler),
    }
    for part in parts.values():
        initialize(part, config.transformer.num_layers, torch.Generator().manual_seed(0))
    labels = torch.arange(NUM_CODES)  # a cluster a code: as many as the released samplers keep
    return CogVideo(config, **parts, image_tokenizer=Autoencoder(config.autoencoder), cluster_labels=labels, text=text)


# Commands


class Shown(NamedTuple):
    """A command of the page and the output shown with it."""

    arguments: list[str]
    output: list[str]

    @property
    def name(self) -> str:
        """Of the command: its first two words, or the first one."""
        two = " ".join(self.arguments[:2])
        return two if two in COMMANDS else self.arguments[0]


def shown_commands(page: Path | str = README) -> list[Shown]:
    """Every `$ cogvideo ...` of a page, or of a text from one."""
    sessions = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    parts = re.split(r"^\$ ", sessions, flags=re.MULTILINE)[1:]
    lines = [part.splitlines() for part in parts]
    return [Shown(shlex.split(first)[1:], output) for first, *output in lines if first.split()[0] == "cogvideo"]


def test_shown_commands_exist() -> None:
    """Guards against commands and options that were renamed, or were never there."""
    shown = shown_commands() + shown_commands(TRAINING) + shown_commands(EVALUATION)
    assert {each.name for each in shown} == set(COMMANDS)
    for each in shown + shown_commands(DATA):
        for option in [argument for argument in each.arguments if argument.startswith("--")]:
            assert re.search(rf"{option}\b", help_of(each.name)), option
    pages = README.read_text() + PAPER_MAP.read_text() + TRAINING.read_text()
    mentioned = re.findall(r"`cogvideo ([a-z]+(?: [a-z]+)?)", pages)
    assert {each for each in mentioned if each not in COMMANDS and each.split()[0] not in COMMANDS} == set()


@cache
def help_of(name: str) -> str:
    """What a command says of itself."""
    with redirect_stdout(io.StringIO()) as told, pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    return told.getvalue()


def test_shown_output_is_real(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the memory that users plan with: every shown line is one that the command prints."""
    monkeypatch.setenv("COLUMNS", "80")
    (shown,) = [each for each in shown_commands() if each.arguments[0] == "info"]
    info(*shown.arguments[1:])
    real = {line.strip() for line in capsys.readouterr().out.splitlines()}
    lines = [line.strip() for line in shown.output if line.strip() not in ("", "...")]
    assert len(lines) > 10
    assert [line for line in lines if line not in real] == []


# Files


def tree() -> list[str]:
    """Paths of the tree in CONTRIBUTING: two spaces a level; folders end with a slash."""
    (text,) = [block for block in blocks(ROOT / "CONTRIBUTING.md", "text") if "README.md" in block]
    paths: list[str] = []
    folders: list[str] = []
    for line in text.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        paths.append("".join(folders) + ("" if name.endswith("/") else name))
    return paths


def test_tree_lists_every_file() -> None:
    """Guards newcomers from files that nobody explains; folders' empty `__init__.py` need no line."""
    listed = set(tree())
    for folder, patterns in {"src/cogvideo": ("*.py", "py.typed"), "benchmarks": ("*.py",), "docs": ("*.md",)}.items():
        for file in [file for pattern in patterns for file in (ROOT / folder).rglob(pattern)]:
            path = file.relative_to(ROOT).as_posix()
            needs_no_line = file.name == "__init__.py" and file.parent != ROOT / "src/cogvideo"
            assert needs_no_line or path in listed, f"the tree in CONTRIBUTING.md lacks {path}"


def test_tree_lists_no_other_files() -> None:
    """Guards against lines for files that moved or are gone, and against a line twice."""
    listed = tree()
    assert len(listed) == len(set(listed))
    for path in listed:
        assert list(ROOT.glob(path.rstrip("/"))), f"there is no {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Guards against links to files and headings that are not there."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not heading or heading in headings(file), target


def headings(page: Path) -> set[str]:
    """Names of a page's headings in links, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_references_of_the_paper_map() -> None:
    """Guards readers of the paper from functions that were renamed or moved: `file.py:name` or `file.py:Class.name`."""
    references = re.findall(r"`([\w/]+\.py):([\w.]+)`", PAPER_MAP.read_text())
    assert len(references) > 50
    for file, name in references:
        assert name in definitions(ROOT / "src/cogvideo" / file), f"{file} has no {name}"


def definitions(file: Path) -> set[str]:
    """Functions, classes, their methods and fields, and constants of a module."""
    return set(_names(ast.parse(file.read_text()).body, ""))


def _names(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _names(node.body, f"{prefix}{node.name}.")
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id
        if isinstance(node, ast.Assign):
            yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))


# Drawings


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the table of numbers is about: the definitions that stand above it."""
    (code,) = blocks(SEQUENCE, "python")
    defined: dict[str, Any] = {}
    exec(code, defined)
    return defined


def numbers() -> list[tuple[str, str]]:
    """Expression and value of each line of the table."""
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", SEQUENCE.read_text().partition("## Numbers")[2], re.MULTILINE)


@pytest.mark.parametrize(("expression", "value"), numbers())
def test_numbers_of_the_drawings(names: dict[str, Any], expression: str, value: str) -> None:
    """Guards the figures in the drawings: each is what the layout says."""
    assert eval(expression, names) == ast.literal_eval(value)


def test_numbers_are_read() -> None:
    """Guards against a table that is formatted in another way and not tested any more."""
    assert len(numbers()) == SEQUENCE.read_text().partition("## Numbers")[2].count("\n| `") >= 30


SEES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "■": torch.ones_like,
    "◣": torch.tril,
    "·": torch.zeros_like,
}


@pytest.mark.parametrize("stage", ["sequential", "interpolation"])
@pytest.mark.parametrize("channel", ["spatial", "temporal"])
def test_drawings_of_the_masks(stage: str, channel: str, names: dict[str, Any]) -> None:
    """Guards the drawings of who sees whom: they are the rule in words, block by block, in the stage's feed order."""
    (drawing,) = blocks(SEQUENCE, f"mask {stage} {channel}")
    (_, *columns), *rows = [line.split() for line in f"query {drawing}".splitlines()]
    order = [str(place) for place in names[stage].order]
    assert columns == ["text", *order]
    assert [name for name, *_ in rows] == (["text", *order] if channel == "spatial" else order)
    text_slots, frame_slots = 3, 4
    mask = getattr(visible(stage, 5, 2, 0, False, (True,) * text_slots), channel)
    spans = {"text": slice(0, text_slots)} | {
        name: slice(text_slots + int(name) * frame_slots, text_slots + (int(name) + 1) * frame_slots) for name in order
    }
    for query, *signs in rows:
        for key, sign in zip(columns, signs, strict=True):
            block = mask[spans[query], spans[key]]
            expected = SEES[sign](torch.ones_like(block))
            assert torch.equal(block, expected), f"{query} sees {key} otherwise than {sign}"


def test_drawing_of_parallel_frames(names: dict[str, Any]) -> None:
    """Guards the drawing of the lag: every slot stands below the pass that takes it through the model."""
    (drawing,) = [block for block in blocks(SEQUENCE, "text") if block.startswith("pass ")]
    first, _, *frames = drawing.splitlines()
    passes = {match.start(): int(match[0]) for match in re.finditer(r"\d+", first)}
    lag, slots = names["lag"](names["grid"], names["window"]), names["slots"]
    assert len(frames) == 4
    for number, line in enumerate(frames):
        drawn = {match.start(): int(match[0]) for match in re.finditer(r"(?<=\s)\d+", line) if match.start() > 8}
        at = {column: taken - number * lag for column, taken in passes.items()}
        assert drawn == {column: slot for column, slot in at.items() if 0 <= slot < slots}
