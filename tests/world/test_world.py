"""The World: clips determined by their number alone, true captions, held-out pairs, antialiased frames."""

from __future__ import annotations

import hashlib
import itertools
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from cogvideo import world
from cogvideo.world.captions import COLOR_WORDS, OBJECT_WORDS, PLACE_WORDS, SPEED_PHRASES, SPEED_WORDS
from cogvideo.world.motion import Cast
from cogvideo.world.places import background
from cogvideo.world.scenes import held_out_action, held_out_color

MANY = 2_000
STILL = world.Scene(0, "ball", "red", "large", "vanish", "right", "slowly", "gray", "soft", 0.0, 0.0, "right")
"""A scene whose figure stands at (0.52, GROUND) at the end."""


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.scene(index) for index in range(MANY)]


def one(action: str, **changes: Any) -> world.Scene:
    """A scene with an action, in its first direction and relation unless `changes` override them."""
    act = world.ACTS[action]
    two = ("box", "blue", act.relations[0]) if act.relations else ("", "", "")
    values = {"action": action, "direction": act.directions[0], "object": "fish"}
    values |= dict(zip(("other_object", "other_colour", "relation"), two, strict=True))
    return replace(STILL, **(values | changes))


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Share of pixels that differ visibly."""
    return float((np.abs(one.astype(int) - other).max(-1) > 24).mean())


# Determinism


def fingerprint() -> str:
    """A hash of the scenes, captions and pixels of some clips."""
    parts = [f"{each} {world.captions(each)} {world.attributes(each)}".encode() for each in map(world.scene, range(99))]
    return hashlib.sha256(
        b"".join([*parts, *(world.render(world.scene(i), 48).tobytes() for i in range(5))])
    ).hexdigest()


def test_another_process_draws_the_same() -> None:
    """Catches clips that depend on hash seeds, global random state or caches."""
    code = "import numpy, test_world; numpy.random.seed(7); print(test_world.fingerprint())"
    here = Path(__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == fingerprint()


def test_numbers_keep_their_clips() -> None:
    """Catches changes in vocabulary or sampling that silently alter the data that recipes were trained on."""
    text = "\n".join(f"{world.scene(index)} {world.captions(world.scene(index))}" for index in range(500))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "9fd7b4b40df475b4"


def test_simple_scenes_are_a_part_of_the_world() -> None:
    """Checks the simple domain: one large figure in the middle, few values per attribute, no scene in two splits."""
    scenes = [world.scene(index, "simple") for index in range(3000)]
    simple = world.DOMAINS["simple"]
    for scene in scenes:
        assert scene.object in simple.objects
        assert scene.colour in simple.colors
        assert scene.action in simple.actions
        assert scene.background in simple.backgrounds
        still = (scene.size, scene.shading, scene.delay, scene.shift, scene.other_object)
        assert still == ("large", "flat", 0, 0, "")
    assert {len({getattr(scene, name) for scene in scenes}) for name in ("object", "colour", "action")} == {8}
    splits: dict[object, set[str]] = {}
    for scene in scenes:
        splits.setdefault(replace(scene, index=0, facing="left"), set()).add(world.split(scene))
    assert all(len(each) == 1 for each in splits.values())
    assert {split for each in splits.values() for split in each} == {"train", "validation", "held_out"}


def test_the_order_of_rendering_does_not_matter() -> None:
    """Catches clips that modify a cached background."""
    first, before = world.render(world.scene(3)), {name: background(name, 64).copy() for name in world.PLACES}
    for index in range(20):
        world.render(world.scene(index))
    assert (world.render(world.scene(3)) == first).all()
    assert all((background(name, 64) == picture).all() for name, picture in before.items())


# Frames


def test_every_attribute_is_drawn_everywhere(scenes: list[world.Scene]) -> None:
    """Catches attribute values that never occur, or too rarely to be learned."""
    vocabularies = {
        "object": world.OBJECTS,
        "colour": tuple(world.COLORS),
        "size": world.SIZES,
        "action": tuple(world.ACTS),
        "speed": world.SPEEDS,
        "background": tuple(world.PLACES),
        "shading": world.SHADINGS,
    }
    for name, values in vocabularies.items():
        counts = Counter(getattr(scene, name) for scene in scenes)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.5 * MANY / len(values)


@pytest.mark.parametrize("index", range(0, 40, 4))
def test_sizes_show_the_same_picture(index: int) -> None:
    """Guards against aliasing and resolution-dependent shapes: 192 pixels averaged down by 3 match 64."""
    small, large = (world.render(world.scene(index), size, 2, 9).astype(float) for size in (64, 192))
    averaged = large.reshape(9, 64, 3, 64, 3, 3).mean((2, 4))
    difference = np.abs(averaged - small)
    assert difference.mean() < 1
    assert (difference.max(-1) > 40).mean() < 0.006


def test_edges_are_soft() -> None:
    """Guards against hard edges: motion by a fraction of a pixel must be visible."""
    values = np.unique(world.render(replace(STILL, shading="outlined"))[-1, :, :, 1])
    assert len(values) > 60


def test_frames_belong_to_times() -> None:
    """Catches frames that depend on how many others are rendered: all rates sample the same motion."""
    for index in (0, 1, 2, 17, 40):
        scene = world.scene(index)
        full = world.render(scene)
        assert (world.render(scene, fps=2.0, num_frames=9) == full[::4]).all()
        longer = world.render(scene, num_frames=40)
        assert (longer[:33] == full).all()
        assert (longer[33:] == full[-1]).all()
        assert world.render(scene, 48, 5, 1).shape == (1, 48, 48, 3)


@pytest.mark.parametrize("colour", world.COLORS)
def test_colours_look_like_their_names(colour: str) -> None:
    """Catches shading, outlines or a wrong table that make one color look like another."""
    for shading in world.SHADINGS:
        frame = world.render(replace(STILL, object="heart", colour=colour, shading=shading), 96)[-1].astype(int)
        heart = frame[np.abs(frame - background("gray", 96)[0]).max(-1) > 24]
        nearest = np.linalg.norm(heart[:, None] - list(world.COLORS.values()), axis=-1).argmin(1)
        assert list(world.COLORS)[np.bincount(nearest).argmax()] == colour


def test_figures_are_told_from_each_other_and_from_the_background() -> None:
    """Catches objects that look alike or are not drawn."""
    last = {name: world.render(replace(STILL, object=name))[-1] for name in world.OBJECTS}
    empty = background("gray", 64)[0]
    assert all(apart(frame, empty) > 0.04 for frame in last.values())
    for (_, one_frame), (_, other) in itertools.combinations(last.items(), 2):
        assert apart(one_frame, other) > 0.025


def test_no_colour_is_lost_before_its_background(scenes: list[world.Scene]) -> None:
    """Prevents scenes such as white on snow, two figures of one color or kind, and objects unfit for the action."""
    for scene in scenes:
        clashes = world.PLACES[scene.background].clashes
        assert scene.colour not in clashes
        assert scene.other_colour not in clashes
        assert scene.colour != scene.other_colour
        assert scene.object != scene.other_object
        assert scene.object not in world.ACTS[scene.action].unfit


# Actions


@pytest.mark.parametrize("action", world.ACTS)
def test_actions_fill_the_clip_in_phases(action: str) -> None:
    """Catches actions that end early, stand still or return to where they were."""
    frames = world.render(one(action))
    for first, second in itertools.combinations(frames[::8], 2):
        assert apart(first, second) > 0.01
    assert all(apart(frames[start], frames[start + 8]) > 0.01 for start in (0, 8, 16, 24))
    near = np.mean([apart(*pair) for pair in itertools.pairwise(frames)])
    far = np.mean([apart(*pair) for pair in itertools.pairwise(frames[::8])])
    assert near < 0.8 * far


@pytest.mark.parametrize("action", world.ACTS)
def test_speed_is_seen(action: str) -> None:
    """Catches speeds that show only in the caption."""
    slow, quick = (world.render(one(action, speed=speed)) for speed in world.SPEEDS)
    assert (quick[19:] == quick[-1]).all()
    assert apart(quick[8], slow[8]) > 0.01
    assert any(apart(slow[frame], slow[-1]) > 0.005 for frame in (24, 26, 28))


SIDEWAYS = [name for name, act in world.ACTS.items() if act.directions == ("right", "left")]


@pytest.mark.parametrize("action", SIDEWAYS)
def test_left_is_the_mirror_image_of_right(action: str) -> None:
    """Catches parts of an action that ignore the direction."""
    phase = np.linspace(0, 1, 41)
    right, left = (world.ACTS[action].play(phase, Cast(way, 0.3, 0.25, True, False, 0.0)) for way in (1, -1))
    pairs = [(right.actor, left.actor), (right.other, left.other)]
    for here, there in pairs:
        if here is not None and there is not None:
            np.testing.assert_allclose(here.x, -there.x, atol=1e-9)
            np.testing.assert_allclose(here.y, there.y, atol=1e-9)
            np.testing.assert_allclose(here.angle, -there.angle, atol=1e-9)
            np.testing.assert_allclose(here.facing, -there.facing)


@pytest.mark.parametrize("action", [name for name, act in world.ACTS.items() if len(act.directions) > 1])
def test_directions_are_seen(action: str) -> None:
    """Catches directions that look alike."""
    one_way, other_way = (world.render(one(action, direction=each)) for each in world.ACTS[action].directions)
    assert np.mean([apart(*pair) for pair in zip(one_way, other_way, strict=True)]) > 0.03


@pytest.mark.parametrize("action", SIDEWAYS)
def test_the_direction_is_where_the_actor_first_moves(action: str) -> None:
    """Catches swapped words: if the direction is right, the actor first moves to the right."""
    play = world.ACTS[action].play(np.linspace(0, 1, 81), Cast(1.0, 0.3, 0.25, False, False, 0.0))
    moved = play.actor.x - play.actor.x[0]
    assert moved[np.flatnonzero(np.abs(moved) > 0.1)[0]] > 0


def test_up_is_up_and_clockwise_is_clockwise() -> None:
    """Catches swapped words for the other directions."""
    phase = np.linspace(0, 1, 81)
    for way in (1.0, -1.0):
        cast = Cast(way, 0.3, 0.25, False, False, 0.2)
        y = world.ACTS["zigzag"].play(phase, cast).actor.y
        assert np.sign(y[-1] - y[0]) == way
        orbit = world.ACTS["orbit"].play(phase, cast)
        assert orbit.other is not None
        turn = np.unwrap(np.arctan2(orbit.actor.y - orbit.other.y, orbit.actor.x))
        assert np.sign(turn[0] - turn[-1]) == way
    for action, sign in (("launch", 1), ("drop", -1)):
        y = world.ACTS[action].play(phase, cast).actor.y
        assert np.sign(y[-1] - y[0]) == sign


def test_what_is_behind_is_hidden() -> None:
    """Catches figures drawn in the wrong order for their relation."""
    middle = {each: world.render(one("pass", relation=each))[14:18] for each in ("behind", "in front of")}
    fish, parcel = (np.array(world.COLORS[colour]) for colour in ("red", "blue"))
    near = {
        name: [int((np.abs(frames - colour).max(-1) < 60).sum()) for colour in (fish, parcel)]
        for name, frames in middle.items()
    }
    assert near["behind"][1] > near["in front of"][1]
    assert near["behind"][0] < near["in front of"][0]


# Captions


def test_captions_say_what_is_seen(scenes: list[world.Scene]) -> None:
    """Catches captions that omit or invent something."""
    for scene in scenes:
        for caption in world.captions(scene):
            text = caption.lower()
            assert says_figure(text, scene.colour, scene.object)
            assert not scene.other_object or says_figure(text, scene.other_colour, scene.other_object)
            assert not mentions(text, every(SPEED_WORDS, SPEED_PHRASES, other_than=scene.speed))
            assert not mentions(text, every(PLACE_WORDS, other_than=scene.background))
            assert scene.size == "small" or not mentions(text, ("small", "little", "tiny")) or scene.action == "launch"
            assert scene.size == "large" or not mentions(text, ("large", "big", "huge"))


def test_the_first_caption_says_everything(scenes: list[world.Scene]) -> None:
    """Catches prompts that omit the direction, speed or background, on which clips are evaluated."""
    for scene in scenes:
        text = world.captions(scene)[0].lower()
        words = {"up": ("up", "upwards"), "down": ("down", "falls", "drops")}
        words |= {
            "left": ("left", "from the right", "on the right", "back to the right"),
            "right": ("right", "from the left", "on the left", "back to the left"),
        }
        assert scene.direction == "none" or mentions(text, words.get(scene.direction, (scene.direction,)))
        assert mentions(text, (*SPEED_WORDS[scene.speed], *SPEED_PHRASES[scene.speed]))
        assert mentions(text, PLACE_WORDS[scene.background])


def test_captions_are_english(scenes: list[world.Scene]) -> None:
    """Catches wrong articles, leftover brackets, double spaces, and captions too long for the text slots."""
    for caption in itertools.chain.from_iterable(map(world.captions, scenes)):
        assert re.fullmatch(r"[A-Za-z, ]+\.?", caption)
        assert not re.search(r"  | ,|,,|, \.|,$", caption)
        assert not re.search(r"\ba [aeio]|\ban [^aeio]", caption, re.IGNORECASE), caption
        assert caption.endswith(".") == caption[0].isupper()
        assert len(caption.split()) <= 27


def test_there_are_a_hundred_thousand_captions() -> None:
    """Catches repetitive wording. Runs in a separate process, which is fast because shapes are not checked there."""
    code = """
    from cogvideo import world
    print(len({caption for index in range(50_000) for caption in world.captions(world.scene(index))}))
    """
    result = subprocess.run(
        [sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=True, timeout=300
    )
    assert int(result.stdout) > 100_000


def test_wording_varies() -> None:
    """Catches fixed wording: the same scene under other numbers is described in many ways."""
    texts = {world.captions(replace(one("bounce"), index=index))[0].lower().strip(".") for index in range(100)}
    assert len(texts) > 40


def every(*tables: dict[str, tuple[str, ...]], other_than: str) -> tuple[str, ...]:
    """All words in the tables except those for one value."""
    allowed = {word for table in tables for word in table.get(other_than, ())}
    return tuple({word for table in tables for words in table.values() for word in words} - allowed)


def mentions(text: str, words: tuple[str, ...]) -> bool:
    return re.search(rf"\b({'|'.join(map(re.escape, words))})\b", text) is not None


def says_figure(text: str, colour: str, kind: str) -> bool:
    return any(f" {hue} {noun}" in f" {text}" for hue in COLOR_WORDS[colour] for noun in OBJECT_WORDS[kind])


def test_captions_know_left_from_right(scenes: list[world.Scene]) -> None:
    """Catches swapped sides: figures move to the side of their direction, and come from the other."""
    goals = r"(?<!turns back )\bto (?:the )?(left|right)|moving (left|right)|way (left|right)|first (left|right)"
    for scene in scenes:
        if scene.direction in ("left", "right"):
            for caption in world.captions(scene):
                assert set(re.findall(r"from (?:the )?(left|right)", caption)) <= {"left", "right"} - {scene.direction}
                assert {word for found in re.findall(goals, caption) for word in found} <= {scene.direction, ""}


# Splits


def test_a_tenth_of_the_pairs_is_held_out() -> None:
    """Catches rules that hold out more or less than a tenth, or too many or none of one value."""
    for rule, seconds in ((held_out_color, list(world.COLORS)), (held_out_action, list(world.ACTS))):
        table = np.array([[rule(kind, second) for second in seconds] for kind in world.OBJECTS])
        assert table.mean() == pytest.approx(0.1, abs=0.005)
        assert table.any(0).all()
        assert table.any(1).all()
        assert table.mean(0).max() <= 0.2
        assert table.mean(1).max() <= 0.2


def test_training_never_sees_a_held_out_pair(scenes: list[world.Scene]) -> None:
    """Catches leaks, including through the second figure, and attribute values missing from training."""
    train = [scene for scene in scenes if world.split(scene) == "train"]
    for scene in train:
        assert not held_out_color(scene.object, scene.colour)
        assert not held_out_action(scene.object, scene.action)
        assert not scene.other_object or not held_out_color(scene.other_object, scene.other_colour)
    for name in ("object", "colour", "action", "direction", "speed", "background", "other_object", "other_colour"):
        assert {getattr(scene, name) for scene in train} == {getattr(scene, name) for scene in scenes}


def test_splits_have_their_shares(scenes: list[world.Scene]) -> None:
    """Catches splits of the wrong size, and disagreement between the ways to look one up."""
    splits = [world.split(scene) for scene in scenes]
    assert splits[:50] == [world.split(index) for index in range(50)]
    shares = {name: splits.count(name) / MANY for name in ("train", "validation", "held_out")}
    assert 0.15 < shares["held_out"] < 0.27
    assert shares["validation"] / (1 - shares["held_out"]) == pytest.approx(0.05, abs=0.01)
    for name in shares:
        found = [scene.index for scene in itertools.islice(world.scenes(name, 10), 20)]
        assert found == [index for index in range(10, MANY) if splits[index] == name][:20]


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: world.scene(-1), "index is -1, expected 0 or more"),
        (lambda: world.split(-1), "index is -1, expected 0 or more"),
        (lambda: world.render(STILL, 15), "size is 15, expected 16 to 4096"),
        (lambda: world.render(STILL, fps=0.0), "fps is 0.0, expected a positive number"),
        (lambda: world.render(STILL, fps=float("nan")), "fps is nan, expected a positive number"),
        (lambda: world.render(STILL, num_frames=0), "num_frames is 0, expected a positive number"),
        (lambda: replace(STILL, colour="mauve"), "colour is 'mauve', expected one of 'red', "),
        (lambda: replace(STILL, action="sleep"), "action is 'sleep', expected one of bounce, "),
        (lambda: replace(STILL, direction="up"), "direction is 'up', expected one of 'right', 'left'"),
        (lambda: replace(STILL, relation="behind"), "relation is 'behind', expected one of ''"),
        (lambda: replace(STILL, shift=1.5), "shift is 1.5, expected -1 to 1"),
    ],
)
def test_mistakes_are_refused(call: Any, message: str) -> None:
    """Refuses impossible clips, with errors that say what was expected."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call()
