"""`cogvideo serve --ray`: the application and its workers on Ray Serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import ray
from ray import serve
from starlette.types import ASGIApp

from cogvideo.web.server import DRAINING, leave_on_sigterm
from cogvideo.web.worker import open_worker

NAME = "cogvideo"
MAX_CONCURRENT = 1000
"""Maximum number of concurrent requests, most of which wait for events."""


class WorkerReplica:
    """A replica that runs a worker; Ray replaces it when the worker has ended.

    Args:
        arguments: arguments of `open_worker`, except the first.
    """

    def __init__(self, *arguments: Any) -> None:
        self._stopping = Event()
        worker = open_worker(self._stopping, *arguments)
        self._thread = Thread(target=worker.run, daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        """Tell Ray whether the worker still runs."""
        if not self._thread.is_alive():
            raise RuntimeError("the worker has ended")

    def __del__(self) -> None:
        self._stopping.set()
        self._thread.join()  # it finishes its frame


@contextmanager
def deployed(
    make: Callable[[], ASGIApp],
    host: str,
    port: int,
    address: str | None,
    device: str,
    workers: int,
    arguments: tuple[Any, ...],
) -> Iterator[None]:
    """The application on a cluster, with workers on a device, each of which takes a GPU or a core."""
    ray.init(address=address, include_dashboard=False, log_to_driver=False)
    leave_on_sigterm()  # Ray would abort on it
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        has_gpu = device.startswith("cuda") or (device == "auto" and "GPU" in resources)
        needed = {"num_gpus": 1} if has_gpu else {"num_cpus": 1}
        page = serve.deployment(name="web", max_ongoing_requests=MAX_CONCURRENT, ray_actor_options={"num_cpus": 0})
        work = serve.deployment(num_replicas=workers, graceful_shutdown_timeout_s=DRAINING, ray_actor_options=needed)
        parts = [work(WorkerReplica).bind(*arguments)] if workers else []
        serve.start(http_options={"host": host, "port": port})
        serve.run(page(serve.ingress(make)()).bind(*parts), name=NAME)
        yield
    finally:
        serve.delete(NAME)
        ray.shutdown()
