"""Memory and compute of a training step. `costs` explains the letters of the formulas."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cogvideo.config import CogVideoConfig
from cogvideo.models.transformer import Transformer
from cogvideo.models.upscaler import Upscaler
from cogvideo.planning.costs import (
    NARROW,
    WIDE,
    Matrices,
    Stage,
    count,
    kinds_of,
    layout_of,
    modules,
    num_cells,
)


@dataclass(frozen=True)
class Training:
    """One optimizer step of a stage on one GPU, in bfloat16 with float32 master weights and Adam; sizes in bytes."""

    stage: str
    batch: int
    states: dict[str, int]
    """Memory kept from step to step, by use."""
    activations: int
    """Activations at the peak of a step, if all are kept for the backward pass."""
    activations_checkpointed: int
    """The same if only the blocks' inputs are kept, and each block is recomputed."""
    flops_per_position: float
    """Operations by convention, see `flops_per_position`."""

    @property
    def total(self) -> int:
        """Memory without checkpointing."""
        return sum(self.states.values()) + self.activations

    @property
    def total_checkpointed(self) -> int:
        """Memory with checkpointing."""
        return sum(self.states.values()) + self.activations_checkpointed


def training(config: CogVideoConfig, stage: Stage, batch: int = 1, autocast: bool = False) -> Training:
    """Cost of a step of a stage. The image model trains its base; a video stage trains its channel on a frozen base.

    With `autocast`, norms and hence the residual stream are in float32, as with torch.autocast on GPUs.
    """
    flops = stage_flops(Matrices.of(config.transformer, stage == "image"), stage == "image")
    return Training(stage, batch, training_states(config, stage), *activations(config, stage, batch, autocast), flops)


def training_states(config: CogVideoConfig, stage: Stage) -> dict[str, int]:
    """Bytes that training a stage keeps: frozen weights once, five values per trained weight."""
    trained = count(modules(config)["base" if stage == "image" else stage])
    frozen = () if stage == "image" else modules(config)["base"].parameters()
    return {
        "frozen weights": sum(each.numel() * (NARROW if each.ndim > 1 else WIDE) for each in frozen),
        "working copy": NARROW * trained,
        "master weights": WIDE * trained,
        "gradients": WIDE * trained,
        "moments": 2 * WIDE * trained,
    }


def activations(config: CogVideoConfig, stage: Stage, batch: int, autocast: bool = False) -> tuple[int, int]:
    """Bytes at the peak of a step, excluding states, without and with checkpointing.

    All blocks keep their activations until the loss is known; with checkpointing, only their inputs, and one block all.
    In the image model, the word gradient from the code head stays in memory; at the end, the gradient from the
    embedding and the sum of both join it.
    """
    layers, sizes = _layer_activations(config, stage, autocast), config.transformer
    inputs = (len(layers) - 1) * layout_of(config, stage).length * sizes.hidden * (WIDE if autocast else NARROW)
    last = _last_activations(config, stage)
    words = NARROW * sizes.vocab_size * sizes.hidden if stage == "image" else 0
    kept, checkpointed = batch * (sum(layers) + last) + words, batch * (inputs + max(layers) + last) + words
    return max(kept, 3 * words), max(checkpointed, 3 * words)


def _layer_activations(config: CogVideoConfig, stage: Stage, autocast: bool) -> list[int]:
    """Bytes per sample that each block keeps for its backward pass.

    | kept | image model | video stage |
    |---|---|---|
    | inputs of the four norms, first norm | 5 R | 5 R |
    | spatial q and attention, keys and values | 2 R + 2 (T + F (T + S)) | the same |
    | input of the output projection, second norm | 2 R | its output, R |
    | around GELU | 8 R | 4 R |
    | temporal q, k, v without windows | | 3 R |
    | with windows, where cells gather them | | N + 2 (cells T + N) |
    | temporal attention, its parts joined, its output | | 3 N |

    All are rows of h two-byte values; autocast adds two bytes to inputs of norms. Attention keeps one float32 number
    per head and row.
    """
    layout, sizes, kinds = layout_of(config, stage), config.transformer, kinds_of(config, stage)
    text, rows = layout.text_slots, layout.length
    frame_rows = rows - text
    common = (11 if autocast else 7) * rows + 2 * (text + layout.num_frames * (text + layout.frame_slots))
    kept, scores = [common + 10 * rows], rows
    if kinds:
        cells = [3 * frame_rows + 2 * num_cells(kind) * text for kind in kinds] if len(kinds) > 1 else [3 * rows]
        kept, scores = [common + 5 * rows + each + 3 * frame_rows for each in cells], rows + frame_rows
    layers = [NARROW * sizes.hidden * each + WIDE * sizes.num_heads * scores for each in kept]
    return [layers[layer % len(layers)] for layer in range(sizes.num_layers)]


def _last_activations(config: CogVideoConfig, stage: Stage) -> int:
    """Bytes per sample between forward and backward pass, excluding what blocks keep.

    The peak is either in the loss, with logits in float32, their probabilities and the gradients of both, or in the
    last block, with gradients of 8 R h values while the first two are still held. Masks of both channels stay in memory
    throughout.
    """
    layout, sizes = layout_of(config, stage), config.transformer
    logits = WIDE * len(layout.loss_places) * layout.frame_slots * sizes.num_codes
    masked = layout.length if stage == "image" else 2 * layout.length - layout.text_slots
    masks = NARROW * layout.length * masked
    return masks + max(4 * logits, 2 * logits + 8 * NARROW * layout.length * sizes.hidden)


def flops_per_position(model: nn.Module) -> float:
    """Floating-point operations of a training step for each position that goes through the model, by convention.

    6 per trained weight and 4 per frozen weight of the matrices that a position goes through: two in the forward pass,
    two for the gradient of the input, two for the gradient of the weights. The code head counts at every position;
    embedding lookups, biases, norms, products of attention scores and recomputed activations do not count.

    Positions of super-resolution differ, and the result is their mean. Text and low codes only go through the base's
    blocks; if those are frozen, nothing before them learns, and they cost 2 per weight. High slots go through their
    own attention, the base's feed-forward layers and the code head.
    """
    assert isinstance(model, Upscaler | Transformer)
    is_trained = model.base.words.weight.requires_grad
    if isinstance(model, Transformer):
        return stage_flops(Matrices.of(model.base.config, model.channel is None), is_trained)
    base, attention, head = Matrices.of(model.base.config)
    layout = model.channel.layout
    low, high = layout.text_slots + layout.low_slots, layout.high_slots
    own = 6 * attention + (6 if is_trained else 4) * (base - attention + head)
    return (low * (6 if is_trained else 2) * base + high * own) / (low + high)


def stage_flops(matrices: Matrices, is_base_trained: bool) -> float:
    """Operations per position of the image model or a video stage, see `flops_per_position`."""
    return float((6 if is_base_trained else 4) * (matrices.base + matrices.head) + 6 * matrices.added)
