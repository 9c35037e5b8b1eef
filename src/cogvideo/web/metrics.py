"""Metrics for Prometheus: requests of this server, and the state of the queue."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cogvideo.web.jobs import Jobs


class Metrics(Collector):
    """Metrics since the server started; those of the queue are read when requested."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._registry = CollectorRegistry()
        names = ["method", "route", "status"]
        self.requests = Counter("cogvideo_requests", "Answered requests.", names, registry=self._registry)
        self.seconds = Histogram(
            "cogvideo_request_seconds", "Time to the first byte of the answer.", ["route"], registry=self._registry
        )
        self._registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """State of the queue."""
        counts, waited = self._jobs.counts()
        videos = GaugeMetricFamily("cogvideo_videos", "Videos by status.", labels=["status"])
        for status, number in counts.items():
            videos.add_metric([status], number)
        yield videos
        yield GaugeMetricFamily("cogvideo_oldest_waiting_seconds", "Age of the oldest waiting video.", waited)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class MetricsMiddleware:
    """Middleware that counts and times requests by route."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, is_answered = time.perf_counter(), False

        def count(status: int) -> None:
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if route != "unknown" else "any"
            self._metrics.requests.labels(method, route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - begin)

        async def send_counted(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_counted)
        except Exception:
            if not is_answered:
                count(500)  # sent by an outer layer
            raise
