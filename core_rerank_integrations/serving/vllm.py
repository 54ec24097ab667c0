"""The rerank routes in ``vllm serve``: a plugin of vLLM, and the command that loads it."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from core_rerank_integrations.backends.loading import check_adapter
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.reranker import CoReReranker, checked_model
from core_rerank_integrations.serving.app import Service, rerank_router
from core_rerank_integrations.serving.guard import Guard
from core_rerank_integrations.serving.limits import Limits
from core_rerank_integrations.serving.metrics import Measured, Metrics
from core_rerank_integrations.settings import RerankerSettings

with requires_extra("server"):
    from fastapi.routing import APIRoute
    from prometheus_client import REGISTRY

if TYPE_CHECKING:
    from fastapi import FastAPI

PLUGINS = ("core_rerank", "core_rerank_server")
"""The plugins that ``VLLM_PLUGINS`` has to name: that of the worker processes, and this one."""
CONFIG_KEY = "core_rerank"
"""In vLLM's ``--additional-config``: the settings of the reranker and the limits of its routes."""
ENGINE_SETTINGS = ("backend", "device", "document_cache", "dtype", "engine_args")
"""Settings that the engine's own arguments take the place of."""


class VLLMRoutes:
    """Endpoint plugin of vLLM: the rerank routes, on the engine that ``vllm serve`` runs.

    Models, health, metrics, keys and encryption are vLLM's own.

    Attributes:
        name: Name of the plugin.
        required_tasks: Tasks of vLLM, of which the engine has to support one.
    """

    name = PLUGINS[1]
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; vLLM calls this when its own are there.

        Raises:
            InvalidInputError: A setting or limit in ``--additional-config`` is invalid, or several
                processes would share the engine.
        """
        args = app.state.args
        self._settings, limits = _configured(args)
        metrics = Metrics(REGISTRY)
        self._service = Service(self._load, limits, metrics)
        # vLLM asks for its key in routes below /v1 and /v2 alone, so not in /rerank.
        keys = [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
        for route in rerank_router(self._service, limits).routes:
            assert isinstance(route, APIRoute)
            if "POST" in route.methods:
                guarded = Guard(route.app, limits, keys, lambda: self._service.is_closing)
                route.app = Measured(guarded, metrics, [route.path])
            # As it is: `include_router` would make another one.
            app.router.routes.append(route)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:  # noqa: ARG002
        """Read the heads in the engine, and test them; vLLM calls this before it serves.

        Raises:
            BaseException: The engine cannot rerank; the message says why.
        """
        self._engine = engine_client
        await self._service.start()
        if self._service.failure is not None:
            raise self._service.failure

    def _load(self) -> CoReReranker:
        return CoReReranker(**self._settings, backend="vllm-shared", engine=self._engine)


def vllm_command(
    settings: RerankerSettings, limits: Limits, host: str, port: int, more: Sequence[str]
) -> list[str]:
    """Return the command that starts ``vllm serve`` with the rerank routes.

    Args:
        settings: The model and its heads.
        limits: The limits of the routes.
        host: Address to listen on.
        port: Port.
        more: More arguments for ``vllm serve``.

    Raises:
        InvalidInputError: The heads, the precision or an argument do not suit such an engine.
    """
    from core_rerank_integrations.backends.vllm.caller.shared import serve_arguments

    if any(argument.replace("_", "-").startswith("--additional-config") for argument in more):
        raise InvalidInputError(
            "--additional-config holds the settings of the reranker here, and vLLM takes only one: "
            "leave it out"
        )
    model, heads = checked_model(settings)
    check_adapter(settings.backend, model, heads)
    # The files are on this machine now, and need no token.
    own = settings.model_copy(update={"local_files_only": True})
    config = own.model_dump(
        mode="json", exclude_defaults=True, exclude_none=True, exclude=set(ENGINE_SETTINGS)
    )
    config |= {"model": str(settings.model)} | limits.model_dump(exclude_defaults=True)
    return [
        *("vllm", "serve", str(model.path), "--served-model-name", str(settings.model)),
        *("--host", host, "--port", str(port)),
        *serve_arguments(model, settings.dtype, more),
        *("--additional-config", json.dumps({CONFIG_KEY: config})),
        *more,
    ]


def vllm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that `vllm_command` needs in an environment."""
    from core_rerank_integrations.backends.vllm.caller.process import engine_variables

    named = environment.get("VLLM_PLUGINS")
    plugins = [*(named.split(",") if named else []), *PLUGINS]
    return engine_variables(environment) | {"VLLM_PLUGINS": ",".join(dict.fromkeys(plugins))}


def _configured(args: Namespace) -> tuple[dict[str, Any], Limits]:
    """Return arguments of the reranker, and limits, from the arguments of ``vllm serve``.

    Raises:
        InvalidInputError: One is invalid, or there would be several servers.
    """
    if (args.api_server_count or 1) > 1:
        raise InvalidInputError(
            f"{args.api_server_count} API servers would share an engine (--api-server-count, or "
            "--data-parallel-size): the rerank routes need an engine for each server. Start one "
            "server per GPU, behind a balancer"
        )
    given = (args.additional_config or {}).get(CONFIG_KEY, {})
    limits = {name: value for name, value in given.items() if name in Limits.model_fields}
    settings = {"model": args.model} | {
        name: value for name, value in given.items() if name not in limits
    }
    if unsuited := settings.keys() & set(ENGINE_SETTINGS):
        raise InvalidInputError(
            f"{', '.join(sorted(unsuited))} in --additional-config: vLLM's own arguments say this"
        )
    checked = RerankerSettings.checked(**settings, backend="vllm-shared")
    return {name: getattr(checked, name) for name in settings}, Limits.checked(**limits)
