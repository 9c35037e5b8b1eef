"""`cogvideo data report` and `cogvideo train report`: pages about prepared data and about training runs."""

from __future__ import annotations

from pathlib import Path

from cogvideo.config import require
from cogvideo.data.dataset import Dataset
from cogvideo.files import check_place
from cogvideo.report import data as dataset_page
from cogvideo.report import training as training_page
from cogvideo.report.page import count, middle, write_page
from cogvideo.report.runs import read_runs


def data(folder: Path, /, out: Path | None = None, tokenizer: str = "", clips: int = 12, seed: int = 0) -> None:
    """Write a page about prepared data: counts, lengths, pictures, captions, codes, and what was rejected.

    It is one HTML file without scripts, which needs no other file and no network. Parts that need the
    source of the clips or the tokenizer are left out if these are gone, and the page says so. The same data gives the
    same bytes.

    Args:
        folder: Output of `cogvideo data prepare`.
        out: File of the page; report.html in the folder unless given.
        tokenizer: Bundle with the image tokenizer, if it has moved since the data was prepared.
        clips: Number of random clips to show.
        seed: Seed of the clips to show, and of those to count if there are too many to count all.
    """
    out = folder / "report.html" if out is None else out
    require(clips >= 0, f"clips is {clips}, expected 0 or more")
    check_place(out, "the page")
    dataset = Dataset(folder)
    facts = dataset_page.facts(dataset, tokenizer, clips, seed)
    source, made_with = middle(dataset.card.source, 120), middle(dataset.card.tokenizer, 120)
    lead = f"Clips from {source}, encoded with the image tokenizer of {made_with}."
    write_page(out, "data report", f"{folder.resolve().name}: prepared clips", lead, "data.html", facts)
    print("\n".join([*(f"missing: {each}" for each in facts["missing"]), f"written: {out}"]))


def training(runs: tuple[Path, ...], /, *, out: Path) -> None:
    """Write a page about one or several training runs.

    It is one HTML file without scripts, which needs no other file and no network. Runs of one stage share their plots.
    Unfinished runs are shown as far as they got. The same files give the same bytes.

    Args:
        runs: Folders of runs (such as OUT/.sequential-run), or folders with runs inside.
        out: File of the page.
    """
    require(len(runs) > 0, "there is no run, expected one or several folders, such as my-model/.sequential-run")
    check_place(out, "the page")
    found = read_runs(runs)
    num_runs = count(found, "run")
    title = f"{found[0].name}: training" if len({run.name for run in found}) == 1 else "Training runs"
    lead = "Curves show values by step; the numbers below are the last values."
    lead = f"{num_runs}. {lead} Losses of different stages cannot be compared."
    write_page(out, "train report", title, lead, "training.html", training_page.facts(found))
    print(f"written: {out}, with {num_runs}")
