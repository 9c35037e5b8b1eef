"""Tests that only a GPU can decide: bfloat16 kernels against float64, CUDA graphs, and one run of every stage.

Without one, they run on the CPU, so that they do not fail in their first minute on a GPU.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.cuda import STAGES, trainer_of
from torch import Tensor, nn

import parity
from cogvideo.config import SamplingConfig, preset
from cogvideo.devices import usable
from cogvideo.generation.decode import Passes, decode
from cogvideo.generation.decoder import Condition
from cogvideo.generation.sampling import GumbelNoise
from cogvideo.generation.upscale import slot_noise, upscale
from cogvideo.layout import SequenceLayout
from cogvideo.models.attention import CellGroup, Chunk, MaskPlan, attend
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.upscaler import Upscaler
from cogvideo.pipeline import CogVideoPipeline
from cogvideo.training.objectives.tokenizer import FrameStream, TokenizerObjective, TokenizerSettings
from cogvideo.training.parallel import ALONE
from cogvideo.training.step import Trainer
from conftest import MakeSystem, MakeText

IS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_GPU else "cpu")
pytestmark = pytest.mark.cuda
TINY, CPU = preset("tiny"), torch.device("cpu")
CASES = ["train_stage2_window", "dsr"]
"""Fast cases of the released system."""
SHAPES = {
    "image": (2, 4, 112, 112),
    "keys % 128 == 64": (2, 4, 320, 320),
    "temporal": (2, 4, 320, 368),
    "window": (8, 4, 4, 64),
    "draft": (2, 4, 8, 368),
    "step": (2, 4, 1, 77),
    "odd": (1, 3, 33, 97),
}


@pytest.fixture(autouse=True)
def set_up() -> None:
    """Set up the GPU as every command does."""
    usable(DEVICE)


# Attention


@pytest.mark.parametrize("kind", ["none", "keys", "causal", "added"])
@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
def test_attention_in_bfloat16(shape: tuple[int, int, int, int], kind: str) -> None:
    """Guards every kernel that masks and shapes may select: values and gradients are finite and close to float64."""
    batch, heads, rows, keys = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (
        torch.randn(batch, heads, slots, 64, generator=generator).bfloat16() for slots in (rows, keys, keys, rows)
    )
    mask = _mask(kind, batch, rows, keys)
    found = _attention(q, k, v, gradient, mask, DEVICE, torch.bfloat16)
    exact = _attention(q, k, v, gradient, mask, CPU, torch.float64)
    for ours, expected in zip(found, exact, strict=True):
        assert ours.isfinite().all()
        assert (ours.cpu().double() - expected).norm() < 0.02 * expected.norm()


def _mask(kind: str, batch: int, rows: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    pads = torch.arange(keys) >= torch.arange(batch)[:, None]  # one more pad in each sample
    if kind == "keys":
        return pads[:, None, None]
    own = torch.arange(keys) == torch.arange(keys - rows, keys)[:, None]  # without it, padding would see nothing
    seen = (pads[:, None, None] & torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)) | own
    return seen if kind == "causal" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, mask: Tensor | None, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    leaves = [each.to(device, dtype).requires_grad_() for each in (q, k, v)]
    mask = None if mask is None else mask.to(device)
    plan = MaskPlan((CellGroup(None, None, (Chunk(None, None, mask),)),))
    out = attend(leaves[0], torch.stack(leaves[1:]), plan)
    backward = gradient.to(device, dtype).transpose(1, 2).flatten(2)
    return [out.detach(), *torch.autograd.grad(out, leaves, backward)]


@pytest.mark.parametrize("keys", [64, 192, 320])
def test_gradients_with_large_scores(keys: int) -> None:
    """Guards against NaN gradients from cuDNN, which need a mask, keys % 128 == 64 and very small sums."""
    q, k, v = (torch.randn(1, 1, keys, 64, generator=torch.Generator().manual_seed(0)) * 0.1 for _ in range(3))
    q[..., 0], k[..., 0] = 1.0, -120 * 8
    seen = torch.ones(1, 1, keys, keys, dtype=torch.bool).tril()
    for each in _attention(q, k, v, torch.ones_like(q), seen, DEVICE, torch.bfloat16):
        assert each.isfinite().all()


# Decoding


@pytest.mark.parametrize("stage", ["image", "sequential", "interpolation"])
def test_graphs_give_the_codes_of_eager_passes(make_system: MakeSystem, make_text: MakeText, stage: str) -> None:
    """Guards CUDA graphs in bfloat16: replayed passes give the same codes as eager passes with the same kernels."""
    system = make_system(stage, 4, 2 if stage == "interpolation" else 0)
    model = copy.deepcopy(system.model).to(DEVICE, torch.bfloat16)
    given = system.codes(2, {"image": 0, "sequential": 1, "interpolation": 3}[stage])
    condition = Condition(make_text((1, 4)), make_text((2, 5), seed=1), 1.5, 1.4)

    def codes(passes: Passes) -> Tensor:
        generators = [torch.Generator().manual_seed(number) for number in range(2)]
        noise = GumbelNoise(generators, system.layout.num_frames, 16, model.base.config.num_codes)
        labels = torch.arange(model.base.config.num_codes) % 6
        frames = decode(model, system.layout, condition, given, noise, SamplingConfig(clusters=3), labels, passes)
        return torch.stack([frame.codes.cpu() for frame in frames])

    for width in (1, 4):
        eager = codes(Passes(draft=width))
        assert torch.equal(codes(Passes(draft=width)), eager)  # whatever the order of additions on a GPU
        if IS_GPU:
            assert torch.equal(codes(Passes(draft=width, graphs=True)), eager)


# Training


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_every_stage(stage: str) -> None:
    """Guards loss and gradient norm under autocast: both are close to those of the CPU in float32."""
    figures = []
    start, batch = trainer_of(stage, TINY, 4, CPU)
    for device, precision in ((DEVICE, "bfloat16"), (CPU, "float32")):
        there, _ = trainer_of(stage, TINY, 4, device)
        there.settings = replace(there.settings, precision=precision)
        there.objective.load_state_dict(start.objective.state_dict())
        if precision == "float32":
            there.objective.float()
        there.step(0, batch)
        figures.append(there.figures(1))
        assert all(bool(each.isfinite().all()) for each in there.objective.parameters())
    assert figures[0].loss == pytest.approx(figures[1].loss, rel=0.01)
    assert figures[0].gradient_norm == pytest.approx(figures[1].gradient_norm, rel=0.05)


def test_a_step_of_the_tokenizer() -> None:
    """Guards channels-last convolutions, codes and the adversary in bfloat16."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    settings = TokenizerSettings(steps=4, batch=4, precision="bfloat16", plain_steps=0, adversary_start=1)
    stream = FrameStream(pixels, settings.batch, 0)
    objective = TokenizerObjective(TINY.autoencoder, settings, 0, stream, device=DEVICE)
    trainer = Trainer(objective, settings, ranks=ALONE._replace(device=DEVICE))
    for number in range(3):
        trainer.step(number, stream[number])
    trainer.figures(3)  # raises for values that are not finite


# The other models


def _same(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(DEVICE, torch.bfloat16)


@torch.inference_mode()
def test_super_resolution() -> None:
    """Guards neighborhoods and portions: logits close to those of the CPU in float32, and reproducible codes."""
    trainer, batch = trainer_of("superres", TINY, 2, CPU)
    here = trainer.objective.model.float()
    there = _same(here)
    assert isinstance(there, Upscaler)
    text, low = batch.text, batch.low.flatten(1)
    expected = here.base.logits(here(*text, low))
    ours = there.base.logits(there(text.tokens.to(DEVICE), text.mask.to(DEVICE), low.to(DEVICE)))
    assert (ours.cpu().float() - expected).norm() < 0.05 * expected.norm()
    codes = TINY.transformer.num_codes

    def drawn() -> Tensor:
        noise = [slot_noise(torch.Generator(), there.channel.layout.high_slots, codes, DEVICE) for _ in low]
        return upscale(there, text, low, noise, SamplingConfig(clusters=3), torch.arange(codes) % 16)

    assert torch.equal(drawn(), drawn())


@torch.inference_mode()
def test_the_image_tokenizer() -> None:
    """Guards encoding and decoding: most codes match the CPU in float32, and pixels are close."""
    torch.manual_seed(0)
    here = Autoencoder(TINY.autoencoder)
    there, frames = _same(here), torch.rand(2, 3, 64, 64)
    codes = here.encode(frames)
    assert (there.encode(frames.to(DEVICE)).cpu() == codes).float().mean() > 0.8
    expected = here.decode(codes)
    assert (there.decode(codes.to(DEVICE)).cpu().float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("case", [*CASES, *(["infer_stage1_guided", "icetk_vqvae"] if IS_GPU else [])])
def test_parity(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards parity with the released system on a GPU, in float64 and float32 as on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert parity.check(Path(parity.GOLDEN) / f"{case}.safetensors", device=DEVICE).passed


def test_the_pipeline() -> None:
    """Guards the model in the box from prompt to pixels: the same seed gives the same clip."""
    pipeline = CogVideoPipeline.from_pretrained("pocket", torch.bfloat16, DEVICE)
    settings: Any = replace(pipeline.settings, rounds=int(IS_GPU))
    one, again = (
        pipeline("a red heart beats", generator=torch.Generator().manual_seed(7), settings=settings) for _ in range(2)
    )
    assert one.frames.shape == (1, 9 if IS_GPU else 5, 96, 96, 3)
    assert torch.equal(one.codes, again.codes)
    assert one.frames.std() > 10


def test_layouts_of_the_rehearsal() -> None:
    """Guards the sizes that these tests rely on: `tiny` has windows, so both kinds of blocks are covered."""
    assert TINY.interpolation.window > 0
    assert SequenceLayout.interpolation(TINY.layout).num_frames == 5
