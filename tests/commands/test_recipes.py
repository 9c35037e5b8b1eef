"""Recipes: tables of settings become arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvideo.commands.recipes import expand


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[sequential]\nlearning-rate = 1e-3\nbatch = 8\nrandom_offset = false\ncheckpointing = true\nrates = [1, 2.5]\n"
        'split = "train"\n[image]\n'
    )
    return path


@pytest.mark.parametrize("joined", [False, True])
def test_a_table_becomes_arguments_before_the_users(recipe: Path, joined: bool) -> None:
    """Guards that every kind of value arrives, behind positional arguments and before what the user overrides."""
    own = [f"--recipe={recipe}"] if joined else ["--recipe", str(recipe)]
    assert expand("train sequential", ["clips", *own, "--batch", "4"]) == [
        "clips",
        *("--learning-rate", "0.001", "--batch", "8", "--no-random-offset", "--checkpointing"),
        *("--rates", "1", "2.5", "--split", "train"),
        *own,
        *("--batch", "4"),
    ]


def test_without_a_recipe_nothing_changes() -> None:
    """Guards the commands that have none."""
    assert expand("info", ["pocket", "--json"]) == ["pocket", "--json"]
    assert expand("train image", ["--recipe"]) == ["--recipe"]


def test_an_empty_table_is_a_table(recipe: Path) -> None:
    """Guards recipes that leave a command at its defaults."""
    assert expand("train image", ["--recipe", str(recipe)]) == ["--recipe", str(recipe)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[image]\n", r"has no table \[sequential\], it has \[image\]"),
        ("sequential = 3", "has no table"),
        ("[sequential]\nbatch = {a = 1}", "batch is {'a': 1}"),
        ("[sequential]\nbatch = [true]", "batch is \\[True\\]"),
        ("[sequential", "cannot use the recipe"),
        (None, "cannot use the recipe .*No such file"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    """Guards against a recipe that is silently left out."""
    path = tmp_path / "recipe.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        expand("train sequential", ["--recipe", str(path)])
