"""Positions in a sequence, which slots share a window, the lag of parallel frames, and configurations."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.config import (
    PRESETS,
    AutoencoderConfig,
    CogVideoConfig,
    LayoutConfig,
    SamplingConfig,
    StageConfig,
    TransformerConfig,
    UpscalerConfig,
    from_dict,
    preset,
)
from cogvideo.layout import SequenceLayout, UpscaleLayout, cells, check_code_range, lag
from reference import all_slots, visible, window_labels

RELEASED = preset("cogvideo").layout
SMALL = LayoutConfig(grid=4, num_frames=5, text_slots=6, image_text_slots=7, frame_position=8)
WINDOWS = [(2, 2), (4, 2), (4, 4), (6, 2), (6, 6), (8, 2), (8, 4), (12, 4), (20, 10)]


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int]:
    """A grid, and a window that divides it or 0."""
    window = draw(st.sampled_from([0, 2, 4, 6]))
    return (draw(st.integers(1, 7)), 0) if not window else (window * draw(st.integers(1, 12 // window)), window)


# Sequences


def test_released_layout() -> None:
    """Guards the released sequence: 64 text slots and 5 frames of 400, (64, 464, 2064); added positions from 912 on."""
    layout = SequenceLayout.sequential(RELEASED)
    assert (layout.text_slots, layout.frame_slots, layout.length) == (64, 400, 2064)
    assert layout.first_extra_position == 912
    positions = layout.frame_positions(range(5))
    assert torch.equal(positions, 512 + torch.arange(2000))


def test_orders_and_losses() -> None:
    """Guards against frames that are fed, seen or trained in the wrong order or stage."""
    image = SequenceLayout.text_to_image(SMALL)
    assert (image.text_slots, image.order, image.num_bidirectional, image.loss_places) == (7, (0,), 0, (0,))
    sequential = SequenceLayout.sequential(SMALL)
    assert (sequential.order, sequential.num_bidirectional) == ((0, 1, 2, 3, 4), 0)
    assert sequential.loss_places == (1, 2, 3, 4)
    interpolation = SequenceLayout.interpolation(SMALL)
    assert (interpolation.order, interpolation.num_bidirectional) == ((0, 2, 4, 1, 3), 3)
    assert interpolation.loss_places == (1, 3)
    assert SequenceLayout.interpolation(SMALL, 2).order == (0, 2, 1)
    assert SequenceLayout.interpolation(replace(SMALL, num_frames=6)).order == (0, 2, 4, 1, 3)


@pytest.mark.parametrize("num_given", [-1, 0, 1, 4])
def test_refused_numbers_of_given_frames(num_given: int) -> None:
    """Guards against interpolation without neighbors, or beyond the positions."""
    with pytest.raises(ValueError, match=f"got {num_given} given frames to interpolate, expected 2 to 3"):
        SequenceLayout.interpolation(SMALL, num_given)


def test_loss_slots_are_those_of_the_loss_places() -> None:
    """Guards against loss on given frames, from confusing places with ranks."""
    for layout, ranks in (
        (SequenceLayout.text_to_image(SMALL), [0]),
        (SequenceLayout.sequential(SMALL), [1, 2, 3, 4]),
        (SequenceLayout.interpolation(SMALL), [3, 4]),
        (SequenceLayout.interpolation(SMALL, 2), [2]),
    ):
        assert layout.loss_slots().tolist() == [rank * 16 + slot for rank in ranks for slot in range(16)]


def test_positions_follow_places_not_ranks() -> None:
    """Guards against interpolated frames at the positions of their rank."""
    layout = SequenceLayout.interpolation(SMALL)
    expected = [8 + 16 * place + slot for place in (0, 2, 4, 1, 3) for slot in range(16)]
    assert layout.frame_positions(range(5)).tolist() == expected
    assert layout.frame_positions(range(3, 4)).tolist() == expected[48:64]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_text_positions_count_from_the_first_real_token(lengths: list[int]) -> None:
    """Guards against caption positions that depend on the amount of padding."""
    mask = torch.arange(6) >= 6 - torch.tensor(lengths)[:, None]
    positions = SequenceLayout.sequential(SMALL).text_positions(mask)
    for row, length in zip(positions.tolist(), lengths, strict=True):
        assert row == [0] * (6 - length) + list(range(length))


def test_input_shift() -> None:
    """Guards against a slot that is fed its own code, or the last code of the previous frame."""
    codes = torch.arange(2 * 5 * 16).view(2, 5, 16)
    fed = SequenceLayout.sequential(SMALL).feed(codes, 999).view(2, 5, 16)
    for sample in range(2):
        for frame in range(5):
            assert fed[sample, frame].tolist() == [999, *codes[sample, frame, :-1].tolist()]
    assert SequenceLayout.sequential(SMALL).feed(codes[:, :0], 999).shape == (2, 0)


def test_layout_of_super_resolution() -> None:
    """Guards the released sizes: (96, 496, 4096), with low codes at position 513 and up."""
    layout = UpscaleLayout.of(RELEASED, preset("cogvideo").upscaler)
    assert (layout.text_slots, layout.low_slots, layout.high_slots, layout.high_grid) == (96, 400, 3600, 60)
    assert layout.low_positions().tolist() == list(range(513, 913))


# Windows


@given(grids(), st.booleans())
def test_windows_cover_every_slot_once(sizes: tuple[int, int], shifted: bool) -> None:
    """Guards against slots that are in no window, or in two."""
    grid, window = sizes
    covered = torch.cat([part.flatten() for part in cells(grid, window, shifted)])
    assert sorted(covered.tolist()) == list(range(grid**2))


@given(grids(), st.booleans())
def test_windows_are_those_of_the_rolled_frame(sizes: tuple[int, int], shifted: bool) -> None:
    """Guards the windowing rule: roll by half a window, cut, and split what the roll has joined."""
    grid, window = sizes
    groups: dict[tuple, list[int]] = {}
    for slot, label in enumerate(window_labels(grid, window, shifted)):
        groups.setdefault(label, []).append(slot)
    ours = [cell for part in cells(grid, window, shifted) for cell in part.tolist()]
    assert sorted(ours) == sorted(groups.values())


def test_windows_differ_between_even_and_odd_blocks() -> None:
    """Guards against blocks that never exchange anything between windows."""
    whole, shifted = ({tuple(cell) for part in cells(4, 2, odd) for cell in part.tolist()} for odd in (False, True))
    assert not whole & shifted
    assert {len(cell) for cell in whole} == {4}
    assert {len(cell) for cell in shifted} == {1, 2, 4}


@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([2, 4, 6]), st.booleans())
def test_windows_of_frames_that_are_not_square(rows: int, columns: int, window: int, shifted: bool) -> None:
    """Guards partial windows, at the right and bottom edges of a frame."""
    groups: dict[tuple, list[int]] = {}
    for slot, label in enumerate(window_labels((rows, columns), window, shifted)):
        groups.setdefault(label, []).append(slot)
    ours = [cell for part in cells((rows, columns), window, shifted) for cell in part.tolist()]
    assert sorted(ours) == sorted(groups.values())


def test_frames_lie_in_the_middle_of_the_positions() -> None:
    """Guards positions of non-square frames: those of the middle of a square, in the first frame, in later ones and in
    super-resolution."""
    table = torch.arange(36).view(6, 6)
    wide = LayoutConfig(grid=6, frame_position=48).shaped((3, 6))
    layout = SequenceLayout.sequential(wide)
    assert (layout.frame_positions(range(2)) - 48).tolist() == [
        *table[1:4].flatten().tolist(),
        *(36 + table[1:4].flatten()).tolist(),
    ]
    assert layout.first_extra_position == 48 + 36
    large = UpscaleLayout.of(wide, UpscalerConfig(ratio=2, low_position=50))
    assert (large.low_positions() - 50).tolist() == table[1:4].flatten().tolist()
    assert large.high_positions().tolist() == torch.arange(144).view(12, 12)[2:8].flatten().tolist()
    assert wide.shaped(6) == LayoutConfig(grid=6, frame_position=48)
    with pytest.raises(ValueError, match="frames have 7 x 3 codes, expected at most 6 x 6"):
        wide.shaped((7, 3))


# The lag of parallel frames


def smallest_lag(grid: int | tuple[int, int], window: int) -> int:
    """Derive the lag from the dense masks of two causal frames: a slot sees only keys fed no later than itself."""
    area, needed = grid**2 if isinstance(grid, int) else grid[0] * grid[1], 0
    for shifted in (False, True):
        seen = visible("sequential", 2, grid, window, shifted and bool(window), (True,)).temporal
        queries, keys = seen[1 + area :, 1 : 1 + area].nonzero().unbind(1)
        needed = max(needed, int((keys - queries).max()))
    return needed


@pytest.mark.parametrize(("grid", "window"), [*WINDOWS[:-2], (2, 0), (4, 0), (7, 0), ((3, 5), 2), ((5, 3), 4)])
def test_lag_is_the_smallest_that_the_masks_allow(grid: int | tuple[int, int], window: int) -> None:
    """Guards against frames that read keys before they exist, and against frames that wait longer than they must."""
    assert lag(grid, window) == smallest_lag(grid, window)


def test_lag_of_the_released_windows() -> None:
    """Guards the figure that determines the number of passes: nine rows and nine columns of a window of ten."""
    assert lag(20, 10) == 9 * 20 + 9


# Invalid codes


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 5, 16, dtype=torch.int64), "got 5 given frames, expected 0 to 4"),
        (torch.zeros(2, 2, 15, dtype=torch.int64), r"codes of shape \(2, 2, 15\)"),
        (torch.zeros(2, 16, dtype=torch.int64), r"codes of shape \(2, 16\)"),
        (torch.full((1, 2, 16), 24), r"got codes from 24 to 24, expected \[0, 24\)"),
        (torch.full((1, 2, 16), -1), r"got codes from -1 to -1, expected \[0, 24\)"),
        (torch.zeros(1, 2, 16), "got codes of type torch.float32, expected torch.int64"),
    ],
)
def test_refused_codes(codes: torch.Tensor, message: str) -> None:
    """Guards against text tokens among codes, and frames of the wrong grid."""
    with pytest.raises(ValueError, match=message):
        SequenceLayout.sequential(SMALL).check_given(codes, 24)


def test_accepted_codes() -> None:
    """Guards against rejecting the first code, the last code, or no codes at all."""
    codes = torch.tensor([0, 23]).repeat(8)[None, None]
    assert SequenceLayout.sequential(SMALL).check_given(codes, 24) == 1
    check_code_range(codes[:0], 24)


# Configurations


def as_json(config: object) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[call-overload]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name: str) -> None:
    """Guards against configurations that change when a bundle is saved and loaded."""
    config = preset(name)
    assert from_dict(CogVideoConfig, as_json(config)) == config


def test_released_sizes() -> None:
    """Guards the preset `cogvideo` against typos: these are the shapes of the released checkpoints."""
    config = preset("cogvideo")
    transformer = config.transformer
    assert (transformer.num_layers, transformer.hidden, transformer.num_heads, transformer.head_dim) == (
        48,
        3072,
        48,
        64,
    )
    assert (transformer.vocab_size, transformer.num_codes, transformer.num_positions) == (150_010, 20_000, 1024)
    assert (transformer.start_of_image, transformer.pad) == (150_000, 20_003)
    assert (config.layout.grid, config.layout.num_frames, config.layout.text_slots) == (20, 5, 64)
    assert config.layout.image_text_slots == 111
    assert config.interpolation.window == 10
    assert config.upscaler.ratio * config.layout.grid == 60


def test_unknown_preset() -> None:
    """Guards against a typo that silently selects some model; the message lists the names."""
    with pytest.raises(ValueError, match=r"unknown preset 'cogvidoe', expected one of tiny, pocket, small, cogvideo"):
        preset("cogvidoe")


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("layout"), r"missing \['layout'\], unknown \[\]"),
        (lambda values: values.update(extra=1), r"missing \[\], unknown \['extra'\]"),
        (
            lambda values: values["layout"].pop("grid"),
            r"layout has the wrong fields: missing \['grid'\]",
        ),
        (lambda values: values.update(layout=3), r"CogVideoConfig\.layout: expected object, got int"),
        (lambda values: values["layout"].update(grid="8"), r"CogVideoConfig\.layout\.grid: expected int, got str"),
        (lambda values: values["layout"].update(grid=8.0), r"\.layout\.grid: expected int, got float"),
        (lambda values: values["layout"].update(grid=True), r"\.layout\.grid: expected int, got bool"),
        (lambda values: values["layout"].update(grid=None), r"\.layout\.grid: expected int, got null"),
        (lambda values: values["layout"].update(grid=0), "grid is 0, expected a positive number"),
        (lambda values: values["autoencoder"].update(mean=0.5), r"\.autoencoder\.mean: expected array, got float"),
        (lambda values: values["autoencoder"].update(mean=[0.5, 0.5]), "mean"),
        (
            lambda values: values["autoencoder"].update(encoder_multipliers=[1, "2"]),
            r"encoder_multipliers\[1\]: expected int, got str",
        ),
        (
            lambda values: values["text"].update(image_template=["a"]),
            "image_template: expected str, got array",
        ),
        (
            lambda values: values["interpolation"].update(window=6),
            "grid 8 is not divisible by the interpolation window",
        ),
    ],
)
def test_faults_of_stored_configurations(change, message: str) -> None:
    """Guards against misreading a damaged or newer file."""
    values = as_json(CogVideoConfig())
    change(values)
    with pytest.raises(ValueError, match=message):
        from_dict(CogVideoConfig, values)


def test_samplers_of_older_files() -> None:
    """Guards older models, whose samplers were one flat table, at first without those of super-resolution."""
    values = as_json(preset("pocket"))
    for name in ("first_sampling", "later_sampling", "superres_sampling", "text_bonus"):
        del values[name]
    old = {"first_temperature": 0.4, "first_clusters": 0, "temperature": 0.6, "clusters": 0}
    old |= {"first_guidance": 1.5, "guidance": 2.5, "text_bonus": 0.0}
    superres = {"superres_temperature": 0.0, "superres_clusters": 0}
    then = replace(preset("pocket"), later_sampling=SamplingConfig(0.6, clusters=0, guidance=2.5))
    assert from_dict(CogVideoConfig, values | {"drawing": old | superres}) == then
    older = from_dict(CogVideoConfig, values | {"drawing": old})
    assert older == replace(then, superres_sampling=CogVideoConfig.superres_sampling)
    assert older.superres_sampling == SamplingConfig(1.0, clusters=6, cluster_temperature=0.6)
    for wrong, message in (
        (old | {"clusters": "0"}, r"later_sampling\.clusters: expected int, got str"),
        (old | {"clutter": 1}, r"drawing has the unknown fields \['clutter'\]"),
        (
            {name: value for name, value in old.items() if name != "guidance"},
            r"later_sampling\.guidance: expected float, got null",
        ),
        (3, r"unknown \['drawing'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            from_dict(CogVideoConfig, values | {"drawing": wrong})


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageConfig(window=3), "window is 3, expected an even number"),
        (lambda: StageConfig(window=-2), "window is -2, expected 0"),
        (lambda: LayoutConfig(grid=0), "grid is 0, expected a positive number"),
        (lambda: LayoutConfig(text_slots=60), "frame_position is 48, expected at least the 60 text slots"),
        (lambda: TransformerConfig(hidden=250), "hidden 250 is not divisible by num_heads 4"),
        (lambda: TransformerConfig(num_layers=0), "num_layers is 0, expected a positive number"),
        (lambda: SamplingConfig(temperature=None), "temperature is None, expected 0 to 100"),  # type: ignore[arg-type]
        (lambda: SamplingConfig(top_p="1"), "top_p is '1', expected above 0, at most 1"),  # type: ignore[arg-type]
        (lambda: TransformerConfig(num_layers=10**9), "num_layers is 1000000000, expected at most 1000"),
        (lambda: TransformerConfig(num_codes=5000), "num_codes 5000 is larger than vocab_size 4096"),
        (
            lambda: TransformerConfig(start_of_image=4096),
            r"start_of_image token is 4096, expected an id in \[0, 4096\)",
        ),
        (lambda: UpscalerConfig(high_rows=4), "high_rows is 4, expected a positive odd number"),
        (lambda: UpscalerConfig(ratio=0), "ratio is 0, expected at least 1"),
        (lambda: replace(CogVideoConfig(), sequential=StageConfig(6)), "not divisible by the sequential window 6"),
        (
            lambda: replace(CogVideoConfig(), layout=LayoutConfig(grid=16)),
            "num_positions is 256, expected at least 305",
        ),
        (
            lambda: replace(CogVideoConfig(), autoencoder=AutoencoderConfig(num_codes=512)),
            "the autoencoder has 512 codes, the transformer 1024",
        ),
    ],
)
def test_refused_configurations(make, message: str) -> None:
    """Guards against sizes that would fail late, deep inside a model."""
    with pytest.raises(ValueError, match=message):
        make()


def test_natural_order_of_the_oracles() -> None:
    """Checks the oracle itself: text first, then frames by place."""
    slots = all_slots(2, 2, 2)
    assert [slot.place for slot in slots] == [-1, -1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert [slot.index for slot in slots] == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]
