"""`cogvideo study`: a blind preference study on this machine."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from cogvideo.config import require
from cogvideo.evaluation.study import Study, create
from cogvideo.evaluation.trials import REAL, Design, QuestionSet


def new(
    name: Path,
    /,
    *,
    a: Path,
    b: Path,
    prompts: Path,
    c: Path | None = None,
    real: Path | None = None,
    questions: QuestionSet = "pairs",
    trials: int | None = None,
    catches: int = 4,
    repeats: int = 4,
    size: int | None = None,
    seed: int = 0,
) -> None:
    """Make a blind study of clips from two or three systems, for `cogvideo study serve`.

    Every clip is written again as mp4 with a random name and without metadata. Clips are matched to prompts by the
    column `file` of the table of prompts; else by the names that `cogvideo generate` gives them; else by the numbers
    in their names, in the order of the prompts.

    Args:
        name: Folder of the study, which must not exist.
        a: Folder with the clips of the first system.
        b: Folder with the clips of the second system.
        prompts: Text file with a prompt on each line, or table with the column prompt and optionally file.
        c: Folder with the clips of a third system.
        real: Folder with real clips for catch trials, which show a clip against noise; clips of the systems unless
            given.
        questions: Questions to ask: which of two clips is better (pairs), which has better looks, motion and relevance
            (axes), or grades of single clips for texture, motion, relevance and overall quality (paper).
        trials: Trials of a rater, not counting repeats and catch trials; every clip once unless given.
        catches: Catch trials of a rater, at most one per prompt.
        repeats: Trials that a rater sees a second time, with sides swapped.
        size: Side in pixels to which clips are cropped and scaled; their own size unless given.
        seed: Seed of the order of trials.
    """
    from cogvideo.commands.matching import find_clips, read_texts  # tables need PyTorch, which takes seconds

    given = {"a": a, "b": b, "c": c}
    systems = {letter: folder for letter, folder in given.items() if folder is not None}
    folders = systems | ({} if real is None else {REAL: real})
    texts, stems = read_texts(prompts)
    design = Design(questions, len(texts), tuple(systems), real is not None, trials, catches, repeats, seed)
    clips = {system: find_clips(folder, texts, stems) for system, folder in folders.items()}
    create(name, design, texts, clips, {letter: folder.resolve().name for letter, folder in folders.items()}, size)
    print(f"{name}: {len(texts)} prompts, {len(design.trials(0))} trials for each rater")
    print(f"next: cogvideo study serve {quote(str(name))}")


def serve(name: Path, /, raters: int = 1, port: int = 8765) -> None:
    """Serve the web page of a study on this machine, and print a link for each rater.

    Raters compare clips with the keys 1, 2 and =, or grade them with digits. They may stop at any time and continue
    later with the same link. The page is for this machine alone (127.0.0.1).

    Args:
        name: Folder of the study.
        raters: Number of raters; more can be added later.
        port: Port to listen at; 0 for any that is free.
    """
    from cogvideo.web.listening import HOST, listening, run
    from cogvideo.web.study import application

    require(raters > 0, f"raters is {raters}, expected a positive number")
    study = Study(name)
    with listening(HOST, port) as listener:
        study.add_raters(raters)
        address = f"http://{HOST}:{listener.getsockname()[1]}"
        for rater in study.raters():
            progress = f"{rater.num_answered} of {rater.num_trials} answered"
            print(f"rater {rater.number + 1}: {address}/{rater.token}/ ({progress})")
        print("Press Ctrl-C to stop. All answers are on disk; the links stay valid at the same port.", flush=True)
        run(application(study), listener)


def report(name: Path, /, out: Path | None = None, margin: float = 0.05, slips: int = 0) -> None:
    """Write report.html, results.csv and answers.csv about a study, and print the results.

    Args:
        name: Folder of the study.
        out: Folder for the files; that of the study unless given.
        margin: Half-width of an interval; the report says how many answers narrow the intervals to it.
        slips: Number of wrong catch trials that a rater may have without failing.
    """
    from cogvideo.report import study

    study.report(name, name if out is None else out, margin, slips)
