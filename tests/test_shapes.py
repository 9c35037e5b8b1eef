"""Shape annotations are enforced in all tests: of arguments, of results, and between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from cogvideo.kernels import narrow
from cogvideo.models.attention import _gather
from cogvideo.models.quantizer import Codebook
from conftest import checked

Rows = Float[Tensor, "rows columns"]
TALL, WIDE = torch.zeros(3, 2), torch.zeros(2, 3)


@checked
def added(one: Float[Tensor, "rows columns"], other: Float[Tensor, "rows columns"]) -> Tensor:
    return one


@checked
def turned(one: Rows) -> Float[Tensor, "columns rows"]:
    return one.T if one[0, 0] == 0 else one


@checked
def both(rows: list[Rows]) -> None:
    """Like `added`, through an alias in a list."""


@checked
def zeros(size: int) -> Float[Tensor, "{size} {size}"]:
    return torch.zeros(size, 2)


@checked
def drawn(one: Rows, other: Rows) -> Iterator[Tensor]:
    yield turned(one)


@checked
@dataclass(frozen=True)
class Pair:
    one: Rows
    other: Rows


@pytest.mark.parametrize(
    ("call", "good", "bad"),
    [
        (added, (TALL, TALL), (TALL, WIDE)),
        (added, (TALL, TALL), (TALL, TALL.long())),
        (turned, (TALL,), (TALL + 1,)),
        (both, ([TALL],), ([TALL[0]],)),
        (zeros, (2,), (3,)),
        (zeros, (2,), ("2",)),
        (lambda *each: list(drawn(*each)), (TALL, TALL), (TALL, WIDE)),
        (Pair, (TALL, TALL), (TALL, WIDE)),
    ],
)
def test_shapes_are_enforced(call: Callable[..., Any], good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    """Guards the decorator: a mismatched size, dtype or number of dimensions raises where it occurs."""
    call(*good)
    with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
        call(*bad)


@pytest.mark.usefixtures("without_shape_checks")
def test_shapes_are_not_enforced_where_refusals_are_tested() -> None:
    """Guards tests of the package's own errors, which shape checks would preempt."""
    added(TALL, WIDE)


def test_the_package_is_checked() -> None:
    """Guards the import hook: functions of the package are decorated, including private ones."""
    for function in (Codebook.lookup, narrow, _gather):
        assert function.__code__.co_filename == checked.__code__.co_filename
