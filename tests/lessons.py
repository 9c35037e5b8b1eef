"""Helpers for tests of training tasks: samples, large random weights, visibility checks, overfitting."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cogvideo.data.loader import ClipSample
from cogvideo.models.transformer import Transformer
from cogvideo.models.upscaler import Upscaler
from cogvideo.training.objectives.task import Objective, Task
from conftest import unchecked


def sample(
    codes: Tensor, caption: str | None = "a red ball rolls", seed: int = 0, duration: float = 0.0, high: object = None
) -> ClipSample:
    """Create a sample with codes (frames, grid, grid)."""
    high_codes = high.numpy().astype(np.uint16) if isinstance(high, Tensor) else None
    return ClipSample(codes.numpy().astype(np.uint16), caption, duration, 0, 0, 0, seed, high_codes)


def random_codes(*shape: int, num_codes: int, seed: int = 0) -> Tensor:
    """Return random codes of a given shape."""
    return torch.randint(num_codes, shape, generator=torch.Generator().manual_seed(seed))


def changed_in(codes: Tensor, place: int, num_codes: int) -> Tensor:
    """Return a copy of the codes with one of them changed, indexed across all frames."""
    other = codes.clone().flatten()
    other[place] = (other[place] + 1) % num_codes
    return other.view(codes.shape)


@torch.no_grad()
def large(module: nn.Module, seed: int = 0) -> nn.Module:
    """Convert to float64, with random weights so large that every visible input changes the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.double().named_parameters():
        wide = "gate" in name or "words" in name or "positions" in name
        parameter.normal_(float("norm" in name and "weight" in name), 1.0 if wide else 0.3, generator=generator)
    return module


@torch.no_grad()
def rows_of(model: nn.Module, task: Task, batch: object) -> Tensor:
    """Return the model's output for a batch of a task, before the logits, (batch, rows, hidden)."""
    kept: list[Tensor] = []
    hook = model.register_forward_hook(lambda _module, _inputs, rows: kept.append(rows))
    task.losses(model, batch)
    hook.remove()
    return kept[0]


def changes(model: nn.Module, task: Task, batch: object) -> Tensor:
    """Return which rows of every later sample differ from those of the first, (batch - 1, rows)."""
    rows = rows_of(model, task, batch)
    return (rows[1:] - rows[:1]).abs().amax(-1) > 1e-9


def learn(model: nn.Module, task: Task, samples: Sequence[ClipSample], steps: int, rate: float = 4e-3) -> float:
    """Overfit the samples; return the final mean loss."""
    objective, batch = Objective(model, task), task.collate(list(samples))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    with unchecked():  # all steps have the shapes of the final loss, which is checked
        for _ in range(steps):
            loss = objective(batch).loss.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float(objective(batch).loss.mean())


def narrowed(model: Transformer | Upscaler) -> Transformer | Upscaler:
    """Freeze the base in its storage types: matrices in bfloat16, vectors in float32."""
    for parameter in model.base.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if parameter.ndim > 1 else torch.float32)
    return model


def assert_the_channel_alone_is_trained(
    model: Transformer | Upscaler, task: Task, samples: Sequence[ClipSample], precision: str
) -> None:
    """Check that a frozen base (stored in bfloat16 if that is the precision) gets no gradients, every part of the
    channel does, and the loss is close to that of the same weights in float64."""
    batch, narrow = task.collate(list(samples)), precision == "bfloat16"
    exact = task.losses(copy.deepcopy(model).double(), batch).loss
    model = narrowed(model) if narrow else model
    model.base.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        loss = task.losses(model, batch).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=0.05 if narrow else 1e-4, atol=0)
    loss.mean().backward()
    assert all(each.grad is None for each in model.base.parameters())
    for name, each in model.channel.named_parameters():
        assert each.grad is not None, name
        assert each.grad.dtype == torch.float32
        assert each.grad.isfinite().all(), name
        assert each.grad.any(), name
