"""Packed weights: the same function as before, and the same bits for any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from cogvideo.config import LayoutConfig, StageConfig, TransformerConfig
from cogvideo.generation.decoder import Condition, Decoder
from cogvideo.layout import SequenceLayout
from cogvideo.models.transformer import Base, TemporalChannel, Transformer, initialize
from cogvideo.packing import PackedLinear, PackedWords, can_pack, pack
from cogvideo.text import PaddedText, pad_left
from reference import relative_error

SHAPE = (768, 256)


def some_linear(dtype: torch.dtype, shape: tuple[int, int] = SHAPE) -> nn.Linear:
    return nn.Linear(shape[1], shape[0], dtype=dtype).requires_grad_(False)


def needs_packing(dtype: torch.dtype) -> None:
    if not can_pack(some_linear(dtype).weight):
        pytest.skip(f"oneDNN does not pack {dtype} on this machine")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_packed_equals_linear(dtype: torch.dtype, tolerance: float) -> None:
    """Guards the private operators: they must still compute x W^T + b in a new PyTorch version."""
    needs_packing(dtype)
    linear, x = some_linear(dtype), torch.randn(3, 5, SHAPE[1], dtype=dtype)
    for bias in (linear.bias, None):
        expected = torch.nn.functional.linear(
            x.double(), linear.weight.double(), None if bias is None else bias.double()
        )
        assert relative_error(PackedLinear(linear.weight, bias)(x), expected) < tolerance


@pytest.mark.parametrize("shape", [SHAPE, (256, 1024), (512, 2048), (1024, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_their_number(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Checks reproducibility across batches: a row gives the same result alone or among others, at any position."""
    needs_packing(dtype)
    packed, x = PackedLinear(some_linear(dtype, shape).weight, None), torch.randn(200, 1, shape[1], dtype=dtype)
    whole = packed(x)
    for rows in (1, 2, 3, 5, 8, 17, 32, 33, 65, 160):
        assert torch.equal(packed(x[:rows]), whole[:rows])
        assert torch.equal(packed(x[7 : rows + 7]), whole[7 : rows + 7])


class Packed(NamedTuple):
    """Packed video stage with five texts."""

    model: Transformer
    sequence: SequenceLayout
    texts: Callable[[slice], list[PaddedText]]
    given: torch.Tensor

    @classmethod
    def of(cls, dtype: torch.dtype, window: int) -> Packed:
        """Random weights, and a text of a different length for every sample."""
        needs_packing(dtype)
        config, layout = TransformerConfig(num_layers=2), LayoutConfig(grid=4)
        channel = TemporalChannel(config, layout, StageConfig(window))
        parts = Base(config), channel
        for part in parts:
            initialize(part, 2, torch.Generator().manual_seed(0))
            pack(part.to(dtype).requires_grad_(False))
        rows = [[1100 + number] * (3 + 5 * number) for number in range(5)]

        def texts(samples: slice) -> list[PaddedText]:
            return [pad_left(each[samples], layout.text_slots, config.pad) for each in (rows, [[1200, 1201]] * 5)]

        given = torch.arange(5)[:, None, None].expand(-1, 2, 16) * 7
        return cls(Transformer(*parts), SequenceLayout.sequential(layout), texts, given)

    def run(self, samples: slice) -> Decoder:
        """Guided run of some of the samples, with two given frames."""
        run = Decoder(self.model, self.sequence, Condition(*self.texts(samples), 3.0))
        run.prefill(self.given[samples])
        return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 2])
def test_logits_do_not_depend_on_the_batch(dtype: torch.dtype, window: int) -> None:
    """Checks the guarantee for packed models: a sample's logits are bit-identical alone and in a batch."""
    packed, tokens = Packed.of(dtype, window), torch.arange(5)[:, None] + 40

    def logits(samples: slice) -> torch.Tensor:
        run = packed.run(samples)
        return torch.stack([run.step([2 * 16 + slot], tokens[samples]) for slot in range(4)], 1)

    whole = logits(slice(None))
    for sample in range(5):
        assert torch.equal(logits(slice(sample, sample + 1)), whole[sample : sample + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 2])
def test_drafts_do_not_depend_on_the_batch(dtype: torch.dtype, window: int) -> None:
    """Checks the same guarantee for drafts: a sample is bit-identical however many slots the others draft."""
    packed, fed = Packed.of(dtype, window), torch.arange(5 * 17).view(5, 17) + 40
    passes = [
        [range(3)] * 5,
        [range(1, 9), range(2, 3), range(1, 3), range(3, 7), range(3, 8)],
        [range(2, 3), range(3, 4), range(2, 10), range(16, 16), range(4, 16)],
    ]
    run = packed.run(slice(None))
    whole = [run.draft(2, runs, fed).split([len(each) for each in runs]) for runs in passes]
    for sample in range(5):
        run = packed.run(slice(sample, sample + 1))
        for runs, found in zip(passes, whole, strict=True):
            if runs[sample]:
                alone = run.draft(2, [runs[sample]], fed[sample : sample + 1])
                assert torch.equal(alone, found[sample])


def test_pack_replaces_large_layers_and_the_head() -> None:
    """Checks that packing replaces large layers and the head, keeps their results, and happens only once."""
    needs_packing(torch.float32)
    base = Base(TransformerConfig(num_layers=1)).requires_grad_(False)
    x = torch.randn(1, 2, 256)
    before = base.blocks[0].mlp(x), base.logits(x)
    pack(base)
    assert isinstance(base.blocks[0].qkv, PackedLinear)
    words = base.words
    assert isinstance(words, PackedWords)
    for after, exact in zip((base.blocks[0].mlp(x), base.logits(x)), before, strict=True):
        assert relative_error(after, exact) < 1e-5
    pack(base)
    assert base.words is words


def test_other_dtypes_and_small_layers_stay() -> None:
    """Guards float64 runs and tiny models against operators that fail or slow them down."""
    for layer in (some_linear(torch.float64), some_linear(torch.float32, (32, 32))):
        model = nn.Sequential(layer)
        pack(model)
        assert model[0] is layer
