"""Checkpoints of a run: folders of PyTorch's distributed format, whole or not there, for any number of ranks.

A checkpoint is written aside and renamed when every rank has written its part; one that goes is renamed before it is
removed. So whatever kills a run, a folder with the name of a checkpoint is whole.
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from cogvideo.config import require
from cogvideo.files import write_text
from cogvideo.training.parallel import any_rank, wait_for_all

STATE = "state.json"
WEIGHTS, OPTIMIZER, AVERAGE = "weights", "optimizer", "average"
"""Tables of a checkpoint."""
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class DamagedError(ValueError):
    """A checkpoint that cannot be read; an earlier one may be whole."""


def training_state(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], average: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """What a checkpoint holds: trained weights, the optimizers' state, the running average. Frozen weights do not.

    Args:
        module: that is trained.
        optimizers: which share what is trained of it.
        average: running average of that, if there is one.
    """
    weights, states = get_state_dict(module, optimizers, options=TRAINED)
    return {WEIGHTS: weights, OPTIMIZER: states} | ({} if average is None else {AVERAGE: dict(average)})


def restore(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: Mapping[str, Any]) -> None:
    """Put a loaded state back; the average was filled in place."""
    set_state_dict(
        module, optimizers, model_state_dict=state[WEIGHTS], optim_state_dict=state[OPTIMIZER], options=TRAINED
    )


class Checkpoints:
    """The checkpoints in a folder. Every rank calls every function.

    Args:
        folder: of the run's checkpoints; it is made when something is saved.
        keep: how many of the last stay, beside the best. 0 to look at them alone, while a run may be writing there.
        asynchronous: whether `save` returns when the state is copied, and writes while training goes on.
    """

    def __init__(self, folder: Path, keep: int = 2, asynchronous: bool = False) -> None:
        self.folder = folder
        self.keep = keep
        self.asynchronous = asynchronous
        # the writing thread talks to its like beside training, which must not meet it in one queue of messages
        self._group = dist.new_group(backend="gloo") if asynchronous and dist.is_initialized() else None
        self._writing: Future[Any] | None = None
        self._publish: Callable[[], None] = lambda: None
        self._damaged: set[int] = set()
        if keep and _is_first():
            for leftover in folder.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def path(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.folder / f"step-{step:08}"

    def steps(self) -> list[int]:
        """Those that are whole, in order."""
        found = [re.fullmatch(r"step-(\d{8,})", each.name) for each in self.folder.glob("step-*")]
        return sorted(int(each[1]) for each in found if each)

    def best(self) -> int | None:
        """The one with the lowest held-out loss, of equals the first; None where nothing was measured.

        Those whose loss cannot be read are passed over, which is said once.
        """
        losses = {step: self._held_out(step) for step in self.steps()}
        known = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return min(known, key=lambda step: known[step]) if known else None

    def _held_out(self, step: int) -> float | None:
        path = self.path(step)
        try:
            return cast(float | None, json.loads((path / STATE).read_text(encoding="utf-8"))["held_out"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if step not in self._damaged:
                print(f"{path} is damaged ({STATE}: {_reason(error)}): it is left alone.", file=sys.stderr)
            self._damaged.add(step)
            return None

    def save(self, step: int, state: dict[str, Any], held_out: float | None = None) -> None:
        """Write a checkpoint; one of the same step is replaced.

        Args:
            step: how many were made.
            state: nested tables of tensors and numbers; tensors may be spread over ranks.
            held_out: loss on held-out clips.

        Raises:
            OSError: it cannot be written.
        """
        self.wait()
        aside = self.folder / f".step-{step:08}"
        if _is_first():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            write_text(aside / STATE, json.dumps({"step": step, "held_out": held_out}) + "\n")
        wait_for_all()
        self._publish = lambda: self._rename(aside, step)
        writer, alone = FileSystemWriter(aside), not dist.is_initialized()
        with _writing(aside):
            if self.asynchronous:
                writing = async_save(state, storage_writer=writer, process_group=self._group, no_dist=alone)
                self._writing = cast("Future[Any]", writing)
            else:
                save(state, storage_writer=writer, no_dist=alone)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until what is being written is whole and has its name; then older ones are removed.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is not None:
            with _writing(self.folder):
                self._writing.result()
            self._writing = None
        self._publish()
        self._publish = lambda: None

    def settle(self) -> None:
        """Give what is whole by now its name, without waiting for what is not."""
        if self._writing is not None and not any_rank(not self._writing.done()):
            self.wait()

    def _rename(self, aside: Path, step: int) -> None:
        wait_for_all()
        if _is_first():
            if step in self.steps():
                self._remove(step)
            aside.rename(self.path(step))
            for old in set(self.steps()[: -self.keep]) - {self.best()} - self._damaged:
                self._remove(old)
        wait_for_all()

    def _remove(self, step: int) -> None:
        leaving = self.folder / f".step-{step:08}-old"
        self.path(step).rename(leaving)
        shutil.rmtree(leaving)

    def set_aside(self, step: int) -> None:
        """Take its name from one that is damaged: it is no longer counted, and stays to be looked at."""
        if _is_first():
            aside = self.folder / f"damaged-{self.path(step).name}"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)
        wait_for_all()

    def load(self, step: int, state: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint, into a state of the same structure, whose tensors are filled in place.

        Raises:
            DamagedError: it cannot be read; on every rank.
            ValueError: it is of another configuration.
        """
        path = self.path(step)
        _check_structure(path, state)
        with _reading(path):  # what never had a gradient has no state of the optimizer there, and needs none
            planner, alone = DefaultLoadPlanner(allow_partial_load=True), not dist.is_initialized()
            load(state, storage_reader=FileSystemReader(path), planner=planner, no_dist=alone)
        return state


def read_weights(path: Path, averaged: bool) -> dict[str, Tensor]:
    """The trained weights of a checkpoint, whole, in one process.

    Args:
        path: folder of the checkpoint.
        averaged: the running average in their place.

    Raises:
        ValueError: it is damaged, or has none.
    """
    table = AVERAGE if averaged else WEIGHTS
    entries = {name: each for name, each in _metadata(path).items() if isinstance(each, TensorStorageMetadata)}
    state = {
        name.removeprefix(f"{table}."): torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in entries.items()
        if name.startswith(f"{table}.")
    }
    require(len(state) > 0, f"{path} has no {table}")
    with _reading(path):
        load({table: state}, storage_reader=FileSystemReader(path), no_dist=True)
    return state


def _metadata(path: Path) -> Mapping[str, Any]:
    with _reading(path):
        return FileSystemReader(path).read_metadata().state_dict_metadata


def _check_structure(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose trained weights have other names or shapes."""
    stored = _metadata(path)
    for table in (WEIGHTS, AVERAGE):
        there = {
            name.removeprefix(f"{table}."): tuple(each.size)
            for name, each in stored.items()
            if name.startswith(f"{table}.") and isinstance(each, TensorStorageMetadata)
        }
        here = {name: tuple(each.shape) for name, each in state.get(table, {}).items()}
        odd = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
        if odd:
            name = odd[0]
            raise ValueError(
                f"{path} is of another configuration: {table} {name} is {there.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} here"
            )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What is raised by bytes that mean nothing depends on the bytes, and what ranks raise is no Exception."""
    try:
        with _without_warnings():
            yield
    except (Exception, CheckpointException) as error:
        reason = _reason(_cause(error))
        raise DamagedError(f"{path} is damaged ({reason}); remove it to use an earlier one") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        with _without_warnings():
            yield
    except CheckpointException as error:
        cause = _cause(error)
        number, reason = (cause.errno, cause.strerror) if isinstance(cause, OSError) else (None, _line(cause))
        raise OSError(number or errno.EIO, f"the checkpoint cannot be written ({reason})", str(path)) from error


def _without_warnings() -> AbstractContextManager[None]:
    """PyTorch says that there are no ranks, which is what was asked for."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank where something did: what the system said, if PyTorch's error is only what
    followed from that."""
    first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    cause: BaseException | None = first
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return first if cause is None else cause


def _reason(error: BaseException) -> str:
    """Why something cannot be read, in words: what PyTorch and pickle say of bytes that mean nothing helps nobody."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "its content is cut short or was changed"


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
