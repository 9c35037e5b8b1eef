"""`cogvideo data captions`: a table for captions, and a page that shows the clips while you fill it in."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any
from unicodedata import category

from cogvideo.config import require
from cogvideo.data.folders import find_manifest
from cogvideo.evaluation.review import NO_ROW, listed
from cogvideo.files import write_csv
from cogvideo.media.video import VideoError, read_video
from cogvideo.report.page import count, write_page

TABLE, PAGE = "captions.csv", "captions.html"
FPS, SIDE, MAX_FRAMES = 4.0, 160, 32
"""Frames per second, side and maximum number of frames that the page shows of a clip."""


def captions(clips: Path, /) -> None:
    """Write a table for the captions of clips, and a page that shows the clips and saves what you write.

    Both include the captions that exist. An existing table is kept: the page then shows its captions, and empty fields
    for the clips that it lacks.

    Args:
        clips: Folder of videos; captions.csv and captions.html are written there.
    """
    import_module("jinja2")
    require(clips.is_dir(), f"there is no folder {clips}, expected one with videos")
    items, rejected, named = listed(str(clips))
    rows = [(str(each.media), "" if each.id in named else each.captions[0]) for each in items]
    for each in rejected:
        if each.reason == NO_ROW:
            rows.append((str(clips.absolute() / each.id), ""))
        else:
            print(f"{each.id} is left out: {each.reason} ({each.detail})")
    shown: list[dict[str, Any]] = []
    for path, caption in rows:
        file = Path(path).relative_to(clips.absolute()).as_posix()
        if any(category(sign) in ("Cc", "Cs") for sign in file):
            print(f"{file!r} is left out: its name has characters that a page cannot hold: rename it")
            continue
        try:
            frames = read_video(Path(path), FPS, SIDE, fit="letterbox", max_frames=MAX_FRAMES).frames
        except VideoError as error:
            print(f"{file} is left out. {error}")
            continue
        shown.append({"file": file, "caption": caption, "frames": frames})
    require(len(shown) > 0, f"no clip in {clips} can be shown, expected a folder with videos")
    if find_manifest(clips) is None:
        write_csv(clips / TABLE, [("file", "caption"), *((each["file"], each["caption"]) for each in shown)])
        print(f"{clips / TABLE}: {count(sum(not each['caption'] for each in shown), 'empty caption')}")
    page = clips / PAGE
    lead = f"{count(shown, 'clip')} of {clips.resolve().name}."
    write_page(page, "data captions", "Captions", lead, "captions.html", {"clips": shown, "fps": FPS})
    print(f"{page}: open it in a browser, write captions, save, and replace {TABLE}")
