"""`cogvideo data world`: files that the data tools accept."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from cogvideo import world
from cogvideo.commands.world import world as command
from cogvideo.data.sources import SourceOptions, list_source
from cogvideo.media.video import read_video


def test_the_command_writes_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches files that `cogvideo data prepare` cannot use."""
    command(out=tmp_path / "clips", clips=3, start=5, size=32, split="held_out")
    listing = list_source(str(tmp_path / "clips"), SourceOptions())
    expected = list(itertools.islice(world.scenes("held_out", 5), 3))
    assert not listing.rejected
    assert [item.captions for item in listing.items] == [world.captions(scene) for scene in expected]
    assert [item.attributes for item in listing.items] == [world.attributes(scene) for scene in expected]
    assert {item.split for item in listing.items} == {"held_out"}
    video = read_video(tmp_path / "clips" / f"world-{expected[0].index:06}.mp4", 8.0)
    difference = np.abs(video.frames.astype(int) - world.render(expected[0], 32))
    assert difference.mean() < 8
    assert (tmp_path / "clips" / "contact_sheet.png").stat().st_size > 1000
    assert len((tmp_path / "clips" / "captions.jsonl").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "clips" / "captions.jsonl").read_text().splitlines()[0])["split"] == "held_out"
    assert "3 clips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clips": 0}, "clips is 0, expected a positive number"),
        ({"start": -2}, "start is -2, expected 0 or more"),
        ({"size": 8}, "size is 8, expected an even number from 16 to 4096"),
        ({"size": 1_000_000}, "size is 1000000, expected an even number from 16 to 4096"),
        ({"size": 33}, "size is 33, expected an even number"),
    ],
)
def test_the_command_refuses_mistakes_before_it_writes(tmp_path: Path, options: dict[str, int], message: str) -> None:
    """Refuses invalid options before a folder is created."""
    with pytest.raises(ValueError, match=message):
        command(out=tmp_path / "clips", **options)
    assert not (tmp_path / "clips").exists()


def test_the_command_does_not_overwrite_a_file_by_a_folder(tmp_path: Path) -> None:
    """Prevents a traceback if `--out` is a file."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        command(out=tmp_path / "file", clips=1, size=32)


@pytest.mark.parametrize("name", ["captions.jsonl", "contact_sheet.png"])
def test_the_command_replaces_its_own_files_alone(name: str, tmp_path: Path) -> None:
    """Protects a user's own files in the folder; those of an earlier call are replaced."""
    (tmp_path / name).write_text('{"file": "mine.mp4"}')
    with pytest.raises(ValueError, match=r"has a captions\.jsonl or contact_sheet\.png of something else"):
        command(out=tmp_path, clips=1, size=32)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    (tmp_path / name).unlink()
    for clips in (2, 1):
        command(out=tmp_path, clips=clips, size=32)
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 1
