"""Comparison of two sets of clips: FVD and related figures, each with everything that it depends on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from cogvideo.config import require
from cogvideo.data.engines import Machines
from cogvideo.evaluation.distribution import Extrapolation, Metric, Sets, halves, interval, limit, mean
from cogvideo.evaluation.features import Judge, extract, one_thread
from cogvideo.evaluation.footage import DrawnExcerpts, Excerpt, Reading, draw
from cogvideo.evaluation.protocols import Protocol

INCEPTION_SCORE = "Inception Score"
SAME_RATE = 0.01
"""Relative difference below which rates count as equal."""


@dataclass(frozen=True)
class Figure:
    """One figure, and how reliable it is."""

    name: str
    """Name of the measure, such as FVD."""
    of: str
    """Sets of clips that it was computed from."""
    clips: int
    """Number of clips in each set."""
    value: float
    interval: tuple[float, float]
    """95% confidence interval, by bootstrap over clips."""
    real: float | None = None
    """The same figure for real clips against other real ones; None if there are too few, or if it has no meaning."""
    real_clips: int = 0
    """Number of clips in each set of real clips."""
    limit: Extrapolation | None = None
    """The figure at infinitely many clips; None for too few clips to extrapolate, see `limit`."""

    @classmethod
    def measured(cls, name: str, of: str, metric: Metric, sets: Sets, seed: int, real: Sets = ()) -> Figure:
        """A figure of some sets, bit-identical on any number of cores.

        `real` are sets of real clips for the same figure, if it depends on the number of clips and is extrapolated.
        """
        with one_thread():
            value, around = metric(*sets), interval(metric, sets, seed)
            if not real:
                return cls(name, of, len(sets[0]), value, around)
            floor = metric(*real) if len(real[0]) > 1 else None
            return cls(name, of, len(sets[0]), value, around, floor, len(real[0]), limit(metric, sets, seed))


@dataclass(frozen=True)
class ComparedClips:
    """Description of a source's clips."""

    source: str
    """Source as the user named it."""
    clips: int
    """Number of clips that are compared: excerpts, some of which may be parts of the same video."""
    videos: int
    """Number of videos that they are parts of."""
    of: int
    """Number of videos in the source."""
    short: int
    """Number of clips left out for too few frames, among those examined."""
    fps: float
    """Frames per second, before the protocol's step."""
    resolutions: dict[str, int]
    """Number of clips by the file's frame size."""
    codecs: dict[str, int]
    """Number of clips by codec."""

    @classmethod
    def of_excerpts(cls, source: str, drawn: DrawnExcerpts, excerpts: Sequence[Excerpt]) -> ComparedClips:
        """One side, from the excerpts that were drawn and those that are compared."""
        footage = [each.footage for each in excerpts]
        sizes = Counter(f"{each.size[1]} x {each.size[0]}" for each in footage)
        codecs = Counter(each.codec for each in footage)
        videos, short = len({each.id for each in footage}), drawn.num_short
        return cls(source, len(excerpts), videos, drawn.num_clips, short, footage[0].fps, dict(sizes), dict(codecs))

    def __str__(self) -> str:
        sizes, codecs = ", ".join(self.resolutions), ", ".join(self.codecs)
        short = f" ({self.short} too short)" if self.short else ""
        parts = "" if self.clips == self.videos else f"{self.clips:,} parts of "
        return f"{parts}{self.videos:,} clips of {self.of:,}{short}, {self.fps:g} frames per second, {sizes}, {codecs}"


@dataclass(frozen=True)
class Comparison:
    """Inputs and results of a comparison."""

    real: ComparedClips
    generated: ComparedClips
    figures: list[Figure]
    num_shared: int
    """Number of generated clips with the content of a real one."""


@dataclass(frozen=True)
class Networks:
    """The available networks."""

    i3d: Judge
    proven: bool
    """True if `i3d` is the network of FVD."""
    c3d: Judge | None = None
    """Network of the Inception Score."""
    lpips: Judge | None = None

    @property
    def names(self) -> tuple[str, str]:
        """Names of the distances: only one network's are called FVD and KVD."""
        other = f"unproven I3D {self.i3d.identity[1]!s:.8}"
        return ("FVD", "KVD") if self.proven else (f"Frechet distance ({other})", f"kernel distance ({other})")


class ComparisonRun:
    """One comparison."""

    def __init__(self, reading: Reading, networks: Networks, machines: Machines, seed: int) -> None:
        require(seed >= 0, f"seed is {seed}, expected 0 or more")
        self._reading, self._networks, self._machines, self._seed = reading, networks, machines, seed
        self._protocol = reading.protocol

    def compare(self, real: str, generated: str) -> Comparison:
        """Compare the clips of two sources."""
        protocol, reading, seed = self._protocol, self._reading, self._seed
        scored = 0 if self._networks.c3d is None else protocol.score_clips
        reading.find(generated)  # a bad source is refused before the other's clips are read
        drawn = draw(real, reading, protocol.real, max(2 * protocol.clips, scored), seed)
        made = draw(generated, reading, "start", max(protocol.clips, scored), seed)
        check_alike([*drawn.excerpts, *made.excerpts], protocol)
        true = drawn.excerpts[: 2 * protocol.clips]
        others = made.excerpts[: min(protocol.clips, len(true))]
        pairs = [] if self._networks.lpips is None else self._pairs(real, generated)
        figures = self._distances(true, others)
        if self._networks.c3d is not None:
            count = min(scored, len(drawn.excerpts), len(made.excerpts))
            figures += self._scores(drawn.excerpts[:count], made.excerpts[:count], self._networks.c3d)
        if self._networks.lpips is not None:
            figures.append(self._distance_of_pairs(pairs, self._networks.lpips))
        known = {each.footage.content for each in true}
        num_shared = sum(each.footage.content in known for each in others)
        real_side = ComparedClips.of_excerpts(real, drawn, true[: len(others)])
        return Comparison(real_side, ComparedClips.of_excerpts(generated, made, others), figures, num_shared)

    def _features(self, title: str, judge: Judge, excerpts: Iterable[Excerpt]) -> Float[Tensor, "clips features"]:
        return extract(title, judge, [(each,) for each in excerpts], self._reading, self._machines)

    def _distances(self, real: list[Excerpt], generated: list[Excerpt]) -> list[Figure]:
        """FVD and KVD, also with reconstructions by the tokenizer in place of either side."""
        judge, count = self._networks.i3d, len(generated)
        true = self._features("real clips", judge, real)
        sets = {"real": true[:count], "generated": self._features("generated clips", judge, generated)}
        pairs = [("real", "generated")]
        if self._reading.tokenizer is not None:
            codes = [replace(each, through_codes=True) for each in real[:count]]
            sets["reconstructed"] = self._features("reconstructions", judge, codes)
            pairs += [("reconstructed", "generated"), ("real", "reconstructed")]
        apart = halves([each.footage.id for each in real], true, count)
        metrics = dict(zip(self._networks.names, (self._protocol.fvd, self._protocol.kvd), strict=True))
        return [
            Figure.measured(name, " / ".join(pair), metric, [sets[each] for each in pair], self._seed, apart)
            for pair in pairs
            for name, metric in metrics.items()
        ]

    def _scores(self, real: list[Excerpt], generated: list[Excerpt], judge: Judge) -> list[Figure]:
        """Inception Scores of real and generated clips."""
        count, least = len(real), 2 * self._protocol.splits
        require(count >= least, f"got {count} clips, expected {least} or more for Inception Score in this protocol")
        sides = {"real": real, "generated": generated}
        logits = {name: self._features(f"C3D of {name} clips", judge, each) for name, each in sides.items()}

        def score(logits: Tensor) -> float:
            return self._protocol.inception_score(logits).mean

        return [
            Figure.measured(INCEPTION_SCORE, name, score, [each], self._seed, [logits["real"]])
            for name, each in logits.items()
        ]

    def _pairs(self, real: str, generated: str) -> list[tuple[Excerpt, ...]]:
        """Clips of the same name, from the first frame of both."""
        sides = [_by_name(self._reading, source) for source in (real, generated)]
        names = sorted(sides[0].keys() & sides[1].keys())[: self._protocol.clips]
        require(len(names) > 0, f"{real} and {generated} have no clip of the same name, expected pairs for LPIPS")
        pairs = [tuple(side[name] for side in sides) for name in names]
        check_alike([each for pair in pairs for each in pair], self._protocol)
        return pairs

    def _distance_of_pairs(self, pairs: Sequence[tuple[Excerpt, ...]], judge: Judge) -> Figure:
        """LPIPS of pairs of clips."""
        distances = extract("pairs", judge, pairs, self._reading, self._machines)
        return Figure.measured(f"LPIPS ({judge.identity[1]})", "pairs of a name", mean, [distances], self._seed)


def _by_name(reading: Reading, source: str) -> dict[str, Excerpt]:
    """The beginnings of clips that are long enough, by their names without suffix."""
    found: dict[str, Excerpt] = {}
    for each in reading.look(reading.find(source)):
        if each.num_frames >= reading.protocol.span:
            name = str(Path(each.id).with_suffix(""))
            require(name not in found, f"{source} has two clips with the name {name}, expected one for each pair")
            found[name] = Excerpt(each, 0)
    return found


def check_alike(excerpts: Sequence[Excerpt], protocol: Protocol) -> None:
    """Refuse clips of different rates, and of different sizes if the protocol keeps these."""
    footage = [each.footage for each in excerpts]
    slow, fast = (key(footage, key=lambda each: each.fps) for key in (min, max))
    told = f"{slow.id} has {slow.fps:g} frames per second and {fast.id} {fast.fps:g}"
    require(fast.fps <= (1 + SAME_RATE) * slow.fps, f"{told}, expected one rate: pass --fps")
    if protocol.size is None:
        small, large = (key(footage, key=lambda each: each.size) for key in (min, max))
        told = (
            f"{small.id} has {small.size[1]} x {small.size[0]} pixels and {large.id} {large.size[1]} x {large.size[0]}"
        )
        require(small.size == large.size, f"{told}, expected one size: pass --size")
