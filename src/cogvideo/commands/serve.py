"""`cogvideo serve`, `cogvideo studio`, `cogvideo worker` and `cogvideo key`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogvideo.bundle.adapters import scales
from cogvideo.bundle.model import POCKET
from cogvideo.config import require

FOLDER = Path("cogvideo-videos")
ANYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class StorageOptions:
    """Queue and files."""

    folder: Path = FOLDER
    """Folder of the queue, files and keys."""
    queue: str = ""
    """Database of the queue, such as postgresql://user@host/name; a SQLite file in the folder by default."""
    files: str = ""
    """Folder or store of video files, such as s3://bucket/folder; a subfolder of the folder by default."""

    def urls(self) -> tuple[str, str]:
        """URLs of the queue and of files."""
        if not (self.queue and self.files):
            self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder.resolve()
        return self.queue or f"sqlite:///{place / 'queue.db'}", self.files or str(place / "files")


@dataclass(frozen=True)
class WorkerOptions:
    """Generation."""

    model: str = POCKET
    """Model: pocket (the model in the box), a folder of a bundle, or an ID on the Hugging Face Hub."""
    adapter: tuple[str, ...] = ()
    """Names of adapters in the model, or their folders, each with its scale as NAME:SCALE; 1 unless given."""
    device: str = "auto"
    """Device to run on: cpu, cuda, cuda:0, or auto."""
    batch: int = 8
    """Largest number of clips to generate at once; fewer if memory is short."""
    lease: float = 30.0
    """Seconds after which others take over the clips of a worker that died."""
    running: int = 0
    """Largest number of clips of one key that all workers together make at once; 0 for any number."""

    def __post_init__(self) -> None:
        require(self.batch > 0, f"batch is {self.batch}, expected a positive number")
        require(self.lease > 0, f"lease is {self.lease}, expected a positive number of seconds")
        require(self.running >= 0, f"running is {self.running}, expected 0 (any number) or more")


def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    names: tuple[str, ...] = (),
    workers: int = 1,
    waiting: int = 100,
    kept: int = 10_000,
    browser: bool = False,
    ray: bool = False,
    ray_address: str | None = None,
    place: StorageOptions = StorageOptions(),  # frozen
    work: WorkerOptions = WorkerOptions(),  # frozen
) -> None:
    """Serve text to video over HTTP: a page, and the interface of the OpenAI video endpoint.

    Videos wait in a queue on disk: neither a restart nor a crash loses one. By default, only this machine can
    connect; to allow others, set --host and make a key (`cogvideo key`). If there are keys, every request needs one.

    Args:
        host: Address to listen at; 0.0.0.0 for all.
        port: Port to listen at; 0 for any that is free.
        names: Names under which the server is reached, other than its address.
        workers: Number of worker processes, which share the CPU cores: one per core gives the highest throughput, a
            single one the lowest latency. 0 if all run elsewhere (`cogvideo worker`).
        waiting: Largest number of unfinished videos of a key.
        kept: Largest number of videos of a key, including finished ones.
        browser: Open the server's page, the studio, in a browser.
        ray: Run server and workers on Ray Serve (needs the extra ray); each worker takes a GPU or a core.
        ray_address: Address of a Ray cluster that shares queue, files and keys; a local one is started by default.
        place: Queue and files.
        work: Generation.
    """
    import webbrowser
    from contextlib import ExitStack
    from threading import Event, Thread

    from fastapi import FastAPI

    from cogvideo.devices import usable
    from cogvideo.web import worker
    from cogvideo.web.jobs import Jobs, Limits
    from cogvideo.web.keys import Keys
    from cogvideo.web.listening import is_local, listening, run
    from cogvideo.web.served import ServedModel
    from cogvideo.web.server import application, leave_on_sigterm
    from cogvideo.web.server import workers as running
    from cogvideo.web.site import ServerState
    from cogvideo.web.storage import Store

    require(workers >= 0, f"workers is {workers}, expected 0 or more")
    require(waiting > 0 and kept > 0, f"waiting is {waiting} and kept {kept}, expected positive numbers")
    if workers and not ray:
        usable(work.device)
    queue, files = place.urls()
    has_keys = bool(Keys(place.folder / "keys").read())
    where = "" if place.folder == FOLDER else f" --folder {place.folder}"
    make_key = f"make a key first, `cogvideo key NAME{where}`"
    require(has_keys or is_local(host), f"host is {host}, which others can reach: {make_key}")
    adapters = scales(work.adapter)
    hosts = ["*"] if host in ANYWHERE and not names else ["127.0.0.1", "localhost", "[::1]", host, *names]

    def make() -> FastAPI:
        keys = Keys(place.folder / "keys") if has_keys else None
        served = ServedModel(work.model, adapters=adapters)
        return application(ServerState(served, Jobs(queue), Store(files), keys, Limits(waiting, kept)), hosts)

    app = make()
    leave_on_sigterm()
    arguments = (queue, files, work.model, work.device, work.batch, work.lease, work.running, adapters)
    with listening(host, port) as listener, ExitStack() as stack:
        port = listener.getsockname()[1]
        if ray:
            from cogvideo.web.cluster import deployed

            listener.close()
            stack.enter_context(deployed(make, host, port, ray_address, work.device, workers, arguments))
        else:
            stack.enter_context(running(workers, worker.work, arguments))
        shown = "127.0.0.1" if host in ANYWHERE else host
        address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
        print(address, flush=True)
        if browser:
            Thread(target=webbrowser.open, args=(address,), daemon=True).start()  # opening may block
        if ray:
            Event().wait()
        else:
            run(app, listener, app.state.site.leaving)


def studio(
    *,
    port: int = 8000,
    browser: bool = True,
    place: StorageOptions = StorageOptions(),  # frozen
    work: WorkerOptions = WorkerOptions(),  # frozen
) -> None:
    """Generate clips on a page in a browser, for this machine alone.

    It runs `cogvideo serve` with one worker and opens its page. Clips stay in the folder, including unfinished ones.

    Args:
        port: Port to listen at; 0 for any that is free.
        browser: Open the page in a browser.
        place: Queue and files.
        work: Generation.
    """
    serve(port=port, browser=browser, place=place, work=work)


def worker(*, place: StorageOptions = StorageOptions(), work: WorkerOptions = WorkerOptions()) -> None:  # frozen
    """Generate the videos of a queue, on this machine or another one.

    Any number of workers may share a queue. When one dies, others continue its clips from the last finished
    frame. At SIGTERM or Ctrl-C, a worker finishes its frame and returns its clips to the queue.

    Args:
        place: Queue and files.
        work: Generation.
    """
    from cogvideo.web import worker

    queue, files = place.urls()
    print(f"working for {queue.rpartition('@')[2]}", flush=True)
    arguments = (work.model, work.device, work.batch, work.lease, work.running, scales(work.adapter))
    worker.work(1, queue, files, *arguments)


def key(name: str, /, *, folder: Path = FOLDER) -> None:
    """Make an API key for `cogvideo serve` and print it. Only its hash is kept, in the file `keys` of the folder.

    To revoke a key, delete its line there. A server that was started without keys asks for none until it is restarted.

    Args:
        name: Name of the key; its videos belong to that name.
        folder: Folder of the server.
    """
    from cogvideo.web.keys import Keys

    print(Keys(folder / "keys").add(name))
