"""Text to video: the stages in a chain, one generator of finished frames for whoever shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, Union

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int64, UInt8
from torch import Tensor

from cogvideo.bundle.model import CogVideo
from cogvideo.bundle.packed import Packed, Parts
from cogvideo.config import DrawingConfig, require
from cogvideo.devices import default_dtype, usable
from cogvideo.generation.hierarchy import Settings, generate
from cogvideo.generation.sampling import Sampling, spawn
from cogvideo.generation.upscale import slot_noise, superres_sampling, upscale
from cogvideo.media.shots import View
from cogvideo.media.video import write_video
from cogvideo.models.autoencoder import Autoencoder, to_pixels
from cogvideo.planning.memory import require_memory
from cogvideo.text import PaddedText, fit, pad_left

if TYPE_CHECKING:
    import PIL.Image

MOST_CONTEXT = 2
"""Key frames of a clip that is extended which the new ones follow: with two, the model sees how things move."""

Picture = Union["PIL.Image.Image", UInt8[np.ndarray, "_ _ 3"]]
"""An image: of Pillow, or red, green and blue."""


D = TypeVar("D", bound="Drawing")


@dataclass(frozen=True)
class Drawing:
    """How codes are drawn, as commands offer it: `DrawingConfig`, whose values a model has, and a call may change."""

    guidance: float | None = None
    """How strongly key frames follow the prompt; 1 is not at all, and twice as fast. This and the next ones are the
    model's own unless given."""
    temperature: float | None = None
    """Of later frames; lower is calmer."""
    clusters: int | None = None
    """Of codes that later frames are drawn from; fewer is calmer, 0 is all codes."""
    first_guidance: float | None = None
    """How strongly the first frame follows the prompt; 1 is not at all."""
    first_temperature: float | None = None
    """Of the first frame; lower is surer and less varied."""
    first_clusters: int | None = None
    """Of codes that the first frame is drawn from; 0 is all codes."""
    text_bonus: float | None = None
    """Added to text scores where there is no guidance."""
    superres_temperature: float | None = None
    """Of super-resolution; 0 takes the likeliest codes."""
    superres_clusters: int | None = None
    """Of codes that super-resolution draws from; 0 is all codes."""

    def of(self: D, own: DrawingConfig) -> D:
        """With a model's own values for those that are not given."""
        values = {name: value for name, value in asdict(own).items() if getattr(self, name) is None}
        return replace(self, **values)

    def settings(self, own: DrawingConfig) -> Settings:
        """The same as the stages of a model take it.

        Raises:
            ValueError: a value cannot be used.
        """
        return Settings.of(self._filled(own))

    def superres_sampling(self, own: DrawingConfig) -> Sampling:
        """The same as super-resolution takes it.

        Raises:
            ValueError: a value cannot be used.
        """
        return superres_sampling(self._filled(own))

    def _filled(self, own: DrawingConfig) -> DrawingConfig:
        given = self.of(own)
        return DrawingConfig(**{each.name: getattr(given, each.name) for each in fields(own)})


@dataclass(frozen=True)
class Upscaling:
    """How codes become larger."""

    enabled: bool = True
    """Whether they do, where the model has super-resolution."""
    sampling: Sampling | None = None
    """Sampler of the high codes; the model's own unless given."""


@dataclass(frozen=True)
class Given:
    """Frames that a clip is made around. They are kept as they are: as what the image tokenizer makes of them."""

    frames: Int64[Tensor, "frames slots"] | None = None
    """Leading frames at the rate of the finished clip: one is an image that starts to move, more are a clip that is
    extended from its last second."""
    last: Int64[Tensor, " slots"] | None = None
    """The last frame; then `frames` is one, the first."""
    loop: bool = False
    """End with the first frame again. It is left out of the clip, which then repeats without a jump."""

    def __post_init__(self) -> None:
        require(isinstance(self.loop, bool), f"loop is {self.loop!r:.60}, expected True or False")
        number = 0 if self.frames is None else len(self.frames)
        require(not (self.loop and self.last is not None), "a loop ends with its first frame, expected no last frame")
        require(not (self.loop and number > 1), "a clip that is extended does not end where it began: expected no loop")
        require(self.last is None or number == 1, f"got a last frame and {number} leading ones, expected one")


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
        upscaling: Upscaling | None = None,
    ) -> Clips:
        """Clips of one prompt or several.

        Args:
            prompt: what they show.
            image: the first frame, cut to a square.
            video: frames to go on from, at the rate of the clip (8 a second with three rounds).
            last_image: the last frame, from `image` on.
            loop: end where the clip began.
            negative_prompt: what to move away from, instead of the unconditional text; empty for that. As in
                `settings` unless given.
            num_samples: clips of each prompt.
            generator: one a clip, on the CPU. A single one makes the first clip; the next clips get the seeds that
                follow its own, or, where it was drawn from before, seeds that it draws. Random unless given.
            guidance_scale: how strongly key frames follow the prompt; 1 is not at all. As in `settings` unless given.
            callback: called with each frame when it is finished.
            settings: all else that decides a clip; the model's own unless given.
            upscaling: of the frames.

        Raises:
            ValueError: something cannot be used, or the model lacks a part.
        """
        settings = self.settings if settings is None else settings
        require(isinstance(settings, Settings), f"settings is {settings!r:.60}, expected Settings")
        require(callback is None or callable(callback), f"callback is {callback!r:.60}, expected a function of a Frame")
        require(isinstance(video, Sequence | np.ndarray | None), f"video is {video!r:.60}, expected frames")
        guidance = settings.guidance
        if guidance_scale is not None:
            guidance = replace(guidance, sequential=guidance_scale)
        if negative_prompt is not None:
            guidance = replace(guidance, negative=negative_prompt or None)
        settings = replace(settings, guidance=guidance)
        is_number = isinstance(num_samples, int) and not isinstance(num_samples, bool) and num_samples > 0
        require(is_number, f"num_samples is {num_samples!r}, expected a positive whole number")
        texts = [prompt] if isinstance(prompt, str) else prompt
        are_texts = isinstance(texts, Sequence) and len(texts) > 0 and all(isinstance(each, str) for each in texts)
        require(are_texts, f"prompt is {prompt!r:.60}, expected a text or a sequence of texts")
        prompts = [each for each in texts for _ in range(num_samples)]
        require(image is None or video is None, "got an image and a video to start from, expected one of them")
        first = [image] if image is not None else video
        given = Given(
            None if first is None else self.encode(first),
            None if last_image is None else self.encode([last_image])[0],
            loop,
        )
        found = []
        for frame in self.stream(prompts, _one_each(generator, len(prompts)), settings, upscaling, given):
            found.append(frame)
            if callback is not None:
                callback(frame)
        return collect(found, self.fps(settings))

    @property
    def settings(self) -> Settings:
        """The model's own."""
        return Settings.of(self.model.config.drawing)

    def fps(self, settings: Settings) -> float:
        """Frames a second of a clip that is made with these settings."""
        return (self.num_frames(settings) - 1) / settings.duration

    def num_frames(self, settings: Settings) -> int:
        """Frames of a clip that is made with these settings."""
        return (self.model.config.layout.num_frames - 1) * 2**settings.rounds + 1

    @torch.inference_mode()
    def encode(self, pictures: Iterable[Picture]) -> Int64[Tensor, "frames slots"]:
        """Codes of pictures, cut to squares of the model's size.

        Raises:
            ValueError: the model has no image tokenizer.
        """
        from cogvideo.media.images import as_image, look  # only pictures need Pillow

        view = View(self.model.config.frame_side)
        seen = [look(as_image(each), view).pixels for each in pictures]
        require(len(seen) > 0, "got no pictures, expected one or several")
        autoencoder = self._packed().autoencoder
        like = autoencoder.codebook.embedding
        pixels = rearrange(torch.from_numpy(np.stack(seen)), "frames height width rgb -> frames rgb height width")
        return autoencoder.encode(pixels.to(like.device, like.dtype) / 255, chunk=1).flatten(1).cpu()

    def stream(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        settings: Settings | None = None,
        upscaling: Upscaling | None = None,
        given: Given | None = None,
    ) -> Iterator[Frame]:
        """Frames as they are finished, not in order of time. A clip depends on its prompt, generator and settings.

        Args:
            prompts: one a clip.
            generators: one CPU generator a clip.
            settings: of the stages; the model's own unless given.
            upscaling: of the frames.
            given: frames that are there already, the same in every clip.

        Raises:
            ValueError: a prompt or a setting cannot be used, the model lacks a part, or there is too little memory. At
                the call, before weights are loaded.
        """
        settings, upscaling, given = settings or self.settings, upscaling or Upscaling(), given or Given()
        there = self.model.components
        require("image_tokenizer" in there, f"this model has no image_tokenizer for pixels; it has {', '.join(there)}")
        enlarged = [spawn(generator, 1)[0] for generator in generators]
        model = self._packed()
        frames = self._generate(model, prompts, generators, settings, given)
        enlarges = upscaling.enabled and "superres" in there
        text = self._text(prompts, settings.truncate) if enlarges else None
        sampling = upscaling.sampling or superres_sampling(self.model.config.drawing)
        self.check_memory(settings, len(prompts))
        if self.offload:
            frames = _offloaded(model, frames)
        return self._frames(model, frames, text, sampling, enlarged)

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

    def _generate(
        self,
        model: Packed,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        settings: Settings,
        given: Given,
    ) -> Iterator[_Coded]:
        """Codes of the frames, given ones first; those that lie between given ones are not drawn anew."""
        step, length = 2**settings.rounds, self.num_frames(settings)
        old = 0 if given.frames is None else len(given.frames)
        context = min(MOST_CONTEXT, 1 + (old - 1) // step) if old else 0
        start = old - 1 - (context - 1) * step if old else 0

        def rows(codes: Int64[Tensor, "*places slots"]) -> Int64[Tensor, "batch *places slots"]:
            return codes.expand(len(prompts), *codes.shape)

        frames = generate(
            model,
            prompts,
            generators,
            settings,
            rows(given.frames[start::step]) if given.frames is not None else None,
            rows(given.last) if given.last is not None else None,
            given.loop,
        )
        num_frames, spacing = start + length - given.loop, settings.duration / (length - 1)

        def coded() -> Iterator[_Coded]:
            for place in range(old):
                assert given.frames is not None
                yield _Coded("given", place, num_frames, rows(given.frames[place]))
            for frame in frames:
                place = start + round(frame.time / spacing)
                if old <= place < num_frames:
                    yield _Coded(frame.stage, place, num_frames, frame.codes)

        return coded()

    def _text(self, prompts: Sequence[str], truncate: bool) -> PaddedText:
        text, slots = self.model.text, self.model.config.upscaler.text_slots
        rows = [fit(text.encode_image_caption(prompt), slots, truncate) for prompt in prompts]
        return pad_left(rows, slots, text.pad)

    def _frames(
        self,
        model: Packed,
        frames: Iterator[_Coded],
        text: PaddedText | None,
        sampling: Sampling,
        generators: list[torch.Generator],
    ) -> Iterator[Frame]:
        """Pixels of the frames, enlarged where there is a text to do it with."""
        noise: list[list[torch.Generator]] = []
        for frame in frames:
            noise = noise or [spawn(generator, frame.num_frames) for generator in generators]
            codes = frame.codes
            if text is not None:
                codes = self._upscale(model, text, codes, [each[frame.place] for each in noise], sampling)
            yield Frame(*frame, self._pixels(model.autoencoder, codes))

    def _upscale(
        self,
        model: Packed,
        text: PaddedText,
        codes: Int64[Tensor, "batch slots"],
        generators: Sequence[torch.Generator],
        sampling: Sampling,
    ) -> Int64[Tensor, "batch high"]:
        upscaler = model.upscaler
        device = upscaler.base.words.weight.device
        slots, num_codes = upscaler.channel.layout.high_slots, model.config.transformer.num_codes
        noise = [slot_noise(generator, slots, num_codes, device) for generator in generators]
        return upscale(upscaler, text, codes, noise, sampling, model.cluster_labels)

    @torch.inference_mode()
    def _pixels(
        self, autoencoder: Autoencoder, codes: Int64[Tensor, "batch slots"]
    ) -> UInt8[np.ndarray, "batch height width 3"]:
        side = round(codes.shape[1] ** 0.5)
        squares = codes.to(autoencoder.codebook.embedding.device).view(-1, side, side)
        return to_pixels(autoencoder.decode(squares, chunk=1))


def _offloaded(model: Packed, frames: Iterator[_Coded]) -> Iterator[_Coded]:
    """All codes first, without the weights that drew them afterwards."""
    found = list(frames)
    model.release()
    yield from found


class _Coded(NamedTuple):
    """A frame before it has pixels, see `Frame`."""

    stage: str
    place: int
    num_frames: int
    codes: Int64[Tensor, "batch slots"]


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
