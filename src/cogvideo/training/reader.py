"""`cogvideo train reader`: the World reader learns from clips that are drawn on the fly.

Unlike models, which learn from the split `train`, the reader learns from all splits: it must read held-out pairs as
well as others. What it never sees are clips numbered below `attributes.READER_LEARNS`. It is tested on some of these,
with held-out pairs reported separately, and models are judged by others.

Shapes are learnt last, and from single frames in a tenth of the time: the first steps have stills of one figure alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cogvideo import world
from cogvideo.config import require
from cogvideo.devices import slowness, usable
from cogvideo.evaluation.attributes import READER_LEARNS, READER_TEST, accuracies, unseen_scenes
from cogvideo.evaluation.reader import ATTRIBUTES, BATCH, SIZE, Reader, ReaderConfig, labels, render, to_input
from cogvideo.files import alone_in
from cogvideo.runs import Checkpoint, RunFolder
from cogvideo.training.autoencoder import generator
from cogvideo.training.loop import ProgressLine, Window, interrupts
from cogvideo.training.optim import groups_by_decay, has_fused, trained

STILLS = 100_000_000
"""First number of the clips that stills are taken from."""
STILL_FROM, STILL_TO = 1.0, 2.0
"""Seconds between which: figures are in the picture, or mostly."""
WATCHED = 256
"""Clips of a test while it learns."""
REPORT_EVERY = 50
"""Steps of one line of `metrics.jsonl`."""
SHIFT, BRIGHTNESS, TINT, NOISE = 3, 0.08, 0.03, 0.04
"""Largest changes of a clip: pixels, relative brightness of all and of one colour, deviation of noise."""


@dataclass(frozen=True)
class ReaderSettings:
    """What decides the weights of the reader."""

    steps: int = 5000
    """Steps, each on clips that no step before it had."""
    batch: int = 16
    """Clips a step."""
    still_steps: int = 1500
    """How many of the steps, the first ones, have single frames in place of clips."""
    stills: int = 64
    """Frames of such a step."""
    learning_rate: float = 2e-3
    """Largest learning rate of AdamW."""
    warmup: int = 200
    """Steps in which the learning rate rises to it; then it falls to zero along half a cosine."""
    weight_decay: float = 0.05
    """Of AdamW."""
    largest_gradient: float = 1.0
    """Norm that the gradient is cut to."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the layers in a step (autocast)."""
    seed: int = 0
    """Of weights and augmentation."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "stills", "learning_rate", "largest_gradient"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("still_steps", "warmup", "weight_decay", "seed"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, expected 0 or more")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        falling = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1)) * falling


def train_reader(
    *,
    out: Path,
    settings: ReaderSettings = ReaderSettings(),
    config: ReaderConfig = ReaderConfig(),  # noqa: B008  # frozen
    test_clips: int = 2000,
    evaluate_every: int = 500,
    checkpoint_every: int = 200,
    device: str = "auto",
    recipe: Path | None = None,  # read by the command line
) -> None:
    """Train the World reader, which judges clips. Killed and called again, it continues.

    It learns from all splits of the World, and is tested on clips by numbers that it never saw: half of them with
    attribute pairs that models never see in training, half of the split `validation`.

    Args:
        out: the file, .safetensors; the run is in a folder beside it.
        settings: the recipe.
        config: sizes.
        test_clips: clips of the test at the end.
        evaluate_every: steps between tests on fewer clips.
        checkpoint_every: steps between checkpoints, which is what is lost when a run is killed.
        device: cpu, cuda, cuda:0, or auto.
        recipe: a TOML file with a table for this command: options as they stand here. Those given here win.

    Raises:
        ValueError: a setting cannot be used, the folder holds another run or one at work, or training diverged.
        OSError: something cannot be written.
    """
    require(out.suffix == ".safetensors", f"out is {out}, expected a name that ends in .safetensors")
    for name, value in {
        "test_clips": test_clips,
        "evaluate_every": evaluate_every,
        "checkpoint_every": checkpoint_every,
    }.items():
        require(value > 0, f"{name} is {value}, expected a positive number")
    place, console = usable(device), Console(stderr=True, highlight=False, soft_wrap=True)
    if slow := slowness(getattr(torch, settings.precision), place):
        console.print(slow)
    folder = RunFolder(out.parent / f".{out.stem}-run")
    with alone_in(folder.path):
        folder.claim({"settings": asdict(settings), "config": asdict(config)})
        trainer = Trainer(config, settings, place)
        _learn(trainer, folder, evaluate_every, checkpoint_every, console)
        trainer.model.save(out)
        reader = Reader.load(out).to(place)
        scenes = unseen_scenes(test_clips, READER_TEST)
        right = tested(reader, scenes)
        folder.finish({"steps": settings.steps, "accuracy": right})
    Console(highlight=False).print(_table(right, len(scenes)))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB after {settings.steps:,} steps")


class Trainer:
    """A reader in training: step `n` depends on the state after step `n - 1`, the settings and `n` alone.

    Args:
        config: sizes.
        settings: the recipe.
        device: where everything is.
    """

    def __init__(self, config: ReaderConfig, settings: ReaderSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = Reader(config).to(device)
        groups, fused = groups_by_decay(trained(self.model), settings.weight_decay), has_fused(trained(self.model))
        self.optimizer = torch.optim.AdamW(groups, settings.learning_rate, betas=(0.9, 0.98), fused=fused)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def step(self, number: int) -> dict[str, Float[Tensor, ""]]:
        """Learn from the step's clips or stills, numbered from 0; the loss, and accuracies on what is learnt from."""
        still = number < self.settings.still_steps
        drawn = stills(number, self.settings.stills) if still else clips(number, self.settings.batch)
        seen = augment(drawn.pixels, generator(self.settings.seed, "augment", number, device=self.device))
        truth = {name: each.to(self.device) for name, each in labels(drawn.scenes).items()}
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            scores = self.model.looks(seen) if still else self.model(seen)
        loss = torch.stack([F.cross_entropy(each.float(), truth[name]) for name, each in scores.items()]).sum()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate_at(number)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.largest_gradient)
        self.optimizer.step()
        right = {name: (scores[name].argmax(-1) == truth[name]).float().mean() for name in ATTRIBUTES if name in scores}
        return {"loss": loss.detach(), **right}


class Drawn(NamedTuple):
    """What a step learns from."""

    scenes: list[world.Scene]
    """What is true."""
    pixels: UInt8[np.ndarray, "batch frames 64 64 3"]
    """What is seen."""


def clips(step: int, batch: int) -> Drawn:
    """Those of a step: clips that no step before it had, none of those kept for tests."""
    scenes = [world.scene(READER_LEARNS + number) for number in range(step * batch, (step + 1) * batch)]
    return Drawn(scenes, np.stack([render(scene) for scene in scenes]))


def stills(step: int, number: int) -> Drawn:
    """Single frames of other clips, of one figure alone, since one frame does not tell which of two acts."""
    begin = STILLS + step * number * 4  # two clips of three have one figure
    alone = (scene for scene in world.scenes("all", begin) if not scene.other_object)
    scenes = list(islice(alone, number))
    moments = np.linspace(STILL_FROM, STILL_TO, number).tolist()
    frames = [world.render(scene, SIZE, 1 / moment, 2)[1:] for scene, moment in zip(scenes, moments, strict=True)]
    return Drawn(scenes, np.stack(frames))


def augment(
    clips: UInt8[np.ndarray, "batch frames size size 3"], generator: torch.Generator
) -> Float[Tensor, "batch 3 frames size size"]:
    """Clips as a tokenizer might give them back, all labels still true: no mirroring, no large change of a colour.

    Each clip as a whole is shifted by up to 3 pixels, every second one blurred, its brightness and colours changed a
    little; noise comes in squares of 2 x 2 pixels, new in every frame. The generator says where the result is.
    """
    device = generator.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(clips), *shape, 1, 1, 1, generator=generator, device=device)

    pixels = to_input(_shifted(clips, generator), device)
    pixels[::2] = torch.lerp(pixels[::2], _blurred(_blurred(pixels[::2])), uniform(0, 1, 1)[::2])
    pixels = pixels * ((1 + uniform(-BRIGHTNESS, BRIGHTNESS, 1)) * (1 + uniform(-TINT, TINT, 3)))
    cells = *pixels.shape[:3], pixels.shape[3] // 2, pixels.shape[4] // 2
    noise = torch.randn(cells, generator=generator, device=device) * uniform(0, NOISE, 1)
    return (pixels + noise.repeat_interleave(2, 3).repeat_interleave(2, 4)).clamp_(0, 1)


def _shifted(
    clips: UInt8[np.ndarray, "batch frames size size 3"], generator: torch.Generator
) -> UInt8[np.ndarray, "batch frames size size 3"]:
    """The outermost pixels are repeated where nothing is known."""
    offsets = torch.randint(-SHIFT, SHIFT + 1, (len(clips), 2, 1), generator=generator, device=generator.device)
    places = (offsets.cpu().numpy() + np.arange(clips.shape[2])).clip(0, clips.shape[2] - 1)
    return np.stack([clip[:, rows][:, :, columns] for clip, (rows, columns) in zip(clips, places, strict=True)])


def _blurred(pixels: Float[Tensor, "*planes rows columns"]) -> Float[Tensor, "*planes rows columns"]:
    """Weights 1, 2, 1 across and down; the outermost pixels stay."""
    made = pixels.clone()
    made[..., 1:-1] += pixels[..., :-2].add(pixels[..., 2:]).sub_(pixels[..., 1:-1], alpha=2).mul_(0.25)
    pixels = made.clone()
    made[..., 1:-1, :] += pixels[..., :-2, :].add(pixels[..., 2:, :]).sub_(pixels[..., 1:-1, :], alpha=2).mul_(0.25)
    return made


def tested(reader: Reader, scenes: Sequence[world.Scene]) -> dict[str, dict[str, float]]:
    """Accuracies on real renders of some scenes."""
    parts = (scenes[start : start + BATCH] for start in range(0, len(scenes), BATCH))
    readings = [reading for part in parts for reading in reader.read(np.stack([render(scene) for scene in part]))]
    return accuracies(readings, scenes)


def _learn(trainer: Trainer, folder: RunFolder, evaluate_every: int, checkpoint_every: int, console: Console) -> None:
    """All steps that are left."""
    steps = trainer.settings.steps
    first = folder.resume(trainer.load_state_dict, steps, console)
    window, watched = Window(1, "steps"), unseen_scenes(WATCHED, READER_TEST)
    with ProgressLine(console, first, steps) as line, interrupts() as interrupt:
        for done in range(first + 1, steps + 1):
            window.add(trainer.step(done - 1))
            line.advance(done, lambda done=done: _shown(window.glance(done)))  # type: ignore[misc]
            saves = done % checkpoint_every == 0 or done == steps or interrupt.is_set()
            if saves or done % REPORT_EVERY == 0:
                folder.report(window.row(done))
            if saves:
                folder.save(Checkpoint(done, trainer.state_dict()))
            if interrupt.is_set():
                console.print(f"Stopped after step {done:,}; the same command continues.")
                interrupt.leave()
            if done % evaluate_every == 0 and done < steps:
                right = tested(trainer.model.eval(), watched)
                folder.report({"step": done, "accuracy": right})
                console.print(
                    f"step {done:,}: " + ", ".join(f"{name} {each:.1%}" for name, each in right["all clips"].items())
                )


def _shown(row: dict[str, float]) -> str:
    return f"loss {row['loss']:.3f}  {row['steps_per_second']:.1f} steps/s"


def _table(right: dict[str, dict[str, float]], number: int) -> Table:
    table = Table(title=f"Read right, of {number:,} clips that were never learnt from")
    for name in ("", *ATTRIBUTES, "all"):
        table.add_column(name, justify="left" if name == "" else "right")
    for group, shares in right.items():
        table.add_row(group, *(f"{each:.1%}" for each in shares.values()))
    return table
