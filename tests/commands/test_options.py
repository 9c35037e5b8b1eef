"""Command lines from signatures: arguments, recipes, and help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from cogvideo.commands.options import parse
from cogvideo.config import CogVideoConfig, InputError, require


@dataclass(frozen=True)
class Common:
    """Common options."""

    steps: int = 10
    """Number of steps."""


@dataclass(frozen=True)
class Training(Common):
    """Options of training. They decide the weights."""

    rate: float = 0.1
    """Rate of learning, in %."""
    steps: int = 20
    """Steps of a run."""

    def __post_init__(self) -> None:
        require(self.steps > 0, f"steps is {self.steps}, expected a positive number")


@dataclass(frozen=True)
class Everything:
    """Options of a stage."""

    data: tuple[Path, ...]
    """Folders to read."""
    training: Training = Training(steps=30)


def draw(
    prompt: tuple[str, ...] = (),
    /,
    *,
    everything: Everything,
    seed: int | None = None,
    shape: tuple[int, int] = (4, 4),
    kind: Literal["mp4", "gif"] | None = None,
    superres: bool = True,
    json: bool = False,
    from_: str = "",
    config: CogVideoConfig | None = None,
    recipe: Path | None = None,
) -> dict[str, Any]:
    """Draw clips.

    A second paragraph that is
    filled.

    Args:
        prompt: Texts to draw.
        everything: not shown
        seed: Seed of the
            first clip.
        shape: Height and width.
        kind: Kind of file.
        superres: Enlarge frames.
        json: Print JSON.
        from_: Place to start from.
        config: for Python
        recipe: TOML file.
    """
    return locals()


def drawn(*arguments: str) -> dict[str, Any]:
    return parse("draw", draw, ["--data=clips", *arguments])()


HELP = """\
usage: cogvideo draw [PROMPT ...] --data PATH ... [OPTIONS]

Draw clips.

A second paragraph that is filled.

arguments:
  PROMPT                Texts to draw.

options:
  --seed INT            Seed of the first clip.
  --shape INT INT       Height and width. (default: 4 4)
  --kind {mp4,gif}      Kind of file.
  --superres, --no-superres
                        Enlarge frames. (default: on)
  --json, --no-json     Print JSON.
  --from TEXT           Place to start from.
  --recipe PATH         TOML file.
  -h, --help            Show this help.

Options of a stage:
  --data [PATH ...]     Folders to read. (required)

Options of training:
  --steps INT           Steps of a run. (default: 30)
  --rate FLOAT          Rate of learning, in %. (default: 0.1)
"""


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks readable help: names of types, no None, defaults of the instance, text of the most derived class."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        parse("draw", draw, ["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out == HELP


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("", "prompt", ()),
        ("a --seed 3 b", "prompt", ("a", "b")),
        ("a --json b", "prompt", ("a", "b")),
        ("a -- --seed -1e-3 -- b", "prompt", ("a", "--seed", "-1e-3", "--", "b")),
        ("--seed=-1", "seed", -1),
        ("--seed 1 --seed 2", "seed", 2),
        ("--shape 1 2", "shape", (1, 2)),
        ("--no-superres", "superres", False),
        ("--json --no-json", "json", False),
        ("--kind gif", "kind", "gif"),
        ("--from here", "from_", "here"),
        ("", "everything", Everything((Path("clips"),))),
        ("--data a b --rate -1E-3", "everything", Everything((Path("a"), Path("b")), Training(rate=-1e-3, steps=30))),
        ("--data", "everything", Everything(())),
        ("", "config", None),
    ],
)
def test_arguments_become_values(arguments: str, name: str, value: object) -> None:
    """Checks each kind of option; text after -- is not an option, and omitted ones take the instance's defaults."""
    assert drawn(*arguments.split())[name] == value


def test_a_refusal_of_a_dataclass_is_passed_on() -> None:
    """Checks that a value rejected by a configuration is reported as the user's mistake."""
    with pytest.raises(InputError, match=r"^steps is 0, expected a positive number$"):
        drawn("--steps", "0")


def test_a_recipe_is_overridden_by_the_command_line(tmp_path: Path) -> None:
    """Checks every kind of value in a recipe, required options in it, and that the command line wins."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[draw]\ndata = ["a", "b"]\nsuperres = false\njson = true\nshape = [1, 2]\nrate = 1e-3\nsteps = 5\n'
        'from = "-y"\n[image]\n'
    )
    values = parse("train draw", draw, ["a", "--recipe", str(path), "--steps", "6", "--json"])()
    assert values["everything"] == Everything((Path("a"), Path("b")), Training(rate=1e-3, steps=6))
    assert (values["superres"], values["json"], values["shape"], values["from_"]) == (False, True, (1, 2), "-y")
    assert parse("image", draw, [f"--recipe={path}", "--data", "c"])()["everything"] == Everything((Path("c"),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[image]\n", r"there is no table \[draw\], only \[image\]"),
        ("draw = 3", r"there is no table \[draw\], only \[draw\]"),
        ("[draw]\nsteps = {a = 1}", "steps is {'a': 1}, expected a text, a number, true, false or a list"),
        ("[draw]\nsteps = [true]", r"steps is \[True\]"),
        ("[draw]\nsteps = 'a'", "--steps: got 'a', expected a whole number"),
        ("[draw]\nstep = 3", "unknown option --step; did you mean --steps?"),
        ("[draw]\nsteps = 3\nstray = -1", "unknown option --stray; "),
        ("[draw", "it cannot be read: Expected"),
        (None, "it cannot be read: No such file"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    """Prevents a recipe from being silently ignored."""
    path = tmp_path / "recipe.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=f"^recipe {path}: {message}"):
        drawn("--recipe", str(path))
