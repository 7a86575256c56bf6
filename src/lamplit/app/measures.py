"""Counts and times of the requests, for Prometheus."""

from __future__ import annotations

import os
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, exposition, multiprocess
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COUNTS = "PROMETHEUS_MULTIPROC_DIR"  # folder in which several processes count together, as prometheus_client calls it
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Measures:
    """What one application counts; several processes count together, in a folder that the environment names."""

    media_type = exposition.CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ("method", "route")
        self._requests = Counter(
            "lamplit_requests", "Requests that were answered.", (*labels, "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "lamplit_request_seconds", "Seconds to the end of the answer.", labels,
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._images = Gauge(
            "lamplit_images", "Images of the store that is open.", multiprocess_mode="mostrecent",
            registry=self._registry,
        )  # fmt: skip

    def text(self, images: int) -> bytes:
        """Write all in Prometheus' text format.

        Args:
            images: of the store.
        """
        self._images.set(images)
        registry = self._registry
        if COUNTS in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return exposition.generate_latest(registry)

    def around(self, app: ASGIApp) -> ASGIApp:
        """Return an application that counts what another answers."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began, status = time.perf_counter(), 500

            async def sent(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, sent)
            finally:
                route = getattr(scope.get("route"), "path", "none")  # never what a client has typed
                method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
                self._requests.labels(method, route, status).inc()
                self._seconds.labels(method, route).observe(time.perf_counter() - began)

        return counted
