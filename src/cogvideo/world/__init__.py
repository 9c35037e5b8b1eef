"""The World: captioned clips of small things in action, each determined by its number alone.

An action fills the four seconds of a clip from start to end, in phases, so that two neighboring frames do not show what
happens. Scenes, captions and attributes are the same everywhere. Pixels are computed in single precision with
operations that IEEE 754 defines to the last bit, so that they agree between processes and, as far as the sines of the
motion do (which are rounded again), between machines.
"""

from cogvideo.world.captions import captions
from cogvideo.world.figures import COLORS, SHADINGS
from cogvideo.world.places import PLACES
from cogvideo.world.rendering import MIN_SIZE, SECONDS, render
from cogvideo.world.scenes import (
    ACTS,
    DOMAINS,
    OBJECTS,
    SIZES,
    SPEEDS,
    Scene,
    attributes,
    is_held_out,
    scene,
    scenes,
    split,
)

__all__ = [
    "ACTS",
    "COLORS",
    "DOMAINS",
    "MIN_SIZE",
    "OBJECTS",
    "PLACES",
    "SECONDS",
    "SHADINGS",
    "SIZES",
    "SPEEDS",
    "Scene",
    "attributes",
    "captions",
    "is_held_out",
    "render",
    "scene",
    "scenes",
    "split",
]
