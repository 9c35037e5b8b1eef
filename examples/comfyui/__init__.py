"""Nodes for ComfyUI: put this folder into its `custom_nodes`, and `pip install cogvideo` into its environment.

Loader, sampler, extension (as often as wanted), and decoding to a batch of images, which any node that saves or shows
videos takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvideo.generation.request import GenerationSettings, Request
from cogvideo.pipeline import Clips, CogVideoPipeline, collect

SEED = ("INT", {"default": 0, "min": 0, "max": 2**53 - 1, "control_after_generate": True})
PROMPT = ("STRING", {"multiline": True, "default": "a red heart beats, on a white background"})


@dataclass(frozen=True)
class Clip:
    """A clip, with what another one needs to continue it."""

    made: Clips
    settings: GenerationSettings


class Load:
    """A model."""

    CATEGORY, FUNCTION = "cogvideo", "load"
    RETURN_TYPES, RETURN_NAMES = ("COGVIDEO",), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets of the node."""
        return {"required": {"name": ("STRING", {"default": "pocket"}), "device": (["auto", "cpu", "cuda"],)}}

    def load(self, name: str, device: str) -> tuple[CogVideoPipeline]:
        """Load a model: `pocket`, a folder, or an ID on the Hugging Face Hub."""
        return (CogVideoPipeline.from_pretrained(name, device=device),)


class Sample:
    """A clip of a prompt, from a first image and to a last one if they are connected."""

    CATEGORY, FUNCTION = "cogvideo", "sample"
    RETURN_TYPES, RETURN_NAMES = ("COGVIDEO_CLIP",), ("clip",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets and inputs of the node."""
        widgets = {
            "prompt": PROMPT,
            "negative": ("STRING", {"default": ""}),
            "seed": SEED,
            "rounds": ("INT", {"default": 3, "min": 0, "max": 6}),
            "guidance": ("FLOAT", {"default": 1.5, "min": 0.0, "max": 20.0, "step": 0.1}),
            "loop": ("BOOLEAN", {"default": False}),
        }
        images = {"first": ("IMAGE",), "last": ("IMAGE",)}
        return {"required": {"model": ("COGVIDEO",), **widgets}, "optional": images}

    def sample(
        self,
        model: CogVideoPipeline,
        prompt: str,
        negative: str,
        seed: int,
        rounds: int,
        guidance: float,
        loop: bool,
        first: Tensor | None = None,
        last: Tensor | None = None,
    ) -> tuple[Clip]:
        """Generate a clip. Five key frames become 9, 17 or 33 frames in 1, 2 or 3 rounds."""
        own = model.settings
        settings = replace(
            own, rounds=rounds, later=own.later | {"guidance": guidance}, negative=negative.strip() or None
        )
        given, end = (None if each is None else model.encode([_pixels(each)]) for each in (first, last))
        generator = torch.Generator().manual_seed(seed)
        return (_made(model, Request([prompt], [generator], settings, given, None if end is None else end[0], loop)),)


class Extend:
    """A clip that keeps the frames of another one, and goes on from its last second."""

    CATEGORY, FUNCTION = "cogvideo", "extend"
    RETURN_TYPES, RETURN_NAMES = ("COGVIDEO_CLIP",), ("clip",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets and inputs of the node."""
        return {"required": {"model": ("COGVIDEO",), "clip": ("COGVIDEO_CLIP",), "prompt": PROMPT, "seed": SEED}}

    def extend(self, model: CogVideoPipeline, clip: Clip, prompt: str, seed: int) -> tuple[Clip]:
        """Generate up to four more seconds, with the settings of the clip."""
        generator = torch.Generator().manual_seed(seed)
        return (_made(model, Request([prompt], [generator], clip.settings, clip.made.codes[0])),)


class Decode:
    """Images of a clip."""

    CATEGORY, FUNCTION = "cogvideo", "decode"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "FLOAT"), ("images", "fps")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node."""
        return {"required": {"clip": ("COGVIDEO_CLIP",)}}

    def decode(self, clip: Clip) -> tuple[Tensor, float]:
        """Return frames as ComfyUI has them, (frames, height, width, 3) in [0, 1], and their rate."""
        return torch.from_numpy(clip.made.frames[0]).float() / 255, clip.made.fps


def _made(model: CogVideoPipeline, request: Request) -> Clip:
    return Clip(collect(model.frames(request), model.fps(request.settings)), request.settings)


def _pixels(images: Tensor) -> np.ndarray:
    """The first image of a batch."""
    return (255 * images[0, ..., :3]).round().clamp(0, 255).byte().cpu().numpy()


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "CogVideoLoad": Load,
    "CogVideoSample": Sample,
    "CogVideoExtend": Extend,
    "CogVideoDecode": Decode,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    name: name.replace("CogVideo", "CogVideo ") for name in NODE_CLASS_MAPPINGS
}
