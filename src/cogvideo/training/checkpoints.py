"""Checkpoints of a run: folders of PyTorch's distributed format, whole or not there, for any number of ranks.

A checkpoint is written aside and renamed when every rank has written its part; one that goes is renamed before it is
removed. So whatever kills a run, a folder with the name of a checkpoint is whole. Each rank adds the hashes of its
files: damaged is what differs from them. A checkpoint that cannot be read for another reason is not.
"""

from __future__ import annotations

import errno
import hashlib
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

from cogvideo.config import InputError, require
from cogvideo.devices import is_out_of_memory
from cogvideo.files import named, write_text
from cogvideo.training.parallel import Share, any_rank, is_first, raised_by_all, wait_for_all

STATE, METADATA = "state.json", ".metadata"
CHANGED = "its content is cut short or was changed"
WEIGHTS, OPTIMIZER, AVERAGE = "weights", "optimizer", "average"
"""Tables of a checkpoint."""
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class DamagedError(InputError):
    """A checkpoint that is not what was written; an earlier one may be whole."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} is damaged ({self.reason}); remove it to use an earlier one"


def training_state(
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    average: Mapping[str, Tensor] | None,
) -> dict[str, Any]:
    """Content of a checkpoint: trained weights, the optimizers' state, the running average, and no frozen weights.

    Args:
        module: that is trained.
        optimizers: which share what is trained of it.
        average: running average of that, if there is one.
    """
    # PyTorch gives an optimizer without a state one, by a step of zeros: good before a run, to load into, and only then
    begun = [each for each in optimizers if each.state] or optimizers
    weights, states = get_state_dict(module, begun, options=TRAINED)
    return {WEIGHTS: weights, OPTIMIZER: states} | ({} if average is None else {AVERAGE: dict(average)})


def restore(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: Mapping[str, Any]) -> None:
    """Put a loaded state back; the average was filled in place. The kernel of AdamW stays that of this device, whatever
    the run had before."""
    for saved in state[OPTIMIZER]["param_groups"]:
        if "fused" in saved:
            saved["fused"] = optimizers[0].defaults["fused"]
    set_state_dict(
        module, optimizers, model_state_dict=state[WEIGHTS], optim_state_dict=state[OPTIMIZER], options=TRAINED
    )


class Checkpoints:
    """The checkpoints in a folder. Every rank calls every function.

    Args:
        folder: of the run's checkpoints; it is made when something is saved.
        keep: number of last checkpoints that stay, in addition to the best. 0 to look at them alone, while a run may be
            writing there.
        asynchronous: whether `save` returns when the state is copied, and writes while training goes on.
    """

    def __init__(self, folder: Path, keep: int = 2, asynchronous: bool = False) -> None:
        self.folder = folder
        self.keep = keep
        self.asynchronous = asynchronous
        # the writing threads of the ranks talk while training does, and need a queue of messages of their own
        self._group = dist.new_group(backend="gloo") if asynchronous and dist.is_initialized() else None
        self._writing: Future[Any] | None = None
        self._publish: Callable[[], None] = lambda: None
        self._damaged: set[int] = set()
        if keep and is_first():
            for leftover in named(folder, ".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def path(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.folder / f"step-{step:08}"

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, in order."""
        found = [re.fullmatch(r"step-(\d{8,})", each.name) for each in named(self.folder, "step-*")]
        return sorted(int(each[1]) for each in found if each)

    def best(self) -> int | None:
        """The one with the lowest held-out loss, of equals the first; None where nothing was measured.

        Those whose loss is damaged are passed over, which is said once.

        Raises:
            OSError: a loss cannot be read.
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
                print(f"{path} is damaged ({STATE}: {_damage(error)}): it is left alone.", file=sys.stderr)
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
        if is_first():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            write_text(aside / STATE, json.dumps({"step": step, "held_out": held_out}) + "\n")
        wait_for_all()
        self._publish = lambda: self._rename(aside, step)
        writer = FileSystemWriter(aside)
        alone = not dist.is_initialized()
        with _writing(aside):
            if self.asynchronous:
                writing = async_save(state, storage_writer=writer, process_group=self._group, no_dist=alone)
                self._writing = cast("Future[Any]", writing)
            else:
                save(state, storage_writer=writer, no_dist=alone)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until what is being written is whole and has its name; then remove older ones.

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
        """Take its name from one that is damaged: it is no longer counted, and stays to be looked at."""
        if is_first():
            aside = self.folder / f"damaged-{self.path(step).name}"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)
        wait_for_all()

    def load(self, step: int, state: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint, into a state of the same structure, whose tensors are filled in place.

        Parameters that never had a gradient have no state of the optimizer there, and lose it here.

        Raises:
            DamagedError: it is damaged; on every rank, as the others.
            ValueError: it is of another configuration.
            OSError: it cannot be read.
            MemoryError: or PyTorch's own, which is a RuntimeError.
        """
        path = self.path(step)
        known = raised_by_all(lambda share: _check_files(path, share))
        stored = _metadata(path, known)
        _check_structure(path, state, stored)
        with _reading(path, known):
            planner = DefaultLoadPlanner(allow_partial_load=True)
            load(state, storage_reader=FileSystemReader(path), planner=planner, no_dist=not dist.is_initialized())
        begun = {name.rpartition(".")[0] for name in stored}
        states = state.get(OPTIMIZER, {}).get("state", {})
        for name in [each for each in states if f"{OPTIMIZER}.state.{each}" not in begun]:
            del states[name]
        return state


def read_weights(path: Path, averaged: bool) -> dict[str, Tensor]:
    """The trained weights of a checkpoint, whole, in one process.

    Args:
        path: folder of the checkpoint.
        averaged: the running average in their place.

    Raises:
        ValueError: it is damaged, or has none.
        OSError: it cannot be read.
    """
    known = _check_files(path)
    table = AVERAGE if averaged else WEIGHTS
    tensors = _tensors(_metadata(path, known), table)
    state = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in tensors.items()}
    require(len(state) > 0, f"{path} has no {table}")
    with _reading(path, known):
        load({table: state}, storage_reader=FileSystemReader(path), no_dist=True)
    return state


def _write_hashes(folder: Path) -> None:
    """Note what this rank has written."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    paths = [*named(folder, f"__{rank}_*"), *([] if rank else [folder / METADATA])]
    table = {path.name: _sha256(path) for path in sorted(paths)}
    write_text(folder / f"hashes-{rank}.json", json.dumps(table, indent=2) + "\n")


def _check_files(path: Path, share: Share = Share(0, 1)) -> bool:  # noqa: B008  # a tuple
    """Compare the files of a checkpoint, or this rank's share of them, with their hashes; whether it has any.

    Raises:
        DamagedError: a file is missing or changed.
        OSError: one cannot be read.
    """
    hashes: dict[str, str] = {}
    try:
        for table in named(path, "hashes-*.json"):
            hashes = {**hashes, **json.loads(table.read_bytes())}
        for name in sorted(hashes)[share.rank :: share.world_size]:
            if _sha256(path / name) != hashes[name]:
                raise DamagedError(path, CHANGED)
    except FileNotFoundError as error:
        raise DamagedError(path, _damage(error)) from error
    except (ValueError, TypeError) as error:
        raise DamagedError(path, CHANGED) from error
    return bool(hashes)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _metadata(path: Path, known: bool) -> Mapping[str, Any]:
    with _reading(path, known):
        return FileSystemReader(path).read_metadata().state_dict_metadata


def _tensors(stored: Mapping[str, Any], table: str) -> dict[str, TensorStorageMetadata]:
    """Entries of a table of a checkpoint, by their names in it."""
    prefix = f"{table}."
    return {
        name.removeprefix(prefix): each
        for name, each in stored.items()
        if name.startswith(prefix) and isinstance(each, TensorStorageMetadata)
    }


def _check_structure(path: Path, state: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose trained weights have other names or shapes."""
    for table in (WEIGHTS, AVERAGE):
        there = {name: tuple(each.size) for name, each in _tensors(stored, table).items()}
        here = {name: tuple(each.shape) for name, each in state.get(table, {}).items()}
        odd = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
        if odd:
            name = odd[0]
            raise InputError(
                f"{path} is of another configuration: {table} {name} is {there.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} here"
            )


@contextmanager
def _reading(path: Path, known: bool) -> Iterator[None]:
    """Translate errors: bytes that mean nothing may raise anything, and what ranks raise is no Exception.

    Args:
        path: of the checkpoint.
        known: whether its files were compared with their hashes. Older checkpoints have none: what is raised by them is
            damage, but for what the system says and for memory.
    """
    try:
        with _without_warnings():
            yield
    except (Exception, CheckpointException) as error:
        cause = _cause(error)
        if not known and (isinstance(cause, FileNotFoundError) or not _is_of_the_system(cause)):
            raise DamagedError(path, _damage(cause)) from error
        if isinstance(cause, OSError) and cause.errno is not None:
            reason = f"the checkpoint cannot be read ({cause.strerror})"
            raise OSError(cause.errno, reason, str(path)) from error
        raise cause from error


def _is_of_the_system(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno is not None) or is_out_of_memory(error)


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
    """Error of the first rank that has one: that of the system, if PyTorch's only followed from it."""
    first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    cause: BaseException | None = first
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return first if cause is None else cause


def _damage(error: BaseException) -> str:
    """Words for damage; PyTorch's own for bytes that mean nothing help nobody."""
    return "No such file or directory" if isinstance(error, FileNotFoundError) else CHANGED


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
