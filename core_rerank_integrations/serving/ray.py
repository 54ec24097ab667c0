"""The server on Ray Serve: ``serve run core_rerank_integrations.serving.ray:app model=...``."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Self, TypeVar

from pydantic import Field, model_validator

from core_rerank_integrations._internal.memory import return_large_blocks
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.heads.scoring_config import Count, Positive
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.serving.app import create_app
from core_rerank_integrations.serving.guard import key_from
from core_rerank_integrations.serving.limits import Limits
from core_rerank_integrations.serving.metrics import Metrics
from core_rerank_integrations.serving.queue import BATCH_REQUESTS
from core_rerank_integrations.serving.replies import RETRY_SECONDS
from core_rerank_integrations.settings import (
    CheckedModel,
    DocumentCache,
    ReplicaResources,
    RerankerSettings,
)

with requires_extra("ray"):
    from fastapi import FastAPI
    from ray import serve
    from ray.serve.metrics import Gauge

Arguments = TypeVar("Arguments", bound=CheckedModel)

MAX_LOADS = 3
"""How often a replica is started whose model cannot be loaded."""
PUBLISH_SECONDS = 5.0
"""Time between two publications of the figures."""


class ReplicaOptions(ReplicaResources):
    """Number of replicas, what each gets, and how many requests wait for it."""

    replicas: Count = Field(
        default=1, description="Number of replicas; with max_replicas, the smallest."
    )
    max_replicas: Count | None = Field(
        default=None, description="Largest number of replicas, if it follows the requests."
    )
    target_ongoing_requests: Positive = Field(
        default=float(BATCH_REQUESTS),
        description="Ongoing requests per replica, above which replicas are added.",
    )
    max_ongoing_requests: Count = Field(
        default=64, description="Maximum requests that a replica reads or lets wait."
    )
    max_queued_requests: Count = Field(
        default=256, description="Maximum requests that wait in a proxy of Ray for a replica."
    )
    api_key_env: str | None = Field(
        default=None,
        description="Environment variable of the replicas with the key of requests.",
    )

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise InvalidInputError(
                f"max_replicas={self.max_replicas} is less than replicas={self.replicas}"
            )
        return self


@serve.ingress()
class RerankReplica:
    """One model with its server.

    Args:
        settings: The model and its heads.
        limits: What a request may cost.
        api_key_env: Environment variable with the key; ``None`` for none.
    """

    def __init__(self, settings: RerankerSettings, limits: Limits, api_key_env: str | None) -> None:
        self._settings = settings
        self._limits = limits
        self._api_key = key_from(api_key_env)
        return_large_blocks()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app, which begins to load the model."""
        load = partial(CoReReranker, **dict(self._settings))
        app = create_app(load, self._limits, self._api_key)
        self._service = app.state.service
        self._publishing = asyncio.create_task(_publish(app.state.metrics))
        return app

    async def check_health(self) -> None:
        """Say at once whether the model is loaded; Ray waits for the first answer.

        Raises:
            BaseException: The model cannot be loaded.
        """
        await self._service.loaded.wait()
        if self._service.failure is not None:
            raise self._service.failure


def app(args: dict[str, Any]) -> serve.Application:
    """Build the application of ``serve run`` and of Serve's configuration files.

    Args:
        args: Fields of `RerankerSettings`, `DocumentCache`, `ReplicaOptions` and `Limits`, as texts
            or values.

    Raises:
        InvalidInputError: An argument is unknown or invalid.
    """
    kinds = (RerankerSettings, DocumentCache, ReplicaOptions, Limits)
    known = {name for kind in kinds for name in kind.model_fields}
    known -= {"document_cache", "max_waiting"}  # They have names of their own here.
    if unknown := args.keys() - known:
        raise InvalidInputError(
            f"unknown arguments: {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}"
        )
    cache = _checked(DocumentCache, args)
    changed = {} if cache == DocumentCache() else {"document_cache": cache}
    settings = _checked(RerankerSettings, args | changed)
    options = _checked(ReplicaOptions, args)
    limits = _checked(Limits, args | {"max_waiting": options.max_ongoing_requests})
    replicas: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        scaling = {
            "min_replicas": options.replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_ongoing_requests,
        }
        replicas = {"autoscaling_config": scaling}
    deployment = serve.deployment(
        RerankReplica,
        **replicas,
        ray_actor_options=options.actor_options(),
        # A replica refuses what is too much itself, in the words of its clients, and needs room to.
        max_ongoing_requests=2 * options.max_ongoing_requests,
        max_queued_requests=options.max_queued_requests,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_SECONDS},
        graceful_shutdown_timeout_s=limits.shutdown_seconds,
        max_constructor_retry_count=MAX_LOADS,
    )
    return deployment.bind(settings, limits, options.api_key_env)


def _checked(kind: type[Arguments], args: dict[str, Any]) -> Arguments:
    return kind.checked(**{name: args[name] for name in kind.model_fields.keys() & args.keys()})


async def _publish(metrics: Metrics) -> None:
    """Publish figures among those of Ray, which has one address for all replicas of a machine."""
    gauges: dict[str, Gauge] = {}
    while True:
        for family in metrics.registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                if sample.name not in gauges:
                    gauges[sample.name] = Gauge(
                        sample.name, family.documentation, tuple(sample.labels)
                    )
                gauges[sample.name].set(sample.value, sample.labels)
        await asyncio.sleep(PUBLISH_SECONDS)
