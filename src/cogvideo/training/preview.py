"""Samples while a stage learns: its weights of the moment in a model of their own, which the first rank draws with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cogvideo.bundle.format import MODULES, Component
from cogvideo.bundle.model import CogVideo
from cogvideo.data.loader import ClipStream
from cogvideo.models.transformer import Base
from cogvideo.training import samples
from cogvideo.training.export import ExportTarget, modules
from cogvideo.training.optim import StageOptimization
from cogvideo.training.parallel import any_rank, full_state
from cogvideo.training.stages import STAGES, base_of, own
from cogvideo.training.step import Trainer

SHOWN = 4
"""Clips of a contact sheet."""


class Preview:
    """Draws what the stage makes of the same clips, or prompts, at any step. All ranks call it.

    Args:
        target: the stage, and the bundle that it starts from.
        trainer: what learns.
        stream: whose first clips are drawn.
        prompts: drawn instead, where a stage needs no more than a prompt.
        folder: for contact sheets and videos.

    Raises:
        ValueError: a prompt says nothing.
    """

    def __init__(
        self, target: ExportTarget, trainer: Trainer, stream: ClipStream, prompts: Sequence[str], folder: Path
    ) -> None:
        self.target = target
        self.trainer = trainer
        self.folder = folder
        clips = [stream[place] for place in range(min(SHOWN, len(stream)))]
        self.examples = samples.from_clips(clips)
        if prompts and STAGES[target.stage].is_prompted:
            self.examples = samples.from_prompts(prompts)
            for prompt in prompts:
                target.source.text.encode_image_caption(prompt)  # else refused after the steps to the first sheet
        has = {name for name in ("base", "text", "image_tokenizer") if name in target.source.components}
        self.problem = samples.missing(target.stage, has.union(own(target.stage, target.choice)), self.examples)
        """Why nothing can be drawn, in a sentence; empty if it can."""

    def __call__(self, step: int) -> Path | None:
        """The contact sheet of a step, on the first rank; None where nothing can be drawn."""
        if self.problem:
            return None
        with self.trainer.averaged():
            weights = full_state(self.trainer.module)
        if self.trainer.ranks.rank > 0:
            return None
        settings = self.trainer.settings
        assert isinstance(settings, StageOptimization)
        rows = samples.draw(self.target.stage, self._system(weights), self.examples, settings.seed)
        return samples.write_samples(self.folder, step, rows).sheet

    def lacks(self, step: int) -> bool:
        """True if the contact sheet of a step could be drawn, and is not there."""
        absent = self.trainer.ranks.rank == 0 and not samples.sheet_of(self.folder, step).exists()
        return not self.problem and any_rank(absent)

    def _system(self, weights: dict[str, Tensor]) -> CogVideo:
        """The stage with these weights, and all that it draws with."""
        stage, choice, source = self.target.stage, self.target.choice, self.target.source
        names = ("base", "text", "image_tokenizer", "cluster_labels")
        parts: dict[str, Component] = {name: source.component(name) for name in names if name in source.components}
        if not STAGES[stage].is_base and choice.base == "frozen":
            name, live = base_of(stage, choice, source), self.trainer.objective.model.base
            assert isinstance(live, Base)
            whole = not any(isinstance(each, DTensor) for each in live.parameters())
            parts["base" if name == "base" else f"{stage}_base"] = live if whole else source.component(name)
        parts |= modules(stage, choice, self.target.config, weights)
        placed = {name: self._placed(name, part) for name, part in parts.items()}
        return CogVideo(self.target.config, **placed)

    def _placed(self, name: str, part: Component) -> Component:
        """The component on the device of training. One that lies elsewhere is copied, and stays where it is."""
        if not isinstance(part, nn.Module):
            return part
        device = self.trainer.ranks.device
        with torch.device("meta"):
            module = MODULES[name](self.target.config)
        module.load_state_dict({key: each.to(device) for key, each in part.state_dict().items()}, assign=True)
        return module.requires_grad_(False)
