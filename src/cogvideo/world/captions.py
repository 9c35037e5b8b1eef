"""The World's wording: several true captions for each clip."""

from __future__ import annotations

import re

from cogvideo.world.figures import COLORS
from cogvideo.world.scenes import OBJECTS, Scene, SceneChoices

NUM_CAPTIONS = 3
"""Captions per clip. The first says everything; the others omit each of direction, speed and background in one case of
four, unless the action needs it. Object, color and action are always named, and so is a second figure."""

OBJECT_WORDS: dict[str, tuple[str, ...]] = {name: (name,) for name in OBJECTS} | {
    "box": ("box", "parcel"),
    "ring": ("ring", "hoop"),
    "car": ("car", "toy car"),
    "mushroom": ("mushroom", "toadstool"),
    "moon": ("moon", "crescent moon"),
    "house": ("house", "hut"),
}

COLOR_WORDS: dict[str, tuple[str, ...]] = {name: (name,) for name in COLORS} | {"purple": ("purple", "violet")}

SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("",),
    "large": ("large", "big", "huge"),
}

SPEED_WORDS: dict[str, tuple[str, ...]] = {
    "slowly": ("slowly", "slowly", "unhurriedly"),
    "quickly": ("quickly", "rapidly", "swiftly"),
}
"""Words for the speed, before the figure or its action."""

SPEED_PHRASES: dict[str, tuple[str, ...]] = {
    "slowly": ("all slowly", "at a slow pace", "taking its time"),
    "quickly": ("all quickly", "at a fast pace", "in a hurry", "at high speed"),
}
"""Words for the speed, after the action."""

PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "on a green meadow", "on the grass"),
    "beach": ("on a beach", "by the sea", "on the sand"),
    "night": ("at night", "under a starry sky", "under the stars"),
    "snow": ("in the snow", "in a snowy landscape", "on a winter day"),
    "desert": ("in the desert", "among sand dunes", "in a dry desert"),
    "sea": ("under water", "at the bottom of the sea", "in the deep sea"),
    "room": ("in a room", "in a living room", "on a wooden floor"),
    "sunset": ("at sunset", "under an evening sky", "in front of the setting sun"),
    "city": ("in a city", "on a street", "in front of tall buildings"),
    "gray": ("on a gray background", "before a gray wall"),
    "pink": ("on a pink background", "before a pink wall"),
    "yellow": ("on a yellow background", "before a yellow wall"),
}

CLAUSES = (
    ("bounce", "{moves} in[ from the {start}], bounces twice and leaves[ on the {end}]"),
    ("bounce", "enters[ from the {start}], bounces two times and disappears"),
    ("bounce", "bounces twice on its way[ from {start} to {end}] through the picture"),
    ("rise and set", "rises[ on the {start}] and sets[ on the {end}]"),
    ("rise and set", "comes up[ on the {start}], moves in a high arc and goes down"),
    ("rise and set", "rises high up and sinks again[, moving {end}]"),
    ("burst", "grows and bursts"),
    ("burst", "swells up bit by bit until it pops"),
    ("burst", "gets bigger and bigger, then bursts into pieces"),
    ("topple", "leaps up, spins around once and falls over[ to the {end}]"),
    ("topple", "spins in the air, lands and topples over[ to the {end}]"),
    ("topple", "does a full turn, lands upright and tips over[ to the {end}]"),
    ("hop", "crosses the picture[ from {start} to {end}] in three hops"),
    ("hop", "makes three hops[ to the {end}]"),
    ("hop", "jumps three times[, moving {end}]"),
    ("drop", "falls down, bounces and comes to rest"),
    ("drop", "drops from above, bounces lower and lower and lies still"),
    ("drop", "falls from high up, bounces a few times and stops"),
    ("launch", "jumps twice, then shoots up and away"),
    ("launch", "hops on the spot two times and takes off upwards"),
    ("launch", "makes two small jumps and flies up like a rocket"),
    ("loop", "flies[ from {start} to {end}] with a loop in the middle"),
    ("loop", "flies in[ from the {start}], does a loop and flies on"),
    ("loop", "flies a loop[ on its way {end}]"),
    ("visit", "{moves} in[ from the {start}], stops and goes back out"),
    ("visit", "comes in[ from the {start}], nods and goes away again"),
    ("visit", "appears[ on the {start}], stops in the middle and goes back"),
    ("swing", "swings on a string like a pendulum[, first to the {end}]"),
    ("swing", "hangs on a string and swings less and less[, starting to the {end}]"),
    ("swing", "swings back and forth[, first {end}], until it hangs still"),
    ("vanish", "vanishes[ on the {start}] and appears again[ on the {end}]"),
    ("vanish", "shrinks away[ on the {start}] and comes back[ on the {end}]"),
    ("vanish", "disappears[ on the {start}] and shows up[ on the {end}]"),
    ("zigzag", "zigzags {end} {like}"),
    ("zigzag", "floats {end} in a zigzag"),
    ("zigzag", "drifts {end}, swaying from side to side {like}"),
    ("meet", "comes in[ from the {start}], meets {other} and turns back"),
    ("meet", "goes up to {other} and turns back[ to the {start}]"),
    ("meet", "comes[ from the {start}], greets {other} and turns back"),
    ("chase", "chases {other}[ to the {end}] until it escapes"),
    ("chase", "runs after {other}[, moving {end}], but cannot catch it"),
    ("chase", "chases {other} out of the picture[ on the {end}]"),
    ("pass", "passes {relation} {other}[ from {start} to {end}]"),
    ("pass", "moves along {relation} {other}[, to the {end}]"),
    ("pass", "crosses the picture {relation} {other}[ from {start} to {end}]"),
    ("jump", "jumps over {other}[ from {start} to {end}]"),
    ("jump", "comes[ from the {start}] and leaps over {other}"),
    ("jump", "runs up and jumps over {other}[ to the {end}]"),
    ("push", "comes in[ from the {start}] and pushes {other} away"),
    ("push", "pushes {other} out of the picture[ on the {end}]"),
    ("push", "runs into {other} and shoves it away[ to the {end}]"),
    ("orbit", "circles around {other}[ {end}]"),
    ("orbit", "flies[ {end}] around {other}"),
    ("orbit", "goes round and round {other}[ {end}]"),
)
"""Actions and clauses for them. Parts in brackets are in only some of the captions."""

LIKE = {"up": "like a bubble", "down": "like a leaf"}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def captions(scene: Scene) -> tuple[str, ...]:
    """Captions of a clip, each true; equal scenes have equal captions."""
    return tuple(_caption(scene, number) for number in range(NUM_CAPTIONS))


def _caption(scene: Scene, number: int) -> str:
    draws = SceneChoices(f"cogvideo world 1 caption {scene.index} {number}")
    says_direction, says_speed, says_place = (number == 0 or draws.number(4) > 0 for _ in range(3))
    figure = _figure(draws, scene.size, scene.colour, scene.object)
    clause = _clause(draws, scene, says_direction)
    place = draws.choose(PLACE_WORDS[scene.background]) if says_place else ""
    text = _sentence(draws, scene, figure, clause, place, says_speed)
    return text if draws.number(3) == 0 else f"{text[0].upper()}{text[1:]}."


def _figure(draws: SceneChoices, size: str, color: str, name: str) -> str:
    """A figure in words, such as `a small red ball`."""
    words = draws.choose(SIZE_WORDS[size]) if draws.number(2) else ""
    phrase = f"{words} {draws.choose(COLOR_WORDS[color])} {draws.choose(OBJECT_WORDS[name])}".strip()
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _clause(draws: SceneChoices, scene: Scene, says_direction: bool) -> str:
    template = draws.choose([clause for action, clause in CLAUSES if action == scene.action])
    template = re.sub(r"\[(.*?)\]", r"\1" if says_direction else "", template)
    other = _figure(draws, "medium", scene.other_colour, scene.other_object) if scene.other_object else ""
    return template.format(
        start=OPPOSITE.get(scene.direction, ""),
        end=scene.direction,
        like=LIKE.get(scene.direction, ""),
        moves="rolls" if scene.object in ("ball", "ring") else "slides",
        other=other,
        relation=scene.relation,
    )


def _sentence(draws: SceneChoices, scene: Scene, figure: str, clause: str, place: str, says_speed: bool) -> str:
    """Put figure, clause, speed and place in one of several orders."""
    before, after, end = _one_of_three(draws, f"{place}, ", f" {place}", f", {place}") if place else ("", "", "")
    word, phrase = draws.choose(SPEED_WORDS[scene.speed]), draws.choose(SPEED_PHRASES[scene.speed])
    first, between, last = _one_of_three(draws, f"{word}, ", f"{word} ", f", {phrase}") if says_speed else ("", "", "")
    if before and first:
        first, between = "", f"{word} "  # not: "On a beach, slowly, a red ball ..."
    return f"{before}{first}{figure}{after} {between}{clause}{last}{end}"


def _one_of_three(draws: SceneChoices, *texts: str) -> list[str]:
    """The texts, all but one of them empty."""
    kept = draws.number(len(texts))
    return [text if number == kept else "" for number, text in enumerate(texts)]
