"""Parity with the released system: `python -m tests.parity DIR` for any folder in the format of tests/golden.

Prints a table (case, worst logit error, equal codes), and fails unless all codes are equal and all probed logits agree.
Sizes, seeds and texts come from each case's settings and tensors; golden/README.md explains the format.
Exit status: 0 if all cases pass, 1 if any fails, 2 if there is nothing to test.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from cogvideo.bundle.convert import released_autoencoder_names, released_base_names, released_channel_names
from cogvideo.config import (
    AutoencoderConfig,
    LayoutConfig,
    SamplingConfig,
    StageConfig,
    TransformerConfig,
    UpscalerConfig,
    preset,
)
from cogvideo.generation import decode as decoding
from cogvideo.generation.decode import DecodedFrame, Passes
from cogvideo.generation.decoder import Condition, Decoder
from cogvideo.generation.upscale import SLOTS_PER_DRAW, upscale
from cogvideo.layout import SequenceLayout
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.plans import full_pass
from cogvideo.models.transformer import Base, TemporalChannel, Transformer
from cogvideo.models.upscaler import UpscaleChannel, Upscaler
from cogvideo.text import PaddedText

GOLDEN = Path(__file__).parent / "golden"
LOGITS, PIXELS = 1e-4, 1e-3
"""Maximum error of a logit or loss (computed in float64, stored in float32), and of a pixel (computed in float32)."""
FRAME_POSITION, LOW_POSITION = 512, 513
"""Fixed in the released models: position of frame 0, and of the low codes of super-resolution."""
INTERPOLATION_WINDOW = 10
"""Default for generation cases without their own setting."""
EXTRA_POSITIONS = "mixins.extra_position_embedding.position_embeddings.weight"
PROBED_EVERY = {"infer_first": 37, "infer_stage1": 97, "infer_stage2": 61}
"""Distance between probed slots, in generated slots."""
DECODERS = ("Decoder", "MaskedDecoder", "GraphedDecoder")
CPU, ONE_BY_ONE = torch.device("cpu"), Passes()


class Outcome(NamedTuple):
    """The result of one case."""

    name: str
    error: float
    """Largest deviation of a logit or loss; of a pixel for the image tokenizer."""
    equal: int
    """Number of equal ids (codes, positions, fed tokens)."""
    total: int
    limit: float = LOGITS

    @property
    def passed(self) -> bool:
        """True if every id is equal and no value is off."""
        return self.equal == self.total > 0 and self.error <= self.limit


class Case(NamedTuple):
    """One file of the folder."""

    folder: Path
    name: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    device: torch.device

    @classmethod
    def read(cls, path: Path, device: torch.device = CPU) -> Case:
        """Read the settings and tensors of a file."""
        with safe_open(path, "pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(path.parent, path.stem, json.loads(file.metadata()["meta"]), tensors, device)

    def shapes(self, kind: str) -> dict[str, list[int]]:
        """Return released tensor names and shapes."""
        return json.loads((self.folder / f"state_dict_shapes_{kind}.json").read_text())

    def weights(self, kind: str) -> dict[str, Tensor]:
        """Compute released weights in float64 from the seed, by this project's own copy of the rule."""
        values = golden_weights().weights(self.shapes(kind), self.meta["seed"])
        return {name: torch.from_numpy(value).double() for name, value in values.items()}


class Tally:
    """Accumulated deviations of a case."""

    def __init__(self) -> None:
        self.error, self.equal, self.total = 0.0, 0, 0

    def close(self, ours: Tensor, theirs: Tensor) -> None:
        """Compare values."""
        if ours.shape != theirs.shape:
            raise ValueError(f"got values of shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}")
        error = float((ours.double() - theirs.double()).abs().max())
        self.error = max(self.error, math.inf if math.isnan(error) else error)

    def same(self, ours: Tensor, theirs: Tensor) -> None:
        """Compare ids."""
        if ours.shape != theirs.shape:
            raise ValueError(f"got ids of shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}")
        self.equal += int((ours == theirs).sum())
        self.total += theirs.numel()


# The model of a case


@functools.cache
def golden_weights() -> Any:
    """Import the module `golden/weights.py`."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def transformer_config(case: Case, shapes: dict[str, list[int]], start: int) -> TransformerConfig:
    """Derive sizes from the settings of the case and the shapes of its weights."""
    vocab_size, hidden = shapes["transformer.word_embeddings.weight"]
    return TransformerConfig(
        num_layers=case.meta["num_layers"],
        hidden=hidden,
        num_heads=case.meta["num_attention_heads"],
        vocab_size=vocab_size,
        num_codes=case.meta["num_image_tokens"],
        start_of_image=start,
        pad=0,
        num_positions=shapes["transformer.position_embeddings.weight"][0],
    )


def load(module: torch.nn.Module, names: dict[str, str], weights: dict[str, Tensor]) -> None:
    """Load weights, with a strict match of names, and remove them from `weights`."""
    module.load_state_dict({ours: weights.pop(released) for released, ours in names.items()})


def build(case: Case, start: int, window: int, text_slots: int, video: bool) -> tuple[Transformer, LayoutConfig]:
    """Build the image model or a video stage with the released weights, in float64."""
    sizes = LayoutConfig(case.meta["grid"], case.meta["frames"], text_slots, text_slots, FRAME_POSITION)
    config = transformer_config(case, case.shapes("cogvideo"), start)
    base, channel = Base(config).double(), TemporalChannel(config, sizes, StageConfig(window)).double()
    weights = case.weights("cogvideo")
    rows = len(channel.positions.weight)  # the released table may have more or fewer rows than are used
    weights[EXTRA_POSITIONS] = F.pad(weights[EXTRA_POSITIONS], (0, 0, 0, rows))[:rows]
    load(base, released_base_names(config.num_layers), weights)
    load(channel, released_channel_names(config.num_layers), weights)
    assert not weights, f"released tensors without a name of ours: {sorted(weights)}"
    return Transformer(base, channel if video else None).to(case.device), sizes


# Training cases


def check_training(case: Case, passes: Passes) -> Outcome:
    """Check fed tokens, positions, logits of frames and text, and losses in one full pass over a training sequence."""
    meta, given, tally = case.meta, case.tensors, Tally()
    mask, area = given["text_mask"].bool(), meta["grid"] ** 2
    batch, words = mask.shape
    model, sizes = build(case, int(given["tokens"][0, words]), max(meta["window"], 0), words, True)
    layout = SequenceLayout.sequential(sizes) if meta["stage"] == 1 else SequenceLayout.interpolation(sizes)
    by_rank = torch.tensor(layout.order)
    by_place = by_rank.argsort()  # the files store frames by place; the model is fed by rank

    def in_places(rows: Tensor) -> Tensor:
        return rows.unflatten(1, (len(by_rank), area))[:, by_place].flatten(1, 2)

    labels = given["labels"][:, words:].view(batch, -1, area)[:, by_rank]
    fed = layout.feed(labels, model.base.config.start_of_image)
    tally.same(in_places(fed), given["tokens"][:, words:])
    text_positions = layout.text_positions(mask)
    positions = layout.frame_positions(range(layout.num_frames)).expand(batch, -1).to(case.device)
    tally.same(torch.cat([text_positions, in_places(positions)], 1), given["position_ids"])

    plan = full_pass(layout, model.window, mask, torch.float64, layout.num_frames)
    tokens = torch.cat([given["tokens"][:, :words], fed], 1)
    x = model(tokens, torch.cat([text_positions, positions], 1), plan)
    logits = model.base.logits(x[:, words:])
    tally.close(in_places(logits)[:, given["probe"]], given["logits"])
    losses = F.cross_entropy(logits.transpose(1, 2), labels.flatten(1), reduction="none")
    tally.close(in_places(losses), given["per_token_loss"])
    tally.close(losses[:, layout.loss_slots()].mean(), given["loss"])
    probed = slice(words - given["text_logits"].shape[1], words)
    text_logits = F.linear(model.base.norm(x[:, probed]), model.base.words.weight)
    tally.close(text_logits[mask[:, probed]], given["text_logits"][mask[:, probed]])
    return Outcome(case.name, tally.error, tally.equal, tally.total)


# Generation cases


class Watched(Decoder):
    """A decoder that keeps the latest guided logits of each slot, by rank."""

    seen: ClassVar[dict[int, Tensor]]
    """Logits of one run; every run has its own class."""

    def step(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        logits = super().step(slots, tokens)
        for column, slot in enumerate(slots):
            rank, own = divmod(slot, self.layout.frame_slots)
            self._of(rank, logits)[:, own] = logits[:, column]
        return logits

    def draft(self, rank: int, runs: Sequence[range], fed: Tensor) -> Tensor:
        """See `Decoder`."""
        logits = super().draft(rank, runs, fed)
        parts = logits.split([len(run) for run in runs])
        for sample, (run, own) in enumerate(zip(runs, parts, strict=True)):
            self._of(rank, logits)[sample, run.start : run.stop] = own
        return logits

    def _of(self, rank: int, logits: Tensor) -> Tensor:
        shape = (len(self.condition.text.tokens), self.layout.frame_slots, logits.shape[-1])
        return self.seen.setdefault(rank, logits.new_full(shape, torch.nan))


class Watch(NamedTuple):
    """The frames of a run, and the logits that they were sampled from."""

    frames: list[DecodedFrame]
    logits: Tensor
    """(batch, frames, slots, codes)"""

    @property
    def codes(self) -> Tensor:
        """(batch, frames, slots)"""
        return torch.stack([frame.codes for frame in self.frames], 1)


@torch.inference_mode()
def watch(*arguments: Any, **options: Any) -> Watch:
    """Run `decode` and keep the logits of every slot."""
    seen: dict[int, Tensor] = {}
    kinds = {kind: type(kind, (Watched, getattr(decoding, kind)), {"seen": seen}) for kind in DECODERS}
    with mock.patch.multiple(decoding, **kinds):
        frames = list(decoding.decode(*arguments, **options))
    return Watch(frames, torch.stack([seen[rank] for rank in sorted(seen)], 1))


def check_generation(case: Case, passes: Passes) -> Outcome:
    """Check frames that were sampled with reproducible noise, and the logits they were sampled from."""
    meta, given, tally = case.meta, case.tensors, Tally()
    kind = "_".join(case.name.split("_")[:2])
    prompts = [meta["text"], *([meta["guide_text"]] if meta.get("guide_text") else [])]
    words = max(meta["text_len_train"], *(len(row) for prompt in prompts for row in rows_of(prompt, 1)))
    window = infer_window(case) if kind == "infer_stage2" else 0
    model, sizes = build(case, meta["boi"], window, words, video=kind != "infer_first")
    if kind == "infer_first":
        layout, first, expected = SequenceLayout.text_to_image(sizes), None, given["tokens"][:, None]
    elif kind == "infer_stage1":
        layout, first, expected = SequenceLayout.sequential(sizes), given["first"][:, None], given["frames"][:, 1:]
    else:
        layout, first, expected = SequenceLayout.interpolation(sizes), given["given"], given["inserted"]
    batch, num_drawn, slots = expected.shape
    first = expected[:, :0] if first is None else first
    texts = [pad(rows_of(prompt, batch), words, case.device) for prompt in prompts]
    bonus, scale = float(meta["log_text_attention_weight"]), float(meta.get("alpha") or 1)
    condition = Condition(texts[0], texts[1] if len(texts) > 1 else None, scale, bonus)
    noise = gumbel(meta["noise_seed"], num_drawn * slots, batch, meta["num_image_tokens"])
    noise = noise.unflatten(0, (num_drawn, slots)).transpose(1, 2).to(case.device)
    ours = watch(
        model,
        layout,
        condition,
        first,
        lambda rank: noise[rank - first.shape[1]],
        SamplingConfig(temperature=float(meta.get("temperature", 1))),
        passes=passes,
    )
    tally.same(ours.codes, expected)
    every = PROBED_EVERY[kind]
    tally.close(ours.logits.flatten(1, 2)[:, ::every].transpose(0, 1), given["logits_probe"])
    return Outcome(case.name, tally.error, tally.equal, tally.total)


def infer_window(case: Case) -> int:
    """Return the window of an interpolation case: its own, else the released one if it fits, else that of training."""
    window, training = INTERPOLATION_WINDOW, case.folder / "train_stage2_window.safetensors"
    if case.meta["grid"] % window and training.exists():
        window = Case.read(training).meta["window"]
    return max(int(case.meta.get("window", window)), 0)


def rows_of(prompt: list[Any], batch: int) -> list[list[int]]:
    """Return a row per sample: the same tokens for all, or the prompt's own rows."""
    return prompt if isinstance(prompt[0], list) else [prompt] * batch


def pad(rows: Sequence[Sequence[int]], slots: int, device: torch.device = CPU) -> PaddedText:
    """Left-pad rows to a number of slots."""
    tokens = torch.tensor([[0] * (slots - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[False] * (slots - len(row)) + [True] * len(row) for row in rows], device=device)
    return PaddedText(tokens, mask)


def gumbel(seed: int, draws: int, batch: int, num_codes: int) -> Tensor:
    """Return noise (draws, batch, codes): one draw per step, for all samples."""
    return torch.from_numpy(np.random.default_rng(seed).gumbel(size=(draws, batch, num_codes)))


# Super-resolution and the image tokenizer


def check_upscaling(case: Case, passes: Passes) -> Outcome:
    """Check all high codes from one pass, and the logits of some of them."""
    meta, given, tally = case.meta, case.tensors, Tally()
    shapes, weights = case.shapes("dsr"), case.weights("dsr")
    config = replace(transformer_config(case, shapes, meta["boi"]), pad=meta["pad"])
    words, low_end, end = meta["layout"]
    grid, side = math.isqrt(low_end - words), meta["kernel_size"]
    ratio = math.isqrt(end - low_end) // grid
    upscaler = UpscalerConfig(ratio, words, LOW_POSITION, 2 * side - 1, side, side)
    sizes = LayoutConfig(grid, 1, words, words, LOW_POSITION)
    base, channel = Base(config).double(), UpscaleChannel(config, sizes, upscaler).double()
    load(base, released_base_names(config.num_layers), weights)
    names = released_channel_names(config.num_layers)
    load(channel, {released: ours for released, ours in names.items() if not ours.endswith("gate")}, weights)
    assert not weights, f"released tensors without a name of ours: {sorted(weights)}"
    model, codes = Upscaler(base, channel).to(case.device), given["image_tokens"]
    text = pad(given["text"].tolist(), words, case.device)
    rng = np.random.default_rng(meta["noise_seed"])
    noise = torch.from_numpy(rng.gumbel(size=(*given["upsampled"].shape, config.num_codes))).to(case.device)
    drawn = upscale(model, text, codes, [iter(frame.split(SLOTS_PER_DRAW)) for frame in noise], SamplingConfig())
    tally.same(drawn, given["upsampled"])
    tally.close(base.logits(model(*text, codes)[:, given["probe"]]), given["logits"])
    return Outcome(case.name, tally.error, tally.equal, tally.total)


def check_tokenizer(case: Case, passes: Passes) -> Outcome:
    """Check the codes of images at every rate, and the images of codes."""
    meta, given, tally = case.meta, case.tensors, Tally()
    shapes = case.shapes("icetk_vqvae")
    config = replace(autoencoder_config(shapes), mean=tuple(meta["mean"]), std=tuple(meta["std"]))
    names = released_autoencoder_names(config)
    unread = shapes.keys() - names.keys() - {"quantize.cluster_size", "quantize.embed_avg"}
    assert not unread, f"released tensors without a name of ours: {sorted(unread)}"
    values = golden_weights().vqvae_weights({name: shapes[name] for name in names}, meta["seed"])
    with torch.device("meta"):
        model = Autoencoder(config)
    model.load_state_dict({names[name]: torch.from_numpy(value) for name, value in values.items()}, assign=True)
    model = model.to(case.device)
    for name in sorted(given):
        if match := re.fullmatch(r"ids_(\d+)x", name):
            rate = int(match[1])
            tally.same(model.encode(given["image"], rate), given[name])
            tally.close(model.decode(given[name], rate), given[f"decoded_{rate}x"])
    return Outcome(case.name, tally.error, tally.equal, tally.total, PIXELS)


def autoencoder_config(shapes: dict[str, list[int]]) -> AutoencoderConfig:
    """Derive sizes of the image tokenizer from the shapes of its weights; everything else is as released."""
    channels, (num_codes, embedding) = shapes["enc.conv_in.weight"][0], shapes["quantize.embed.weight"]

    def widths(prefix: str) -> tuple[int, ...]:
        levels = count(shapes, rf"{prefix}\.(\d+)\.block\.")
        return tuple(shapes[f"{prefix}.{level}.block.0.conv2.weight"][0] // channels for level in range(levels))

    released = preset("cogvideo").autoencoder
    return replace(
        released,
        channels=channels,
        encoder_multipliers=widths(r"enc.down"),
        encoder_blocks=count(shapes, r"enc\.down\.0\.block\.(\d+)\."),
        decoder_multipliers=tuple(widths(f"decs.{decoder}.up") for decoder in range(count(shapes, r"decs\.(\d+)\."))),
        decoder_blocks=count(shapes, r"decs\.0\.up\.0\.block\.(\d+)\."),
        embedding_dim=embedding,
        num_codes=num_codes,
        num_downsamplers=count(shapes, r"down_samplers\.(\d+)\."),
    )


def count(names: dict[str, list[int]], pattern: str) -> int:
    """Count the distinct numbers that the pattern's group matches in the names."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


# All cases of a folder

CHECKS: dict[str, Callable[[Case, Passes], Outcome]] = {
    "train_": check_training,
    "infer_": check_generation,
    "dsr": check_upscaling,
    "icetk_vqvae": check_tokenizer,
}
"""Checks, by the prefix of the names of their cases."""


def cases(folder: Path) -> list[Path]:
    """Return the case files in a folder."""
    return [path for path in sorted(folder.glob("*.safetensors")) if path.stem.startswith(tuple(CHECKS))]


@torch.inference_mode()
def check(path: Path, passes: Passes = ONE_BY_ONE, device: torch.device = CPU) -> Outcome:
    """Recompute a case on a device."""
    case = Case.read(path, device)
    run = next(run for prefix, run in CHECKS.items() if case.name.startswith(prefix))
    return run(case, passes)


def try_all(paths: Sequence[Path]) -> Iterator[Outcome]:
    """Check every case, continuing after one that cannot be computed."""
    for path in paths:
        try:
            yield check(path)
        except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
            print(f"parity: {path.name}: {type(error).__name__}: {error}", file=sys.stderr)
            yield Outcome(path.stem, math.inf, 0, 0)


def report(outcomes: Iterator[Outcome]) -> bool:
    """Print the table; return True if all cases pass."""
    table = Table("case", "worst error", "allowed", "codes equal", "")
    passed = []
    for each in outcomes:
        passed.append(each.passed)
        verdict = "pass" if each.passed else "FAIL"
        table.add_row(each.name, f"{each.error:.1e}", f"{each.limit:.0e}", f"{each.equal}/{each.total}", verdict)
    Console().print(table)
    return all(passed)


def main(arguments: Sequence[str]) -> int:
    """Run the command; see the top of the file."""
    if len(arguments) != 1:
        print("usage: python -m tests.parity DIR", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    if not folder.is_dir():
        print(f"parity: {folder} is not a folder", file=sys.stderr)
        return 2
    if not (found := cases(folder)):
        print(f"parity: {folder} holds no case, expected files like infer_first_frame.safetensors", file=sys.stderr)
        return 2
    return 0 if report(try_all(found)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
