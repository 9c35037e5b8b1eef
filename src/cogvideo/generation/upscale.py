"""Super-resolution of codes: one pass of the upscaler, then one draw per slot (spec section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cogvideo.bundle.model import StageModels
from cogvideo.config import SamplingConfig, require
from cogvideo.generation.sampling import Clusters, check_clusters, gumbel, log_probabilities, spawn
from cogvideo.layout import UpscaleLayout, check_code_range
from cogvideo.models.upscaler import Upscaler
from cogvideo.text import PaddedText, check_text

SLOTS_PER_DRAW = 240
"""High slots whose logits and noise are in memory at once. The codes depend on this number."""

SlotNoise = Iterator[Float[Tensor, "slots codes"]]
"""Noise of the high slots of one frame, in portions of `SLOTS_PER_DRAW`."""


def slot_noise(generator: torch.Generator, num_slots: int, num_codes: int, device: torch.device) -> SlotNoise:
    """Gumbel noise of one frame: at the released sizes 72 million numbers, or 1.5 s on a CPU core.

    The CPU generator of the frame is advanced once, here. Other kinds of devices draw other numbers.
    """
    own = torch.Generator(device).manual_seed(spawn(generator, 1)[0].initial_seed())
    return (gumbel(len(slots), num_codes, own) for slots in torch.split(torch.arange(num_slots), SLOTS_PER_DRAW))


def enlarge(
    system: StageModels,
    text: PaddedText,
    codes: Int64[Tensor, "batch low"],
    generators: Sequence[torch.Generator],
    sampling: SamplingConfig,
) -> Int64[Tensor, "batch high"]:
    """Compute the high codes of frames, with one generator per frame.

    Raises:
        ValueError: text or low codes are invalid, or the model has no super-resolution.
    """
    model, layout = system.upscaler, UpscaleLayout.of(system.config.layout, system.config.upscaler)
    words = model.base.words.weight
    noise = [slot_noise(each, layout.high_slots, model.base.config.num_codes, words.device) for each in generators]
    return upscale(model, text, codes, noise, sampling, system.cluster_labels, layout=layout)


@torch.inference_mode()
def upscale(
    model: Upscaler,
    text: PaddedText,
    codes: Int64[Tensor, "batch low"],
    noise: Sequence[SlotNoise],
    sampling: SamplingConfig,
    labels: Int64[Tensor, " codes"] | None = None,
    frames_per_pass: int = 1,
    layout: UpscaleLayout | None = None,
) -> Int64[Tensor, "batch high"]:
    """Compute the high codes of frames. A frame's codes depend only on its own text, low codes and noise.

    Args:
        model: the upscaler; the run uses its device and dtype.
        text: caption of each frame, left-padded, without a duration.
        codes: low codes of each frame.
        noise: noise of each frame, see `slot_noise`; not read by a greedy sampler.
        sampling: the sampler.
        labels: cluster of each code, for cluster sampling.
        frames_per_pass: frames that go through the model at once: more memory, fewer passes, the same codes.
        layout: layout for frames whose shape differs from the model's.

    Raises:
        ValueError: text, low codes, noise or frames per pass are invalid.
    """
    layout = layout or model.channel.layout
    _check(model, layout, text, codes, noise, frames_per_pass)
    check_clusters(sampling, labels, model.base.config.num_codes)
    device = model.base.words.weight.device
    clusters = None if labels is None else Clusters.of(labels, device)
    passes = []
    for frames in torch.split(torch.arange(len(codes)), frames_per_pass):
        rows = [each[frames].to(device) for each in (text.tokens, text.mask, codes)]
        high = model(*rows, layout)
        own = [noise[frame] for frame in frames.tolist()]
        parts = [_draw(model, part, own, sampling, clusters) for part in torch.split(high, SLOTS_PER_DRAW, dim=1)]
        passes.append(torch.cat(parts, dim=1))
    return torch.cat(passes)


def _draw(
    model: Upscaler,
    high: Float[Tensor, "frames slots hidden"],
    noise: Sequence[SlotNoise],
    sampling: SamplingConfig,
    clusters: Clusters | None,
) -> Int64[Tensor, "frames slots"]:
    scores = log_probabilities(model.base.logits(high), sampling, clusters)
    if sampling.is_greedy:
        return scores.argmax(-1)
    portions = [next(each, None) for each in noise]
    slots, expected = [0 if portion is None else len(portion) for portion in portions], high.shape[1]
    advice = "each needs a fresh `slot_noise`"
    require({*slots} == {expected}, f"got noise of {slots} slots, expected {expected} per frame: {advice}")
    return (scores + torch.stack([each.to(scores.device) for each in portions if each is not None])).argmax(-1)


def _check(
    model: Upscaler,
    layout: UpscaleLayout,
    text: PaddedText,
    codes: Tensor,
    noise: Sequence[SlotNoise],
    frames_per_pass: int,
) -> None:
    config = model.base.config
    fits = codes.ndim == 2 and len(codes) > 0 and codes.shape[1] == layout.low_slots
    expected = f"expected (batch, {layout.low_slots}) and at least one frame"
    require(fits, f"got low codes of shape {tuple(codes.shape)}, {expected}")
    check_text(text, len(codes), layout.text_slots, config.vocab_size)
    require(len(noise) == len(codes), f"got noise of {len(noise)} frames, expected {len(codes)}")
    require(frames_per_pass >= 1, f"frames_per_pass is {frames_per_pass}, expected at least 1")
    check_code_range(codes, config.num_codes)
