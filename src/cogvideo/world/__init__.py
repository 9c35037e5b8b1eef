"""The World: captioned clips of small things in action, each determined by its number alone.

An action fills the four seconds of a clip from start to end, in phases, so that two neighboring frames do not show what
happens. Scenes, captions and attributes are the same everywhere. Pixels are computed in single precision with
operations that IEEE 754 defines to the last bit, so that they agree between processes and, as far as the sines of the
motion do (which are rounded again), between machines.
"""

from cogvideo.world.captions import captions as captions
from cogvideo.world.figures import COLORS as COLORS
from cogvideo.world.figures import SHADINGS as SHADINGS
from cogvideo.world.places import PLACES as PLACES
from cogvideo.world.rendering import MAX_SIZE as MAX_SIZE
from cogvideo.world.rendering import MIN_SIZE as MIN_SIZE
from cogvideo.world.rendering import SECONDS as SECONDS
from cogvideo.world.rendering import render as render
from cogvideo.world.scenes import ACTS as ACTS
from cogvideo.world.scenes import DOMAINS as DOMAINS
from cogvideo.world.scenes import OBJECTS as OBJECTS
from cogvideo.world.scenes import SIZES as SIZES
from cogvideo.world.scenes import SPEEDS as SPEEDS
from cogvideo.world.scenes import Scene as Scene
from cogvideo.world.scenes import attributes as attributes
from cogvideo.world.scenes import is_held_out as is_held_out
from cogvideo.world.scenes import scene as scene
from cogvideo.world.scenes import scenes as scenes
from cogvideo.world.scenes import split as split
