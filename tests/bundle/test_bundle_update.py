"""Updating a bundle: components are added, replaced, and removed, and all other files stay exactly as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from cogvideo.bundle.format import MODULES, Manifest
from cogvideo.bundle.model import CogVideo, update
from cogvideo.config import CogVideoConfig
from cogvideo.files import LOCK
from gallery import loud, make_model, make_parts
from killing import kill_at
from workshop import small_config


@pytest.fixture
def config(train_text_model: Callable[..., bytes]) -> CogVideoConfig:
    return small_config(train_text_model())


@pytest.fixture
def folder(train_text_model: Callable[..., bytes], tmp_path: Path) -> Path:
    """Bundle without interpolation."""
    make_model(tmp_path / "model", train_text_model(), without=("interpolation",))
    return tmp_path / "model"


def hashes(folder: Path) -> dict[str, str]:
    """Hashes of the components, verified against the current files."""
    manifest = Manifest.read(folder)
    for entry in manifest.components.values():
        entry.verify(folder / entry.file)
    return {name: entry.sha256 for name, entry in manifest.components.items()}


def test_components_come_and_go(folder: Path, config: CogVideoConfig) -> None:
    """Guards the other components: only what is named changes, and what is removed leaves no file."""
    before, channel = hashes(folder), loud(MODULES["interpolation"](config), 3)
    update(folder, config, interpolation=channel, sequential=loud(MODULES["sequential"](config), 4))
    added = hashes(folder)
    assert added.keys() == before.keys() | {"interpolation"}
    assert {name for name in before if added[name] != before[name]} == {"sequential"}
    update(folder, config, without=("sequential", "superres", "interpolation_base"))
    left = hashes(folder)
    assert left == {name: each for name, each in added.items() if name not in ("sequential", "superres")}
    files = {entry.file for entry in Manifest.read(folder).components.values()}
    assert {each.name for each in folder.iterdir()} == files | {"bundle.json", LOCK}
    loaded = CogVideo.from_pretrained(folder).interpolation.channel
    assert loaded is not None
    assert all(torch.equal(each, loaded.state_dict()[name]) for name, each in channel.state_dict().items())


def test_what_is_lost_can_be_replaced(folder: Path, config: CogVideoConfig) -> None:
    """Checks recovery from a file deleted by mistake. Components to be kept must exist."""
    before = hashes(folder)
    (folder / "sequential.safetensors").unlink()
    with pytest.raises(ValueError, match=r"incomplete: there is no file .*sequential"):
        update(folder, config, superres=loud(MODULES["superres"](config), 3))
    update(folder, config, sequential=loud(MODULES["sequential"](config), 1))
    assert hashes(folder) == before


def test_unknown_names_are_refused(folder: Path, config: CogVideoConfig) -> None:
    """Guards against a misspelled component that is silently ignored."""
    before, message = hashes(folder), r"got the components \['interpolaton'\], expected some of \['base', "
    with pytest.raises(ValueError, match=message):
        update(folder, config, interpolaton=loud(MODULES["interpolation"](config), 3))
    with pytest.raises(ValueError, match=message):
        update(folder, config, without=("interpolaton",))
    assert hashes(folder) == before


def test_what_is_given_is_not_taken_away(folder: Path, config: CogVideoConfig) -> None:
    """Checks that a component that is both given and listed in `without` is replaced, not removed."""
    update(folder, config, without=("sequential",), sequential=loud(MODULES["sequential"](config), 4))
    assert "sequential" in hashes(folder)


def test_where_there_is_none_a_bundle_is_made(tmp_path: Path, config: CogVideoConfig) -> None:
    """Checks that updating a new folder creates a bundle, as for its first stage."""
    update(tmp_path / "new", config, without=("superres",), base=loud(MODULES["base"](config), 1))
    assert hashes(tmp_path / "new").keys() == {"base"}


def test_another_configuration_is_refused(
    folder: Path, config: CogVideoConfig, train_text_model: Callable[..., bytes]
) -> None:
    """Guards a bundle against parts of another model, and against changes by a rejected update."""
    before = hashes(folder)
    with pytest.raises(ValueError, match="has a different configuration from the components to be written"):
        update(folder, small_config(train_text_model(), 64), base=MODULES["base"](small_config(train_text_model(), 64)))
    with pytest.raises(ValueError, match="does not fit the configuration as sequential"):
        update(folder, config, sequential=MODULES["base"](config))
    assert hashes(folder) == before


def test_whenever_it_is_killed_the_bundle_is_whole(folder: Path, config: CogVideoConfig, tmp_path: Path) -> None:
    """Guards training into a bundle: it is the old one or the new one, whatever interrupts the end of a run."""
    channel, before, seen = loud(MODULES["sequential"](config), 4), hashes(folder), []
    for number in count(1):
        copy = tmp_path / f"killed-{number}"
        shutil.copytree(folder, copy)
        killed = kill_at(number, lambda: update(copy, config, without=("superres",), sequential=channel))  # noqa: B023
        seen.append(hashes(copy))
        if not killed:
            break
    new = seen[-1]
    assert all(found in (before, new) for found in seen)
    assert before in seen
    assert "superres" not in new
    assert CogVideo.from_pretrained(copy).components


def test_a_component_is_told_by_its_name(folder: Path, train_text_model: Callable[..., bytes]) -> None:
    """Checks what training looks up in a bundle: its folder, file hashes, components, and which ones are missing."""
    model, parts = CogVideo.from_pretrained(folder), make_parts(train_text_model())
    assert model.folder == folder
    assert {name: model.sha256(name) for name in model.components} == hashes(folder)
    assert model.component("base") is model.base
    assert model.component("sequential") is model.sequential.channel
    assert model.component("text") is model.text
    assert model.sha256("interpolation") is None
    with pytest.raises(ValueError, match=r"the bundle .*model has no interpolation, it has: base, "):
        model.component("interpolation")
    alone = CogVideo(small_config(train_text_model()), base=parts["base"])
    assert (alone.folder, alone.sha256("base"), alone.component("base")) == (None, None, parts["base"])
    with pytest.raises(ValueError, match="this model has no text, it has: base"):
        alone.component("text")
