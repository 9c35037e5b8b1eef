"""Scenes of the World: attributes drawn from the number of a clip, and the rule for held-out pairs.

Everything is integer arithmetic on a BLAKE2 hash of the number: the same on every machine and in every process.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeVar

from cogvideo.config import require
from cogvideo.world import motion
from cogvideo.world.figures import COLORS, FIGURES, SHADINGS
from cogvideo.world.places import PLACES

T = TypeVar("T")
Split = Literal["train", "validation", "held_out"]


class Act(NamedTuple):
    """One action."""

    play: motion.Action
    directions: tuple[str, ...]
    """Initial directions of the actor; the first is `way` +1 of the play, the second -1."""
    relations: tuple[str, ...] = ()
    """Relations of the actor to the second figure, for actions of two."""
    unfit: tuple[str, ...] = ()
    """Objects that cannot do it, or not visibly."""


_SIDEWAYS, _ROUND = ("right", "left"), ("clockwise", "counterclockwise")

ACTS: dict[str, Act] = {
    "bounce": Act(motion.bounce, _SIDEWAYS),
    "rise and set": Act(motion.arc, _SIDEWAYS),
    "burst": Act(motion.burst, ("none",)),
    "topple": Act(motion.topple, _SIDEWAYS, unfit=("ball", "ring")),
    "hop": Act(motion.hop, _SIDEWAYS),
    "drop": Act(motion.drop, ("down",)),
    "launch": Act(motion.launch, ("up",)),
    "loop": Act(motion.loop, _SIDEWAYS),
    "visit": Act(motion.visit, _SIDEWAYS),
    "swing": Act(motion.swing, _SIDEWAYS),
    "vanish": Act(motion.vanish, _SIDEWAYS),
    "zigzag": Act(motion.zigzag, ("up", "down")),
    "meet": Act(motion.meet, _SIDEWAYS, ("toward",)),
    "chase": Act(motion.chase, _SIDEWAYS, ("after",)),
    "pass": Act(motion.overtake, _SIDEWAYS, ("behind", "in front of")),
    "jump": Act(motion.jump, _SIDEWAYS, ("over",)),
    "push": Act(motion.push, _SIDEWAYS, ("against",)),
    "orbit": Act(motion.orbit, _ROUND, ("around",)),
}
"""Actions by name."""

OBJECTS = tuple(FIGURES)
SIZES = ("small", "medium", "large")
SPEEDS = ("slowly", "quickly")
ROLLING = ("ball", "ring")
"""Objects that turn as they move along the ground."""

VALIDATION_EVERY = 20
"""One in this many clips that are not held out is in the split `validation`."""


@dataclass(frozen=True)
class Domain:
    """Attributes that scenes are drawn from, each as likely as the others."""

    key: str
    """Start of the text that determines a scene's choices."""
    objects: tuple[str, ...] = OBJECTS
    colors: tuple[str, ...] = tuple(COLORS)
    """Colors of figures, except those that clash with the background."""
    sizes: tuple[str, ...] = SIZES
    """Sizes of the actor."""
    actions: tuple[str, ...] = tuple(ACTS)
    backgrounds: tuple[str, ...] = tuple(PLACES)
    shadings: tuple[str, ...] = SHADINGS
    delays: int = 17
    """Number of possible delays, in steps of 1/80 of a second from 0."""
    shifts: int = 128
    """Number of positions on either side of the middle of the picture, in steps of 1/128."""


DOMAINS: dict[str, Domain] = {
    "full": Domain("cogvideo world 1 scene"),
    "simple": Domain(
        "cogvideo world 1 simple",
        objects=("ball", "box", "star", "heart", "pyramid", "fish", "car", "mushroom"),
        colors=("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
        sizes=("large",),
        actions=("bounce", "rise and set", "burst", "topple", "drop", "launch", "swing", "vanish"),
        backgrounds=("meadow", "beach", "night", "snow", "sea", "room"),
        shadings=("flat",),
        delays=1,
        shifts=0,
    ),
}
"""All of the World; and large figures with clearly different outlines, one per scene, in the middle of the picture,
whose actions look different in five key frames: simple enough for a small model."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that determines a clip and its captions."""

    index: int
    """Number of the clip; it chooses the wording of the captions."""
    object: str
    """The actor, one of `OBJECTS`."""
    colour: str
    size: str
    action: str
    direction: str
    """Its first direction: left, right, up, down, clockwise, counterclockwise, or none."""
    speed: str
    """`slowly`: the action fills the four seconds; `quickly`: it is over soon after two."""
    background: str
    """One of the `PLACES`."""
    shading: str
    """Style of drawing, one of `SHADINGS`."""
    delay: float
    """Seconds before the action starts, up to 0.2."""
    shift: float
    """Position in the picture, -1 to 1."""
    facing: str
    """Side that the actor faces if the action does not determine it: left or right."""
    other_object: str = ""
    """The second figure of actions of two, else empty; its size is between small and medium."""
    other_colour: str = ""
    relation: str = ""
    """Relation of the actor to it, such as `behind`."""
    domain: str = field(default="full", repr=False)
    """Name of the domain that it was drawn from; numbers count within a domain."""

    def __post_init__(self) -> None:
        require(self.action in ACTS, f"action is {self.action!r}, expected one of {', '.join(ACTS)}")
        act = ACTS[self.action]
        choices: dict[str, Sequence[str]] = {
            "object": OBJECTS,
            "colour": tuple(COLORS),
            "size": SIZES,
            "direction": act.directions,
            "speed": SPEEDS,
            "background": tuple(PLACES),
            "shading": SHADINGS,
            "facing": ("left", "right"),
            "other_object": OBJECTS if act.relations else ("",),
            "other_colour": tuple(COLORS) if act.relations else ("",),
            "relation": act.relations or ("",),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
        require(self.index >= 0, f"index is {self.index}, expected 0 or more")
        require(0 <= self.delay <= 0.2, f"delay is {self.delay}, expected 0 to 0.2 seconds")
        require(-1 <= self.shift <= 1, f"shift is {self.shift}, expected -1 to 1")


class SceneChoices:
    """Choices determined by a text alone."""

    def __init__(self, key: str) -> None:
        self._bits = int.from_bytes(hashlib.blake2b(key.encode()).digest(), "little")

    def number(self, end: int) -> int:
        """One of 0 to `end` - 1; 512 bits are enough for dozens of choices without noticeable bias."""
        self._bits, number = divmod(self._bits, end)
        return number

    def choose(self, options: Sequence[T]) -> T:
        """One of the options, each as likely as the others."""
        return options[self.number(len(options))]


def scene(index: int, domain: str = "full") -> Scene:
    """The scene of a clip, from all splits: equal numbers give equal scenes, everywhere.

    Raises:
        ValueError: the number is negative, or there is no such domain.
    """
    require(index >= 0, f"index is {index}, expected 0 or more")
    require(domain in DOMAINS, f"domain is {domain!r}, expected one of {', '.join(DOMAINS)}")
    choices = DOMAINS[domain]
    draws = SceneChoices(f"{choices.key} {index}")
    action = draws.choose(choices.actions)
    act, place = ACTS[action], draws.choose(choices.backgrounds)
    colors = [each for each in choices.colors if each not in PLACES[place].clashes]
    kind = draws.choose([each for each in choices.objects if each not in act.unfit])
    color = draws.choose(colors)
    two = bool(act.relations)
    return Scene(  # in the order of the draws
        index,
        object=kind,
        colour=color,
        size=draws.choose(choices.sizes),
        action=action,
        direction=draws.choose(act.directions),
        speed=draws.choose(SPEEDS),
        background=place,
        shading=draws.choose(choices.shadings),
        delay=draws.number(choices.delays) / 80,
        shift=(draws.number(2 * choices.shifts + 1) - choices.shifts) / 128,
        facing=draws.choose(("left", "right")),
        other_object=draws.choose([each for each in choices.objects if each != kind]) if two else "",
        other_colour=draws.choose([each for each in colors if each != color]) if two else "",
        relation=draws.choose(act.relations) if two else "",
        domain=domain,
    )


def attributes(scene: Scene) -> dict[str, str]:
    """Facts about a clip; `other_object`, `other_colour` and `relation` only for actions of two."""
    names = ["object", "colour", "size", "action", "direction", "speed", "background"]
    names += ["other_object", "other_colour", "relation"] if scene.other_object else []
    return {name: getattr(scene, name) for name in names}


def held_out_color(object: str, color: str) -> bool:
    """True if no object of this kind has this color in `train`: a tenth of the pairs, spread over all objects and
    colors."""
    return (7 * OBJECTS.index(object) + list(COLORS).index(color)) % 10 == 3


def held_out_action(object: str, action: str) -> bool:
    """True if this object never does this in `train`: a tenth of the pairs, spread over all objects and actions."""
    return (3 * OBJECTS.index(object) + list(ACTS).index(action)) % 10 == 6


def is_held_out(scene: Scene) -> bool:
    """True if a scene has a held-out pair: object and color of either figure, or object and action of the actor."""
    return (
        held_out_color(scene.object, scene.colour)
        or held_out_action(scene.object, scene.action)
        or (scene.other_object != "" and held_out_color(scene.other_object, scene.other_colour))
    )


def split(clip: int | Scene) -> Split:
    """The split of a clip: `held_out` if it has a held-out pair; a twentieth of the rest is `validation`.

    The validation clips of the full World are those with every twentieth number. In a smaller domain, many numbers show
    the same picture, so the content decides: no clip of `validation` looks like one of `train`.

    Raises:
        ValueError: the number is negative.
    """
    which = clip if isinstance(clip, Scene) else scene(clip)
    if is_held_out(which):
        return "held_out"
    if which.domain == "full":
        number = which.index
    else:
        content = replace(which, index=0, facing="left")
        number = SceneChoices(f"{DOMAINS[which.domain].key} split {content}").number(VALIDATION_EVERY)
    return "validation" if number % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train"


def scenes(name: Split | Literal["all"], start: int = 0, domain: str = "full") -> Iterator[Scene]:
    """The scenes of a split in the order of their numbers, without end.

    Raises:
        ValueError: no such split or domain, or `start` is negative.
    """
    allowed = ("train", "validation", "held_out", "all")
    require(name in allowed, f"split is {name!r}, expected one of {', '.join(allowed)}")
    every = (scene(index, domain) for index in itertools.count(start))
    return every if name == "all" else (each for each in every if split(each) == name)
