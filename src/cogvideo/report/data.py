"""`cogvideo data report`: what is in a dataset, as one HTML page that needs nothing else."""

from __future__ import annotations

import csv
from pathlib import Path

from cogvideo import __version__
from cogvideo.config import InputError, require
from cogvideo.data.dataset import REJECTED, Dataset
from cogvideo.files import replacing
from cogvideo.report.clips import find_origin, frame_size, source_sizes
from cogvideo.report.page import page
from cogvideo.report.sample import NUM_ROWS, draw_rows, take_sample
from cogvideo.report.sections import Rejected, Report, lead, sections

FOOT = f"Made by cogvideo data report, version {__version__}. This page needs no other file and no network."
NUM_EXAMPLES = 5
"""Clips that are named for each reason of rejection."""
NUM_SIZED = 200
"""Files of the source whose size is looked up."""
SHEET_WIDTH = 640
"""Pixels that the frames of a clip may take side by side; four to eight of them are shown."""


def report(folder: Path, /, out: Path | None = None, tokenizer: str = "", clips: int = 12, seed: int = 0) -> None:
    """Write a page about prepared data: counts, lengths, pictures, captions, codes, and what was rejected.

    It is one HTML file without scripts, which needs no other file and no network. What needs the clips' source or the
    tokenizer is left out where they are not there any more, and the page says so. The same data gives the same bytes.

    Args:
        folder: output of `cogvideo data prepare`.
        out: file of the page; report.html in the folder unless given.
        tokenizer: bundle with the image tokenizer, if it is not where it was when the data was prepared.
        clips: how many random clips are shown.
        seed: of which clips are shown, and which are counted where there are too many to count all.

    Raises:
        ValueError: the folder holds no dataset, or a damaged one, or an option cannot be used.
        OSError: the page cannot be written.
    """
    out = folder / "report.html" if out is None else out
    require(clips >= 0, f"clips is {clips}, expected 0 or more")
    require(not out.is_dir(), f"{out} is a folder, expected the file of the page")
    dataset = Dataset(folder)
    require(out.parent.is_dir(), f"there is no folder {out.parent} for the page")
    facts = gather(dataset, tokenizer, clips, seed)
    content = page(f"{folder.resolve().name}: prepared clips", lead(facts.card), sections(facts), FOOT)
    with replacing(out) as file:
        file.write(content)
    print("\n".join([*(f"missing: {each}" for each in facts.missing), f"written: {out}"]))


def gather(dataset: Dataset, tokenizer: str, num_clips: int, seed: int) -> Report:
    """Everything that the page says.

    Raises:
        ValueError: a shard is damaged.
    """
    card = dataset.card
    shown = [dataset.row(row) for row in draw_rows(dataset, num_clips, seed)]
    sized = [dataset.row(row).id for row in draw_rows(dataset, NUM_SIZED, seed)]
    origin = find_origin(card, tokenizer, [*(row.id for row in shown), *sized])
    columns = min(8, max(4, SHEET_WIDTH // (frame_size(card) or SHEET_WIDTH)))
    return Report(
        card=card,
        sample=take_sample(dataset, seed, NUM_ROWS),
        clips=[origin.clip(row, columns) for row in shown],
        sizes=source_sizes((origin.items[id] for id in sized if id in origin.items), origin.frames),
        missing=origin.missing,
        rejected=read_rejected(dataset.folder / REJECTED),
    )


def read_rejected(path: Path) -> Rejected | None:
    """How many clips the table of rejected ones has for each reason, and the first of each; None if it is not there.

    Raises:
        ValueError: it is no such table.
    """
    rejected = Rejected({}, {})
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                _add(rejected, row["id"], row["reason"], row["detail"])
    except FileNotFoundError:
        return None
    except (KeyError, csv.Error, OSError) as error:
        raise InputError(
            f"cannot read {path} ({error}), expected a table with the columns id, reason, detail"
        ) from error
    return rejected


def _add(rejected: Rejected, id: str, reason: str, detail: str) -> None:
    rejected.counts[reason] = rejected.counts.get(reason, 0) + 1
    examples = rejected.examples.setdefault(reason, [])
    if len(examples) < NUM_EXAMPLES:
        examples.append((id or "", detail or ""))
