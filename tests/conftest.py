"""Shared test setup: shape checks at run time, seeds, small models of every stage with their oracles, text models."""

from __future__ import annotations

import gc
import io
import os
import random
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import lru_cache, wraps
from inspect import isgeneratorfunction
from typing import Any, NamedTuple, get_type_hints

# Before PyTorch is loaded, and for all processes that tests start: small models are slower on several threads, and far
# slower if parallel tests have more threads than there are cores.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

from reference import Grid, Oracle, Prompt, Stage

JAXTYPED = jaxtyping.jaxtyped


def typed(function: Any) -> Any:
    """Enforce types at run time; a function that takes a protocol cannot be checked and is returned unchanged."""
    try:
        return beartype(function, conf=BeartypeConf(is_pep484_tower=True))  # accept an int as a float
    except BeartypeDecorHintPep3119Exception:
        return function


def checked(function: Any) -> Any:
    """Enforce types and tensor shapes at run time.

    The jaxtyping decorator binds the arguments of every call and checks them twice, which takes most of the time of a
    small model. It is kept only where a shape depends on the value of an argument, for names that are not defined yet,
    and for generators, which beartype checks as they run.
    """
    if is_dataclass(function) and "__init__" in vars(function):
        function.__init__ = checked(function.__init__)
    if isinstance(function, type):
        return function
    try:
        hints = str([*get_type_hints(function).values()])
    except NameError:
        hints = "{unknown}"
    if "{" in hints or isgeneratorfunction(function):
        return JAXTYPED(function, typechecker=typed)
    strict, has_shapes = typed(function), "jaxtyping" in hints

    @wraps(function)
    def enforced(*arguments: Any, **options: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*arguments, **options)
        if not has_shapes:
            return strict(*arguments, **options)
        with JAXTYPED("context"):
            return strict(*arguments, **options)

    return enforced


jaxtyping.jaxtyped = lambda typechecker: checked
jaxtyping.install_import_hook("cogvideo", None)  # before the first import of the package

from sentencepiece import SentencePieceTrainer  # noqa: E402

from cogvideo.config import LayoutConfig, StageConfig, TransformerConfig  # noqa: E402
from cogvideo.evaluation.networks.cache import VARIABLE  # noqa: E402
from cogvideo.layout import SequenceLayout  # noqa: E402
from cogvideo.models.transformer import Base, TemporalChannel, Transformer  # noqa: E402
from cogvideo.text import PaddedText  # noqa: E402

TEXT_SLOTS, NUM_CODES, VOCAB_SIZE, START, HIDDEN, HEADS = 6, 24, 40, 37, 16, 2
CAPTIONS = (
    "A cat runs over the grass.",
    "a man pours water into a glass",
    "4.0s the sun rises behind a mountain <pad> <n>",
    "一只猫在草地上奔跑。",
    "4.0秒 两个人在海边散步 视频 高清摄影",
)


# A shell that starts the tests in the background makes them, and all processes that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Use the same examples in every run, however slow the machine is.
slow = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=slow)
hypothesis.settings.load_profile("steady")


def _seed(name: str) -> None:
    """Seed the global generators of Python, NumPy and PyTorch from a name."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """Seed each fixture by its name: shared fixtures must not depend on which test runs first."""
    _seed(fixturedef.argname)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from scanning everything imported so far: a million objects."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Seed each test by its ID: it gets the same random numbers alone or with others, in any order."""
    _seed(item.nodeid)


@contextmanager
def unchecked() -> Iterator[None]:
    """Disable shape checks, as they are for users."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """Disable shape checks, for tests of the package's own errors and of whole clips, where checks are too slow."""
    with unchecked():
        yield


class System(NamedTuple):
    """A small model of a stage, its layout, and its oracle."""

    model: Transformer
    layout: SequenceLayout
    oracle: Oracle

    def codes(self, batch: int, num_frames: int, seed: int = 0) -> torch.Tensor:
        """Return random codes of the leading ranks, (batch, frames, slots)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(NUM_CODES, (batch, num_frames, self.layout.frame_slots), generator=generator)

    def prompt(self, text: PaddedText, sample: int) -> Prompt:
        """Return one row of text for the oracle."""
        return Prompt(text.tokens[sample].tolist(), tuple(text.mask[sample].tolist()))

    def at_places(self, codes: torch.Tensor) -> dict[int, list[int]]:
        """Return the codes (frames, slots) of one sample's leading ranks, by the place of their frame."""
        return {self.layout.order[rank]: row for rank, row in enumerate(codes.tolist())}


MakeSystem = Callable[..., System]
MakeText = Callable[..., PaddedText]


@lru_cache(maxsize=64)
def _make_system(
    stage: Stage,
    grid: Grid = 4,
    window: int = 0,
    num_frames: int = 5,
    num_given: int | None = None,
    num_layers: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> System:
    table = grid if isinstance(grid, int) else max(grid) + 1
    config = TransformerConfig(num_layers, HIDDEN, HEADS, VOCAB_SIZE, NUM_CODES, START, NUM_CODES, 8 + table**2)
    sizes = LayoutConfig(table, num_frames, TEXT_SLOTS, TEXT_SLOTS, 8).shaped(grid)
    layout = {
        "image": lambda: SequenceLayout.text_to_image(sizes),
        "sequential": lambda: SequenceLayout.sequential(sizes),
        "interpolation": lambda: SequenceLayout.interpolation(sizes, num_given),
    }[stage]()
    base, channel = Base(config), TemporalChannel(config, sizes, StageConfig(window))
    for part, offset in ((base, 0), (channel, 1)):
        _randomize(part.double(), seed + offset)
    model = Transformer(base, None if stage == "image" else channel).to(dtype)
    oracle = Oracle(
        stage,
        base.state_dict(),
        None if stage == "image" else channel.state_dict(),
        num_layers,
        HEADS,
        NUM_CODES,
        START,
        grid,
        layout.num_frames,
        sizes.frame_position,
        window,
        table,
    )
    return System(model, layout, oracle)


@torch.no_grad()
def _randomize(module: torch.nn.Module, seed: int) -> None:
    """Set weights so large that any visibility error changes the logits, and logits are as large as the noise."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        spread = 1.0 if name in ("gate", "words.weight", "positions.weight") or name.endswith("gate") else 0.3
        parameter.normal_(0, spread, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)


@pytest.fixture(scope="session")
def make_system() -> MakeSystem:
    """A small random model: `make_system(stage, grid, window, num_frames, num_given, num_layers, seed, dtype)`.

    Equal arguments return the same object: tests that change a model must copy it.
    """
    return _make_system


@pytest.fixture(scope="session")
def make_text() -> MakeText:
    """Left-padded random text: `make_text(lengths, seed)`."""

    def make(lengths: Sequence[int], seed: int = 0) -> PaddedText:
        generator = torch.Generator().manual_seed(100 + seed)
        tokens = torch.randint(NUM_CODES, START, (len(lengths), TEXT_SLOTS), generator=generator)
        mask = torch.arange(TEXT_SLOTS) >= TEXT_SLOTS - torch.tensor(list(lengths))[:, None]
        return PaddedText(tokens, mask)

    return make


@lru_cache
def _train_text_model(symbols: tuple[str, ...] = ("<pad>", "<n>"), **options: Any) -> bytes:
    model = io.BytesIO()
    settings: dict[str, Any] = {"vocab_size": 360, "hard_vocab_limit": False, "byte_fallback": True}
    settings |= {"user_defined_symbols": list(symbols), "num_threads": 1, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=iter(CAPTIONS * 3), model_writer=model, **settings, **options)
    return model.getvalue()


@pytest.fixture(scope="session", autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide weights that the user has downloaded: `finetune`, for example, does more when it finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def train_text_model() -> Callable[..., bytes]:
    """A SentencePiece model of a few hundred pieces: `train_text_model(symbols, **options of SentencePiece)`.

    `<unk> <s> </s> <pad> <n>` come first, as in the released model.
    """
    return _train_text_model


@pytest.fixture(scope="session")
def text_model() -> bytes:
    """A small SentencePiece model that does not normalize text before splitting it."""
    return _train_text_model(normalization_rule_name="identity", remove_extra_whitespaces=False)
