"""Fine-tuning on your own clips: a chain of steps, each skipped once it is done, so that a killed chain can resume.

| step | makes | is done when |
|---|---|---|
| clips | clips.csv: pieces of the clips with captions and splits | it exists |
| start | the bundle, with what can be kept of the base | its training.json exists |
| tokenizer | the image tokenizer, if the base's reconstructs the clips poorly | its run is finished |
| data | codes of the clips | the dataset is complete |
| image, sequential, interpolation | the stages, from the base's weights | their runs are finished |

The number of training steps is chosen from the time left when a stage begins, and is then part of its run's identity.
With adapters, the base stays unchanged, including both tokenizers, and the stages train an adapter per component.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from cogvideo.bundle.adapters import ADAPTED, ADAPTERS, OWN
from cogvideo.bundle.format import MANIFEST
from cogvideo.bundle.model import CogVideo
from cogvideo.bundle.model import update as update_bundle
from cogvideo.config import CogVideoConfig, Limited, Positive, Seed, Sides, require
from cogvideo.data.clips import FrameRates, filled_rates
from cogvideo.data.dataset import CARD, Dataset
from cogvideo.data.encoding import PrepareSettings
from cogvideo.data.engines import Machines
from cogvideo.data.frame_store import StoreSettings
from cogvideo.data.frames import FrameSettings, read_item
from cogvideo.data.prepare import prepare
from cogvideo.data.shards import digest
from cogvideo.data.sources import Item, Rejection, SourceOptions, list_source
from cogvideo.devices import usable
from cogvideo.evaluation.networks.cache import network_path
from cogvideo.evaluation.review import check_usable, has_detector, in_short, listed, on_shape, review, with_splits
from cogvideo.files import exclusive_lock, write_csv
from cogvideo.generation.request import shape_of
from cogvideo.media.images import evenly
from cogvideo.models.autoencoder import to_frames
from cogvideo.models.perceptual import load_lpips
from cogvideo.runs import IDENTITY, TYPED, RunFolder
from cogvideo.text import TextTokenizer, is_unicode
from cogvideo.training.card import REPORTS, read_reports, write_model_card
from cogvideo.training.checkpoints import Checkpoints
from cogvideo.training.export import export_run
from cogvideo.training.launch import seconds_per_step, train
from cogvideo.training.objectives.image import ImageMixture
from cogvideo.training.objectives.tokenizer import TokenizerSettings
from cogvideo.training.optim import StageOptimization
from cogvideo.training.recorder import ProgressLine, standard_error
from cogvideo.training.session import DataOptions, LoggingConfig, Options, StageLogging
from cogvideo.training.stages import STAGES, Choice, StageName
from cogvideo.training.text import figures, train_model
from cogvideo.training.tokenizer import RUN as TOKENIZER_RUN
from cogvideo.training.tokenizer import evaluate, train_tokenizer

RUN = ".finetune-run"
"""Folder of the chain inside the bundle's folder."""
TABLE, DATA = "clips.csv", "data"
"""Names in that folder: the clips, and their codes."""
TITLES = {
    "clips": "Looking at the clips",
    "start": "Copying the base",
    "tokenizer": "Image tokenizer",
    "data": "Encoding the clips",
    "image": "Image model",
    "sequential": "Key frames",
    "interpolation": "Frames in between",
}
TRAINED: tuple[StageName, ...] = ("image", "sequential", "interpolation")
SHARES = {"tokenizer": 0.3, "image": 0.3, "sequential": 0.22, "interpolation": 0.12}
"""Shares of the time; the rest is for reviewing the clips, encoding, and the page."""
MIN_PSNR, MAX_LPIPS = 25.0, 0.35
"""Reconstructions that are worse on average count as poor: faces are no longer recognizable."""
MIN_FITTING = 0.9
"""Share of captions that must fit into the text slots for the base's text tokenizer to be kept."""
MIN_STEPS = 20
MIN_JUDGES = 4
"""Minimum number of held-out clips for exporting the step with the lowest held-out loss instead of the last one: the
loss of one or two clips that look like no other is lowest before anything is learned."""
_NOT_TEXT = ("path is not text", "its bytes are not UTF-8, as tables of clips are: rename the folder or the file")
"""Reason and details of clips that the table cannot name."""
RATE, TOKENIZER_RATE = 1e-3, 1e-3
"""Learning rates: a quarter and a third of those used to train the model in the box."""
ADAPTER_RATE = 3e-2
"""Learning rate of adapters: they learn as fast as full training, at a third of it half as fast (measured)."""


@dataclass(frozen=True)
class Finetuning(Limited):
    """Settings of a fine-tuning."""

    minutes: Positive[float] = 20.0
    """Time in minutes, which determines the number of training steps."""
    steps: Positive[int] | None = None
    """Steps of each stage, instead of as many as fit into the time."""
    batch: Positive[int] = 8
    """Samples per step; at most the number of frames that the clips have at 8 per second."""
    fit: Literal["crop", "letterbox"] = "crop"
    """Treatment of clips of another shape: crop to the center, or add white bars."""
    size: Sides | None = None
    """Width and height of a frame in pixels, such as 96x56, before super-resolution; the base's by default."""
    lora: Positive[int] | None = None
    """Rank of adapters (LoRA) to train instead of the base's weights, which stay unchanged; such as 8."""
    seed: Seed = 0
    """Seed of the order of the clips and of all random choices."""
    device: str = "auto"
    """Device to run on: cpu, cuda, cuda:0, or auto."""

    @property
    def adapters(self) -> dict[str, float]:
        """Scales of the adapters that the new model generates with."""
        return {} if self.lora is None else {OWN: 1.0}

    def trained_in(self, out: Path) -> Path:
        """Folder of the stages' runs and results, in the bundle's folder `out`."""
        return out if self.lora is None else out / ADAPTERS / OWN


class Step(NamedTuple):
    """A step of the chain."""

    name: str
    work: Callable[[], None]
    is_done: Callable[[], bool]


class FinetuningRun:
    """A fine-tuning of a base on the clips of a source, into a bundle."""

    def __init__(self, source: str, out: Path, base: str, settings: Finetuning) -> None:
        usable(settings.device)
        self.source, self.out, self.settings, self._typed = source, out, settings, base
        self.base = CogVideo.from_pretrained(base)
        needed = ("image_tokenizer", "text", *(() if settings.lora is None else ADAPTED))
        lacks = [name for name in needed if name not in self.base.components]
        require(not lacks, f"the base {base} has no {', '.join(lacks)}, expected a model with {', '.join(needed)}")
        assert self.base.folder is not None
        require(self.base.folder.resolve() != out.resolve(), f"{out} is the base: give the new model another folder")
        holds_clips = Path(source).resolve().is_relative_to(out.resolve())
        require(not holds_clips, f"{out} holds the clips: give the new model a folder of its own")
        most = self.config.transformer.hidden  # which also checks the size
        require((settings.lora or 1) <= most, f"lora is {settings.lora}, expected a rank of 1 to {most}")
        items, rejected, self._named = listed(source)
        is_foreign = (out / MANIFEST).exists() and not (out / RUN).exists()
        require(not is_foreign, f"{out} holds another model: give this one a folder of its own")
        self.folder = RunFolder(out / RUN)
        self.table, self.data = self.folder.path / TABLE, self.folder.path / DATA
        self.items = [each for each in items if is_unicode(self._place(each))]
        odd = [Rejection(each.id, *_NOT_TEXT) for each in items if not is_unicode(self._place(each))]
        self.rejected = [*rejected, *odd]
        require(len(self.items) > 0, f"no clip in {source} can be used: {': '.join(_NOT_TEXT)}")

    @property
    def num_steps(self) -> int:
        """Number of steps, including the final page."""
        return len(TITLES) + 1

    def run(self) -> None:
        """Do all remaining steps."""
        with exclusive_lock(self.folder.path):
            self._claim()
            steps = self._steps()
            for number, step in enumerate(steps, 1):
                if step.is_done():
                    continue
                _say(f"[{number}/{self.num_steps}] {TITLES[step.name]}{self._time_left}")
                began = time.monotonic()
                step.work()
                seconds = round(time.monotonic() - began, 1)
                self.folder.report({"step": number, "name": step.name, "seconds": seconds})

    def _claim(self) -> None:
        """Check that clips, base and settings match those of the first step."""
        files = [each.media for each in self.items if isinstance(each.media, Path)]
        sizes = [file.stat().st_size if file.is_file() else None for file in files]  # links may be broken
        clips = [[each.id, each.captions, each.start, each.end, each.split] for each in self.items]
        settings = {name: value for name, value in asdict(self.settings).items() if name != "device"}
        base = {name: self.base.sha256(name) for name in self.base.components}
        identity = {"clips": len(clips), "listing": digest([clips, sizes]), "base": base, "settings": settings}
        if not self.table.exists():  # nothing has been made yet
            (self.folder.path / IDENTITY).unlink(missing_ok=True)
        typed = {TYPED: self._typed}
        is_changed = self.folder.began and self.folder.identity["listing"] != identity["listing"]
        changes = "the clips changed" if is_changed else self.folder.changes(identity, typed)
        advice = f"pass the same as before to continue it, or remove the folder {self.out} to start anew"
        require(not changes, f"another run began in {self.out}: {changes}; {advice}")
        self.folder.claim(identity, typed)

    @property
    def seconds(self) -> dict[str, float]:
        """Time that each finished step took."""
        return {row["name"]: row["seconds"] for row in self.folder.rows()}

    @property
    def minutes_left(self) -> float:
        """Minutes left of the requested time."""
        return max(0.0, self.settings.minutes - sum(self.seconds.values()) / 60)

    @property
    def _time_left(self) -> str:
        """Suffix of a progress message with the time left; empty if the number of steps is fixed."""
        if self.settings.steps is not None:
            return ""
        left = f"{self.minutes_left:.0f}"
        return f"; about {left} min left in all" if left != "0" else "; the time is up, and the rest is kept short"

    def _steps(self) -> list[Step]:
        def is_over(run: str) -> bool:
            return RunFolder(self.out / run).summary is not None

        is_encoded = (self.data / CARD).exists
        steps = [
            Step("clips", self._review, self.table.exists),
            Step("start", self._begin, (self.out / REPORTS).exists),
            Step("tokenizer", self._tokenizer, lambda: is_encoded() or not self.is_poor or is_over(TOKENIZER_RUN)),
            Step("data", self._prepare, is_encoded),
        ]
        return steps + [Step(name, partial(self._train, name), partial(self._is_best, name)) for name in TRAINED]

    # The clips

    def _review(self) -> None:
        if not has_detector():
            _say("PySceneDetect is missing (pip install 'cogvideo[data]'): clips are not cut where the scene changes.")
        with ProgressLine(standard_error(), 0, len(self.items), "clip") as line:
            seen = iter(range(1, len(self.items) + 1))
            clips, rejected = review(self.items, self._named, lambda: line.advance(next(seen), lambda: ""))
        clips, rejected = with_splits(clips), [*self.rejected, *rejected]
        check_usable(clips, rejected, self.source)
        layout, is_cropped = self.config.layout, self.settings.size is None and self.settings.fit == "crop"
        shape = on_shape(clips, layout.sides, self.config.autoencoder.rate) if is_cropped else []
        for told in [*in_short(clips, rejected), *shape]:
            _say(told)
        facts = {"clips": [each.facts for each in clips], "rejected": [each._asdict() for each in rejected]}
        self.folder.describe(facts)
        if self.batch < self.settings.batch:
            _say(f"Batches of {self.batch:,} samples, not {self.settings.batch:,}: the clips have no more frames.")
        rows: list[tuple[Any, ...]] = [("file", "start", "end", "caption", "split")]
        for item in (each.item for each in clips):
            span = (f"{item.start:.10g}" if item.start else "", "" if item.end is None else f"{item.end:.10g}")
            rows += [(self._place(item), *span, caption, item.split) for caption in item.captions]
        write_csv(self.table, rows)

    def _place(self, item: Item) -> str:
        """Path of a clip in the table."""
        assert isinstance(item.media, Path)
        return os.path.relpath(item.media, self.folder.path.resolve())

    @cached_property
    def clips(self) -> list[Item]:
        """Clips of the table."""
        return list_source(str(self.table), SourceOptions(validation=0.0)).items

    @property
    def batch(self) -> int:
        """Samples per step, at most as many as there are frames to train on."""
        train = [each["seconds"] for each in self.folder.about["clips"] if each["split"] == "train"]
        return min(self.settings.batch, sum(max(1, round(8 * seconds)) for seconds in train))

    # The start

    @property
    def config(self) -> CogVideoConfig:
        """Configuration of the base, for frames of the requested size."""
        size, own = self.settings.size, self.base.config
        return own if size is None else own.shaped(shape_of(size, own))

    @cached_property
    def quality(self) -> dict[str, float]:
        """Quality of the base's tokenizer on some frames of the clips."""
        base = CogVideo.from_pretrained(str(self.base.folder), torch.float32)
        frames = FrameSettings(fps=1, size=self.config.frame_size, fit=self.settings.fit, max_seconds=3, min_frames=1)
        some = [self.clips[place] for place in evenly(len(self.clips), 16)]
        pixels = np.concatenate([read_item(each, frames).frames for each in some])
        began = time.monotonic()
        found = {"psnr": evaluate(base.autoencoder, pixels, self.batch).psnr}
        found["seconds_a_frame"] = (time.monotonic() - began) / len(pixels)
        if network_path("lpips-vgg").is_file():
            made = base.autoencoder.reconstruct(pixels)
            both = [to_frames(torch.from_numpy(each)) for each in (pixels, made)]
            with torch.inference_mode():
                found["lpips"] = float(load_lpips(network_path("lpips-vgg"))(*both).mean())
        return found

    @property
    def is_poor(self) -> bool:
        """True if the image tokenizer has to be trained; adapters keep the codes of their base."""
        return self.settings.lora is None and self._shows_poorly

    @property
    def _shows_poorly(self) -> bool:
        return self.quality["psnr"] < MIN_PSNR or self.quality.get("lpips", 0.0) > MAX_LPIPS

    def _begin(self) -> None:
        """Create the bundle with what can be kept of the base."""
        names = [name for name in self.base.components if not (self.is_poor and name.startswith("superres"))]
        parts: dict[str, Any] = {name: self.base.component(name) for name in names}
        lpips = f", LPIPS {self.quality['lpips']:.2f} (at most {MAX_LPIPS})" if "lpips" in self.quality else ""
        measured = f"{self.quality['psnr']:.1f} dB PSNR (at least {MIN_PSNR:g}){lpips}"
        fate = "and is kept"
        if self.is_poor:
            fate = "and is trained"
            if "superres" in self.base.components:
                fate += "; super-resolution, which relies on the old codes, is left out"
        elif self._shows_poorly:
            fate += ", as adapters need it; without --lora it is trained"
        _say(f"The base's image tokenizer reconstructs the clips with {measured}, {fate}.")
        parts["text"] = self._text()
        assert self.base.folder is not None
        update_bundle(self.out, self.config, **parts)
        write_model_card(self.out, {} if self.is_poor else read_reports(self.base.folder))

    def _text(self) -> TextTokenizer:
        """The base's text tokenizer, or a new one if the base's cuts many captions and the new one does not."""
        captions = [caption for each in self.clips if each.split == "train" for caption in each.captions]
        config, slots, text = self.config, self.config.layout.text_slots, self.base.text
        fitting = figures(text, captions, slots).fitting
        if fitting < MIN_FITTING and self.settings.lora is None:
            own = TextTokenizer(train_model(captions, config.transformer), config.text, config.transformer.num_codes)
            fitting_own = figures(own, captions, slots).fitting
            if fitting_own >= MIN_FITTING:
                _say(f"{fitting:.0%} of the captions fit the base's text tokenizer: a new one is trained on them.")
                text, fitting = own, fitting_own
        if fitting < 1:
            cut = f"{1 - fitting:.0%} of the captions are longer than the {slots} tokens that the model reads"
            _say(f"{cut}: their ends are not learned. Shorten them.")
        return text

    def _tokenizer(self) -> None:
        batch = 2 * self.batch
        pace = 4 * batch * self.quality["seconds_a_frame"]  # a backward pass takes as long as two forward ones
        steps = self._steps_of("tokenizer", lambda: pace)
        every = max(1, steps // 5)
        train_tokenizer(
            (str(self.table),),
            out=self.out,
            settings=TokenizerSettings(
                steps=steps,
                batch=batch,
                learning_rate=TOKENIZER_RATE,
                warmup=min(20, steps // 5),
                optimizer="muon",
                plain_steps=0,
                adversary_weight=0.0,
            ),
            frames=StoreSettings(
                num_frames=4000,
                num_held_out=32,
                clips=FrameSettings(fit=self.settings.fit, min_frames=1, seed=self.settings.seed),
            ),
            options=SourceOptions(validation=0.0),
            init=str(self.base.folder),
            perceptual="lpips" if network_path("lpips-vgg").is_file() else None,
            device=self.settings.device,
            logging=LoggingConfig(evaluate_every=every, checkpoint_every=every, keep=1),
            overwrite=True,
        )

    def _prepare(self) -> None:
        prepare(
            str(self.table),
            out=self.data,
            tokenizer=str(self.out),
            settings=PrepareSettings(frames=FrameSettings(fit=self.settings.fit, min_frames=1)),
            options=SourceOptions(validation=0.0),
            machines=Machines(self.settings.device),
        )

    # The stages

    def _train(self, stage: StageName) -> None:
        durations = _durations(self.data)
        if stage != "image" and not durations:
            _say(f"No clip has 5 frames at 8 per second (half a second): {TITLES[stage].lower()} stay as they are.")
            return
        has_it = STAGES[stage].trains in self.base.components
        fresh: Mapping[str, Any] = {"image": "random", "sequential": "inherit", "interpolation": "sequential"}
        choice = Choice("continue" if has_it else fresh[stage], lora=self.settings.lora)
        task = {"mixture": ImageMixture(understanding=0.0, text=0.0)} if stage == "image" else {}
        sampling = {"durations": durations} if stage == "image" else {}
        options = self._options(1)
        steps = self._steps_of(stage, lambda: seconds_per_step(stage, choice, options, task, sampling))
        train(stage, choice, self._options(steps), task, sampling)
        best = self._best(stage)
        if best is not None and best != self._delivered(stage):
            _say(f"Keeping step {best:,}, which has the lowest held-out loss.")
            export_run(self._run(stage), self._run(stage).parent, best=True, overwrite=True)

    def _options(self, steps: int) -> Options:
        every = max(1, steps // 8)
        logging = StageLogging(max(1, steps // 40), every, every, keep=1, evaluate_samples=32, sample_every=0)
        settings = StageOptimization(
            steps=steps,
            batch=self.batch,
            learning_rate=RATE if self.settings.lora is None else ADAPTER_RATE,
            warmup=min(20, steps // 5),
            optimizer="muon",
            ema=0.98,
            seed=self.settings.seed,
        )
        return Options(
            DataOptions((self.data,)),
            self.settings.trained_in(self.out),
            init=None if self.settings.lora is None else str(self.out),
            device=self.settings.device,
            overwrite=True,
            optimization=settings,
            logging=logging,
        )

    def _steps_of(self, name: str, pace: Callable[[], float]) -> int:
        """Number of steps of a run: what it began with, else as many as fit into its share of the time left, up to a
        limit for few clips."""
        run = RunFolder(self._run(name))
        if run.began:
            return int(run.identity["settings" if name == "tokenizer" else "optimization"]["steps"])
        if self.settings.steps is not None:
            return self.settings.steps
        names = list(SHARES)
        after = sum(SHARES[each] for each in names[names.index(name) :])
        rest = 1 - sum(SHARES.values())
        seconds = 60 * self.minutes_left * SHARES[name] / (after + rest)
        most = 200 + 20 * len(self.clips)
        steps = max(MIN_STEPS, min(most, round(seconds / max(pace(), 1e-3))))
        reasons = {most: "as many as so few clips can use", MIN_STEPS: "the minimum"}
        _say(f"{steps:,} steps: {reasons.get(steps, 'what the time allows')}.")
        return steps

    def _run(self, name: str) -> Path:
        return (self.out if name == "tokenizer" else self.settings.trained_in(self.out)) / f".{name}-run"

    def _best(self, stage: StageName) -> int | None:
        """Step to export; None for the last one."""
        num_judges = sum(each.split != "train" for each in self.clips)
        return Checkpoints(self._run(stage) / "checkpoints", keep=0).best() if num_judges >= MIN_JUDGES else None

    def _delivered(self, stage: StageName) -> int | None:
        """Step at which the bundle's component of a stage was exported."""
        return read_reports(self._run(stage).parent).get(STAGES[stage].trains, {}).get("steps")

    def _is_best(self, stage: StageName) -> bool:
        """True if a stage's run is finished and its best step in the bundle, or if the clips are too short for it."""
        run = RunFolder(self._run(stage))
        if run.summary is None:
            return stage != "image" and (self.data / CARD).exists() and not _durations(self.data)
        best = self._best(stage)
        return self._delivered(stage) == (run.summary["steps"] if best is None else best)


def _durations(folder: Path) -> tuple[float, ...]:
    """Seconds of the sequences that a dataset's training clips can fill, longest first."""
    dataset = Dataset(folder)
    rates = FrameRates(dataset.card.fps, DataOptions.rates)
    longest = int(dataset.num_frames()[dataset.rows("train")].max())
    return tuple((rates.num_frames - 1) / rate for rate in filled_rates(longest, rates))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
