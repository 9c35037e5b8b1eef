"""The hot loops on a simulated GPU: host synchronizations and copies to the device per step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cogvideo.bundle.model import CogVideo
from cogvideo.config import LayoutConfig, SamplingConfig, TextConfig, preset
from cogvideo.data.loader import ClipSample
from cogvideo.generation.decode import Passes, decode
from cogvideo.generation.decoder import Condition, MaskedDecoder
from cogvideo.generation.upscale import slot_noise, upscale
from cogvideo.layout import SequenceLayout, UpscaleLayout
from cogvideo.models import plans, upscaler
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.transformer import Base, TemporalChannel, Transformer
from cogvideo.models.upscaler import UpscaleChannel, Upscaler
from cogvideo.pipeline import CogVideoPipeline
from cogvideo.text import PaddedText, TextTokenizer
from cogvideo.training.objectives import video
from cogvideo.training.objectives.image import ImageMixture, ImageTask
from cogvideo.training.objectives.superres import SuperresTask
from cogvideo.training.objectives.task import Objective
from cogvideo.training.objectives.tokenizer import FrameStream, TokenizerObjective, TokenizerSettings
from cogvideo.training.objectives.video import VideoTask
from cogvideo.training.optim import StageOptimization
from cogvideo.training.parallel import ALONE, ParallelSettings
from cogvideo.training.step import Execution, Trainer
from fake_cuda import CUDA, FakeCuda, pretended
from lessons import random_codes, sample

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reaches into the libraries of Linux builds")

TINY = preset("tiny")
SIZES = replace(TINY.transformer, num_layers=2)
LAYOUTS = {
    "image": SequenceLayout.text_to_image(TINY.layout),
    "sequential": SequenceLayout.sequential(TINY.layout),
    "interpolation": SequenceLayout.interpolation(TINY.layout),
}
GIVEN = {"image": 0, "sequential": 1, "interpolation": 3}
LABELS = torch.arange(SIZES.num_codes) % 16


@pytest.fixture(autouse=True)
def own_caches() -> Iterator[None]:
    """Prevent plans from outliving their simulated GPU."""
    yield
    for cached in (plans._structure, video._places, upscaler.neighborhoods):
        cached.cache_clear()


def model_of(stage: str, dtype: torch.dtype = torch.float32, layout: LayoutConfig = TINY.layout) -> nn.Module:
    """Create a small model of a stage on the simulated GPU."""
    with CUDA:
        base = Base(SIZES).to(dtype)
        if stage == "image":
            return Transformer(base)
        base.requires_grad_(False)
        if stage == "superres":
            return Upscaler(base, UpscaleChannel(SIZES, layout, TINY.upscaler).to(dtype))
        return Transformer(base, TemporalChannel(SIZES, layout, getattr(TINY, stage)).to(dtype))


def words(slots: int, real: int, batch: int = 2) -> PaddedText:
    """Create padded text."""
    return PaddedText(
        torch.full((batch, slots), SIZES.pad + 1), (torch.arange(slots) >= slots - real).expand(batch, -1)
    )


def some_samples(frames: int) -> list[ClipSample]:
    """Create samples for any stage, with captions of several lengths."""
    grid, ratio = TINY.layout.grid, TINY.upscaler.ratio
    codes = [random_codes(frames, grid, grid, num_codes=SIZES.num_codes, seed=seed) for seed in range(6)]
    high = random_codes(grid * ratio, grid * ratio, num_codes=SIZES.num_codes)
    return [sample(each, "a cat " * (1 + seed), seed, 1.0, high) for seed, each in enumerate(codes)]


# Training


@pytest.mark.parametrize(
    ("stage", "frames", "tensors"), [("image", 1, 6), ("sequential", 5, 3), ("interpolation", 5, 3), ("superres", 1, 4)]
)
def test_a_training_step_waits_for_nothing(text_model: bytes, stage: str, frames: int, tensors: int) -> None:
    """Guards against mixed devices, against host synchronizations, and against copies of more than the batch."""
    text = TextTokenizer(text_model, TextConfig(), SIZES.num_codes)
    task: Any = {
        "image": lambda: ImageTask(LAYOUTS["image"], text, ImageMixture(0.4, 0.2)),
        "superres": lambda: SuperresTask(UpscaleLayout.of(TINY.layout, TINY.upscaler), text),
    }.get(stage, lambda: VideoTask(LAYOUTS[stage], text))()
    batch = task.collate(some_samples(frames))
    settings = StageOptimization(batch=6, precision="bfloat16", ema=0.9)
    with pretended() as gpu:
        trainer = Trainer(
            Objective(model_of(stage), task), settings, Execution(), ParallelSettings(), ALONE._replace(device=CUDA)
        )
        trainer.step(0, batch)
        gpu.forget()
        trainer.step(1, batch)
        assert not gpu.waits
        assert gpu.copies == {"training/step.py": tensors}


def test_a_step_of_the_tokenizer_waits_for_nothing() -> None:
    """Same for codes and the adversary: a step copies frames, color statistics, and replacements for dead codes."""
    pixels = np.zeros((8, 32, 32, 3), np.uint8)
    settings = TokenizerSettings(steps=8, batch=4, precision="bfloat16", plain_steps=0, adversary_start=0)
    initial = Autoencoder(TINY.autoencoder)
    with pretended() as gpu:
        stream = FrameStream(pixels, settings.batch, 0)
        objective = TokenizerObjective(TINY.autoencoder, settings, 0, stream, None, CUDA, initial)
        trainer = Trainer(objective, settings, ranks=ALONE._replace(device=CUDA))
        trainer.step(0, stream[0])
        gpu.forget()
        trainer.step(1, stream[1])
        assert not gpu.waits
        assert gpu.copies == {"training/step.py": 1, "objectives/codebook.py": 1, "models/autoencoder.py": 4}


# Decoding


def condition(layout: SequenceLayout) -> Condition:
    return Condition(words(layout.text_slots, 9), words(layout.text_slots, 4), 2.0)


@pytest.mark.parametrize("stage", list(LAYOUTS))
def test_a_pass_waits_for_nothing(stage: str) -> None:
    """Guards steps, parallel frames and drafts against copies of indices; prefill may copy its text and codes."""
    layout, given = LAYOUTS[stage], torch.zeros(2, GIVEN[stage], LAYOUTS[stage].frame_slots, dtype=torch.int64)
    with pretended() as gpu:
        run = MaskedDecoder(model_of(stage, torch.bfloat16), layout, condition(layout), lanes=2)
        gpu.forget()
        run.prefill(given)
        assert gpu.copies.total() < 20
        first = GIVEN[stage]
        tokens = torch.zeros(2, 2, dtype=torch.int64, device=CUDA)
        slots = torch.zeros(2, 2, dtype=torch.int64, device=CUDA)
        area = layout.frame_slots
        fed = [first * area + 3, min(first + 1, layout.num_frames - 1) * area]
        gpu.forget()
        assert run.step(fed[:1], tokens[:, :1]).shape == (2, 1, SIZES.num_codes)
        assert run.step(fed, tokens).shape == run.rectangle(first, slots, tokens).shape == (2, 2, SIZES.num_codes)
        assert not gpu.waits
        assert not gpu.copies


@pytest.mark.parametrize(
    ("passes", "copies", "waits"), [(Passes(), 0, 0), (Passes(parallel_frames=True), 0, 0), (Passes(draft=4), 2, 3)]
)
def test_a_frame_waits_for_its_noise_and_its_drafts(passes: Passes, copies: int, waits: int) -> None:
    """Guards the sampler: a frame copies its noise. A drafting pass also copies its slots and row indices, and waits
    for these copies and the codes that it drew, but nothing else; a drafted frame copies its codes back."""
    sizes, numbers = replace(TINY.layout, grid=2), count(1)  # few passes, since they are slow
    layout = SequenceLayout.sequential(sizes)

    def answer(file: str) -> float:
        return next(numbers) % 2

    with pretended(answer) as gpu:
        model, given = model_of("sequential", torch.bfloat16, sizes), torch.zeros(2, 1, 4, dtype=torch.int64)
        noise = torch.zeros(2, 4, SIZES.num_codes)
        sampling = SamplingConfig(top_k=50, top_p=0.9, clusters=3)
        frames = decode(model, layout, condition(layout), given, lambda rank: noise, sampling, LABELS, passes)
        before = next(frames).passes
        gpu.forget()
        made = next(frames).passes - before
        of_frame = 1 + (passes.draft > 1)
        assert gpu.copies.total() <= of_frame + copies * made
        assert gpu.waits.total() <= of_frame + waits * made


def test_super_resolution_waits_for_its_frames_alone() -> None:
    """Guards sampling of many slots: only text, codes and labels are copied, whatever the number of portions."""
    with pretended() as gpu:
        model = model_of("superres", torch.bfloat16)
        layout = model.channel.layout
        low = torch.zeros(2, layout.low_slots, dtype=torch.int64)
        noise = [slot_noise(torch.Generator(), layout.high_slots, SIZES.num_codes, CUDA) for _ in low]
        text = words(layout.text_slots, 5)
        upscale(model, text, low, noise, SamplingConfig(clusters=3), LABELS)
        gpu.forget()
        noise = [slot_noise(torch.Generator(), layout.high_slots, SIZES.num_codes, CUDA) for _ in low]
        high = upscale(model, text, low, noise, SamplingConfig(clusters=3), LABELS, frames_per_pass=2)
        assert high.device == CUDA
        assert gpu.waits == gpu.copies == {"generation/upscale.py": 3, "generation/sampling.py": 1}


def test_the_autoencoder_attends_without_a_table_of_scores() -> None:
    """Guards against 3,600 x 3,600 attention scores in memory, which only `pretended` can detect here."""
    with pretended() as gpu:
        model = Autoencoder(TINY.autoencoder).to(CUDA, torch.bfloat16)
        gpu.forget()
        codes = model.encode(torch.zeros(2, 3, 32, 32, device=CUDA))
        assert model.decode(codes).device == CUDA
        assert gpu.waits.total() <= 2  # to check the range of the codes
        assert gpu.copies.total() <= 4  # means and standard deviations of the colors


def test_the_pipeline_on_a_gpu(text_model: bytes) -> None:
    """Guards the whole pipeline, from prompt to pixels, against mixed devices and dtypes."""
    numbers = count(1)

    def answer(file: str) -> float:
        return 10**6 * (next(numbers) % 2 == 0) if file == "generation/decode.py" else 0

    text = TextTokenizer(text_model, TextConfig(), SIZES.num_codes)
    own = {"vocab_size": text.num_tokens, "pad": text.pad, "start_of_image": text.start_of_image}
    sizes, layout = replace(SIZES, num_layers=1, **own), replace(TINY.layout, grid=2, num_frames=3)  # few, slow passes
    config = replace(TINY, transformer=sizes, layout=layout)
    with pretended(answer):
        with CUDA:
            parts: dict[str, Any] = {
                "base": Base(sizes),
                "sequential": TemporalChannel(sizes, layout, config.sequential),
                "interpolation": TemporalChannel(sizes, layout, config.interpolation),
                "superres": UpscaleChannel(sizes, layout, config.upscaler),
                "image_tokenizer": Autoencoder(config.autoencoder),
            }
        parts = {name: part.bfloat16() for name, part in parts.items()}
        pipeline = CogVideoPipeline(CogVideo(config, text=text, cluster_labels=LABELS, **parts))
        settings = replace(pipeline.settings, rounds=1)
        clips = pipeline("a red heart beats", generator=torch.Generator().manual_seed(7), settings=settings)
        assert clips.frames.shape == (1, 5, 48, 48, 3)


def test_a_bundle_is_loaded_to_a_gpu() -> None:
    """Guards against weights that stay on the CPU, and against a GPU that is not set up when a bundle is loaded."""
    with pretended():
        pipeline = CogVideoPipeline.from_pretrained("pocket", torch.bfloat16, "cuda")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert {each.device for each in pipeline.model.sequential.parameters()} == {CUDA}


def test_the_pretended_gpu_notices() -> None:
    """Checks the simulated GPU itself: it detects everything that it should."""
    with pretended() as gpu:
        there, here = torch.zeros(3, device=CUDA), torch.arange(3)
        with pytest.raises(RuntimeError, match=r"same device|different devices"):
            _ = there + here
        with pytest.raises(AssertionError, match="indexes a tensor on CUDA by one on the CPU"):
            _ = there[here]
        with pytest.raises(AssertionError, match="asks a GPU how large"):
            there.nonzero()
        assert (there.sum() > 0).item() is False
        assert here.to(CUDA, non_blocking=True).device == CUDA
        assert there.cpu().device.type == "cpu"
        assert (gpu.waits.total(), gpu.copies.total()) == (2, 1)


def test_a_real_device_is_left_as_it_was() -> None:
    """Guards later tests: nothing remains of the simulated GPU."""
    generator = torch.Generator
    with pretended() as gpu:
        assert isinstance(gpu, FakeCuda)
    assert torch.Generator is generator
    loss = torch.ones(2, requires_grad=True).sum()
    loss.backward()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1, device="cuda" if not torch.cuda.is_available() else "cuda:99")
