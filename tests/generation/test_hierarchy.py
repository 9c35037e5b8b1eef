"""The hierarchy: which frames are generated from which, what is kept, and what a sample depends on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from jaxtyping import Int64
from torch import Tensor

from cogvideo.bundle.model import CogVideo
from cogvideo.config import CogVideoConfig, LayoutConfig, SamplingConfig, StageConfig, TransformerConfig, preset
from cogvideo.generation import hierarchy
from cogvideo.generation.decode import Passes
from cogvideo.generation.hierarchy import after, between, collect, first_frames, generate
from cogvideo.generation.request import GenerationSettings, Request
from cogvideo.models.transformer import Base, TemporalChannel, initialize
from cogvideo.text import TextTokenizer

GRID, SLOTS = 4, 16
PROMPTS = ["a red ball rolls", "two birds"]


@pytest.fixture(scope="module")
def system(text_model: bytes) -> CogVideo:
    """Complete system with random weights, large enough that codes depend on everything they may depend on."""
    num_codes = 32
    text = TextTokenizer(text_model, preset("pocket").text, num_codes)
    transformer = TransformerConfig(2, 32, 2, text.num_tokens, num_codes, text.start_of_image, text.pad, 128)
    layout = LayoutConfig(grid=GRID, num_frames=5, text_slots=40, image_text_slots=40, frame_position=40)
    base, generator = Base(transformer), torch.Generator().manual_seed(1)
    channels = [TemporalChannel(transformer, layout, StageConfig(window)) for window in (0, 2)]
    for part in (base, *channels):
        initialize(part, 2, generator)
        for parameter in part.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    config = replace(
        CogVideoConfig(),
        transformer=transformer,
        layout=layout,
        interpolation=StageConfig(2),
        autoencoder=replace(CogVideoConfig().autoencoder, num_codes=num_codes),
        upscaler=replace(CogVideoConfig().upscaler, low_position=49),
    )
    base, channels = base.double(), [each.double() for each in channels]
    parts = {"base": base, "sequential": channels[0], "interpolation": channels[1], "text": text}
    return CogVideo(config, **parts, cluster_labels=torch.arange(num_codes) % 6)


def without_weights(system: CogVideo, lost: str = "") -> CogVideo:
    """System with all components except `lost`, none of which can be used as a model."""
    names = [each for each in system.components if each != lost]
    return CogVideo(system.config, **{each: system.text if each == "text" else torch.zeros(0) for each in names})


def settings(**changes: object) -> GenerationSettings:
    """One round with small samplers."""
    first, later = SamplingConfig(clusters=4), SamplingConfig(1.05, clusters=3, guidance=3.0)
    return replace(GenerationSettings(rounds=1, first=first, later=later), **changes)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def request(prompts: list[str], *seeds: int, **options: Any) -> Request:
    return Request(prompts, generators(*seeds), options.pop("settings", settings()), **options)


def clip(system: CogVideo, prompts: list[str], seeds: list[int], **options: Any) -> Int64[Tensor, "b f s"]:
    """All frames of a run."""
    return collect(generate(system, request(prompts, *seeds, **options)))


def some_frames(frames: int) -> Int64[Tensor, "f s"]:
    return torch.randint(0, 32, (frames, SLOTS), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("rounds", "frames"), [(0, 5), (1, 9), (2, 17)])
def test_rounds_double_the_frames(system: CogVideo, rounds: int, frames: int) -> None:
    """Checks the number of frames and their places: one new frame in every gap, no frame twice."""
    events = list(generate(system, request(PROMPTS[:1], 0, settings=settings(rounds=rounds))))
    assert sorted(event.place for event in events) == list(range(frames))
    assert {event.num_frames for event in events} == {frames}
    assert all(event.codes.shape == (1, SLOTS) for event in events)


def test_sample_does_not_depend_on_its_batch(system: CogVideo) -> None:
    """Checks what a seed promises: alone, in a batch, and in a reordered batch, the clip is the same."""
    both = clip(system, PROMPTS, [3, 4])
    swapped = clip(system, PROMPTS[::-1], [4, 3])
    alone = clip(system, PROMPTS[1:], [4])
    assert torch.equal(both, swapped.flip(0))
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("passes", [Passes(parallel_frames=True), Passes(draft=5)])
def test_ways_to_decode_give_the_same_clip(system: CogVideo, passes: Passes) -> None:
    """Checks that fewer passes change nothing, through all stages and with guidance in each of them."""
    first = settings().first | {"guidance": 2.0}
    how = settings(first=first, interpolation_guidance=1.5)
    expected = clip(system, PROMPTS, [3, 4], settings=how)
    assert torch.equal(clip(system, PROMPTS, [3, 4], settings=replace(how, passes=passes)), expected)


@pytest.mark.parametrize(
    "options", [{}, {"given": 3}, {"given": 1, "last": True}, {"loop": True}, {"given": 3, "more_key_frames": 1}]
)
def test_an_interrupted_run_goes_on(system: CogVideo, options: dict[str, Any]) -> None:
    """Checks that a run resumed from any finished frames continues exactly as if it had not been interrupted."""
    some = some_frames(4)
    given = {"given": some[: options["given"]]} if "given" in options else {}
    asked = options | given | ({"last": some[3]} if "last" in options else {})
    more = asked.pop("more_key_frames", 0)
    how = settings(later=SamplingConfig(1.05, clusters=3), more_key_frames=more)  # text bonus in all stages
    frames = list(generate(system, request(PROMPTS, 3, 4, settings=how, **asked)))
    for count in range(2, len(frames), 3):
        finished = {frame.place: frame.codes for frame in frames[:count]}
        rest = list(generate(system, request(PROMPTS, 3, 4, settings=how, finished=finished, **asked)))
        assert [frame.place for frame in rest] == [frame.place for frame in frames[count:]]
        assert torch.equal(collect(rest), collect(frames[count:]))


def test_finished_frames_are_not_generated_again(system: CogVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against redoing work after an interruption: a stage decodes only what is missing."""
    frames = list(generate(system, request(PROMPTS, 3, 4)))
    starts = []

    def watched(*given: Any, finished: torch.Tensor | None, own: Any = hierarchy.decode) -> Any:
        starts.append(0 if finished is None else finished.shape[1])
        return own(*given, finished=finished)

    monkeypatch.setattr(hierarchy, "decode", watched)
    for count in (3, 5, 7):
        finished = {frame.place: frame.codes for frame in frames[:count]}
        assert len(list(generate(system, request(PROMPTS, 3, 4, finished=finished)))) == 9 - count
    assert starts == [2, 0, 0, 1]  # key frames and all gaps; all gaps; second gaps


def test_long_clips_go_on(system: CogVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks long clips: they contain every frame once, use no more memory than a short one, and start with it; each
    sequence of key frames starts with the last two of the previous one."""
    short, calls = clip(system, PROMPTS, [3, 4]), []
    decode = hierarchy.decode

    def watched(model: Any, layout: Any, condition: Any, given: Tensor, *rest: Any, **options: Any) -> Any:
        calls.append((layout.order, given))
        return decode(model, layout, condition, given, *rest, **options)

    monkeypatch.setattr(hierarchy, "decode", watched)
    events = list(generate(system, request(PROMPTS, 3, 4, settings=settings(more_key_frames=4))))
    assert sorted(event.place for event in events) == list(range(17))
    whole = collect(events)
    assert torch.equal(whole[:, :9], short)
    contexts = [given for order, given in calls if order == (0, 1, 2, 3, 4)]
    assert len(contexts) == 3
    for sequence, given in enumerate(contexts[1:], 1):
        assert torch.equal(given, whole[:, [6 * sequence, 6 * sequence + 2]])
    assert max(len(given) for _, given in calls) == 2 * 2
    assert not torch.equal(whole[:, 6:9], whole[:, 12:15])


@pytest.mark.parametrize(("count", "number"), [(1, 9), (2, 10), (3, 9), (7, 13)])
def test_leading_frames_are_kept(system: CogVideo, count: int, number: int) -> None:
    """Checks image-to-video and extension: given frames stay unchanged, and up to two of them are key frames."""
    given = some_frames(count)
    frames = clip(system, PROMPTS, [3, 4], given=given)
    assert frames.shape == (2, number, SLOTS)
    assert torch.equal(frames[:, :count], given.expand(2, -1, -1))


def test_first_and_last_frames_are_kept(system: CogVideo) -> None:
    """Checks in-betweening: two more rounds generate the key frames, and both ends stay unchanged."""
    given, last = some_frames(2)[:1], some_frames(2)[1]
    frames = clip(system, PROMPTS, [3, 4], given=given, last=last)
    assert frames.shape == (2, 9, SLOTS)
    assert torch.equal(frames[:, [0, -1]], torch.stack([given[0], last]).expand(2, -1, -1))


def test_durations_are_told_to_each_stage(system: CogVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the frame rate prefix: 4 seconds for key frames, half as many in each further round."""
    durations: list[float] = []
    encode = TextTokenizer.encode_caption

    def noted(self: TextTokenizer, caption: str | None, duration: float) -> list[int]:
        if caption is not None:
            durations.append(duration)
        return encode(self, caption, duration)

    monkeypatch.setattr(TextTokenizer, "encode_caption", noted)
    clip(system, PROMPTS[:1], [0], settings=settings(rounds=2))
    assert durations == [4.0, 2.0, 1.0] * 2  # once to check all texts before any work, once to use them
    durations.clear()
    clip(system, PROMPTS[:1], [0], given=some_frames(1), last=some_frames(1)[0])
    assert durations[-3:] == [8.0, 4.0, 2.0]
    durations.clear()
    clip(system, PROMPTS, [0, 1], durations=[1.0, 4.0])
    assert durations == [1.0, 4.0, 0.5, 2.0] * 2


def test_gaps_of_a_round_are_one_batch(system: CogVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the cost of a round: the interpolation stage runs once, however many gaps there are."""
    batches = []
    decode = hierarchy.decode

    def counted(model, layout, condition, given, *rest, **options):  # type: ignore[no-untyped-def]
        batches.append((layout.order, len(given)))
        return decode(model, layout, condition, given, *rest, **options)

    monkeypatch.setattr(hierarchy, "decode", counted)
    clip(system, PROMPTS, [0, 1], settings=settings(rounds=2))
    assert batches[2:] == [((0, 2, 4, 1, 3), 2 * 2), ((0, 2, 4, 1, 3), 2 * 4)]


@pytest.mark.parametrize(
    ("frames", "width", "expected"), [(2, 2, [0]), (5, 3, [0, 2]), (3, 3, [0]), (4, 3, [0, 1]), (6, 3, [0, 2, 3])]
)
def test_sequences_fill_every_gap_once(frames: int, width: int, expected: list[int]) -> None:
    """Checks odd numbers of gaps: every gap is covered, and filled by exactly one sequence."""
    spans = hierarchy._spans(frames, width)
    assert [span.start for span in spans] == expected
    gaps = [gap for span in spans for gap in range(span.start, span.start + width - 1) if gap >= span.filled]
    assert gaps == list(range(frames - 1))


@pytest.mark.parametrize("sequences_at_once", [1, 3])
def test_smaller_batches_give_the_same_clip(system: CogVideo, sequences_at_once: int) -> None:
    """Checks the option that saves memory: rounds run in parts, with a last sequence that overlaps."""
    given, last = some_frames(2)[:1], some_frames(2)[1]
    expected = clip(system, PROMPTS, [3, 4], given=given, last=last)
    how = settings(sequences_at_once=sequences_at_once)
    assert torch.equal(clip(system, PROMPTS, [3, 4], given=given, last=last, settings=how), expected)
    whole = clip(system, PROMPTS, [3, 4], settings=settings(rounds=2))
    assert torch.equal(clip(system, PROMPTS, [3, 4], settings=replace(how, rounds=2)), whole)


def test_seed_guidance_negative_and_prompt_each_change_the_clip(system: CogVideo) -> None:
    """Guards against options that are read but ignored."""

    def run(prompt: str = PROMPTS[0], seed: int = 3, **changes: object) -> Tensor:
        return clip(system, [prompt], [seed], settings=settings(**changes))

    clips = [
        run(),
        run(PROMPTS[1]),
        run(seed=4),
        run(later=settings().later | {"guidance": 1.0}),
        run(negative="blurred"),
        run(text_bonus=0.0),
        run(duration=2.0),
    ]
    assert all(not torch.equal(one, other) for place, one in enumerate(clips) for other in clips[:place])


@pytest.mark.parametrize("rounds", [-1, 99])
def test_impossible_rounds_are_refused(rounds: int) -> None:
    """Guards Python callers, who bypass the command line's check and would get a PyTorch error about strides."""
    with pytest.raises(ValueError, match=f"rounds is {rounds!r}, expected 0 to 6"):
        settings(rounds=rounds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": [" "]}, "empty"),
        ({"prompts": ["word " * 200]}, "tokens, 40 fit"),
        ({"prompts": "a cat"}, "expected a list of texts"),
        ({"seeds": [1, 2]}, "2 generators for 1 prompts"),
        ({"durations": [1.0, 2.0]}, "2 durations for 1 prompts"),
        ({"given": some_frames(1) + 32}, "expected \\[0, 32\\)"),
        ({"given": some_frames(1)[..., :-1]}, "15"),
        ({"given": some_frames(2), "last": some_frames(1)[0]}, "got a last frame and 2 leading ones, expected one"),
        ({"last": some_frames(1)[0]}, "got a last frame and 0 leading ones, expected one"),
        (
            {"given": some_frames(1), "last": some_frames(1)[0], "settings": settings(more_key_frames=1)},
            "a last frame has one sequence",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(system: CogVideo, change: dict[str, object], message: str) -> None:
    """Guards users against waiting for an error: everything is checked before any model is used."""
    idle = without_weights(system)
    options = {"prompts": PROMPTS[:1], "seeds": [1]} | change
    with pytest.raises(ValueError, match=message):
        clip(idle, options.pop("prompts"), options.pop("seeds"), **options)


def test_long_prompt_is_cut_on_request(system: CogVideo) -> None:
    """Checks the workaround that the error for long prompts suggests."""
    assert clip(system, ["word " * 200], [1], settings=settings(truncate=True)).shape == (1, 9, SLOTS)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("sequential", "no sequential, which"),
        ("interpolation", "no interpolation, which"),
        ("cluster_labels", "keep 4 clusters, but this model has neither"),
    ],
)
def test_incomplete_models_are_refused_at_the_call(system: CogVideo, lost: str, message: str) -> None:
    """Guards users of a partial bundle against generating key frames in vain."""
    with pytest.raises(ValueError, match=message):
        generate(without_weights(system, lost), request(PROMPTS[:1], 1))


def test_samples_that_share_a_generator_are_refused(system: CogVideo) -> None:
    """Guards against samples that depend on their position in the batch."""
    with pytest.raises(ValueError, match="expected one each"):
        generate(system, Request(PROMPTS, generators(1) * 2, settings()))


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_guidance_that_cannot_be_is_refused(scale: float) -> None:
    """Guards against generating a whole clip of noise."""
    with pytest.raises(ValueError, match=r"guidance is .*, expected 0 to 100"):
        SamplingConfig(guidance=scale)


def test_stages_alone_give_what_the_hierarchy_does(system: CogVideo) -> None:
    """Checks samples of a stage without the others: the first frame, and a round between given frames."""
    frames = list(generate(system, request(PROMPTS, 3, 4)))
    parts = {"base": system.base, "text": system.text, "cluster_labels": system.cluster_labels}
    alone = CogVideo(system.config, **parts)
    assert torch.equal(first_frames(alone, request(PROMPTS, 3, 4)), frames[0].codes)
    alone = CogVideo(system.config, **parts, interpolation=system.interpolation.channel)
    given = torch.stack([some_frames(5), some_frames(5).flip(0)])
    codes = between(alone, request(PROMPTS, 3, 4), given)
    assert torch.equal(codes[:, ::2], given)
    assert torch.equal(between(alone, request(PROMPTS[1:], 4), given[1:]), codes[1:])


@pytest.mark.parametrize("number", [1, 2])
def test_clips_go_on_after_frames_of_their_own(system: CogVideo, number: int) -> None:
    """Checks one stage without a hierarchy: each clip of a batch continues its own frames, as it does alone."""
    given = torch.stack([some_frames(number), some_frames(number).flip(1)])
    codes = after(system, request(PROMPTS, 3, 4), given)
    plain = settings(rounds=0)
    for place, (prompt, seed) in enumerate(zip(PROMPTS, (3, 4), strict=True)):
        alone = clip(system, [prompt], [seed], settings=plain, given=given[place])
        assert torch.equal(codes[place], alone[0, number:])
