"""Engines that encode clips: this process, processes on this machine, or Ray on a cluster."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import Field, dataclass, replace
from functools import partial
from importlib import import_module
from multiprocessing.queues import SimpleQueue
from typing import Any, ClassVar, Literal, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cogvideo.config import InputError, require
from cogvideo.devices import usable

OnClip = Callable[[], None]


class Worker(Protocol):
    """A frozen dataclass with the fields `device` and `readers`, which engines set; it is sent to processes."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def make(self, job: Any, on_clip: OnClip = ...) -> None:
        """Do a job, some clips whose result is kept; `on_clip` is called after each clip."""


GPU_READERS = 4
"""Cores that a Ray actor requests in addition to its GPU."""


def local_devices(device: str, workers: int) -> list[str]:
    """The device of each worker process; 0 workers means one per GPU or core. `cuda` and `auto` use all GPUs."""
    require(workers >= 0, f"workers is {workers}, expected 0 (one per core or GPU) or more")
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    require(device != "cuda" or bool(gpus), "the device is cuda, and there is no CUDA GPU: pass --device cpu")
    if device == "cuda" or (device == "auto" and gpus):
        return [gpus[index % len(gpus)] for index in range(workers or len(gpus))]
    if device in ("cpu", "auto"):
        return ["cpu"] * (workers or os.cpu_count() or 1)
    return [str(usable(device))] * (workers or 1)


def run_local(jobs: Sequence[Any], worker: Worker, places: Sequence[str], on_clip: OnClip) -> None:
    """Do jobs with one process per device in `places`; a single device is used from this process."""
    if len(places) == 1 or len(jobs) == 1:
        worker = _at(worker, places[0], 1)
        for job in jobs:
            worker.make(job, on_clip)
        return
    context = multiprocessing.get_context("spawn")
    devices, clips = context.SimpleQueue(), context.SimpleQueue()
    for place in places:
        devices.put(place)
    with (
        _counting(clips, on_clip),
        ProcessPoolExecutor(len(places), context, _start, (worker, devices, clips, len(places))) as pool,
    ):
        try:
            with _uninterrupted():
                futures = [pool.submit(_make, job) for job in jobs]
            for future in as_completed(futures):
                future.result()
        except BrokenProcessPool as error:
            advice = "finished jobs are kept; run the same command again, with fewer --workers"
            raise InputError(f"a worker process died, perhaps from lack of memory: {advice}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():  # nothing is left to do, or the run is being aborted
                process.terminate()


@dataclass(frozen=True)
class Machines:
    """Devices and processes."""

    device: str = "auto"
    """Device to run on: cpu, cuda for all GPUs, cuda:0, or auto."""
    engine: Literal["local", "ray"] = "local"
    """Processes on this machine, or Ray Data (needs the extra ray)."""
    workers: int = 0
    """Number of processes; 0 for one per core, or one per GPU."""
    ray_address: str | None = None
    """Address of a Ray cluster that shares all folders and the cache; a local one is started by default."""

    def __post_init__(self) -> None:
        if self.engine == "ray":
            import_module("ray")  # if it is missing, fail before any work

    @property
    def kind(self) -> str:
        """Device type, which must be available; on Ray, CPU unless CUDA is requested."""
        if self.engine == "ray":
            return "cuda" if self.device == "cuda" else "cpu"
        return local_devices(self.device, self.workers)[0].partition(":")[0]

    def check(self) -> None:
        """Refuse missing devices; a Ray cluster's devices are on other machines."""
        if self.engine == "local":
            local_devices(self.device, self.workers)

    @property
    def settled(self) -> Machines:
        """The same with a fixed device type, which Ray actors would otherwise choose themselves."""
        return replace(self, device=self.kind) if self.engine == "ray" else self

    def run(self, jobs: Sequence[Any], worker: Worker, on_clip: OnClip) -> None:
        """Do jobs; `on_clip` is called after each clip."""
        if self.engine == "ray":
            run_ray(jobs, worker, self.device, self.ray_address, self.workers, on_clip)
        else:
            run_local(jobs, worker, local_devices(self.device, self.workers), on_clip)


@contextmanager
def progress(title: str, total: int, completed: int) -> Iterator[Callable[..., None]]:
    """A progress bar over clips, some already done; yields a function that advances it."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=completed)
        yield partial(bar.advance, task)


@contextmanager
def _counting(clips: SimpleQueue[bool], on_clip: OnClip) -> Iterator[None]:
    """Call `on_clip` for each True that worker processes put in the queue."""

    def count() -> None:
        while clips.get():
            on_clip()

    counter = threading.Thread(target=count, daemon=True)
    counter.start()
    yield
    clips.put(False)
    counter.join()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Shield processes started here from Ctrl-C; this process receives it once they are started, and ends them."""
    caught: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: caught.append(number)) if is_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # children inherit the mask, not the handler
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, handler)
    for number in caught:
        signal.raise_signal(number)


_worker: Worker
_clips: SimpleQueue[bool]
"""Set by `_start` in a worker process."""


def _start(worker: Worker, devices: SimpleQueue[str], clips: SimpleQueue[bool], num_workers: int) -> None:
    global _worker, _clips
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # processes share the cores
    _worker, _clips = _at(worker, devices.get(), num_workers), clips


def _make(job: Any) -> None:
    _worker.make(job, lambda: _clips.put(True))


def _at(worker: Worker, device: str, num_workers: int) -> Worker:
    """The worker on a device; with a GPU, its share of the cores reads ahead."""
    readers = 0 if device == "cpu" else max(1, (os.cpu_count() or 1) // num_workers)
    return replace(worker, device=device, readers=readers)


def _end_with_parent() -> None:
    """Exit when the parent dies: if killed, it cannot end its processes, which would keep writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_ray(
    jobs: Sequence[Any], worker: Worker, device: str, address: str | None, workers: int, on_clip: OnClip
) -> None:
    """Do jobs with Ray Data; machines must share all folders that the worker reads and writes.

    A local cluster is started unless an address is given. `workers` is the number of actors, 0 for one per core or GPU;
    `on_clip` is called for each clip when its job is done.
    """
    import ray
    from ray.data import DataContext, from_items
    from ray.exceptions import RayTaskError

    ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        DataContext.get_current().enable_progress_bars = False
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpu = device == "cuda" or (device == "auto" and "GPU" in resources)
        actors = min(len(jobs), workers or max(1, int(resources.get("GPU" if gpu else "CPU", 0))))
        shards = from_items([{"job": pickle.dumps(job)} for job in jobs], override_num_blocks=len(jobs))
        made = shards.map(
            _Maker,  # type: ignore[arg-type]  # a callable class, one instance per actor
            fn_constructor_args=(replace(worker, device="cuda", readers=GPU_READERS) if gpu else worker,),
            concurrency=actors,
            num_gpus=1 if gpu else 0,
            num_cpus=GPU_READERS if gpu else 1,
        )
        for row in made.iter_rows():
            for _ in range(row["num_clips"]):
                on_clip()
    except RayTaskError as error:
        raise error.cause from error
    finally:
        ray.shutdown()


class _Maker:
    """A Ray Data actor: does the job in one row."""

    def __init__(self, worker: Worker) -> None:
        torch.set_num_threads(1)
        self.worker = worker

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        clips: list[None] = []
        self.worker.make(pickle.loads(row["job"]), lambda: clips.append(None))
        return {"num_clips": len(clips)}
