"""Documentation is executed: examples, commands, figures, diagrams and references of README and docs."""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from cogvideo.bundle.model import CogVideo
from cogvideo.cli import COMMANDS, main
from cogvideo.commands.info import info
from cogvideo.commands.options import parse
from cogvideo.config import (
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
from cogvideo.text import TextTokenizer
from reference import visible
from workshop import small_autoencoder

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # whole commands: the parts have their own tests

ROOT = Path(__file__).parents[1]
README, SEQUENCE, PAPER_MAP = ROOT / "README.md", ROOT / "docs/sequence.md", ROOT / "docs/paper_map.md"
GENERATION, RELEASED = ROOT / "docs/generation.md", ROOT / "docs/released.md"
DATA, TRAINING = ROOT / "docs/data.md", ROOT / "docs/training.md"
GUIDES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [
    *GUIDES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "recipes/pocket/README.md",
    ROOT / "tests/golden/README.md",
]
GRID, NUM_CODES = 4, 24


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: Path | str, language: str) -> list[str]:
    """Return the fenced blocks of a page, or of a text from one, whose info string is `language`."""
    text = page.read_text() if isinstance(page, Path) else page
    found = [Block(*each) for each in re.findall(r"^```(.*?)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
    return [block.text for block in found if block.language == language]


def section(page: Path, heading: str) -> str:
    """Return the text of a page below a heading, up to the next heading of that level."""
    return page.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def run(code: str, folder: Path) -> str:
    """Run Python as a reader would, in a new process in the folder; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def printed_comments(code: str) -> list[str]:
    """Return the output that an example announces: `print(...)  # this: explanation`."""
    return re.findall(r"^print\(.*\)  # ([^:\n]*):", code, re.MULTILINE)


# Examples


@pytest.mark.soak
def test_python_examples(tmp_path: Path) -> None:
    """Guards the first Python that readers try: it runs, and prints what the pages say."""
    (readme,), (generation,) = blocks(README, "python"), blocks(GENERATION, "python")
    expected = [*printed_comments(readme), *printed_comments(generation)]
    assert len(expected) == 2
    assert run(readme + generation, tmp_path).splitlines() == expected
    assert len(read_video(tmp_path / "heart.mp4", 8).frames) == 33


def test_examples_on_a_small_model(tmp_path: Path, text_model: bytes) -> None:
    """Guards the examples from prompt to pixels, with a small bundle of random weights instead of the real one."""
    (readme,), (generation,), (released,) = (blocks(page, "python") for page in (README, GENERATION, RELEASED))
    small_bundle(text_model).save_pretrained(tmp_path / "cogvideo-bundle")
    code = (readme + generation).replace('"pocket"', '"cogvideo-bundle"')
    clip, stage, *stages, shape = run(code + released, tmp_path).splitlines()
    expected = [*printed_comments(readme), *printed_comments(generation)]
    assert [clip, stage] == [each.replace("96", "48") for each in expected]
    assert len(read_video(tmp_path / "heart.mp4", 8).frames) == 33
    assert stages == ["image", *["sequential"] * 4, *["interpolation"] * 4]
    assert shape == "(1, 9, 48, 48, 3)"


def test_first_commands(tmp_path: Path, text_model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the examples of the README: each command finds the files that earlier ones wrote."""
    small_bundle(text_model).save_pretrained(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    shown = shown_commands(section(README, "Generate clips"))
    assert len(shown) == 5
    for command in shown:
        shorter = [] if "--from-sidecar" in command.arguments else ["--rounds", "0"]
        assert main([*command.arguments, "--model", "small", *shorter]) == 0, command.arguments
    lengths = {name: len(read_video(tmp_path / name, 1).frames) for name in ("heart.mp4", "again.mp4", "longer.mp4")}
    assert lengths == {"heart.mp4": 5, "again.mp4": 5, "longer.mp4": 8}
    assert len(list((tmp_path / "fish").glob("*.mp4"))) == 4
    assert len(list((tmp_path / "out").glob("*.gif"))) == 1


@pytest.mark.soak
def test_own_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the path from a folder of clips to a model: the commands of the pages, but smaller and shorter."""
    first = [each.arguments for each in shown_commands(section(README, "Train on your own clips"))]
    every_stage = [each.arguments for each in shown_commands(TRAINING.read_text().partition("\n## ")[0])]
    then = [arguments for arguments in every_stage if arguments not in first]
    report = shown_commands(DATA)[-1].arguments
    shown = [["data", "world", "--out", "clips", "--clips", "24"], *first, *then, report]
    names = ["world", "tokenizer", "text", "prepare", "image", "sequential", "generate"]
    names += ["interpolation", "superres", "report", "generate", "report"]
    assert [next(word for word in arguments if word in names) for arguments in shown] == names
    few = ["--steps", "2", "--batch", "2", "--sample-every", "0", "--evaluate-samples", "2"]
    fewer = dict.fromkeys(["image", "sequential", "interpolation", "superres"], few) | {
        "tokenizer": ["--preset", "tiny", "--steps", "6", "--plain-steps", "2", "--batch", "4", "--start-vectors", "1"],
        "prepare": ["--workers", "1"],
    }
    lengths = []
    monkeypatch.chdir(tmp_path)
    for arguments, name in zip(shown, names, strict=True):
        assert main([*arguments, *fewer.get(name, [])]) == 0, arguments
        if name == "generate":
            lengths.append(len(read_video(tmp_path / "ball.mp4", 8).frames))
    assert lengths == [40, 33]  # five frames, one per second, read at 8 fps; then all rounds
    assert "my-data" in (tmp_path / "my-data" / "report.html").read_text()
    assert "superres" in (tmp_path / "report.html").read_text()
    (code,) = blocks(DATA, "python")
    run(code, tmp_path)


def small_bundle(text_model: bytes) -> CogVideo:
    """Create a model with every component and the released templates."""
    words = TextConfig("{duration}秒<n>{caption}", "{caption} 高清摄影", "视频")
    text = TextTokenizer(text_model, words, NUM_CODES)
    config = CogVideoConfig(
        TransformerConfig(2, 32, 2, text.num_tokens, NUM_CODES, text.start_of_image, text.pad, 96),
        LayoutConfig(GRID, 5, text_slots=64, image_text_slots=64, frame_position=64),
        StageConfig(0),
        StageConfig(2),
        UpscalerConfig(text_slots=64, low_position=65),
        small_autoencoder(NUM_CODES),
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
    labels = torch.arange(NUM_CODES)  # one cluster per code: as many as the released samplers keep
    return CogVideo(config, **parts, image_tokenizer=Autoencoder(config.autoencoder), cluster_labels=labels, text=text)


# Commands


class Shown(NamedTuple):
    """A command on a page, and the output shown with it."""

    arguments: list[str]
    output: list[str]

    @property
    def name(self) -> str:
        """Name of the command: its first two words, or only the first."""
        two = " ".join(self.arguments[:2])
        return two if two in COMMANDS else self.arguments[0]


def shown_commands(page: Path | str) -> list[Shown]:
    """Return every `$ cogvideo ...` of a page, or of a text from one."""
    sessions = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    parts = re.split(r"^\$ ", sessions, flags=re.MULTILINE)[1:]
    lines = [part.splitlines() for part in parts]
    return [Shown(shlex.split(first)[1:], output) for first, *output in lines if first.split()[0] == "cogvideo"]


def test_shown_commands_exist() -> None:
    """Guards against commands that no page shows, and against shown commands and options that do not exist."""
    shown = [each for page in GUIDES for each in shown_commands(page)]
    assert {each.name for each in shown} == set(COMMANDS)
    for each in shown:
        for option in [argument for argument in each.arguments if argument.startswith("--")]:
            assert re.search(rf"{option}\b", help_of(each.name)), option
    mentioned = re.findall(r"`cogvideo ([a-z]+(?: [a-z]+)?)", "".join(page.read_text() for page in GUIDES))
    assert {each for each in mentioned if each not in COMMANDS and each.split()[0] not in COMMANDS} == set()


def test_containers_run_commands_that_exist() -> None:
    """Guards deployments: container commands parse, nothing runs as root, and the build context has what is copied."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    (command,) = [json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD ")]
    assert "USER 1000" in lines
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert services["database"]["user"] == "postgres"
    for name, *arguments in [command, *(services[each]["command"].split() for each in ("server", "worker"))]:
        module, function = COMMANDS[name].target.split(":")
        parse(name, getattr(import_module(module), function), arguments)
    copied = [part for line in lines if line.startswith("COPY ") for part in line.split()[1:-1]]
    assert {f"!{each}" for each in copied} <= set((ROOT / ".dockerignore").read_text().splitlines())


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_mentioned_options_exist(page: Path) -> None:
    """Guards against options in running text that no command has."""
    mentioned = set(re.findall(r"`(--[a-z][a-z0-9-]*)", page.read_text()))
    assert {option for option in mentioned if not re.search(rf"{option}\b", every_help())} == set()


@cache
def every_help() -> str:
    """Return the help of all commands."""
    return "".join(help_of(name) for name in COMMANDS)


@cache
def help_of(name: str) -> str:
    """Return the help of a command."""
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    return printed.getvalue()


def test_shown_output_is_real(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the memory figures that users plan with: every line shown is one that the command prints."""
    monkeypatch.setenv("COLUMNS", "80")
    (shown,) = [each for each in shown_commands(RELEASED) if each.name == "info"]
    info(*shown.arguments[1:])
    real = {line.strip() for line in capsys.readouterr().out.splitlines()}
    lines = [line.strip() for line in shown.output if line.strip() not in ("", "...")]
    assert len(lines) > 10
    assert [line for line in lines if line not in real] == []


# Files


def tree() -> list[str]:
    """Return the paths of the tree in CONTRIBUTING: two spaces per level; folders end with a slash."""
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
    """Guards against files that the tree does not explain; `__init__.py` of subpackages need no line."""
    listed = set(tree())
    for folder, patterns in {"src/cogvideo": ("*.py", "py.typed"), "benchmarks": ("*.py",), "docs": ("*.md",)}.items():
        for file in [file for pattern in patterns for file in (ROOT / folder).rglob(pattern)]:
            path = file.relative_to(ROOT).as_posix()
            needs_no_line = file.name == "__init__.py" and file.parent != ROOT / "src/cogvideo"
            assert needs_no_line or path in listed, f"the tree in CONTRIBUTING.md lacks {path}"


def test_tree_lists_no_other_files() -> None:
    """Guards against lines for files that were moved or deleted, and against duplicate lines."""
    listed = tree()
    assert len(listed) == len(set(listed))
    for path in listed:
        assert list(ROOT.glob(path.rstrip("/"))), f"there is no {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Guards against links to missing files and headings."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not heading or heading in headings(file), target


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub generates them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_references_of_the_paper_map() -> None:
    """Guards the paper map against renamed or moved functions: `file.py:name` or `file.py:Class.name`."""
    references = re.findall(r"`([\w/]+\.py):([\w.]+)`", PAPER_MAP.read_text())
    assert len(references) > 50
    for file, name in references:
        assert name in definitions(ROOT / "src/cogvideo" / file), f"{file} has no {name}"


def definitions(file: Path) -> set[str]:
    """Return the functions, classes, their methods and fields, and constants of a module."""
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


# Diagrams


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Names that the table of numbers uses: the definitions above it."""
    (code,) = blocks(SEQUENCE, "python")
    defined: dict[str, Any] = {}
    exec(code, defined)
    return defined


def numbers() -> list[tuple[str, str]]:
    """Return the expression and value of each line of the table."""
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", SEQUENCE.read_text().partition("## Numbers")[2], re.MULTILINE)


@pytest.mark.parametrize(("expression", "value"), numbers())
def test_numbers_of_the_drawings(names: dict[str, Any], expression: str, value: str) -> None:
    """Guards the figures in the diagrams: each is what the layout says."""
    assert eval(expression, names) == ast.literal_eval(value)


def test_numbers_are_read() -> None:
    """Guards against a table whose format has changed, so that it is no longer tested."""
    assert len(numbers()) == SEQUENCE.read_text().partition("## Numbers")[2].count("\n| `") >= 30


SEES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "■": torch.ones_like,
    "◣": torch.tril,
    "·": torch.zeros_like,
}


@pytest.mark.parametrize("stage", ["sequential", "interpolation"])
@pytest.mark.parametrize("channel", ["spatial", "temporal"])
def test_drawings_of_the_masks(stage: str, channel: str, names: dict[str, Any]) -> None:
    """Guards the mask diagrams: they match the reference masks, block by block, in the stage's feeding order."""
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
    """Guards the diagram of the lag: every slot is below the pass that feeds it."""
    (drawing,) = [block for block in blocks(SEQUENCE, "text") if block.startswith("pass ")]
    first, _, *frames = drawing.splitlines()
    passes = {match.start(): int(match[0]) for match in re.finditer(r"\d+", first)}
    lag, slots = names["lag"](names["grid"], names["window"]), names["slots"]
    assert len(frames) == 4
    for number, line in enumerate(frames):
        drawn = {match.start(): int(match[0]) for match in re.finditer(r"(?<=\s)\d+", line) if match.start() > 8}
        at = {column: taken - number * lag for column, taken in passes.items()}
        assert drawn == {column: slot for column, slot in at.items() if 0 <= slot < slots}
