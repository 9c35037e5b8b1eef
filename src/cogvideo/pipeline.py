"""Text to video: the chain of stages as one generator of finished frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Union

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from cogvideo.bundle.model import CogVideo
from cogvideo.bundle.packed import Packed, Parts
from cogvideo.config import SamplingConfig, require
from cogvideo.devices import default_dtype, usable
from cogvideo.generation.hierarchy import FinishedFrame, generate
from cogvideo.generation.request import GenerationSettings, Request
from cogvideo.generation.sampling import spawn
from cogvideo.generation.upscale import enlarge
from cogvideo.layout import UpscaleLayout
from cogvideo.media.colors import Pixels
from cogvideo.media.shots import View
from cogvideo.media.video import write_video
from cogvideo.planning.memory import require_memory
from cogvideo.text import PaddedText

if TYPE_CHECKING:
    import PIL.Image

Picture = Union["PIL.Image.Image", UInt8[np.ndarray, "_ _ 3"]]
"""A Pillow image, or an RGB array."""


class Frame(NamedTuple):
    """A finished frame of every clip of a batch."""

    stage: str
    """`given`, `image`, `sequential` or `interpolation`."""
    place: int
    """Place in the clip, from 0."""
    num_frames: int
    """Number of frames of the whole clip."""
    codes: Int64[Tensor, "batch slots"]
    pixels: UInt8[np.ndarray, "batch height width 3"]


class Clips(NamedTuple):
    """Finished clips."""

    frames: UInt8[np.ndarray, "batch frames height width 3"]
    codes: Int64[Tensor, "batch frames slots"]
    fps: float


class CogVideoPipeline:
    """Text to video with one model.

    Args:
        model: a model with base, sequential stage, text and image tokenizer, and optionally interpolation and
            super-resolution. It is never changed. The pipeline loads missing weights for itself, packed for
            the CPU. Weights that the model has loaded on a CPU are in memory twice during generation.
        offload: keep only the weights of the current phase in memory, and load them again for every clip. All
            frames then come at the end, since they are decoded to pixels once all codes are computed.
    """

    def __init__(self, model: CogVideo, offload: bool = False) -> None:
        self.model = model
        self.offload = offload
        self._kept: Parts = {}
        self._fitting: set[tuple[GenerationSettings, int]] = set()

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        offload: bool = False,
        adapters: Mapping[str, float] = MappingProxyType({}),
        channel: str | None = None,
    ) -> CogVideoPipeline:
        """Load a bundle from a folder or the Hugging Face Hub, or the model in the box (`pocket`).

        Args:
            name: folder, id (`owner/name`), or `pocket`.
            dtype: type of the weights; by default float32 on a CPU and bfloat16 on a GPU.
            device: device of the model.
            offload: see the class.
            adapters: adapters by name or folder, each with its scale.
            channel: name of one of the bundle's additional video channels.

        Raises:
            ValueError: there is no such bundle or adapter, or dtype or device cannot be used.
        """
        device = usable(device)
        model = CogVideo.from_pretrained(
            name, dtype or default_dtype(device), device, adapters=adapters, channel=channel
        )
        return cls(model, offload)

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Picture | None = None,
        *,
        video: Sequence[Picture] | UInt8[np.ndarray, "frames _ _ 3"] | None = None,
        last_image: Picture | None = None,
        loop: bool = False,
        negative_prompt: str | None = None,
        num_samples: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance_scale: float | None = None,
        callback: Callable[[Frame], None] | None = None,
        settings: GenerationSettings | None = None,
    ) -> Clips:
        """Generate clips from one or more prompts.

        Args:
            prompt: a text, or a sequence of texts.
            image: the first frame, cropped to the shape of the model's frames.
            video: frames to continue, at the rate of the clip (8 per second with three rounds).
            last_image: the last frame; needs `image`.
            loop: end the clip where it began.
            negative_prompt: text that replaces the unconditional text of guidance; empty for none. By
                default, the one in `settings`.
            num_samples: clips per prompt.
            generator: one CPU generator per clip. A single one generates the first clip; later clips get the
                seeds after its own or, if it has been used before, seeds that it draws. Random by default.
            guidance_scale: guidance of key frames; 1 disables it and halves the compute. By default, the one
                in `settings`.
            callback: called with each frame when it is finished.
            settings: all other choices; by default, the model's own.

        Raises:
            ValueError: an argument cannot be used, or the model lacks a component.
        """
        settings = self.settings if settings is None else settings
        require(isinstance(settings, GenerationSettings), f"settings is {settings!r:.60}, expected Settings")
        require(callback is None or callable(callback), f"callback is {callback!r:.60}, expected a function of a Frame")
        require(isinstance(video, Sequence | np.ndarray | None), f"video is {video!r:.60}, expected frames")
        if guidance_scale is not None:
            settings = replace(settings, later=settings.later | {"guidance": guidance_scale})
        if negative_prompt is not None:
            settings = replace(settings, negative=negative_prompt or None)
        is_number = isinstance(num_samples, int) and not isinstance(num_samples, bool) and num_samples > 0
        require(is_number, f"num_samples is {num_samples!r}, expected a positive whole number")
        texts = [prompt] if isinstance(prompt, str) else prompt
        are_texts = isinstance(texts, Sequence) and len(texts) > 0 and all(isinstance(each, str) for each in texts)
        require(are_texts, f"prompt is {prompt!r:.60}, expected a text or a sequence of texts")
        prompts = [each for each in texts for _ in range(num_samples)]
        require(image is None or video is None, "got an image and a video to start from, expected only one")
        first = [image] if image is not None else video
        given = None if first is None else self.encode(first)
        last = None if last_image is None else self.encode([last_image])[0]
        found = []
        request = Request(prompts, _one_each(generator, len(prompts)), settings, given, last, loop)
        for frame in self.frames(request):
            found.append(frame)
            if callback is not None:
                callback(frame)
        return collect(found, self.fps(settings))

    @property
    def settings(self) -> GenerationSettings:
        """Settings from the model's configuration."""
        return GenerationSettings.of(self.model.config)

    def fps(self, settings: GenerationSettings) -> float:
        """Frames per second of a clip with these settings."""
        return (self.model.config.layout.num_frames - 1) * 2**settings.rounds / settings.duration

    def num_frames(self, settings: GenerationSettings) -> int:
        """Number of frames of a clip with these settings."""
        gaps = self.model.config.layout.num_frames - 1 + settings.more_key_frames
        return gaps * 2**settings.rounds + 1

    def encode(self, pictures: Iterable[Picture]) -> Int64[Tensor, "frames slots"]:
        """Encode pictures, cropped and resized to the model's frames.

        Raises:
            ValueError: the model has no image tokenizer.
        """
        from cogvideo.media.images import as_image, look  # only pictures need Pillow

        view = View(self.model.config.frame_size)
        seen = [look(as_image(each), view).pixels for each in pictures]
        require(len(seen) > 0, "got no pictures, expected one or more")
        return self._packed().autoencoder.encode_pixels(np.stack(seen))

    def stream(
        self, prompts: Sequence[str], generators: Sequence[torch.Generator], settings: GenerationSettings | None = None
    ) -> Iterator[Frame]:
        """Yield frames as they are finished, not in temporal order; see `frames`.

        Args:
            prompts: one per clip.
            generators: one CPU generator per clip.
            settings: all other choices; by default, the model's own.
        """
        return self.frames(Request(prompts, generators, settings or self.settings))

    def frames(self, request: Request) -> Iterator[Frame]:
        """Yield frames as they are finished, not in temporal order.

        Raises:
            ValueError: a prompt or setting cannot be used, the model lacks a component, or there is too
                little memory. Raised at the call, before weights are loaded.
        """
        there = self.model.components
        settings = request.settings
        require("image_tokenizer" in there, f"this model has no image_tokenizer for pixels; it has {', '.join(there)}")
        own = [spawn(generator, 1)[0] for generator in request.generators]
        model = self._packed()
        text = None
        frames = generate(model, request)
        if settings.should_enlarge and "superres" in there:
            slots = self.model.config.upscaler.text_slots
            text = self.model.text.batch(request.prompts, None, slots, settings.truncate)
        self.check_memory(settings, len(request.prompts))
        if self.offload:
            frames = _offloaded(model, frames)
        return _shown(model, frames, text, settings.superres, own)

    def check_memory(self, settings: GenerationSettings, batch: int) -> None:
        """Refuse clips that do not fit into memory; results are cached.

        Raises:
            ValueError: too little memory is free; the message says how much is needed and what helps.
        """
        if (settings, batch) not in self._fitting:
            dtype = self.model.dtype or torch.bfloat16  # stored weights have at least 16 bits
            held = self._packed().num_bytes
            require_memory(self.model, settings, dtype, self.model.device, batch, self.offload, held)
            self._fitting.add((settings, batch))

    def _packed(self) -> Packed:
        return Packed(self.model, self._kept, self.offload)


def _shown(
    model: Packed,
    frames: Iterator[FinishedFrame],
    text: PaddedText | None,
    sampling: SamplingConfig,
    generators: list[torch.Generator],
) -> Iterator[Frame]:
    """Decode frames to pixels, after super-resolution if there is text for it."""
    noise: list[list[torch.Generator]] = []
    layout = UpscaleLayout.of(model.config.layout, model.config.upscaler)
    sides = layout.low_sides if text is None else layout.high_sides
    for frame in frames:
        noise = noise or [spawn(generator, frame.num_frames) for generator in generators]
        codes = frame.codes
        if text is not None:
            codes = enlarge(model, text, codes, [each[frame.place] for each in noise], sampling)
        yield Frame(*frame, model.autoencoder.decode_pixels(codes, 1, sides))


def _offloaded(model: Packed, frames: Iterator[FinishedFrame]) -> Iterator[FinishedFrame]:
    """Compute all codes, release the weights, then yield the frames."""
    found = list(frames)
    model.release()
    yield from found


def collect(frames: Iterable[Frame], fps: float) -> Clips:
    """Arrange the frames of a batch in temporal order."""
    ordered = sorted(frames, key=lambda frame: frame.place)
    codes = torch.stack([frame.codes for frame in ordered], 1)
    return Clips(np.stack([frame.pixels for frame in ordered], 1), codes, fps)


def export_to_video(
    video_frames: Sequence[Picture] | Pixels,
    output_video_path: str | PathLike[str],
    fps: float = 8,
) -> str:
    """Write one clip as mp4, gif or webp, by the suffix of the path, and return the path.

    Raises:
        ValueError: the suffix is unknown, the frames do not form one clip, or the format does not support the rate.
        OSError: the file cannot be written.
    """
    pictures = [np.asarray(each) for each in video_frames]
    shapes = {each.shape for each in pictures}
    expected = "expected one clip: frames of one size, of shape (height, width, 3)"
    require(len(shapes) == 1, f"got frames of {len(shapes)} sizes, {expected}")
    (shape,) = shapes
    require(len(shape) == 3 and shape[2] == 3, f"got frames of shape {shape}, {expected}")
    frames = np.stack(pictures)
    require(frames.dtype == np.uint8, f"got frames of type {frames.dtype}, expected uint8")
    write_video(Path(output_video_path), frames, fps)
    return str(output_video_path)


def _one_each(generator: torch.Generator | Sequence[torch.Generator] | None, clips: int) -> list[torch.Generator]:
    expected = f"generator is {generator!r:.60}, expected one torch.Generator per clip"
    if isinstance(generator, Sequence):
        require(len(generator) > 0 and all(isinstance(each, torch.Generator) for each in generator), expected)
        return list(generator)
    require(generator is None or isinstance(generator, torch.Generator), expected)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    first = generator.initial_seed()
    fresh = [torch.Generator().manual_seed((first + number) % 2**63) for number in range(clips)]
    if torch.equal(generator.get_state(), fresh[0].get_state()):
        return [generator, *fresh[1:]]
    return [generator, *spawn(generator, clips - 1)]  # a used generator continues
