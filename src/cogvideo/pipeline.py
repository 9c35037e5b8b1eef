"""Text to video: the stages in a chain, one generator of finished frames for whoever shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from cogvideo.bundle import CogVideo
from cogvideo.config import require
from cogvideo.generation.hierarchy import Finished, Settings, generate
from cogvideo.generation.sampling import Sampling, spawn
from cogvideo.generation.upscale import RELEASED, slot_noise, upscale
from cogvideo.models.autoencoder import to_pixels
from cogvideo.models.packing import pack
from cogvideo.text import PaddedText, fit, pad_left


@dataclass(frozen=True)
class Upscaling:
    """How codes become larger."""

    enabled: bool = True
    """Whether they do, where the model has super-resolution."""
    sampling: Sampling = RELEASED
    """Sampler of the high codes."""


class Frame(NamedTuple):
    """A frame of every clip of a batch, which will not change any more."""

    stage: str
    """`given`, `image`, `sequential` or `interpolation`."""
    place: int
    """Its place in the clip, of `num_frames`."""
    num_frames: int
    """Frames of the whole clip."""
    codes: Int64[Tensor, "batch slots"]
    pixels: UInt8[np.ndarray, "batch height width 3"]
    """Red, green and blue."""


class CogVideoPipeline:
    """Text to video with one model.

    Args:
        model: with base, sequential stage, text and image tokenizer; interpolation and super-resolution where wanted.
    """

    def __init__(self, model: CogVideo) -> None:
        self.model = model

    @classmethod
    def from_pretrained(
        cls, name: str | PathLike[str], dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> CogVideoPipeline:
        """The pipeline of a bundle in a folder, or of one on the Hugging Face Hub.

        Raises:
            ValueError: there is no such bundle, or dtype or device cannot be used.
        """
        return cls(CogVideo.from_pretrained(name, dtype, device))

    def stream(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        settings: Settings | None = None,
        upscaling: Upscaling | None = None,
    ) -> Iterator[Frame]:
        """Frames as they are finished, not in order of time. A clip depends on its prompt, generator and settings.

        Args:
            prompts: one a clip.
            generators: one CPU generator a clip.
            settings: of the stages.
            upscaling: of the frames.

        Raises:
            ValueError: a prompt or a setting cannot be used, or the model lacks a part. At the call, before weights
                are loaded.
        """
        settings, upscaling = settings or Settings(), upscaling or Upscaling()
        there = self.model.components
        require("image_tokenizer" in there, f"this model has no image_tokenizer for pixels; it has {', '.join(there)}")
        enlarged = [spawn(generator, 1)[0] for generator in generators]
        frames = generate(self.model, prompts, generators, settings)
        enlarges = upscaling.enabled and "superres" in there
        text = self._text(prompts, settings.truncate) if enlarges else None
        return self._frames(frames, settings, text, upscaling.sampling, enlarged)

    def _frames(
        self,
        frames: Iterator[Finished],
        settings: Settings,
        text: PaddedText | None,
        sampling: Sampling,
        generators: list[torch.Generator],
    ) -> Iterator[Frame]:
        """Enlarged where there is a text to do it with."""
        self._pack(settings.rounds)
        num_frames = (self.model.config.layout.num_frames - 1) * 2**settings.rounds + 1
        noise = [spawn(generator, num_frames) for generator in generators]
        for frame in frames:
            place = round(frame.time / settings.duration * (num_frames - 1))
            codes = frame.codes
            if text is not None:
                codes = self._upscale(text, codes, [each[place] for each in noise], sampling)
            yield Frame(frame.stage, place, num_frames, frame.codes, self._pixels(codes))

    def _upscale(
        self,
        text: PaddedText,
        codes: Int64[Tensor, "batch slots"],
        generators: Sequence[torch.Generator],
        sampling: Sampling,
    ) -> Int64[Tensor, "batch high"]:
        model = self.model
        device = model.base.words.weight.device
        slots, num_codes = model.upscaler.channel.layout.high_slots, model.config.transformer.num_codes
        noise = [slot_noise(generator, slots, num_codes, device) for generator in generators]
        return upscale(model.upscaler, text, codes, noise, sampling, model.cluster_labels)

    def _text(self, prompts: Sequence[str], truncate: bool) -> PaddedText:
        text, slots = self.model.text, self.model.config.upscaler.text_slots
        rows = [fit(text.encode_image_caption(prompt), slots, truncate) for prompt in prompts]
        return pad_left(rows, slots, text.pad)

    @torch.inference_mode()
    def _pixels(self, codes: Int64[Tensor, "batch slots"]) -> UInt8[np.ndarray, "batch height width 3"]:
        autoencoder = self.model.autoencoder
        side = round(codes.shape[1] ** 0.5)
        squares = codes.to(autoencoder.codebook.embedding.device).view(-1, side, side)
        return to_pixels(autoencoder.decode(squares, chunk=1))

    def _pack(self, rounds: int) -> None:
        """On a CPU, copy the weights of the stages that draw into the order that it reads fastest; once is enough."""
        model = self.model
        for stage in [model.image_model, model.sequential, *([model.interpolation] if rounds else [])]:
            for part in (stage.base, stage.channel):
                if part is not None:
                    pack(part)
