"""Arrays of an untrusted pickle. Nothing that it names is imported or called, not even NumPy's own classes."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.config import InputError, require

ARRAY_CLASS = "numpy.ndarray"
"""Stands for the class in a pickle."""


def read_arrays(content: bytes, where: object) -> dict[str, NDArray[np.float32]]:
    """The float32 arrays of pickled nested dictionaries, by their keys joined with `/`."""
    try:
        return dict(_leaves(_Unpickler(io.BytesIO(content)).load(), ""))
    except _Refused as error:
        raise InputError(f"{where} is refused: {error}") from None
    except Exception as error:  # invalid bytes may raise anything
        raise InputError(f"{where} is refused: it is not a complete pickle of arrays") from error


class _Refused(Exception):
    """The pickle has something other than arrays."""


class _Dtype:
    """Stands for `numpy.dtype("<f4")`."""

    def __setstate__(self, state: Any) -> None:
        if state[1] != "<":
            raise _Refused(f"it has an array of the byte order {state[1]!r}, expected little-endian float32")


class _Array:
    """Stands for an array, whose content comes last in a pickle."""

    values: NDArray[np.float32]

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        require(isinstance(dtype, _Dtype), "the type is none")
        require(all(type(size) is int and size >= 0 for size in shape), "the shape is none")
        require(len(content) == 4 * math.prod(shape), "the content has another size")
        self.values = np.frombuffer(content, "<f4").reshape(shape, order="F" if is_fortran else "C")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Stand-ins for the parts of a NumPy array, whose module has another name since NumPy 2."""
        match f"{module}.{name}":
            case "numpy.core.multiarray._reconstruct" | "numpy._core.multiarray._reconstruct":
                return lambda *_: _Array()
            case "numpy.ndarray":
                return ARRAY_CLASS
            case "numpy.dtype":
                return self._dtype
            case other:
                raise _Refused(f"it names {other}, expected only NumPy arrays")

    def _dtype(self, kind: Any, *_flags: Any) -> _Dtype:
        if kind != "f4":
            raise _Refused(f"it has an array of the type {kind!r:.20}, expected 'f4'")
        return _Dtype()


def _leaves(value: Any, name: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    if isinstance(value, _Array):
        yield name, value.values
        return
    if not isinstance(value, dict):
        raise _Refused(f"it has a {type(value).__name__}, expected dictionaries of arrays")
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}/{key}" if name else str(key))
