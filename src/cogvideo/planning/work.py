"""The work of training a position, which utilization is measured by."""

from __future__ import annotations

from torch import nn

from cogvideo.models.transformer import Transformer
from cogvideo.models.upscaler import Upscaler


def flops_a_position(model: nn.Module) -> float:
    """Floating-point operations of a training step for each position that goes through the model, by convention.

    6 for each trained parameter and 4 for each frozen one of the matrices that a position goes through: two in the
    forward pass, two for the gradient of what comes in, two for that of the weights. Counted are the linear layers and
    the code head, the latter at every position; not counted are embedding lookups, biases, norms and the products of
    attention's scores. Recomputing activations counts nothing more: utilization is of work that is needed.

    Positions of super-resolution differ, and the result is their mean. Text and low codes go through the base's blocks
    alone; if those are frozen nothing before them learns, and they cost 2 a parameter. High slots go through their own
    attention, the base's feed-forward layers and the code head.

    Args:
        model: `Transformer` or `Upscaler`, before or after it was sharded.
    """
    if isinstance(model, Upscaler):
        layout = model.channel.layout
        low, high = layout.text_slots + layout.low_slots, layout.high_slots
        base = _work(model.base.blocks, 2)
        own = _work(model.channel.blocks) + _work(model.base.blocks, among="mlp") + _head(model)
        return (low * base + high * own) / (low + high)
    assert isinstance(model, Transformer)
    added = 0 if model.channel is None else _work(model.channel.blocks)
    return float(_work(model.base.blocks) + added + _head(model))


def _work(blocks: nn.Module, frozen: int = 4, among: str = "") -> int:
    """Operations of the linear layers whose name starts with `among`."""
    layers = ((name.rpartition(".")[2], each) for name, each in blocks.named_modules() if isinstance(each, nn.Linear))
    weights = [each.weight for name, each in layers if name.startswith(among)]
    return sum((6 if weight.requires_grad else frozen) * weight.numel() for weight in weights)


def _head(model: Transformer | Upscaler) -> int:
    """Operations of the product with the code rows of the word embedding."""
    config = model.base.config
    return (6 if model.base.words.weight.requires_grad else 4) * config.hidden * config.num_codes
