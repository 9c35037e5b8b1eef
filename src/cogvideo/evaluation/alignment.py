"""Alignment: do clips show what their prompts say, and do they move like real ones?

Generated clips are judged together with real clips of the same prompts and the tokenizer's reconstructions of these: a
model of its codes can do no better. All clips stay in the folder; a killed evaluation can be continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import locate
from cogvideo.config import require, size_text
from cogvideo.data.engines import progress
from cogvideo.evaluation.making import ClipOptions, clip_files, fill, generate, read_clip, start, write_clip
from cogvideo.evaluation.motion import STATIC_ENERGY, Movement, measure, movement
from cogvideo.evaluation.preferences import wilson
from cogvideo.evaluation.reader import SIZE, resized
from cogvideo.evaluation.subjects import Clip, Subject, SubjectResult
from cogvideo.files import exclusive_lock, write_json
from cogvideo.media.images import contact_sheet, evenly, write_image
from cogvideo.pipeline import CogVideoPipeline
from cogvideo.runs import RunFolder, provenance

GENERATED, RECONSTRUCTION, REAL = ROWS = ("generated", "reconstruction", "real")
"""Clips that are judged."""
SHOWN, FAILURES, COLUMNS = 6, 4, 11
"""Clips per subject on the contact sheet in any case, additional failures, and frames per row."""


class RowFindings(NamedTuple):
    """Findings about one row of a subject."""

    verdict: SubjectResult
    movement: Movement


def evaluate(
    pipeline: CogVideoPipeline, model: str, subjects: Sequence[Subject], making: ClipOptions, batch: int, out: Path
) -> dict[str, dict[str, RowFindings]]:
    """Make and judge all clips of some subjects in a folder, and write `alignment.json` and `alignment.png` there.

    Returns the findings by subject and row.
    """
    for subject in subjects:
        for first in range(0, len(subject.prompts), batch):
            start(pipeline, subject.prompts[first : first + batch], making)  # refuse unusable prompts now
    bundle = {name: entry.sha256 for name, entry in Manifest.read(locate(model)).components.items()}
    record = making.record(pipeline.model.config)
    folder = RunFolder(out)
    with exclusive_lock(out):
        folder.claim({"bundle": bundle, "making": record})
        results = {subject.name: _judge(subject, pipeline, out, making, batch) for subject in subjects}
        _write_sheet(out, subjects, results)
        _write_json(out / "alignment.json", _protocol(model, bundle, record, subjects), results)
    return results


def _judge(
    subject: Subject, pipeline: CogVideoPipeline, out: Path, making: ClipOptions, batch: int
) -> dict[str, RowFindings]:
    """Findings for each row of a subject; a reconstruction is the best that a model of the tokenizer's codes can do."""
    size, prompts = pipeline.model.config.frame_size, subject.prompts
    require(isinstance(size, int), f"frames are {size_text(size)}, expected squares, as the real clips are")
    assert isinstance(size, int)

    def made(numbers: list[int]) -> list[Clip]:
        return generate(pipeline, [prompts[number] for number in numbers], making)

    def reconstructed(numbers: list[int]) -> list[Clip]:
        decoded = (pipeline.model.autoencoder.reconstruct(subject.real(number, size)) for number in numbers)
        return [resized(clip, SIZE) for clip in decoded]

    clips = {REAL: [resized(subject.real(number, size), SIZE) for number in range(len(prompts))]}
    for name, make in ((GENERATED, made), (RECONSTRUCTION, reconstructed)):
        files = clip_files(out / name, prompts)
        with progress(f"{subject.name}: {name}", len(files), sum(file.exists() for file in files)) as advance:
            fill(files, make, write_clip, batch, advance)
        clips[name] = [read_clip(file) for file in files]
    motions = {name: [measure(clip) for clip in each] for name, each in clips.items()}
    return {name: RowFindings(subject.judge(clips[name]), movement(motions[name], motions[REAL])) for name in ROWS}


def _protocol(
    model: str, bundle: dict[str, str], making: dict[str, Any], subjects: Sequence[Subject]
) -> dict[str, Any]:
    """Everything needed to repeat the measurement."""
    return {
        **provenance(),
        "model": model,
        "bundle_sha256": bundle,
        "making": making,
        "static_below": STATIC_ENERGY,
        "subjects": {subject.name: subject.record() for subject in subjects},
        "seeds": {subject.name: [prompt.seed for prompt in subject.prompts] for subject in subjects},
    }


def _write_json(path: Path, protocol: dict[str, Any], results: dict[str, dict[str, RowFindings]]) -> None:
    """Write the protocol, shares and movement by subject and row, and the findings for each clip."""
    found: dict[str, dict[str, Any]] = {}
    for subject, rows in results.items():
        found[subject] = {}
        for row, (verdict, moved) in rows.items():
            intervals = {
                group: {name: wilson(share, verdict.counts[group]) for name, share in shares.items()}
                for group, shares in verdict.shares.items()
            }
            figures = {"shares": verdict.shares, "intervals": intervals, "movement": moved._asdict()}
            found[subject][row] = figures | {"clips": verdict.findings}
    write_json(path, {"protocol": protocol, "results": found})


def _write_sheet(out: Path, subjects: Sequence[Subject], results: dict[str, dict[str, RowFindings]]) -> None:
    """Write real clips above generated ones: the same prompts each time, then the first failures among the others."""
    rows, labels = [], []
    for subject in subjects:
        verdict = results[subject.name][GENERATED].verdict
        files = clip_files(out / GENERATED, subject.prompts)
        for number in shown(verdict.right):
            rows += [resized(subject.real(number, SIZE), SIZE), read_clip(files[number])]
            labels += [subject.prompts[number].text, verdict.words[number]]
    write_image(out / "alignment.png", contact_sheet(rows, COLUMNS, labels=labels))


def shown(right: Sequence[bool]) -> list[int]:
    """Numbers of clips for the contact sheet: evenly spread ones, then the first failures among the others."""
    spread = evenly(len(right), SHOWN).tolist()
    failed = [number for number, each in enumerate(right) if not each and number not in spread]
    return spread + failed[:FAILURES]
