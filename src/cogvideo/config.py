"""Frozen configurations of all parts of the model, validated on construction.

Presets are tables of differences from the defaults. `tiny` is for trying the whole chain in minutes.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from numbers import Real
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")
F = TypeVar("F", bound="FrameShape")

Sides = int | tuple[int, int]
"""Side of a square; else width and height of a frame in pixels, or rows and columns in codes."""

MAX_LAYERS = 1000
MAX_MAGNITUDE = 100
"""Upper limit of temperatures, guidance, bonuses and durations; useful values are far smaller."""
MAX_KEPT = 1_000_000
"""Upper limit on numbers of codes and clusters."""

CLIP_SECONDS = 4.0
"""Length of a clip, unless the model was trained on shorter ones."""

DURATION_FORMAT = r"(\.\d)?[fg]?"
"""Formats of a duration that text templates may use: 4.0, 4 (g), 4.00 (.2f)."""


class InputError(ValueError):
    """A user mistake. The command line prints it on one line; every other error keeps its traceback."""


def require(condition: bool, message: str) -> None:
    """Raise `InputError` unless the condition holds; `message` gives the value and what was expected."""
    if not condition:
        raise InputError(message)


class Limit(NamedTuple):
    """Limit of a number, given in the type of a field of a `Limited` class."""

    is_met: Callable[[Any], bool]
    expected: str
    """Numbers that meet it, in words."""


def within(low: float, high: float) -> Limit:
    """Limit of a number in [low, high]."""
    return Limit(lambda value: low <= value <= high, f"{low} to {high}")


Positive = Annotated[T, Limit(lambda value: 0 < value < math.inf, "a positive number")]
NotNegative = Annotated[T, Limit(lambda value: 0 <= value < math.inf, "0 or more")]
Share = Annotated[float, Limit(lambda value: 0 <= value <= 1, "a share in [0, 1]")]
Seed = Annotated[int, Limit(lambda value: 0 <= value < 2**63, "a number in [0, 2**63)")]


class Limited:
    """Mixin for dataclasses that refuses values outside the limits in the types of their fields."""

    def __post_init__(self) -> None:
        kind: Any = type(self)  # mypy does not know that classes can be hashed
        for name, limit, is_optional in _limits(kind):
            value = getattr(self, name)
            is_met = is_optional if value is None else isinstance(value, Real) and limit.is_met(value)
            require(is_met, f"{name} is {value!r:.60}, expected {limit.expected}")


@cache
def _limits(kind: type) -> list[tuple[str, Limit, bool]]:
    """Limits of a class, each with the name of its field, and whether the field may be None."""
    limits = []
    hints = typing.get_type_hints(kind, localns={}, include_extras=True)  # otherwise limits do not see their module
    for name, hint in hints.items():
        parts = (hint, *typing.get_args(hint))
        for part in parts:
            found = [each for each in getattr(part, "__metadata__", ()) if isinstance(each, Limit)]
            limits += [(name, each, type(None) in parts) for each in found]
    return limits


def both(sides: Sides) -> tuple[int, int]:
    """Both sides, equal for a square."""
    if isinstance(sides, int):
        return sides, sides
    one, other = sides
    return one, other


def joined(one: int, other: int) -> Sides:
    """The short form of two sides: one number for a square."""
    return one if one == other else (one, other)


def times(sides: Sides, factor: int) -> Sides:
    """Sides multiplied by a factor."""
    one, other = both(sides)
    return joined(factor * one, factor * other)


def size_of(text: str) -> Sides:
    """Size in pixels as users write it: 128x72, or 96 for a square."""
    sides = text.split("x")
    is_size = len(sides) <= 2 and all(each.isdecimal() for each in sides)
    require(is_size, f"size is {text!r:.80}, expected pixels such as 96, or 128x72")
    return joined(int(sides[0]), int(sides[-1]))


def size_text(size: Sides) -> str:
    """Width and height, such as 128x72."""
    return "{}x{}".format(*both(size))


def check_size(size: Sides, rate: int) -> None:
    """Refuse sizes that are not multiples of `rate`, the side of a code in pixels."""
    fits = all(side % rate == 0 for side in both(size))
    require(fits, f"size is {size_text(size)}, expected multiples of {rate}: the pixels of a side of one code")


def shape_in(grid: int, sides: Sides) -> tuple[int, int] | None:
    """Value of the field `shape`: rows and columns of a frame; None if it fills the square table of positions."""
    return None if both(sides) == (grid, grid) else both(sides)


class FrameShape:
    """Mixin for dataclasses with these fields: frames of codes in a square table of positions."""

    grid: int
    shape: tuple[int, int] | None

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of a frame in codes."""
        return self.shape or (self.grid, self.grid)

    @property
    def frame_slots(self) -> int:
        """Number of codes of a frame."""
        rows, columns = self.sides
        return rows * columns

    def shaped(self: F, sides: Sides | None) -> F:
        """Copy for frames of these rows and columns; None is the whole grid."""
        return replace(self, shape=shape_in(self.grid, sides or self.grid))  # type: ignore[type-var]


@dataclass(frozen=True)
class TransformerConfig(Limited):
    """Sizes of the sandwich-LayerNorm transformer shared by all stages (paper section 3, released shapes)."""

    num_layers: Positive[int] = 8
    """Number of blocks."""
    hidden: Positive[int] = 256
    """Width of the residual stream."""
    num_heads: Positive[int] = 4
    """Attention heads per channel; the head width is `hidden / num_heads`."""
    vocab_size: Positive[int] = 4096
    """Rows of the word embedding: image codes first, then text pieces and special tokens."""
    num_codes: Positive[int] = 1024
    """Image codes: tokens `[0, num_codes)`."""
    start_of_image: int = 4093
    """Token fed at slot 0 of every frame."""
    pad: int = 1024
    """Token that fills unused text slots."""
    num_positions: Positive[int] = 256
    """Rows of the base position table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_layers <= MAX_LAYERS, f"num_layers is {self.num_layers}, expected at most {MAX_LAYERS}")
        got, heads, words = f"hidden {self.hidden}", self.num_heads, self.vocab_size
        require(self.hidden % heads == 0, f"{got} is not divisible by num_heads {heads}")
        require(self.num_codes <= words, f"num_codes {self.num_codes} is larger than vocab_size {words}")
        for name in ("start_of_image", "pad"):
            token = getattr(self, name)
            require(0 <= token < words, f"{name} token is {token}, expected an id in [0, {words})")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Inner width of the feed-forward layer."""
        return 4 * self.hidden


@dataclass(frozen=True)
class LayoutConfig(Limited, FrameShape):
    """Sizes and positions of text and frames in a sequence; the source of `layout.SequenceLayout`."""

    grid: Positive[int] = 8
    """Side, in codes, of a square frame and of the table of positions; frames of other shapes use its center."""
    num_frames: Positive[int] = 5
    """Frames in a sequence of the video stages."""
    text_slots: Positive[int] = 48
    """Text slots of the video stages, including the frame rate prefix."""
    image_text_slots: Positive[int] = 48
    """Text slots of the image model."""
    frame_position: int = 48
    """Position of the first row of the table, above all text positions."""
    shape: tuple[int, int] | None = None
    """Rows and columns of a frame in codes; None is the whole grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        longest, got = max(self.text_slots, self.image_text_slots), f"frame_position is {self.frame_position}"
        require(self.frame_position >= longest, f"{got}, expected at least the {longest} text slots")
        got = "frames have {} x {} codes".format(*self.sides)
        fits = all(0 < side <= self.grid for side in self.sides)
        require(fits, f"{got}, expected at most {self.grid} x {self.grid}: the positions of this model")


@dataclass(frozen=True)
class StageConfig:
    """Temporal channel that a video stage adds to the image model."""

    window: int = 0
    """Side of the temporal windows, in codes; 0 is full attention. Odd blocks shift the windows by half."""
    durations: tuple[float, ...] = ()
    """Seconds that sequences spanned in training; empty if unknown."""

    def __post_init__(self) -> None:
        require(self.window >= 0, f"window is {self.window}, expected 0 (full attention) or a positive number")
        require(self.window % 2 == 0, f"window is {self.window}, expected an even number to shift by half")
        positive = all(0 < each < MAX_MAGNITUDE for each in self.durations)
        require(positive, f"durations are {self.durations}, expected positive numbers of seconds")


Odd = Annotated[int, Limit(lambda value: value > 0 and value % 2 == 1, "a positive odd number")]


@dataclass(frozen=True)
class UpscalerConfig(Limited):
    """Super-resolution of code grids (CogView2 'direct', spec section 4)."""

    ratio: int = 3
    """Side of the high grid divided by the side of the low grid."""
    text_slots: int = 48
    """Text slots before the low codes."""
    low_position: int = 49
    """Position of the first low code."""
    high_rows: Odd = 9
    """Rows of high slots that a high slot sees, centered on itself."""
    high_columns: Odd = 5
    """Columns of high slots that a high slot sees, centered on itself."""
    low_side: Odd = 5
    """Rows and columns of low codes that a high slot sees, centered on its own low code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.ratio >= 1, f"ratio is {self.ratio}, expected at least 1")
        text, got = self.text_slots, f"low_position is {self.low_position}"
        require(self.low_position >= text, f"{got}, expected at least the {text} text slots")


@dataclass(frozen=True)
class AutoencoderConfig(Limited):
    """The VQ image autoencoder (ICE, spec section 5): one encoder, one codebook, one decoder per rate."""

    channels: Positive[int] = 32
    """Base width, scaled by the multipliers."""
    encoder_multipliers: tuple[int, ...] = (1, 2, 4)
    """Widths of the encoder's levels; each level but the last halves the side."""
    encoder_blocks: Positive[int] = 2
    """Residual blocks per level of the encoder."""
    decoder_multipliers: tuple[tuple[int, ...], ...] = ((1, 1, 2, 4),)
    """Widths of each decoder's levels, coarsest rate first; n levels enlarge by `2 ** (n - 1)`."""
    decoder_blocks: Positive[int] = 1
    """Residual blocks per level of a decoder."""
    embedding_dim: Positive[int] = 64
    """Width of a codebook row."""
    num_codes: Positive[int] = 1024
    """Rows of the codebook."""
    num_downsamplers: NotNegative[int] = 1
    """Residual downsamplers after the encoder, each halving the side."""
    rate: int = 8
    """Rate used by the video model: side of a code in pixels."""
    groups: Positive[int] = 8
    """Groups of GroupNorm. One group per channel learns far worse."""
    nominal_resolution: int = 256
    """Input side that `attention_resolution` refers to."""
    attention_resolution: int = 16
    """Nominal side of the decoder levels that have attention after their residual blocks."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of red, green and blue, for pixels in [0, 1]."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Standard deviation of red, green and blue."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for multipliers in (self.encoder_multipliers, *self.decoder_multipliers):
            is_positive = len(multipliers) > 0 and all(factor > 0 for factor in multipliers)
            require(is_positive, f"multipliers are {multipliers}, expected one positive number per level")
        got, are_sorted = f"decoders have the rates {self.rates}", sorted({*self.rates}) == [*self.rates[::-1]]
        require(are_sorted, f"{got}, expected different ones, coarsest first")
        finest, coarsest = self.encoder_rate, self.encoder_rate * 2**self.num_downsamplers
        expected = f"expected rates in [{finest}, {coarsest}]: those of an encoder of rate {finest}"
        are_reached = all(finest <= rate <= coarsest for rate in self.rates)
        require(are_reached, f"{got}, {expected} with {self.num_downsamplers} downsamplers")
        require(self.rate in self.rates, f"rate is {self.rate}, expected one of {self.rates}")
        is_divisible = self.channels % self.groups == 0
        require(is_divisible, f"channels {self.channels} is not divisible by groups {self.groups}")
        require(all(value > 0 for value in self.std), f"std is {self.std}, expected positive numbers")

    @property
    def encoder_rate(self) -> int:
        """Side in pixels of one cell of the encoder's output."""
        return 2 ** (len(self.encoder_multipliers) - 1)

    @property
    def rates(self) -> tuple[int, ...]:
        """Rates of the decoders, coarsest first."""
        return tuple(2 ** (len(multipliers) - 1) for multipliers in self.decoder_multipliers)


@dataclass(frozen=True)
class TextConfig:
    """Templates that captions are put into before they are tokenized."""

    duration_template: str = "{duration:g}s<n>{caption}"
    """Text of the video stages; `duration` is the time in seconds that the frames of a sequence span. Templates
    without it serve for comparison."""
    image_template: str = "<n>{caption}"
    """Text of the image model."""
    unconditional_caption: str = ""
    """Caption of the unconditional rows of guidance."""

    def __post_init__(self) -> None:
        for name, fields in (("duration_template", ["caption", "duration"]), ("image_template", ["caption"])):
            template = getattr(self, name)
            got = f"{name} is {template!r:.80}"
            try:
                parts = list(string.Formatter().parse(template))
            except ValueError as error:
                raise InputError(f"{got}, which does not work: {error}") from error
            found = sorted(part for _, part, _, _ in parts if part is not None)
            message = f"{got}, expected a text with the fields {fields}, each once, got {found}"
            require(found in (fields, ["caption"]), message)
            for _, part, form, conversion in parts:
                # Templates come with bundles, and "{caption:>99999999}" would take 100 MB per prompt.
                fits = re.fullmatch(DURATION_FORMAT if part == "duration" else "", form or "")
                expected = "expected {caption}, and a duration such as {duration} or {duration:g}"
                require(fits is not None and not conversion, f"{got}, {expected}")


def _above_zero(high: float) -> Limit:
    return Limit(lambda value: 0 < value <= high, f"above 0, at most {high}")


@dataclass(frozen=True)
class SamplingConfig(Limited):
    """Sampling of codes. Filters apply in this order: temperature, top-k, top-p, clusters."""

    temperature: Annotated[float, within(0, MAX_MAGNITUDE)] = 1.0
    """Divides the logits; 0 is greedy: the most likely code, whatever the noise."""
    top_k: Annotated[int, within(0, MAX_KEPT)] = 0
    """Keep the k most likely codes; 0 keeps all."""
    top_p: Annotated[float, _above_zero(1)] = 1.0
    """Keep the smallest set of most likely codes whose probabilities add up to p; 1 keeps all."""
    clusters: Annotated[int, within(0, MAX_KEPT)] = 0
    """Keep the k most likely clusters of codes (CogView2, CogVideo); 0 keeps all codes."""
    cluster_temperature: Annotated[float, _above_zero(MAX_MAGNITUDE)] = 0.89
    """Divides the logits again within the chosen cluster."""
    guidance: Annotated[float, within(0, MAX_MAGNITUDE)] = 1.0
    """Guidance scale; 1 disables guidance and halves the compute."""

    def __or__(self, given: Mapping[str, Any]) -> SamplingConfig:
        """Copy with the given values replaced."""
        return replace(self, **given)

    @property
    def is_greedy(self) -> bool:
        """True if no noise is added."""
        return self.temperature == 0


@dataclass(frozen=True)
class CogVideoConfig(Limited):
    """A whole system: image model, two video stages, super-resolution and both tokenizers."""

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    sequential: StageConfig = field(default_factory=StageConfig)
    interpolation: StageConfig = field(default_factory=lambda: StageConfig(window=4))
    upscaler: UpscalerConfig = field(default_factory=UpscalerConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    first_sampling: SamplingConfig = SamplingConfig(clusters=16)  # frozen
    """Sampler and guidance of the first frame."""
    later_sampling: SamplingConfig = SamplingConfig(1.05, clusters=12, guidance=3.0)
    """Sampler of all later frames, and guidance of the key frames among them."""
    superres_sampling: SamplingConfig = SamplingConfig(clusters=6, cluster_temperature=0.6)
    """Sampler of super-resolution, which is not guided."""
    text_bonus: Annotated[float, within(-MAX_MAGNITUDE, MAX_MAGNITUDE)] = 1.4
    """Added to the attention scores of text keys when guidance is off."""

    @property
    def frame_size(self) -> Sides:
        """Width and height of a frame in pixels, before super-resolution."""
        rows, columns = self.layout.sides
        return times((columns, rows), self.autoencoder.rate)

    @property
    def seconds(self) -> float:
        """Length of a clip: the longest that key frames were trained on, 4 if unknown."""
        return max(self.sequential.durations, default=CLIP_SECONDS)

    @property
    def sizes(self) -> CogVideoConfig:
        """Configuration without the fields that training adds; components of equal sizes fit into one bundle."""
        return self.trained_on("sequential", ()).trained_on("interpolation", ()).shaped(None)

    def shaped(self, sides: Sides | None) -> CogVideoConfig:
        """Configuration for frames with these rows and columns of codes; None is the whole grid."""
        return replace(self, layout=self.layout.shaped(sides))

    def trained_on(self, stage: str, durations: Iterable[float]) -> CogVideoConfig:
        """The configuration with the durations that a video stage was trained on."""
        changes: dict[str, Any] = {stage: replace(getattr(self, stage), durations=tuple(durations))}
        return replace(self, **changes)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.layout.num_frames >= 3, f"num_frames is {self.layout.num_frames}, expected 3 or more")
        grid, codes, positions = self.layout.grid, self.transformer.num_codes, self.transformer.num_positions
        for name in ("sequential", "interpolation"):
            window = getattr(self, name).window
            fits = window == 0 or grid % window == 0
            require(fits, f"grid {grid} is not divisible by the {name} window {window}")
        own = self.autoencoder.num_codes
        require(own == codes, f"the autoencoder has {own} codes, the transformer {codes}")
        needed = max(self.layout.frame_position, self.upscaler.low_position) + grid**2
        expected = f"expected at least {needed}: text and one frame"
        require(positions >= needed, f"num_positions is {positions}, {expected}")
        guidance = self.superres_sampling.guidance
        require(guidance == 1, f"guidance of super-resolution is {guidance}, expected 1: it is not guided")


_RELEASED_MEAN = (0.79093, 0.76271, 0.75340)
_RELEASED_STD = (0.30379, 0.32279, 0.32800)

_CALM: dict[str, Any] = {
    "first_sampling": {"temperature": 0.4, "clusters": 0, "guidance": 1.5},
    "later_sampling": {"temperature": 0.4, "clusters": 0, "guidance": 1.5},
    "superres_sampling": {"temperature": 0.0, "clusters": 0},
    "text_bonus": 0.0,
}
"""Samplers of small models. With the released samplers, clips of `pocket` move five times as much as real
ones, first frames match the prompt less often, and enlarged frames have speckles. With more guidance, figures move
wrongly: see recipes/pocket/README.md."""

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _CALM
    | {
        "transformer": {"num_layers": 4, "hidden": 128, "vocab_size": 1024, "num_codes": 256}
        | {"pad": 256, "start_of_image": 1021, "num_positions": 80},
        "layout": {"grid": 4},
        "interpolation": {"window": 2},
        "autoencoder": {"channels": 16, "embedding_dim": 32, "num_codes": 256},
    },
    "pocket": _CALM
    | {
        "transformer": {"vocab_size": 5120, "num_codes": 2048, "pad": 2048, "start_of_image": 5117},
        "layout": {"grid": 12},
        "interpolation": {"window": 6},
        "upscaler": {"ratio": 2},
        "autoencoder": {"channels": 16, "encoder_multipliers": (1, 2, 8), "encoder_blocks": 1}
        | {"num_codes": 2048, "decoder_multipliers": ((1, 2, 4, 8),)},
    },
    "small": _CALM
    | {
        "transformer": {"num_layers": 12, "hidden": 768, "num_heads": 12, "vocab_size": 16384}
        | {"num_codes": 4096, "pad": 4096, "start_of_image": 16381, "num_positions": 512},
        "layout": {"grid": 16, "text_slots": 64, "image_text_slots": 64, "frame_position": 64},
        "interpolation": {"window": 8},
        "upscaler": {"text_slots": 64, "low_position": 65},
        "autoencoder": {"channels": 64, "embedding_dim": 128, "num_codes": 4096},
    },
    "cogvideo": {
        "transformer": {"num_layers": 48, "hidden": 3072, "num_heads": 48, "vocab_size": 150_010}
        | {"num_codes": 20_000, "pad": 20_003, "start_of_image": 150_000, "num_positions": 1024},
        "layout": {"grid": 20, "text_slots": 64, "image_text_slots": 111, "frame_position": 512},
        "interpolation": {"window": 10},
        "upscaler": {"text_slots": 96, "low_position": 513},
        "autoencoder": {"channels": 128, "embedding_dim": 256, "num_codes": 20_000, "groups": 32}
        | {"num_downsamplers": 2, "decoder_multipliers": ((1, 1, 1, 2, 4), (1, 1, 2, 4), (1, 2, 4))}
        | {"mean": _RELEASED_MEAN, "std": _RELEASED_STD},
        "text": {
            "duration_template": "{duration}秒<n>{caption}",
            "image_template": "{caption} 高清摄影",
            "unconditional_caption": "视频",
        },
    },
}


def preset(name: str) -> CogVideoConfig:
    """Configuration of a preset."""
    require(name in PRESETS, f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
    base = CogVideoConfig()
    parts = {}
    for part, change in PRESETS[name].items():
        parts[part] = replace(getattr(base, part), **change) if isinstance(change, dict) else change
    return replace(base, **parts)


def upgraded(values: Any) -> Any:
    """Upgrade the table of a configuration that an earlier version wrote."""
    if not isinstance(values, dict):
        return values
    stages = {name: values[name] for name in ("sequential", "interpolation") if isinstance(values.get(name), dict)}
    new = values | {name: {"durations": []} | table for name, table in stages.items()}
    if isinstance(values.get("layout"), dict):
        new["layout"] = {"shape": None} | values["layout"]
    return _with_samplers(new) if isinstance(values.get("drawing"), dict) else new


def _with_samplers(values: dict[str, Any]) -> dict[str, Any]:
    """Upgrade configurations whose samplers are one flat table, `drawing`."""
    new = {name: value for name, value in values.items() if name != "drawing"}
    own = CogVideoConfig()
    old = {"superres_temperature": 1.0, "superres_clusters": 6, "superres_guidance": 1.0} | values["drawing"]
    for stage, prefix in (("first", "first_"), ("later", ""), ("superres", "superres_")):
        changes = {name: old.pop(f"{prefix}{name}", None) for name in ("temperature", "clusters", "guidance")}
        new[f"{stage}_sampling"] = dataclasses.asdict(getattr(own, f"{stage}_sampling")) | changes
    new["text_bonus"] = old.pop("text_bonus", None)
    require(not old, f"drawing has the unknown fields {sorted(old)}")
    return new


def from_dict(kind: type[T], values: Any) -> T:
    """Build an object of `kind` from the JSON form of `dataclasses.asdict`; refuse missing and unknown fields."""
    values = upgraded(values) if kind is CogVideoConfig else values
    _check_fields(kind.__name__, kind, values)
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).replace("`", "").partition(" - at $")
        raise InputError(f"{kind.__name__}{path}: {what[0].lower()}{what[1:]}") from error


def _check_fields(name: str, kind: Any, values: Any) -> None:
    """Refuse tables with an unknown field, or a missing one, which would otherwise get its default."""
    inner = typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(values, dict):
        fields = {each.name for each in dataclasses.fields(kind)}
        missing, unknown = sorted(fields - values.keys()), sorted(values.keys() - fields)
        require(not missing and not unknown, f"{name} has the wrong fields: missing {missing}, unknown {unknown}")
        hints = typing.get_type_hints(kind)
        for key, value in values.items():
            _check_fields(f"{name}.{key}", hints[key], value)
    elif isinstance(values, dict | list) and inner:
        is_table, kind = isinstance(values, dict), inner[-1] if isinstance(values, dict) else inner[0]
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            _check_fields(f"{name}.{key}" if is_table else f"{name}[{key}]", kind, value)


def check_version(values: Any, newest: int) -> dict[str, Any]:
    """Check the format version of a table and return its other fields."""
    require(isinstance(values, dict), f"it holds {values!r:.40}, expected a table")
    version = values.get("format_version")
    expected = f"expected 1 to {newest}"
    require(type(version) is int, f"format_version is {version!r:.60}, {expected}")
    require(version > 0, f"format_version is {version}, {expected}: an older cogvideo wrote it; make it again")
    newer = f"format_version is {version}, {expected}: a newer cogvideo wrote it; upgrade"
    require(version <= newest, newer)
    return {name: value for name, value in values.items() if name != "format_version"}
