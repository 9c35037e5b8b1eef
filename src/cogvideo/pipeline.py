"""Text to video: the stages in a chain, one generator of finished frames for whoever shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Union

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from cogvideo.bundle.model import CogVideo
from cogvideo.bundle.packed import Packed, Parts
from cogvideo.config import SamplingConfig, require
from cogvideo.devices import default_dtype, usable
from cogvideo.generation.hierarchy import Finished, generate
from cogvideo.generation.request import Request, Settings
from cogvideo.generation.sampling import spawn
from cogvideo.generation.upscale import enlarge
from cogvideo.media.shots import View
from cogvideo.media.video import write_video
from cogvideo.planning.memory import require_memory
from cogvideo.text import PaddedText

if TYPE_CHECKING:
    import PIL.Image

Picture = Union["PIL.Image.Image", UInt8[np.ndarray, "_ _ 3"]]
"""An image: of Pillow, or red, green and blue."""


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


class Clips(NamedTuple):
    """Finished clips."""

    frames: UInt8[np.ndarray, "batch frames height width 3"]
    """Red, green and blue."""
    codes: Int64[Tensor, "batch frames slots"]
    fps: float
    """Frames a second."""


class CogVideoPipeline:
    """Text to video with one model.

    Args:
        model: with base, sequential stage, text and image tokenizer; interpolation and super-resolution where wanted.
            It stays as it is: what it has not loaded, the pipeline loads for itself, in the order that a CPU reads
            fastest. Of weights that it has loaded on a CPU there is a second copy in that order while clips are made.
        offload: keep in memory only the weights of the part at work, and read them again for every clip. Frames are
            then shown at the end, since they become pixels when all codes are there.
    """

    def __init__(self, model: CogVideo, offload: bool = False) -> None:
        self.model = model
        self.offload = offload
        self._kept: Parts = {}
        self._fitting: set[tuple[Settings, int]] = set()

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        offload: bool = False,
    ) -> CogVideoPipeline:
        """The pipeline of a bundle in a folder, of one on the Hugging Face Hub, or of the `pocket` model in the box.

        Args:
            name: folder, id (`owner/name`), or `pocket`.
            dtype: of the weights; unless given, float32 on a CPU, which is exact, and bfloat16 on a GPU.
            device: where the model is.
            offload: see the class.

        Raises:
            ValueError: there is no such bundle, or dtype or device cannot be used.
        """
        device = usable(device)
        return cls(CogVideo.from_pretrained(name, dtype or default_dtype(device), device), offload)

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
        settings: Settings | None = None,
    ) -> Clips:
        """Clips of one prompt or several.

        Args:
            prompt: text, or several.
            image: the first frame, cut to a square.
            video: frames to go on from, at the rate of the clip (8 a second with three rounds).
            last_image: the last frame, from `image` on.
            loop: end where the clip began.
            negative_prompt: text to move away from, instead of the unconditional one; empty for that. As in
                `settings` unless given.
            num_samples: clips of each prompt.
            generator: one a clip, on the CPU. A single one makes the first clip; the next clips get the seeds that
                follow its own, or, where it was drawn from before, seeds that it draws. Random unless given.
            guidance_scale: guidance of key frames; 1 disables it and halves the compute. As in `settings` unless given.
            callback: called with each frame when it is finished.
            settings: all else that decides a clip; the model's own unless given.

        Raises:
            ValueError: something cannot be used, or the model lacks a part.
        """
        settings = self.settings if settings is None else settings
        require(isinstance(settings, Settings), f"settings is {settings!r:.60}, expected Settings")
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
        require(image is None or video is None, "got an image and a video to start from, expected one of them")
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
    def settings(self) -> Settings:
        """The model's own."""
        return Settings.of(self.model.config)

    def fps(self, settings: Settings) -> float:
        """Frames a second of a clip that is made with these settings."""
        return (self.num_frames(settings) - 1) / settings.duration

    def num_frames(self, settings: Settings) -> int:
        """Frames of a clip that is made with these settings."""
        return (self.model.config.layout.num_frames - 1) * 2**settings.rounds + 1

    def encode(self, pictures: Iterable[Picture]) -> Int64[Tensor, "frames slots"]:
        """Codes of pictures, cut to squares of the model's size.

        Raises:
            ValueError: the model has no image tokenizer.
        """
        from cogvideo.media.images import as_image, look  # only pictures need Pillow

        view = View(self.model.config.frame_side)
        seen = [look(as_image(each), view).pixels for each in pictures]
        require(len(seen) > 0, "got no pictures, expected one or several")
        return self._packed().autoencoder.encode_pixels(np.stack(seen))

    def stream(
        self, prompts: Sequence[str], generators: Sequence[torch.Generator], settings: Settings | None = None
    ) -> Iterator[Frame]:
        """Frames as they are finished, not in order of time; see `frames`.

        Args:
            prompts: one a clip.
            generators: one CPU generator a clip.
            settings: all else that decides a clip; the model's own unless given.
        """
        return self.frames(Request(prompts, generators, settings or self.settings))

    def frames(self, request: Request) -> Iterator[Frame]:
        """Frames as they are finished, not in order of time. A clip depends on its prompt, generator and settings.

        Raises:
            ValueError: a prompt or a setting cannot be used, the model lacks a part, or there is too little memory. At
                the call, before weights are loaded.
        """
        there, settings = self.model.components, request.settings
        require("image_tokenizer" in there, f"this model has no image_tokenizer for pixels; it has {', '.join(there)}")
        own = [spawn(generator, 1)[0] for generator in request.generators]
        model, text = self._packed(), None
        frames = generate(model, request)
        if settings.should_enlarge and "superres" in there:
            slots = self.model.config.upscaler.text_slots
            text = self.model.text.batch(request.prompts, None, slots, settings.truncate)
        self.check_memory(settings, len(request.prompts))
        if self.offload:
            frames = _offloaded(model, frames)
        return _shown(model, frames, text, settings.superres, own)

    def check_memory(self, settings: Settings, batch: int) -> None:
        """Refuse clips that do not fit; each kind is computed once.

        Raises:
            ValueError: too little memory is free; the message says what is needed and what helps.
        """
        if (settings, batch) not in self._fitting:
            dtype = self.model.dtype or torch.bfloat16  # weights as they are stored have 16 bits at least
            held = self._packed().num_bytes
            require_memory(self.model, settings, dtype, self.model.device, batch, self.offload, held)
            self._fitting.add((settings, batch))

    def _packed(self) -> Packed:
        return Packed(self.model, self._kept, self.offload)


def _shown(
    model: Packed,
    frames: Iterator[Finished],
    text: PaddedText | None,
    sampling: SamplingConfig,
    generators: list[torch.Generator],
) -> Iterator[Frame]:
    """Pixels of the frames, enlarged where there is a text to do it with."""
    noise: list[list[torch.Generator]] = []
    for frame in frames:
        noise = noise or [spawn(generator, frame.num_frames) for generator in generators]
        codes = frame.codes
        if text is not None:
            codes = enlarge(model, text, codes, [each[frame.place] for each in noise], sampling)
        yield Frame(*frame, model.autoencoder.decode_pixels(codes))


def _offloaded(model: Packed, frames: Iterator[Finished]) -> Iterator[Finished]:
    """All codes first, without the weights that drew them afterwards."""
    found = list(frames)
    model.release()
    yield from found


def collect(frames: Iterable[Frame], fps: float) -> Clips:
    """All frames of a batch in order of time."""
    ordered = sorted(frames, key=lambda frame: frame.place)
    return Clips(
        np.stack([frame.pixels for frame in ordered], 1), torch.stack([frame.codes for frame in ordered], 1), fps
    )


def export_to_video(
    video_frames: Sequence[Picture] | UInt8[np.ndarray, "frames height width 3"],
    output_video_path: str | PathLike[str],
    fps: float = 8,
) -> str:
    """Write one clip as mp4, gif or webp, by the suffix of the path; the path is returned.

    Raises:
        ValueError: another suffix, no frames or others than those of one clip, or a rate that the format does not have.
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
    expected = f"generator is {generator!r:.60}, expected one torch.Generator a clip"
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
    return [generator, *spawn(generator, clips - 1)]  # one that was drawn from goes on, and so do the others
