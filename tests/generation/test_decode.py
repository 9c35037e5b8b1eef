"""Cached decoding: equality with full passes, fewer passes for the same codes, batch independence, rejected input."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cogvideo.config import SamplingConfig
from cogvideo.generation import decode as decoding
from cogvideo.generation.decode import Passes, decode
from cogvideo.generation.decoder import Condition, Decoder
from cogvideo.generation.sampling import Clusters, GumbelNoise, log_probabilities
from cogvideo.layout import lag
from cogvideo.models.attention import MaskPlan, attend
from cogvideo.models.cache import Cache, CacheMap
from cogvideo.models.plans import text_mask
from cogvideo.text import PaddedText
from conftest import NUM_CODES, TEXT_SLOTS, MakeSystem, MakeText, System
from parity import Watch, watch
from reference import TEXT, Slot, all_slots, cluster_probabilities, top_k, top_p, visible

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # test_hierarchy.py runs the same code with them

CPU = torch.device("cpu")
PLAIN, ONE_BY_ONE = SamplingConfig(), Passes()
FEWER = [Passes(parallel_frames=True), *(Passes(draft=width) for width in (2, 7, 21))]
SOME = [ONE_BY_ONE, Passes(parallel_frames=True), Passes(draft=7)]
LABELS = torch.arange(NUM_CODES) % 6


class Run(NamedTuple):
    """A stage and its given frames."""

    stage: str
    grid: int | tuple[int, int]
    window: int
    num_frames: int
    num_given: int
    frames_given_to_layout: int | None = None
    num_layers: int = 3

    def system(self, make_system: MakeSystem, dtype: torch.dtype = torch.float64) -> System:
        """Small model of the stage."""
        sizes = (self.stage, self.grid, self.window, self.num_frames, self.frames_given_to_layout, self.num_layers)
        return make_system(*sizes, dtype=dtype)


def name(value: Run | Passes | SamplingConfig) -> str:
    """Test ID of a parameter."""
    if isinstance(value, Run):
        return f"{value.stage}-grid{value.grid}-window{value.window}-{value.num_given}of{value.num_frames}"
    changed = [f"{key}{each}" for key, each in vars(value).items() if each != getattr(type(value), key)]
    return "-".join(changed) or "plain"


IMAGE = Run("image", 4, 0, 1, 0)
FULL, WINDOWED = Run("sequential", 4, 0, 5, 1), Run("sequential", 4, 2, 5, 1)
SHORT = FULL._replace(num_frames=3)
BETWEEN, BETWEEN_FULL = Run("interpolation", 4, 2, 5, 3), Run("interpolation", 4, 0, 5, 3)
RUNS = [
    IMAGE,
    *(Run("sequential", 4, 0, 5, given) for given in (1, 2, 3, 4)),
    *(Run("sequential", 4, 2, 5, given) for given in (1, 4)),
    Run("sequential", 4, 4, 3, 1),
    Run("sequential", 6, 2, 2, 1, num_layers=2),
    Run("sequential", 8, 4, 2, 1, num_layers=2),
    Run("interpolation", 4, 0, 5, 2, 2),
    Run("interpolation", 4, 2, 5, 2, 2),
    BETWEEN_FULL,
    BETWEEN,
    Run("interpolation", 4, 4, 5, 3),
    Run("interpolation", 4, 2, 5, 4),
    Run("sequential", (2, 5), 4, 2, 1, num_layers=2),
    Run("interpolation", (3, 2), 2, 3, 2, num_layers=2),
]


def gumbel(batch: int, frames: int, slots: int, seed: int = 0) -> Tensor:
    """Gumbel noise, (batch, frames, slots, codes)."""
    uniform = torch.rand(batch, frames, slots, NUM_CODES, dtype=torch.float64, generator=torch.manual_seed(seed))
    return -(-uniform.log()).log()


def generate(
    system: System,
    text: PaddedText,
    given: Tensor,
    noise: Tensor,
    sampling: SamplingConfig = PLAIN,
    passes: Passes = ONE_BY_ONE,
    **condition,
) -> Watch:
    """Decode with the given noise, (batch, frames, slots, codes)."""
    return watch(
        system.model,
        system.layout,
        Condition(text, **condition),
        given,
        lambda rank: noise[:, rank - given.shape[1]],
        sampling,
        LABELS,
        passes,
    )


def inputs(system: System, num_given: int, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Given frames, and noise for the remaining ones."""
    frames, slots = system.layout.num_frames - num_given, system.layout.frame_slots
    return system.codes(batch, num_given, seed), gumbel(batch, frames, slots, seed)


# Cached decoding equals the full pass


WAYS = (((0.0, False), (1.4, True)), ((0.0, True), (1.4, False)))
"""Text bonus and guidance: runs alternate between these two sets of pairs; the image model gets both sets."""


@pytest.mark.parametrize(
    ("run", "bonus", "guided"),
    [(IMAGE, *way) for way in WAYS[1]] + [(run, *way) for number, run in enumerate(RUNS) for way in WAYS[number % 2]],
    ids=lambda value: name(value) if isinstance(value, Run) else str(value),
)
def test_decoding_equals_full_passes(
    make_system: MakeSystem, make_text: MakeText, run: Run, bonus: float, guided: bool
) -> None:
    """Checks caches, prefill, positions, guidance, and text bonus: every logit equals a dense pass from scratch."""
    system, text, other = run.system(make_system), make_text((3, TEXT_SLOTS)), make_text((1, 4), seed=1)
    given, noise = inputs(system, run.num_given, 2)
    condition = {"unconditional": other, "scale": 3.0} if guided else {}
    ours = generate(system, text, given, noise, SamplingConfig(temperature=1.05), text_bonus=bonus, **condition)
    places = system.layout.order[run.num_given :]
    assert tuple(frame.place for frame in ours.frames) == places
    for sample in range(2):
        expected = system.oracle.decode(
            system.prompt(text, sample),
            system.at_places(given[sample]),
            places,
            noise[sample],
            1.05,
            bonus,
            system.prompt(other, sample) if guided else None,
            3.0,
        )
        torch.testing.assert_close(ours.logits[sample], expected.logits, rtol=1e-9, atol=1e-9)
        assert torch.equal(ours.codes[sample], expected.codes)


@pytest.mark.parametrize("run", [IMAGE, FULL, WINDOWED, BETWEEN], ids=name)
def test_guidance_of_scale_one_is_none(make_system: MakeSystem, make_text: MakeText, run: Run) -> None:
    """Catches swapped conditional and unconditional rows."""
    system, text, other = run.system(make_system), make_text((3, 6)), make_text((1, 4), seed=1)
    given, noise = inputs(system, run.num_given, 2)
    alone = generate(system, text, given, noise)
    guided = generate(system, text, given, noise, unconditional=other, scale=1.0)
    torch.testing.assert_close(guided.logits, alone.logits, rtol=0, atol=1e-10)
    away = generate(system, text, given, noise, unconditional=other, scale=0.0)
    torch.testing.assert_close(away.logits, generate(system, other, given, noise).logits, rtol=0, atol=1e-10)


# What cached rows see


def one_hot(slots: Sequence[int], total: int, batch: int) -> Tensor:
    """Keys that are 0, and values that are one-hot slots, (2, batch, 1, slots, total)."""
    values = torch.eye(total, dtype=torch.float64)[torch.tensor(slots, dtype=torch.int64)]
    return torch.stack([torch.zeros_like(values), values])[:, None, None].expand(-1, batch, 1, -1, -1)


def see(slots: Sequence[int], plan: MaskPlan, total: int, batch: int = 2) -> Tensor:
    """Write slots, and return which slots each of them sees, (batch, rows, total); values identify the slots."""
    stored = plan.keys(one_hot(slots, total, batch), 0)
    return attend(torch.zeros(batch, 1, len(slots), total, dtype=torch.float64), stored, plan) > 1e-9


@pytest.mark.parametrize("way", ["step", "parallel", "alike", "runs", "masked"])
@pytest.mark.parametrize(
    "run",
    [IMAGE, FULL, WINDOWED, BETWEEN, BETWEEN_FULL, Run("sequential", 6, 2, 3, 1), Run("sequential", 4, 4, 4, 2)],
    ids=name,
)
def test_cached_rows_see_the_rule(make_system: MakeSystem, make_text: MakeText, run: Run, way: str) -> None:
    """Checks every cached row on its own: it reads exactly what the rule allows, nothing stale, nothing missing."""
    layout, text = run.system(make_system).layout, make_text((2, TEXT_SLOTS))
    area, first = layout.frame_slots, run.num_given
    behind = lag(run.grid, run.window) if way == "parallel" else area
    lanes = -(-area // behind)
    kinds = () if run.stage == "image" else (False, True) if run.window else (False,)
    maps = [CacheMap.spatial(layout, lanes), *(CacheMap.temporal(layout, run.window, kind) for kind in kinds)]
    natural = {slot: row for row, slot in enumerate(all_slots(TEXT_SLOTS, layout.num_frames, layout.sides))}
    words = [natural[Slot(TEXT, index)] for index in range(TEXT_SLOTS)]
    frames = [[natural[Slot(place, index)] for index in range(area)] for place in layout.order]
    total, added = len(natural), text_mask(text.mask, 0.0, torch.float64)
    caches = [Cache(where, 1, added, (2, 1, total), torch.empty(0, dtype=torch.float64)) for where in maps]
    fed = words + [slot for frame in frames[:first] for slot in frame]
    for number, cache in enumerate(caches):
        cache.keep(MaskPlan(()), first * area if number else 0).keys(one_hot(fed, total, 2), 0)

    def check(slots: list[int], plan: Callable[[Cache], MaskPlan]) -> None:
        for sample in range(2):
            mask = tuple(text.mask[sample].tolist())
            for number, cache in enumerate(caches):
                seen = visible(run.stage, layout.num_frames, run.grid, run.window, number == 2, mask)
                expected = (seen.temporal if number else seen.spatial)[slots]
                assert torch.equal(see(slots, plan(cache), total)[sample], expected)

    def check_runs(rank: int, runs: list[range]) -> None:
        rows = [(sample, frames[rank][slot]) for sample, run in enumerate(runs) for slot in run]
        for number, cache in enumerate(caches):
            plan = cache.runs([range(rank * area + each.start, rank * area + each.stop) for each in runs])
            ours = see([slot for _, slot in rows], plan, total, batch=1)
            for row, (sample, slot) in enumerate(rows):
                mask = tuple(text.mask[sample].tolist())
                seen = visible(run.stage, layout.num_frames, run.grid, run.window, number == 2, mask)
                assert torch.equal(ours[0, row], (seen.temporal if number else seen.spatial)[slot])

    if way == "runs":  # drafts of 5 and 3 slots, of which 2 and 1 are kept; the second sample finishes alone
        for rank in range(first, layout.num_frames):
            for start in range(area):
                check_runs(rank, [range(min(2 * start, area), min(2 * start + 5, area)), range(start, area)[:3]])
        return
    if way in ("alike", "masked"):
        for rank in range(first, layout.num_frames):
            for start in range(0, area, 2):  # each pass drafts five slots and keeps two
                slots = range(start, min(start + 5, area))
                frame, rows = range(rank * area, (rank + 1) * area), torch.tensor(slots).expand(2, -1)
                shown = [frames[rank][slot] for slot in slots]
                if way == "alike":
                    check(shown, lambda cache: cache.runs([frame[slots.start : slots.stop]] * 2))  # noqa: B023
                else:
                    check(shown, lambda cache: cache.masked(frame, rows))  # noqa: B023
        return
    count = layout.num_frames - first
    for tick in range((count - 1) * behind + area):
        flying = [(frame, tick - frame * behind) for frame in range(count) if 0 <= tick - frame * behind < area]
        shown = [frames[first + frame][slot] for frame, slot in flying]
        check(shown, lambda cache: cache.step([(first + frame) * area + slot for frame, slot in flying]))  # noqa: B023


# Fewer passes, the same codes


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "run",
    [IMAGE, FULL, WINDOWED, Run("sequential", 8, 4, 3, 1), Run("interpolation", 8, 2, 5, 3), BETWEEN_FULL],
    ids=name,
)
def test_fewer_passes_give_the_same_codes(make_system: MakeSystem, make_text: MakeText, run: Run, guided: bool) -> None:
    """Checks that both ways to save passes match one-by-one decoding, even if samples of a batch differ in speed."""
    system, text = run.system(make_system), make_text((1, 4, TEXT_SLOTS))
    given, noise = inputs(system, run.num_given, 3)
    condition = {"unconditional": make_text((2, 1, 5), seed=1), "scale": 3.0} if guided else {"text_bonus": 1.4}
    sampling = SamplingConfig(temperature=0.7)
    reference = generate(system, text, given, noise, sampling, **condition)
    slots, behind, count = system.layout.frame_slots, lag(run.grid, run.window), len(reference.frames)
    assert [frame.passes for frame in reference.frames] == [slots * (number + 1) for number in range(count)]
    for passes in FEWER:
        ours = generate(system, text, given, noise, sampling, passes, **condition)
        assert torch.equal(ours.codes, reference.codes), passes
        torch.testing.assert_close(ours.logits, reference.logits, rtol=0, atol=1e-10)
        assert [frame.place for frame in ours.frames] == [frame.place for frame in reference.frames]
        if passes.parallel_frames:
            assert [frame.passes for frame in ours.frames] == [number * behind + slots for number in range(count)]
        else:
            assert ours.frames[-1].passes <= reference.frames[-1].passes, passes


@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(temperature=0), SamplingConfig(top_k=4), SamplingConfig(top_p=0.8), SamplingConfig(clusters=2)],
    ids=name,
)
def test_fewer_passes_with_every_sampler(
    make_system: MakeSystem, make_text: MakeText, sampling: SamplingConfig
) -> None:
    """Guards against samplers that depend on more than their own row."""
    system, text = WINDOWED.system(make_system), make_text((1, 4))
    given, noise = inputs(system, 1, 2)
    reference = generate(system, text, given, noise, sampling)
    for passes in FEWER:
        assert torch.equal(generate(system, text, given, noise, sampling, passes).codes, reference.codes), passes


@pytest.fixture
def all_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode as on a CUDA device, where every pass drafts the maximum number of slots."""
    monkeypatch.setattr(decoding, "_kind", lambda model, passes: decoding.MaskedDecoder)


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize("width", [1, 2, 5, 16, 20])
def test_passes_of_a_draft_that_is_always_right(make_system: MakeSystem, make_text: MakeText, width: int) -> None:
    """Checks the guesses for later slots: if noise alone decides, a pass completes as many codes as it drafts."""
    system = IMAGE.system(make_system)
    given, noise = inputs(system, 0, 2)
    noise = 1e6 * noise
    ours = generate(system, make_text((1, 4)), given, noise, SamplingConfig(temperature=100), Passes(draft=width))
    first = 1  # the first pass has nothing to guess from: it completes one code
    assert ours.frames[0].passes == (16 if width == 1 else first + -(-(16 - first) // width))
    assert torch.equal(ours.codes, noise.argmax(-1))


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize("run", [FULL, BETWEEN], ids=name)
def test_drafts_start_from_the_frame_before(make_system: MakeSystem, make_text: MakeText, run: Run) -> None:
    """Checks a frame's first drafts: if the frame repeats the previous one in time, all of them are right."""
    system = run.system(make_system)
    given, noise = inputs(system, run.num_given, 2)
    noise = 1e6 * noise[:, :1].expand_as(noise)
    given[:] = noise[:, :1].argmax(-1)
    ours = generate(system, make_text((1, 4)), given, noise, SamplingConfig(temperature=100), Passes(draft=8))
    assert [frame.passes for frame in ours.frames] == [2 * (number + 1) for number in range(len(ours.frames))]


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("run", [IMAGE, FULL, BETWEEN], ids=name)
def test_masks_give_the_same_codes(
    make_system: MakeSystem, make_text: MakeText, run: Run, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the passes for CUDA devices: fixed shapes, masks instead of slices, slots that are fed again."""
    system, text = run.system(make_system), make_text((1, 4, TEXT_SLOTS))
    given, noise = inputs(system, run.num_given, 3)
    condition = {"unconditional": make_text((2, 1, 5), seed=1), "scale": 3.0} if guided else {"text_bonus": 1.4}
    ours = generate(system, text, given, noise, SamplingConfig(temperature=0.7), Passes(draft=7), **condition)
    monkeypatch.undo()
    reference = generate(system, text, given, noise, SamplingConfig(temperature=0.7), **condition)
    assert torch.equal(ours.codes, reference.codes)
    torch.testing.assert_close(ours.logits, reference.logits, rtol=0, atol=1e-10)


def test_drafting_saves_passes_with_noise_that_decides_often(make_system: MakeSystem, make_text: MakeText) -> None:
    """Guards against drafts that are verified but never kept."""
    system = FULL.system(make_system)
    given, noise = inputs(system, 1, 2)
    ours = generate(system, make_text((1, 4)), given, noise, SamplingConfig(temperature=4), Passes(draft=8))
    assert ours.frames[-1].passes < 0.9 * 64


@pytest.mark.parametrize("run", [FULL, WINDOWED, BETWEEN], ids=name)
def test_any_drafts_give_the_same_codes(
    make_system: MakeSystem, make_text: MakeText, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks drafts whose lengths change from pass to pass and differ between samples."""
    widths = random.Random(0)

    def any_run(drafter: decoding.Drafter) -> range:
        drafter.fed[drafter.drawn + 1 :] = widths.choices(range(NUM_CODES), k=len(drafter.fed) - drafter.drawn - 1)
        return range(drafter.done, min(drafter.done + widths.randint(1, 9), len(drafter.fed) - 1))

    monkeypatch.setattr(decoding.Drafter, "propose", any_run)
    system, text = run.system(make_system), make_text((1, 4, TEXT_SLOTS))
    given, noise = inputs(system, run.num_given, 3)
    sampling = SamplingConfig(temperature=0.7)
    reference = generate(system, text, given, noise, sampling)
    ours = generate(system, text, given, noise, sampling, Passes(draft=9))
    assert torch.equal(ours.codes, reference.codes)
    torch.testing.assert_close(ours.logits, reference.logits, rtol=0, atol=1e-10)


# A sample does not depend on its batch


@pytest.mark.parametrize("passes", SOME, ids=name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("run", [IMAGE, SHORT, BETWEEN], ids=name)
def test_a_sample_does_not_depend_on_its_batch(
    make_system: MakeSystem, make_text: MakeText, run: Run, dtype: torch.dtype, passes: Passes
) -> None:
    """Guards against clips that depend on their position in a batch, or on the other clips in it."""
    exact = run.system(make_system)
    system = System(copy.deepcopy(exact.model).to(dtype), exact.layout, exact.oracle)
    text, other, given = make_text((1, 4, 6)), make_text((2, 1, 5), seed=1), system.codes(3, run.num_given)

    def clips(samples: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(50 + sample) for sample in samples]
        count = system.layout.num_frames - run.num_given
        noise = GumbelNoise(generators, count, system.layout.frame_slots, NUM_CODES)
        texts = [PaddedText(each.tokens[samples], each.mask[samples]) for each in (text, other)]
        condition = Condition(texts[0], texts[1], 3.0)
        frames = decode(
            system.model,
            system.layout,
            condition,
            given[samples],
            lambda rank: noise(rank - run.num_given),
            SamplingConfig(clusters=3),
            LABELS,
            passes,
        )
        return torch.stack([frame.codes for frame in frames], 1)

    together = clips([0, 1, 2])
    assert len(together.flatten(1).unique(dim=0)) == 3
    assert torch.equal(clips([2, 0, 1]), together[[2, 0, 1]])
    for sample in range(3):
        assert torch.equal(clips([sample])[0], together[sample])


# Sampling


@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(temperature=0.8), SamplingConfig(top_k=4), SamplingConfig(top_p=0.8), SamplingConfig(clusters=2)],
)
def test_codes_are_the_largest_scores(make_system: MakeSystem, make_text: MakeText, sampling: SamplingConfig) -> None:
    """Guards against noise from the wrong slot, frame, or sample, and against codes that the sampler excludes."""
    system = WINDOWED.system(make_system)
    given, noise = inputs(system, 1, 2)
    ours = generate(system, make_text((1, 4)), given, noise, sampling)
    scores = log_probabilities(ours.logits, sampling, Clusters.of(LABELS, CPU))
    assert torch.equal((scores + noise).argmax(-1), ours.codes)
    row = ours.logits[1, 2, 3]
    expected = {
        sampling.top_k > 0: lambda: top_k(row.tolist(), sampling.top_k),
        sampling.top_p < 1: lambda: top_p(row.tolist(), sampling.top_p),
        sampling.clusters > 0: lambda: cluster_probabilities(row.tolist(), LABELS.tolist(), 2, 1.0, 0.89),
    }.get(True, lambda: (row / sampling.temperature).softmax(-1).tolist())()
    torch.testing.assert_close(scores[1, 2, 3].exp(), torch.tensor(expected, dtype=torch.float64))


def test_greedy_needs_no_noise(make_system: MakeSystem, make_text: MakeText) -> None:
    """Guards against noise affecting greedy sampling."""
    system = FULL.system(make_system)
    given, noise = inputs(system, 1, 2)
    ours = generate(system, make_text((1, 4)), given, noise * torch.nan, SamplingConfig(temperature=0))
    assert torch.equal(ours.logits.argmax(-1), ours.codes)


@pytest.mark.parametrize("passes", [ONE_BY_ONE, *FEWER], ids=name)
def test_noise_is_asked_for_once_a_frame(make_system: MakeSystem, make_text: MakeText, passes: Passes) -> None:
    """Guards against generators that advance with the number of passes."""
    system, asked = WINDOWED.system(make_system), []
    given, noise = inputs(system, 2, 1)

    def once(rank: int) -> Tensor:
        asked.append(rank)
        return noise[:, rank - 2]

    list(decode(system.model, system.layout, Condition(make_text((4,))), given, once, PLAIN, passes=passes))
    assert asked == [2, 3, 4]


def test_frames_come_when_they_are_finished(make_system: MakeSystem, make_text: MakeText) -> None:
    """Guards against computing the whole clip before the first yield, and against codes that change later."""
    system = FULL.system(make_system)
    given, noise = inputs(system, 1, 1)
    before = given.clone()
    asked = []

    def once(rank: int) -> Tensor:
        asked.append(rank)
        return noise[:, rank - 1]

    frames = decode(system.model, system.layout, Condition(make_text((4,))), given, once, PLAIN)
    first = next(frames)
    kept = first.codes.clone()
    assert (first.place, first.passes, asked) == (1, 16, [1])
    rest = list(frames)
    assert torch.equal(first.codes, kept)
    assert [frame.place for frame in rest] == [2, 3, 4]
    assert torch.equal(given, before)


@pytest.mark.parametrize("passes", SOME, ids=name)
def test_a_frame_belongs_to_its_caller(make_system: MakeSystem, make_text: MakeText, passes: Passes) -> None:
    """Guards later frames against a caller that changes a yielded one."""
    system, text = FULL.system(make_system), Condition(make_text((4,)))
    given, noise = inputs(system, 1, 1)
    run = (system.model, system.layout, text, given, lambda rank: noise[:, rank - 1], PLAIN, None, passes)
    whole = [frame.codes for frame in decode(*run)]
    kept = []
    for frame in decode(*run):
        kept.append(frame.codes.clone())
        frame.codes.fill_(-1)
    assert torch.equal(torch.stack(kept), torch.stack(whole))


def test_given_frames_matter(make_system: MakeSystem, make_text: MakeText) -> None:
    """Guards against a prefill whose keys never reach the generated frames. A frame's last code is never fed."""
    for run in (SHORT, WINDOWED._replace(num_frames=3, num_given=2), BETWEEN):
        system, text = run.system(make_system), make_text((4,))
        given, noise = inputs(system, run.num_given, 1)
        before = generate(system, text, given, noise).logits
        for rank in range(run.num_given):
            other = given.clone()
            other[:, rank, -1] = (other[:, rank, -1] + 1) % NUM_CODES
            assert torch.equal(generate(system, text, other, noise).logits, before)
            other[:, rank] = (other[:, rank] + 1) % NUM_CODES
            assert not torch.equal(generate(system, text, other, noise).logits[:, 0, 0], before[:, 0, 0])


# Precisions, devices, memory


@pytest.mark.parametrize("passes", SOME, ids=name)
@pytest.mark.parametrize("bonus", [0.0, 1.4])
@pytest.mark.parametrize("run", [IMAGE, SHORT, BETWEEN], ids=name)
def test_bfloat16(make_system: MakeSystem, make_text: MakeText, run: Run, bonus: float, passes: Passes) -> None:
    """Guards against mixed dtypes of masks, caches, and weights, and against logits far from the exact ones."""
    exact = run.system(make_system)
    system = System(copy.deepcopy(exact.model).bfloat16(), exact.layout, exact.oracle)
    given, noise = inputs(system, run.num_given, 2)
    condition = {"unconditional": make_text((2, 5), seed=1), "scale": 1.5, "text_bonus": bonus}
    first, again = (
        generate(system, make_text((1, TEXT_SLOTS)), given, noise, PLAIN, passes, **condition) for _ in range(2)
    )
    assert first.logits.dtype == torch.bfloat16
    assert first.codes.min() >= 0
    assert first.codes.max() < NUM_CODES
    assert torch.equal(first.codes, again.codes)
    expected = generate(exact, make_text((1, TEXT_SLOTS)), given, noise, PLAIN, passes, **condition).logits[:, 0, 0]
    assert (first.logits[:, 0, 0].double() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cache_dtype", [None, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("passes", SOME, ids=name)
def test_type_of_the_caches(
    make_system: MakeSystem, make_text: MakeText, dtype: torch.dtype, cache_dtype: torch.dtype | None, passes: Passes
) -> None:
    """Guards against masks in the model's dtype where the cache has another, with pads and with a bonus."""
    exact = BETWEEN.system(make_system)
    model = copy.deepcopy(exact.model).to(dtype)
    given, noise = inputs(exact, 3, 2)
    for bonus in (0.0, 1.4):
        condition = Condition(make_text((2, TEXT_SLOTS)), text_bonus=bonus)
        frames = decode(
            model, exact.layout, condition, given, lambda rank: noise[:, rank - 3], PLAIN, None, passes, cache_dtype
        )
        assert all(frame.codes.max() < NUM_CODES for frame in frames)
        decoder = Decoder(model, exact.layout, condition, 1, cache_dtype)
        default = torch.float32 if dtype == torch.bfloat16 else dtype
        assert {layer.dtype for cache in (decoder.spatial, *decoder.temporal) for layer in cache.layers} == {
            cache_dtype or default
        }


def test_memory_of_the_caches(make_system: MakeSystem, make_text: MakeText) -> None:
    """Guards against a spatial cache that holds more than the text and the current frame."""
    for run, temporal in ((IMAGE, 0), (FULL, TEXT_SLOTS + 5 * 16)):
        system = run.system(make_system)
        decoder = Decoder(system.model, system.layout, Condition(make_text((4, 2))))
        caches = (decoder.spatial, *decoder.temporal)
        keys = [cache.layers[0].shape[3] for cache in caches]
        assert keys == [TEXT_SLOTS + 16, *([temporal] if temporal else [])]
        sizes = sum(keys) * run.num_layers * 2 * 2 * 16 * 8  # layers, keys and values, samples, hidden, bytes
        assert sum(cache.num_bytes for cache in caches) == sizes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("passes", [*SOME, Passes(graphs=True), Passes(draft=4, graphs=True)], ids=name)
@pytest.mark.parametrize("run", [IMAGE, FULL, BETWEEN], ids=name)
def test_cuda_gives_the_same_codes(make_system: MakeSystem, make_text: MakeText, run: Run, passes: Passes) -> None:
    """Guards against tensors left on the CPU, and against graphs that replay the wrong pass."""
    system = run.system(make_system)
    given, noise = inputs(system, run.num_given, 2)
    condition = {"unconditional": make_text((2, 5), seed=1), "scale": 1.5, "text_bonus": 1.4}
    expected = generate(system, make_text((1, 4)), given, noise, SamplingConfig(clusters=3), Passes(), **condition)
    there = System(copy.deepcopy(system.model).cuda(), system.layout, system.oracle)
    ours = generate(there, make_text((1, 4)), given, noise, SamplingConfig(clusters=3), passes, **condition)
    assert torch.equal(ours.codes.cpu(), expected.codes)


def test_a_frame_of_one_code(make_system: MakeSystem, make_text: MakeText) -> None:
    """Checks the smallest frame, where no slot is left to trail or to draft."""
    system = Run("sequential", 1, 0, 3, 1).system(make_system)
    given, noise = inputs(system, 1, 1)
    expected = generate(system, make_text((4,)), given, noise)
    for passes in FEWER:
        assert torch.equal(generate(system, make_text((4,)), given, noise, PLAIN, passes).codes, expected.codes)


# Rejected input


def start(system: System, condition: Condition, given: Tensor, sampling: SamplingConfig = PLAIN) -> None:
    """Decode up to the first frame."""
    noise = torch.zeros(2, system.layout.frame_slots, NUM_CODES)
    next(decode(system.model, system.layout, condition, given, lambda rank: noise, sampling))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("run", "num_given", "message"),
    [
        (IMAGE, 1, "got 1 given frames, expected 0 to 0"),
        (FULL, 5, "got 5 given frames, expected 0 to 4"),
        (FULL, 6, "got 6 given frames, expected 0 to 4"),
        (BETWEEN, 0, "got 0 given frames, expected 3 to 4"),
        (BETWEEN, 2, "got 2 given frames, expected 3 to 4"),
        (BETWEEN, 5, "got 5 given frames, expected 3 to 4"),
    ],
)
def test_wrong_number_of_given_frames(
    make_system: MakeSystem, make_text: MakeText, run: Run, num_given: int, message: str
) -> None:
    """Guards against stages that start without the frames they continue, or with nothing left to generate."""
    system = run.system(make_system)
    with pytest.raises(ValueError, match=message):
        start(system, Condition(make_text((2, 3))), torch.zeros(2, num_given, 16, dtype=torch.int64))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 1, 15, dtype=torch.int64), r"codes of shape \(2, 1, 15\), expected .*\(batch, frames, 16\)"),
        (torch.zeros(2, 16, dtype=torch.int64), r"codes of shape \(2, 16\)"),
        (torch.zeros(16, dtype=torch.int64), r"codes of shape \(16,\)"),
        (torch.zeros(2, 1, 16), "got codes of type torch.float32"),
        (torch.full((2, 1, 16), NUM_CODES), r"got codes from 24 to 24, expected \[0, 24\)"),
        (torch.full((2, 1, 16), -1), r"got codes from -1 to -1, expected \[0, 24\)"),
        (torch.zeros(3, 1, 16, dtype=torch.int64), "3"),
        (torch.zeros(1, 1, 16, dtype=torch.int64), "1"),
    ],
)
def test_refused_given_frames(make_system: MakeSystem, make_text: MakeText, given: Tensor, message: str) -> None:
    """Guards against frames with the wrong grid, batch size, or codebook."""
    with pytest.raises(ValueError, match=message):
        start(FULL.system(make_system), Condition(make_text((2, 3))), given)


NO_TEXT = PaddedText(torch.full((2, TEXT_SLOTS), NUM_CODES), torch.tensor([[True] * TEXT_SLOTS, [False] * TEXT_SLOTS]))
WRONG_TEXTS = [
    (
        PaddedText(torch.full((2, 5), 30), torch.ones(2, 5, dtype=torch.bool)),
        r"text of shape \(2, 5\) .*expected \(2, 6\)",
    ),
    (PaddedText(torch.full((2, 6), 30), torch.ones(2, 5, dtype=torch.bool)), r"a mask of shape \(2, 5\)"),
    (PaddedText(torch.full((6,), 30), torch.ones(6, dtype=torch.bool)), r"text of shape \(6,\)"),
    (PaddedText(torch.full((2, 6), 40), torch.ones(2, 6, dtype=torch.bool)), r"from 40 to 40, expected \[0, 40\)"),
    (PaddedText(torch.full((2, 6), -1), torch.ones(2, 6, dtype=torch.bool)), "from -1 to -1"),
    (NO_TEXT, "text without any token"),
]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(("text", "message"), WRONG_TEXTS)
def test_refused_texts(make_system: MakeSystem, make_text: MakeText, text: PaddedText, message: str) -> None:
    """Guards against texts of the wrong layout or vocabulary, and rows that are all pads, whose attention is NaN."""
    with pytest.raises(ValueError, match=message):
        start(FULL.system(make_system), Condition(text), torch.zeros(2, 1, 16, dtype=torch.int64))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "text",
    [
        *(text for text, _ in WRONG_TEXTS),
        PaddedText(torch.full((1, 6), 30), torch.ones(1, 6, dtype=torch.bool)),
        PaddedText(torch.full((3, 6), 30), torch.ones(3, 6, dtype=torch.bool)),
    ],
)
def test_refused_unconditional_texts(make_system: MakeSystem, make_text: MakeText, text: PaddedText) -> None:
    """Checks the unconditional texts in the same way; there must be one per sample."""
    condition = Condition(make_text((2, 3)), text, 3.0)
    with pytest.raises(ValueError, match="got"):
        start(FULL.system(make_system), condition, torch.zeros(2, 1, 16, dtype=torch.int64))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"draft": 0}, "draft is 0, expected at least 1"), ({"draft": 4, "parallel_frames": True}, "choose one of")],
)
def test_refused_passes(values: dict, message: str) -> None:
    """Guards against drafts of zero slots, and against combining both ways to save passes."""
    with pytest.raises(ValueError, match=message):
        Passes(**values)


def test_clusters_without_labels(make_system: MakeSystem, make_text: MakeText) -> None:
    """Guards against cluster sampling without cluster labels."""
    system = FULL.system(make_system)
    with pytest.raises(ValueError, match="no cluster labels"):
        start(system, Condition(make_text((2, 3))), system.codes(2, 1), SamplingConfig(clusters=3))
