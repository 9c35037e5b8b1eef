"""Variants of the video stages, trained from several seeds on the same clips and evaluated on the same prompts.

| variant | replaces |
|---|---|
| random | weights of the image model, by random ones |
| trained | a frozen base, by a trained one |
| one-stage | the hierarchy, by one stage at the rate of finished clips, trained on as many samples as both stages |
| no-rate | text with the frame rate, by text without it |
| no-window | temporal windows, by full attention |

The same image model generates all first frames. A run is a bundle with the runs of its stages inside; it is finished
once its report exists.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.backends import cudnn

from cogvideo.bundle.format import MANIFEST, SHARED
from cogvideo.bundle.model import POCKET, CogVideo, update
from cogvideo.config import CogVideoConfig, Limited, Positive, StageConfig, require, within
from cogvideo.data.dataset import CARD
from cogvideo.data.engines import Machines, OnClip
from cogvideo.data.prepare import prepare
from cogvideo.devices import default_dtype
from cogvideo.evaluation.features import i3d, one_thread
from cogvideo.evaluation.making import ClipOptions, OneStage, clip_files, fill, generate, read_clip, write_clip
from cogvideo.evaluation.networks.cache import network_path
from cogvideo.evaluation.protocols import PROTOCOLS, Several
from cogvideo.evaluation.reader import ALL, FILE, SIZE, resized
from cogvideo.evaluation.subjects import Clip, WorldSubject
from cogvideo.files import exclusive_lock, replacing
from cogvideo.media.images import contact_sheet, evenly, write_image
from cogvideo.pipeline import CogVideoPipeline
from cogvideo.runs import TYPED, RunFolder
from cogvideo.text import TextTokenizer
from cogvideo.training.launch import seconds_per_step, train
from cogvideo.training.optim import StageOptimization
from cogvideo.training.session import DataOptions, Options, StageLogging
from cogvideo.training.stages import BaseChoice, Choice, StageName, StartChoice

VariantName = Literal["full", "random", "trained", "one-stage", "no-rate", "no-window"]
DATA, REAL, CEILING, PACES = "data", "real", "ceiling", "paces"
"""Folders of codes, of features of real clips, of what the image tokenizer leaves of them, and of times of steps."""
RUN, LOG = ".ablation-run", "log.txt"
"""Inside a run, the folder of its report and the log of messages."""
FVD, HELD_OUT = "FVD", "all right, held-out pairs"
PROTOCOL = replace(PROTOCOLS["tfhub"], step=2)
"""16 frames at 4 fps."""
FIRST_NOISE = 1_000_000
"""Difference between the seeds of a prompt's clips in two runs; scene numbers are smaller."""
SHOWN, COLUMNS = 4, 9
"""Clips of a contact sheet, and frames of each."""
ROUNDS = 5
"""Number of times that each stage is timed; stages take turns."""


class Variant(NamedTuple):
    """Differences from the full system."""

    title: str
    start: StartChoice = "inherit"
    base: BaseChoice = "frozen"
    has_windows: bool = True
    has_rate: bool = True
    overlaps: tuple[int, ...] = (0,)
    """Overlaps of the sequences of one stage, in frames, each for a separate set of clips; 0 is the hierarchy."""

    @property
    def stages(self) -> dict[StageName, Choice]:
        """Stages to train; interpolation starts from the key frames of its own run."""
        first: dict[StageName, Choice] = {"sequential": Choice(self.start, self.base)}
        second: BaseChoice = "frozen" if self.base == "frozen" else "trained"
        return first if any(self.overlaps) else first | {"interpolation": Choice("sequential", second)}

    def row(self, overlap: int) -> str:
        """Title of the variant's clips with this overlap."""
        return f"{self.title}, overlap {overlap}" if overlap else self.title

    def configured(self, config: CogVideoConfig) -> CogVideoConfig:
        """Configuration of a base with the variant's differences."""
        text = config.text if self.has_rate else replace(config.text, duration_template=config.text.image_template)
        new = replace(config.sizes, text=text)
        full = StageConfig()
        return new if self.has_windows else replace(new, sequential=full, interpolation=full)


VARIANTS: dict[VariantName, Variant] = {
    "full": Variant("full system"),
    "random": Variant("random initialization", "random", "random"),
    "trained": Variant("base trained", base="trained"),
    "one-stage": Variant("one stage", overlaps=(1, 2)),
    "no-rate": Variant("no rate in the text", has_rate=False),
    "no-window": Variant("full attention", has_windows=False),
}


@dataclass(frozen=True)
class Ablation(Limited):
    """Settings of the comparison."""

    base: str = POCKET
    """Bundle with both tokenizers and the image model to inherit: a folder, a Hub ID, or pocket."""
    variants: tuple[VariantName, ...] = tuple(VARIANTS)
    """Variants to train."""
    seeds: Annotated[int, within(1, 10)] = 3
    """Number of seeds of each variant; more can be added later."""
    domain: Literal["simple", "full"] = "simple"
    """Part of the World that the clips show."""
    scenes: int = 2000
    """Number of scenes of the World to train and validate on."""
    held_out: int = 128
    """Maximum number of held-out clips of each frame rate."""
    clips: Several = 512
    """Number of prompts, and of generated and real clips to compare."""
    at_once: Positive[int] = 16
    """Number of clips to generate at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("full" in self.variants, f"variants are {', '.join(self.variants)}, expected full among them")


@dataclass(frozen=True)
class Experiment:
    """All runs of an ablation, in a folder."""

    out: Path
    ablation: Ablation
    optimization: StageOptimization
    """Optimization of all runs; its seed is the first of theirs."""
    device: str
    readers: int = 0
    """Set by engines, as is the device."""

    @property
    def runs(self) -> dict[str, tuple[VariantName, int]]:
        """Variant and seed of each run by its name."""
        first = self.optimization.seed
        pairs = [(name, seed) for seed in range(first, first + self.ablation.seeds) for name in self.ablation.variants]
        return {f"{name}-{seed}": (name, seed) for name, seed in pairs}

    def report(self, name: str) -> dict[str, dict[str, float]] | None:
        """Metrics of a run's clips, by the title of what generated them; None until the run is finished."""
        return RunFolder(self.out / name / RUN).summary

    def sheet(self, name: str, overlap: int) -> Path:
        """Contact sheet of clips of a run; the folder of the clips is next to it."""
        return self.out / name / f"clips-{overlap}.png"

    def prepare(self, machines: Machines) -> None:
        """Check that the settings match those of earlier runs, and prepare the data that all runs need."""
        base = CogVideo.from_pretrained(self.ablation.base)
        lacks = [name for name in SHARED if name not in base.components]
        require(not lacks, f"the base {self.ablation.base} has no {', '.join(lacks)}, expected an image model")
        settings = asdict(self.ablation) | asdict(self.optimization)
        settings = {
            name: value for name, value in settings.items() if name not in ("base", "variants", "seeds", "seed")
        }
        shared = {name: base.sha256(name) for name in SHARED}
        RunFolder(self.out).claim({"base": shared, "settings": settings}, {TYPED: self.ablation.base})
        if not (self.out / DATA / CARD).exists():
            prepare(
                f"world:{self.ablation.domain}:{self.ablation.scenes}",
                out=self.out / DATA,
                tokenizer=self.ablation.base,
                machines=machines,
            )
        if self.ceiling is None:
            RunFolder(self.out / CEILING).finish(self._measure_ceiling(base))

    @property
    def ceiling(self) -> dict[str, float] | None:
        """Metrics of the real clips after the image tokenizer, a bound on those of variants; None until measured."""
        return RunFolder(self.out / CEILING).summary

    def _measure_ceiling(self, base: CogVideo) -> dict[str, float]:
        subject, side = self._subject(self.optimization.seed), base.config.frame_size
        assert isinstance(side, int)  # the data above is refused otherwise
        real = (subject.real(number, side) for number in range(len(subject.prompts)))
        shown = [resized(base.autoencoder.reconstruct(clip), SIZE) for clip in real]
        return self._metrics(shown, subject, self.out / CEILING)

    def make(self, job: str, on_clip: OnClip = lambda: None) -> None:
        """Do a run, given by its name, or resume it."""
        variant, seed = VARIANTS[self.runs[job][0]], self.runs[job][1]
        out, folder = self.out / job, RunFolder(self.out / job / RUN)
        with exclusive_lock(folder.path), (out / LOG).open("a") as log, redirect_stdout(log), redirect_stderr(log):
            self._train(variant, seed, out)
            model = CogVideo.from_pretrained(out, default_dtype(torch.device(self.device)), self.device)
            found = {}
            for overlap in variant.overlaps:
                pipeline = OneStage(model, overlap) if overlap else CogVideoPipeline(model)
                sheet = self.sheet(job, overlap)
                found[variant.row(overlap)] = self._judge(pipeline, self._subject(seed), sheet)
            folder.finish(found)
        on_clip()

    def _train(self, variant: Variant, seed: int, out: Path) -> None:
        base = CogVideo.from_pretrained(self.ablation.base)
        config = variant.configured(base.config)
        if not (out / MANIFEST).exists():
            names = [each for each in ("image_tokenizer", "cluster_labels", "base") if each in base.components]
            parts: dict[str, Any] = {each: base.component(each) for each in names}
            parts["text"] = TextTokenizer(base.text.model, config.text, config.transformer.num_codes)
            update(out, config, **parts)
        for stage, choice in variant.stages.items():
            if RunFolder(out / f".{stage}-run").summary is None:
                train(stage, choice, self._options(variant, seed, out))

    def _options(self, variant: Variant, seed: int, out: Path) -> Options:
        """Options of training in a run's bundle."""
        has_one = len(variant.stages) == 1
        steps = self.optimization.steps * (2 if has_one else 1)
        every, held_out = max(1, steps // 10), self.ablation.held_out
        return Options(
            DataOptions((self.out / DATA,), fixed_rate=DataOptions.rates[-1] if has_one else None),
            out,
            device=self.device,
            optimization=replace(self.optimization, steps=steps, seed=seed),
            logging=StageLogging(max(1, steps // 50), every, every, keep=1, evaluate_samples=held_out, sample_every=0),
        )

    @property
    def paces(self) -> dict[VariantName, dict[str, float]] | None:
        """Seconds per step by variant and stage; None until measured for all variants."""
        found, variants = RunFolder(self.out / PACES).summary or {}, self.ablation.variants
        return {name: found[name] for name in variants} if found.keys() >= set(variants) else None

    def measure_paces(self) -> None:
        """Time the steps of all stages, in turn. Other work on the machine only adds time, so the fastest counts."""
        seed = self.optimization.seed
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        with one_thread():
            for name in ROUNDS * self.ablation.variants:
                variant = VARIANTS[name]
                options = self._options(variant, seed, self.out / f"{name}-{seed}")
                for stage, choice in variant.stages.items():
                    found[name][stage].append(seconds_per_step(stage, choice, options))
        fastest = {name: {stage: min(each) for stage, each in stages.items()} for name, stages in found.items()}
        RunFolder(self.out / PACES).finish(fastest)

    def _subject(self, seed: int) -> WorldSubject:
        """Prompts with the noise of a seed, which all variants share."""
        return WorldSubject(self.ablation.clips, self.ablation.domain, FIRST_NOISE * seed, FILE)

    def _judge(self, pipeline: CogVideoPipeline, subject: WorldSubject, sheet: Path) -> dict[str, float]:
        """Metrics of the clips that a pipeline generates from all prompts."""
        folder, prompts = sheet.with_suffix(""), subject.prompts
        files = clip_files(folder, prompts)

        def made(numbers: list[int]) -> list[Clip]:
            return generate(pipeline, [prompts[each] for each in numbers], ClipOptions())

        fill(files, made, write_clip, self.ablation.at_once)
        clips = [read_clip(file) for file in files]
        _write_sheet(sheet, subject, clips)
        return self._metrics(clips, subject, folder)

    def _metrics(self, clips: Sequence[Clip], subject: WorldSubject, folder: Path) -> dict[str, float]:
        """Metrics of a clip for each prompt; their features are cached in the folder."""
        shares = subject.judge(clips).shares
        read = shares["all clips"] | {HELD_OUT: shares["held-out pairs"][ALL]}
        if not network_path("i3d").is_file():
            return read
        real = self._features(self.out / REAL, subject, lambda number: subject.real(number, SIZE))
        return {FVD: PROTOCOL.fvd(real, self._features(folder, subject, clips.__getitem__))} | read

    def _features(
        self, folder: Path, subject: WorldSubject, clip: Callable[[int], Clip]
    ) -> Float[Tensor, "clips features"]:
        """Features of clips by number, cached in the folder."""
        files = clip_files(folder, subject.prompts, ".npy")
        if not all(file.exists() for file in files):
            encode = i3d(network_path("i3d"), PROTOCOL).load(self.device)
            frames = slice(None, PROTOCOL.span, PROTOCOL.step)

            def made(numbers: list[int]) -> list[Tensor]:
                return [encode([(clip(each)[frames],)])[0] for each in numbers]

            with one_thread(), torch.inference_mode(), cudnn.flags(deterministic=True, allow_tf32=False):
                fill(files, made, _write, 1)
        return torch.from_numpy(np.stack([np.load(file) for file in files]))


def _write(path: Path, features: Float[Tensor, " features"]) -> None:
    with replacing(path) as file:
        np.save(file, features.cpu().numpy())


def _write_sheet(path: Path, subject: WorldSubject, clips: Sequence[Clip]) -> None:
    """Write a contact sheet of some clips, each with its prompt and below the real clip."""
    numbers = evenly(len(clips), SHOWN).tolist()
    rows = [clip for each in numbers for clip in (subject.real(each, SIZE), clips[each])]
    labels = [text for each in numbers for text in (subject.prompts[each].text, "")]
    write_image(path, contact_sheet(rows, COLUMNS, labels=labels))
