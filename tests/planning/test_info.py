"""`cogvideo info` compared with real modules, caches, operations, files and a process's memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import CogVideo
from cogvideo.commands.info import info, report
from cogvideo.config import (
    PRESETS,
    AutoencoderConfig,
    CogVideoConfig,
    LayoutConfig,
    SamplingConfig,
    StageConfig,
    TextConfig,
    TransformerConfig,
    UpscalerConfig,
    from_dict,
    preset,
)
from cogvideo.generation import hierarchy
from cogvideo.generation.decode import DecodedFrame, Passes, decode
from cogvideo.generation.decoder import Condition, Decoder
from cogvideo.generation.request import GenerationSettings, Request
from cogvideo.layout import SequenceLayout, UpscaleLayout
from cogvideo.models.attention import MaskPlan
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.plans import full_pass
from cogvideo.models.transformer import Base, TemporalChannel, Transformer
from cogvideo.models.upscaler import UpscaleChannel, Upscaler
from cogvideo.planning.costs import (
    STAGES,
    Stage,
    cache_size,
    clip,
    components,
    decoding,
    layout_of,
    rendering,
    resident,
    sums,
    upscaling,
)
from cogvideo.planning.training import training, training_states
from cogvideo.text import PaddedText, TextTokenizer

GIB = 2**30
CASES = [(stage, guided) for stage in STAGES for guided in (False, True)]
CPU = torch.device("cpu")
PAPER = preset("cogvideo")
SMALL = replace(
    CogVideoConfig(),
    transformer=replace(TransformerConfig(), num_layers=3, hidden=64, num_heads=2),
    layout=replace(CogVideoConfig().layout, grid=4, num_frames=5, text_slots=6, image_text_slots=9),
    sequential=StageConfig(window=2),
)


def real_model(config: CogVideoConfig, stage: Stage) -> Transformer:
    """The modules of a stage, with allocated and initialized weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Base(config.transformer)
        channel = None
        if stage != "image":
            channel = TemporalChannel(config.transformer, config.layout, getattr(config, stage))
            for block in channel.blocks:
                nn.init.zeros_(block.gate)
        return Transformer(base, channel)


def text(rows: int, slots: int) -> PaddedText:
    """Text without padding."""
    return PaddedText(torch.ones(rows, slots, dtype=torch.int64), torch.ones(rows, slots, dtype=torch.bool))


def real_decoder(
    config: CogVideoConfig, stage: Stage, guided: bool, samples: int = 1, cache_dtype: torch.dtype = torch.float32
) -> Decoder:
    """The decoder of a stage, with allocated memory."""
    layout = layout_of(config, stage)
    words = text(samples, layout.text_slots)
    condition = Condition(words, words if guided else None)
    return Decoder(real_model(config, stage), layout, condition, cache_dtype=cache_dtype)


def drawn_ranks(layout: SequenceLayout) -> range:
    """Ranks of the frames that a stage samples."""
    given = 0 if layout.num_frames == 1 else max(1, layout.num_bidirectional)
    return range(given, layout.num_frames)


# The released sizes


def test_released_sizes() -> None:
    """Guards the parameter counts of the paper's model (spec section 1): 5.90 B, 1.82 B, 7.72 B, 9.54 B."""
    sizes = components(PAPER) | sums(PAPER)
    billions = {name: round(size / 1e9, 2) for name, size in sizes.items()}
    assert billions["base"] == 5.90
    assert billions["sequential"] == billions["interpolation"] == 1.82
    assert billions["base with one stage"] == 7.72
    assert billions["base with both stages"] == 9.54


def test_released_traffic_and_training() -> None:
    """Guards bytes per step (within 1.5%) and training memory at the released sizes, against hand calculations."""
    by_hand = {"first frame": 11.1, "key frames": 16.4, "to 9 frames": 15.4, "to 33 frames": 17.8}
    read = {each.name: each.bytes_moved("gpu_bfloat16") / 1e9 for each in clip(PAPER)}
    assert {name: read[name] for name in by_hand} == pytest.approx(by_hand, rel=0.015)
    states = training_states(PAPER, "sequential")
    assert round(sum(states.values()) / GIB, 1) == 41.5
    assert training(PAPER, "sequential").flops_per_position == pytest.approx(33e9, rel=0.01)


# Compared with real modules, caches and operations


@pytest.mark.parametrize("config", [SMALL, preset("pocket")], ids=["small", "pocket"])
def test_parameters_are_those_of_the_modules(config: CogVideoConfig) -> None:
    """Catches a component that is forgotten or counted twice."""
    sizes, layout = config.transformer, config.layout
    modules = {
        "base": Base(sizes),
        "sequential": TemporalChannel(sizes, layout, config.sequential),
        "interpolation": TemporalChannel(sizes, layout, config.interpolation),
        "superres": UpscaleChannel(sizes, layout, config.upscaler),
        "image_tokenizer": Autoencoder(config.autoencoder),
    }
    counted = {name: sum(each.numel() for each in module.parameters()) for name, module in modules.items()}
    assert components(config) == counted


@pytest.mark.parametrize(("stage", "guided"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache_is_what_the_decoder_allocates(stage: Stage, guided: bool, dtype: torch.dtype) -> None:
    """Guards cache bytes: text copies per window, the spatial channel's single frame, guidance, dtype, samples."""
    decoder = real_decoder(SMALL, stage, guided, samples=3, cache_dtype=dtype)
    spatial, temporal = cache_size(SMALL, stage, guided)
    assert decoder.spatial.num_bytes == 3 * spatial * dtype.itemsize
    assert sum(each.num_bytes for each in decoder.temporal) == 3 * temporal * dtype.itemsize
    assert decoding(SMALL, "", stage, 3, guided).cache == 3 * (spatial + temporal)


@pytest.mark.parametrize(("stage", "guided"), CASES)
def test_operations_are_those_of_all_steps(stage: Stage, guided: bool) -> None:
    """Guards the mean work of a pass, which must equal PyTorch's own count over every cached step of the stage."""
    decoder, samples = real_decoder(SMALL, stage, guided, samples=2), 2
    layout, ranks = decoder.layout, drawn_ranks(decoder.layout)
    decoder.prefill(torch.zeros(samples, ranks.start, layout.frame_slots, dtype=torch.int64))
    token = torch.zeros(samples, 1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for rank in ranks:
            for slot in range(layout.frame_slots):
                decoder.step([rank * layout.frame_slots + slot], token)
    mean = decoding(SMALL, "", stage, samples, guided)
    assert mean.rows == samples * (1 + guided)
    assert mean.flops == pytest.approx(counter.get_total_flops() / (len(ranks) * layout.frame_slots), rel=1e-9)


@pytest.mark.parametrize(("stage", "guided"), CASES)
def test_operations_of_prefill(stage: Stage, guided: bool) -> None:
    """Guards the work before the first code, which must equal PyTorch's own count over text and given frames."""
    decoder = real_decoder(SMALL, stage, guided, samples=2)
    given = torch.zeros(2, drawn_ranks(decoder.layout).start, decoder.layout.frame_slots, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder.prefill(given)
    assert decoding(SMALL, "", stage, 2, guided).prefill_flops == counter.get_total_flops()


@pytest.mark.parametrize("stage", STAGES)
def test_bytes_moved_are_those_of_the_tensors_that_a_step_reads(stage: Stage) -> None:
    """Guards traffic: weights with a gradient after one step (except the tied head), and the keys that plans slice."""
    decoder = real_decoder(SMALL, stage, guided=True)
    layout, sizes = decoder.layout, SMALL.transformer
    model = decoder.model
    codes = torch.zeros(1, layout.num_frames, layout.frame_slots, dtype=torch.int64)
    _full_logits(model, layout, codes).sum().backward()
    used = [each for name, each in model.named_parameters() if each.grad is not None and "ositions" not in name]
    weights = sum(each.numel() for each in used) - model.base.words.weight.numel() + sizes.num_codes * sizes.hidden
    keys, steps = 0, [(rank, slot) for rank in drawn_ranks(layout) for slot in range(layout.frame_slots)]
    for rank, slot in steps:
        for cache in (decoder.spatial, *decoder.temporal):
            keys += len(cache.layers) * _num_keys(cache.step([rank * layout.frame_slots + slot]))
    read = 4 * (weights + 2 * 2 * sizes.hidden * keys / len(steps))  # two rows, keys and values
    assert decoding(SMALL, "", stage, 1, guided=True).bytes_moved("cpu_float32") == pytest.approx(read, rel=1e-9)


def _num_keys(plan: MaskPlan) -> int:
    """Number of keys that the single row of a step sees."""
    ((_, _, (chunk,)),) = plan.groups
    assert chunk.keys is not None
    return len(chunk.keys)


def _full_logits(model: Transformer, layout: SequenceLayout, codes: Tensor) -> Tensor:
    """Logits of an ordinary training pass over whole sequences."""
    words = text(len(codes), layout.text_slots)
    plan = full_pass(layout, model.window, words.mask, model.base.words.weight.dtype, layout.num_frames)
    fed = layout.feed(codes, model.base.config.start_of_image)
    frames = layout.frame_positions(range(layout.num_frames)).expand(len(codes), -1)
    tokens = torch.cat([words.tokens, fed], 1)
    positions = torch.cat([layout.text_positions(words.mask), frames], 1)
    return model.base.logits(model(tokens, positions, plan)[:, layout.text_slots :][:, layout.loss_slots()])


def test_operations_of_whole_frames_are_those_of_the_modules() -> None:
    """Guards super-resolution and rendering, whose work must equal PyTorch's own count over a real pass."""
    layout = UpscaleLayout.of(SMALL.layout, SMALL.upscaler)
    words, vectors = (
        text(1, layout.text_slots),
        torch.zeros(1, SMALL.autoencoder.embedding_dim, *[layout.high_grid] * 2),
    )
    upscaler = Upscaler(Base(SMALL.transformer), UpscaleChannel(SMALL.transformer, SMALL.layout, SMALL.upscaler))
    model = Autoencoder(SMALL.autoencoder)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as high:
            codes = torch.zeros(1, layout.low_slots, dtype=torch.int64)
            upscaler.base.logits(upscaler(words.tokens, words.mask, codes))
        with FlopCounterMode(display=False) as pixels:
            model.render(vectors, SMALL.autoencoder.rate)
    assert upscaling(SMALL, 7).flops == pytest.approx(high.get_total_flops(), rel=1e-9)
    assert rendering(SMALL, 7).flops == pytest.approx(pixels.get_total_flops(), rel=1e-9)
    assert upscaling(SMALL, 7).passes == rendering(SMALL, 7).passes == 7


@pytest.mark.parametrize("stage", STAGES)
def test_activations_are_what_autograd_keeps(stage: Stage) -> None:
    """Guards training memory: at least what a real forward pass saves for backward, at most a third more."""
    config = replace(SMALL, transformer=replace(SMALL.transformer, num_layers=16))
    model, layout, batch = real_model(config, stage).bfloat16(), layout_of(config, stage), 4
    if model.channel is not None:
        model.base.requires_grad_(False)
    own, kept = {each.untyped_storage().data_ptr() for each in model.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    codes = torch.zeros(batch, layout.num_frames, layout.frame_slots, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = _full_logits(model, layout, codes).float().flatten(0, 1)
        nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
    saved, expected = sum(each.nbytes() for each in kept.values()), training(config, stage, batch)
    assert saved <= expected.activations <= 1.33 * saved
    assert expected.activations_checkpointed < expected.activations


def test_phases_are_those_of_a_clip(text_model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards rows and passes of each phase, which must match a real run of the hierarchy with default guidance."""
    tokenizer = TextTokenizer(text_model, TextConfig(), 24)
    sizes = TransformerConfig(2, 16, 2, tokenizer.num_tokens, 24, tokenizer.start_of_image, tokenizer.pad, 40)
    layout = LayoutConfig(grid=2, num_frames=5, text_slots=32, image_text_slots=32, frame_position=32)
    config = replace(
        CogVideoConfig(),
        transformer=sizes,
        layout=layout,
        sequential=StageConfig(2),
        interpolation=StageConfig(2),
        upscaler=UpscalerConfig(text_slots=32, low_position=33),
        autoencoder=replace(AutoencoderConfig(), num_codes=24),
    )
    base, channel = Base(sizes), TemporalChannel(sizes, layout, StageConfig(2))
    for parameter in (*base.parameters(), *channel.parameters()):
        nn.init.constant_(parameter, 0.1)
    system = CogVideo(config, base=base, sequential=channel, interpolation=channel, text=tokenizer)
    runs: list[tuple[int, int]] = []

    def spy(
        model: Transformer, layout: SequenceLayout, condition: Condition, *args: Any, **options: Any
    ) -> Iterator[DecodedFrame]:
        frames = list(decode(model, layout, condition, *args, **options))
        runs.append((len(condition.rows.tokens), frames[-1].passes))
        return iter(frames)

    monkeypatch.setattr(hierarchy, "decode", spy)
    settings = GenerationSettings(
        rounds=2, first=SamplingConfig(temperature=0), later=SamplingConfig(temperature=0), passes=Passes()
    )
    list(hierarchy.generate(system, Request(["a cat"], [torch.Generator()], settings)))
    *drawn, upscaled, rendered = clip(config, settings)
    assert [(each.rows, each.passes) for each in drawn] == runs
    assert upscaled.passes == rendered.passes == 17


# Memory of a process

GENERATE = """
import torch
from dataclasses import replace
from cogvideo.config import CogVideoConfig, LayoutConfig, TransformerConfig
from cogvideo.generation.decode import decode
from cogvideo.generation.decoder import Condition
from cogvideo.generation.request import GenerationSettings, Request
from cogvideo.config import SamplingConfig
from cogvideo.generation.sampling import GumbelNoise
from cogvideo.layout import SequenceLayout
from cogvideo.models.transformer import Base, TemporalChannel, Transformer
from cogvideo.text import PaddedText

def run(hidden, layers):
    config = replace(
        CogVideoConfig(),
        transformer=replace(TransformerConfig(), hidden=hidden, num_layers=layers),
        layout=replace(LayoutConfig(), num_frames=3),
    )
    layout = SequenceLayout.sequential(config.layout)
    model = Transformer(Base(config.transformer), TemporalChannel(config.transformer, config.layout, config.sequential))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    text = PaddedText(*(torch.ones(8, layout.text_slots, dtype=kind) for kind in (torch.int64, torch.bool)))
    noise = GumbelNoise([torch.Generator() for _ in range(8)], 3, layout.frame_slots, config.transformer.num_codes)
    given = torch.zeros(8, 1, layout.frame_slots, dtype=torch.int64)
    passes = GenerationSettings().passes
    list(decode(model, layout, Condition(text, text, 3.0), given, noise, SamplingConfig(), passes=passes))

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    (line,) = [each for each in open("/proc/self/status") if each.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
run(32, 2)
before = peak()
run(512, 4)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_of_a_process_that_generates() -> None:
    """Guards the estimated peak: a real process (8 guided samples, float32) takes 0.8 to 1.4 times as much."""
    printed = subprocess.run([sys.executable, "-c", GENERATE], capture_output=True, text=True, check=True).stdout
    config = replace(
        CogVideoConfig(),
        transformer=replace(TransformerConfig(), hidden=512, num_layers=4),
        layout=replace(LayoutConfig(), num_frames=3),
    )
    phase = decoding(config, "", "sequential", 8, True)
    expected = phase.memory("cpu_float32")
    assert 0.8 * expected <= int(printed) <= 1.4 * expected


def test_resident_memory_is_the_largest_phase_with_all_weights() -> None:
    """Guards the memory of a clip if all weights stay loaded: neither the sum of phases nor one phase's weights."""
    phases, everything = clip(SMALL), 4 * sums(SMALL)["everything"]
    rest = [each.memory("cpu_float32") - 4 * each.weights for each in phases]
    assert resident(SMALL, phases, "cpu_float32") == everything + max(rest)


# The command


@pytest.mark.parametrize("name", ["pocket", "cogvideo"])
def test_report_of_a_preset(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the printed report: every section is present, and nothing is cut off at 80 columns."""
    info(name)
    printed = capsys.readouterr().out
    for section in ("Parameters", "One clip: work", "One clip: memory", "Training"):
        assert section in printed
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_presets_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the table without a target: one column per preset, with the paper's sizes."""
    info()
    printed = capsys.readouterr().out
    assert all(name in printed for name in PRESETS)
    assert all(figure in printed for figure in ("5.90 B", "1.82 B", "9.54 B", "16.4 GB", "41.5 GiB"))


def test_json_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the JSON for programs: the whole report, and a configuration that can be restored from it."""
    info("pocket", json=True, batch=2)
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(report("pocket", Manifest.of("pocket"), batch=2)))
    assert from_dict(CogVideoConfig, printed["config"]) == preset("pocket")
    assert [each["batch"] for each in printed["training"]] == [2, 2, 2]


def test_bundle_files_have_the_expected_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards file sizes: a file is a header plus the component's bytes, and the report shows its size on disk."""
    base = Base(SMALL.transformer)
    channel = TemporalChannel(SMALL.transformer, SMALL.layout, SMALL.sequential).bfloat16()
    labels = torch.zeros(SMALL.transformer.num_codes, dtype=torch.int64)
    CogVideo(SMALL, base=base, sequential=channel, cluster_labels=labels).save_pretrained(tmp_path)
    for name, bytes_a_value in (("base", 4), ("sequential", 2)):
        content = (tmp_path / f"{name}.safetensors").read_bytes()
        assert len(content) == 8 + int.from_bytes(content[:8], "little") + bytes_a_value * components(SMALL)[name]
    info(str(tmp_path))
    printed = capsys.readouterr().out
    assert "on disk" in printed
    assert "cluster_labels" in printed


@pytest.mark.parametrize(
    ("target", "batch", "message"),
    [
        ("pokcet", 1, r"got 'pokcet', expected a preset \(tiny, pocket, small, cogvideo\) or the folder of a bundle"),
        ("tests", 1, r"bundle\.json"),
        ("pocket", 0, "batch is 0, expected 1 to 1000000"),
        ("pocket", 10**20, "batch is 100000000000000000000, expected 1 to 1000000"),
    ],
)
def test_refusals(target: str, batch: int, message: str) -> None:
    """Prevents a traceback or nonsense for a wrong name, a folder without a bundle, or an impossible batch."""
    target = str(Path(__file__).parent) if target == "tests" else target
    with pytest.raises(ValueError, match=message):
        info(target, batch=batch)
