"""Options of the commands that train a stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cogvideo.config import require
from cogvideo.data.clips import ClipSampling, FrameRates, Mode
from cogvideo.data.dataset import read_card
from cogvideo.training.optim import Optimization
from cogvideo.training.parallel import ParallelSettings
from cogvideo.training.session import LoggingConfig
from cogvideo.training.step import Execution


@dataclass(frozen=True)
class Clips:
    """Clips, and how they become samples."""

    data: tuple[Path, ...]
    """Folders of `cogvideo data prepare`."""
    split: str = "train"
    """Split to train on."""
    held_out_split: str = "validation"
    """Split to validate on; skipped when the data has no `validation`."""
    rates: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Frames a second that a sequence can have, lowest first: the rate of key frames, then those of the rounds."""
    fixed_rate: float | None = None
    """One rate for all clips, as one stage in place of the hierarchy; for comparison."""
    random_offset: bool = True
    """Start anywhere in a clip that a sequence fits, else at its first frame."""
    caption_dropout: float = 0.1
    """Share of samples with the unconditional text, which guidance needs."""

    @property
    def settings(self) -> dict[str, Any]:
        """All but where the data is, which decides nothing."""
        return {name: value for name, value in asdict(self).items() if name != "data"}

    def sampling(self, mode: Mode, seed: int, num_frames: int, **special: Any) -> ClipSampling:
        """Settings of the loader, which has some more for some stages."""
        rates = FrameRates(read_card(self.data[0]).fps, self.rates, num_frames)
        fixed, offset, dropout = self.fixed_rate, self.random_offset, self.caption_dropout
        return ClipSampling(mode, rates, fixed, offset, dropout, seed=seed, **special)


@dataclass(frozen=True)
class StageLogging(LoggingConfig):
    """Reports, samples and checkpoints of a stage's run. They have no say in the weights."""

    report_every: int = 20
    """Steps between lines of metrics.jsonl."""
    evaluate_samples: int = 256
    """Maximum number of held-out clips of a measurement, for each frame rate."""
    sample_every: int = 500
    """Steps between contact sheets; 0 for none."""
    prompts: tuple[str, ...] = ()
    """Prompts of the samples of the image model and of key frames; captions of held-out clips unless given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.evaluate_samples > 0, f"evaluate_samples is {self.evaluate_samples}, expected a positive number")
        require(self.sample_every >= 0, f"sample_every is {self.sample_every}, expected 0 or more")


@dataclass(frozen=True)
class Options:
    """Options of all stages."""

    clips: Clips
    out: Path
    """Bundle that gets the stage. A run that is killed continues with the same command."""
    init: str | None = None
    """Bundle to start from: a folder, or an id on the Hugging Face Hub; `out` unless given."""
    recipe: Path | None = None
    """TOML file with a table for this command: options as they stand here. Those given here win."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:0, or auto."""
    overwrite: bool = False
    """Replace the stage where the bundle has it."""
    optimization: Optimization = field(default_factory=Optimization)
    execution: Execution = field(default_factory=Execution)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    logging: StageLogging = field(default_factory=StageLogging)
