"""Checkpoints of a run: folders in PyTorch's distributed format, complete or absent, for any number of ranks.

A checkpoint is written under a temporary name and renamed when every rank has written its part; an old one is
renamed before it is removed. So even if a run is killed, a folder with the name of a checkpoint is complete. Each
rank adds hashes of its files: a checkpoint is damaged if they differ, not if it cannot be read for other reasons.
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
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

from cogvideo.config import InputError, require
from cogvideo.devices import is_out_of_memory
from cogvideo.files import named, sha256_of, write_json
from cogvideo.training.parallel import any_rank, is_first, raised_by_all, wait_for_all

STATE, METADATA = "state.json", ".metadata"
CHANGED, ABSENT = "its content is cut short or was changed", "No such file or directory"
WEIGHTS, OPTIMIZER, AVERAGE = "weights", "optimizer", "average"
"""Tables of a checkpoint."""
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
# PyTorch warns about a single process; filtered for good, since filters in a `with` block are not thread-safe
warnings.filterwarnings("ignore", r"torch\.distributed is .*unavailable or uninitialized", UserWarning)


class DamagedError(InputError):
    """A checkpoint that differs from what was written; an earlier one may be intact."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} is damaged ({self.reason}); remove it to use an earlier one"


def training_state(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], average: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """Content of a checkpoint: trained weights, the optimizers' state, the running average if there is one."""
    # PyTorch gives an optimizer without state one, by a zero step: right before a run, to load into, and only then
    begun = [each for each in optimizers if each.state] or optimizers
    weights, states = get_state_dict(module, begun, options=TRAINED)
    return {WEIGHTS: weights, OPTIMIZER: states} | ({} if average is None else {AVERAGE: dict(average)})


def restore(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: Mapping[str, Any]) -> None:
    """Restore a loaded state; the average was filled in place. AdamW keeps the kernel for this device."""
    for saved in state[OPTIMIZER]["param_groups"]:
        if "fused" in saved:
            saved["fused"] = optimizers[0].defaults["fused"]
    set_state_dict(
        module, optimizers, model_state_dict=state[WEIGHTS], optim_state_dict=state[OPTIMIZER], options=TRAINED
    )


class Checkpoints:
    """The checkpoints in a folder. Every rank calls every function.

    The last `keep` and the best are kept; 0 is for readers, while a run may be writing there.
    If `asynchronous`, `save` returns once the state is copied, and writing continues during training.
    """

    def __init__(self, folder: Path, keep: int = 2, asynchronous: bool = False) -> None:
        self.folder = folder
        self.keep = keep
        self.asynchronous = asynchronous
        # the ranks' writer threads communicate during training, and need their own process group
        self._group = dist.new_group(backend="gloo") if asynchronous and dist.is_initialized() else None
        self._writing: tuple[int, Future[Any]] | None = None
        self._damaged: set[int] = set()
        if keep and is_first():
            for leftover in named(folder, ".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def path(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.folder / f"step-{step:08}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        found = [re.fullmatch(r"step-(\d{8,})", each.name) for each in named(self.folder, "step-*")]
        return sorted(int(each[1]) for each in found if each)

    def best(self) -> int | None:
        """Step with the lowest held-out loss, the first if several are equal; None if nothing was measured.

        Checkpoints whose loss cannot be read are skipped, with one message each.
        """
        losses = {step: self._held_out(step) for step in self.steps()}
        known = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return min(known, key=lambda step: known[step]) if known else None

    def _held_out(self, step: int) -> float | None:
        path = self.path(step)
        try:
            return cast(float | None, json.loads((path / STATE).read_text(encoding="utf-8"))["held_out"])
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            if step not in self._damaged:
                print(f"{path} is damaged ({STATE}: {_damage(error)}): it is skipped.", file=sys.stderr)
            self._damaged.add(step)
            return None

    def save(self, step: int, state: dict[str, Any], held_out: float | None = None) -> None:
        """Write a checkpoint with its loss on held-out clips; one of the same step is replaced.

        A state is nested tables of tensors and numbers; tensors may be sharded over ranks.
        """
        self.wait()
        aside = self._aside(step)
        if is_first():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            write_json(aside / STATE, {"step": step, "held_out": held_out})
        wait_for_all()
        writer, alone = FileSystemWriter(aside), not dist.is_initialized()
        with _writing(aside):
            if self.asynchronous:
                writing = async_save(state, storage_writer=writer, process_group=self._group, no_dist=alone)
                self._writing = step, cast("Future[Any]", writing)
                return
            save(state, storage_writer=writer, no_dist=alone)
        self._rename(step)

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete and has its name; then remove older ones."""
        if self._writing is not None:
            step, writing = self._writing
            with _writing(self.folder):
                writing.result()
            self._writing = None
            self._rename(step)

    def settle(self) -> None:
        """Name the checkpoint being written if it is complete, without waiting."""
        if self._writing is not None and not any_rank(not self._writing[1].done()):
            self.wait()

    def _aside(self, step: int) -> Path:
        return self.folder / f".step-{step:08}"

    def _rename(self, step: int) -> None:
        aside = self._aside(step)
        _write_hashes(aside)
        wait_for_all()
        if is_first():
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
        """Rename a damaged checkpoint: it no longer counts, but stays for inspection."""
        if is_first():
            aside = self.folder / f"damaged-{self.path(step).name}"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)
        wait_for_all()

    def load(self, step: int, state: dict[str, Any]) -> dict[str, Any]:
        """Load a checkpoint into a state of the same structure, whose tensors are filled in place.

        Parameters that never had a gradient have no optimizer state in the checkpoint, and lose it here.

        Raises:
            DamagedError: the checkpoint is damaged; raised on every rank, as are the others.
            ValueError: it is of another configuration.
            OSError: it cannot be read.
            MemoryError: memory is exhausted; PyTorch's own error is a RuntimeError.
        """
        path = self.path(step)
        has_hashes = raised_by_all(lambda rank, world_size: _check_files(path, rank, world_size))
        with _reading(path, has_hashes):
            reader = FileSystemReader(path)
            stored = reader.read_metadata().state_dict_metadata
        for table in (WEIGHTS, AVERAGE):
            _check_structure(path, table, state.get(table, {}), stored)
        with _reading(path, has_hashes):
            planner = DefaultLoadPlanner(allow_partial_load=True)
            load(state, storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())
        begun = {name.rpartition(".")[0] for name in stored}
        states = state.get(OPTIMIZER, {}).get("state", {})
        for name in [each for each in states if f"{OPTIMIZER}.state.{each}" not in begun]:
            del states[name]
        return state


def read_weights(path: Path, averaged: bool) -> dict[str, Tensor]:
    """The trained weights of a checkpoint, or their running average, unsharded, in one process."""
    table = AVERAGE if averaged else WEIGHTS
    with _reading(path, _check_files(path)):
        reader = FileSystemReader(path)
        tensors = _tensors(reader.read_metadata().state_dict_metadata, table)
        state = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in tensors.items()}
        if state:
            load({table: state}, storage_reader=reader, no_dist=True)
    require(len(state) > 0, f"{path} has no {table}")
    return state


def _write_hashes(folder: Path) -> None:
    """Write the hashes of the files that this rank has written."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    paths = named(folder, f"__{rank}_*") + ([] if rank else [folder / METADATA])
    table = {path.name: sha256_of(path) for path in sorted(paths)}
    write_json(folder / f"hashes-{rank}.json", table)


def _check_files(path: Path, rank: int = 0, world_size: int = 1) -> bool:
    """Check a rank's share of the files against their hashes; False for older checkpoints, which have none."""
    hashes: dict[str, str] = {}
    try:
        for table in named(path, "hashes-*.json"):
            hashes = {**hashes, **json.loads(table.read_bytes())}
        share = sorted(hashes)[rank::world_size]
        is_whole = all(sha256_of(path / name) == hashes[name] for name in share)
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise DamagedError(path, _damage(error)) from error
    if not is_whole:
        raise DamagedError(path, CHANGED)
    return bool(hashes)


def _tensors(stored: Mapping[str, Any], table: str) -> dict[str, TensorStorageMetadata]:
    """Entries of a table of a checkpoint, by their names in it."""
    tensors = {name: each for name, each in stored.items() if isinstance(each, TensorStorageMetadata)}
    prefix = f"{table}."
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _check_structure(path: Path, table: str, tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose trained weights have other names or shapes."""
    there = {name: tuple(each.size) for name, each in _tensors(stored, table).items()}
    here = {name: tuple(each.shape) for name, each in tensors.items()}
    for name in sorted(there.keys() | here.keys()):
        theirs, ours = there.get(name, "absent"), here.get(name, "absent")
        same = f"{path} is of another configuration: {table} {name} is {theirs} there and {ours} here"
        require(theirs == ours, same)


@contextmanager
def _reading(path: Path, has_hashes: bool) -> Iterator[None]:
    """Translate errors: corrupt bytes may raise anything, and PyTorch's error for ranks is not an Exception.

    Files without hashes may be damaged, so any error counts as damage except system errors and lack of memory.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause = _cause(error)
        is_system = isinstance(cause, OSError) and cause.errno is not None
        is_absent = isinstance(cause, FileNotFoundError)
        if not has_hashes and (is_absent or not (is_system or is_out_of_memory(cause))):
            raise DamagedError(path, _damage(cause)) from error
        if isinstance(cause, OSError) and is_system:
            raise OSError(cause.errno, f"the checkpoint cannot be read ({cause.strerror})", str(path)) from error
        raise cause from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        cause = _cause(error)
        number = (isinstance(cause, OSError) and cause.errno) or errno.EIO
        reason = cause.strerror if isinstance(cause, OSError) else f"{type(cause).__name__}: {cause}"[:160]
        _close_files(cause)
        raise OSError(number, f"the checkpoint cannot be written ({reason})", str(path)) from error


def _close_files(error: BaseException | None) -> None:
    """Close files that an error's frames hold. PyTorch's fail to close, and Python 3.13 would print that at exit."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
    finally:
        sys.unraisablehook = hook


def _cause(error: BaseException) -> BaseException:
    """Error of the first rank that failed: the system error, if PyTorch's was caused by one."""
    first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    cause: BaseException | None = first
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return first if cause is None else cause


def _damage(error: BaseException) -> str:
    """Description of the damage; PyTorch's own messages for corrupt bytes help nobody."""
    return ABSENT if isinstance(error, FileNotFoundError) else CHANGED
