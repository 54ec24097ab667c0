"""Figures for Prometheus: numbers and times, and never a text of a request."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from core_rerank_integrations.errors import CoReError, requires_extra
from core_rerank_integrations.reranker import CoReReranker

with requires_extra("server"):
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """The figures of one server.

    Args:
        registry: Where they are registered; ``None`` for a registry of their own.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.requests = Counter(
            "core_rerank_requests",
            "Requests that were answered",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "core_rerank_request_seconds",
            "Time from a request to its answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.waiting = Gauge(
            "core_rerank_waiting_requests",
            "Requests that wait for the model or are being read",
            registry=self.registry,
        )
        self.documents = Counter(
            "core_rerank_documents", "Documents that were asked about", registry=self.registry
        )
        self.together = Histogram(
            "core_rerank_requests_read_together",
            "Requests in one batch",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self.registry,
        )

    def watch(self, reranker: CoReReranker) -> None:
        """Add the counters of a model."""
        self.registry.register(_Backend(reranker))

    def text(self) -> bytes:
        """Return all figures in the format of Prometheus."""
        content: bytes = generate_latest(self.registry)
        return content


class Measured:
    """Count the requests of an application.

    Args:
        app: The application.
        metrics: The figures.
        routes: Paths with figures of their own; others count together.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Iterable[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._routes else "other"
        status = "hung up"
        begun = time.perf_counter()

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - begun)


class _Backend(Collector):
    """The counters of a model's backend, read when they are asked for."""

    def __init__(self, reranker: CoReReranker) -> None:
        self._reranker = reranker

    def collect(self) -> Iterable[Metric]:
        try:
            stats = self._reranker.stats
        except CoReError:  # The model is closed, or is loaded again.
            return
        yield CounterMetricFamily(
            "core_rerank_tokens_run", "Prompt tokens that the model has computed", stats.tokens_run
        )
        if stats.prefixes_asked:
            yield CounterMetricFamily(
                "core_rerank_asked_documents",
                "Documents, or passages of long ones, that questions were asked about",
                stats.prefixes_asked,
            )
            yield CounterMetricFamily(
                "core_rerank_known_documents",
                "How many of these were cached, so that only the question was read",
                stats.prefixes_known,
            )
        yield GaugeMetricFamily(
            "core_rerank_cached_documents",
            "Documents, or passages of long ones, in memory",
            stats.prefixes_cached,
        )
        yield GaugeMetricFamily(
            "core_rerank_cached_bytes", "Size of the cached documents in memory", stats.bytes_cached
        )
