"""Routes, errors, loading and closing the model."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
import uuid
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic_core import from_json

from core_rerank_integrations import __version__
from core_rerank_integrations._internal.cancellation import run_in_thread
from core_rerank_integrations.errors import (
    ClosedError,
    CoReError,
    DocumentTruncatedWarning,
    InvalidInputError,
    LongDocumentWarning,
    requires_extra,
)
from core_rerank_integrations.ranking import check_candidates
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.serving.dialects import (
    AnyRequest,
    DocumentsReply,
    DocumentsRequest,
    ErrorReply,
    ModelCard,
    ModelList,
    RerankReply,
    TEIErrorReply,
    TEIRequest,
    TEIResult,
    VoyageReply,
    is_tei,
)
from core_rerank_integrations.serving.errors import RefusedError
from core_rerank_integrations.serving.guard import Guard
from core_rerank_integrations.serving.limits import Limits
from core_rerank_integrations.serving.metrics import Measured, Metrics
from core_rerank_integrations.serving.queue import RequestQueue
from core_rerank_integrations.serving.replies import (
    error_reply,
    json_reply,
    rerank_reply,
    tei_reply,
    text_of,
    voyage_reply,
    wants_spans,
)
from core_rerank_integrations.settings import RerankOptions

with requires_extra("server"):
    from fastapi import APIRouter, FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.routing import APIRoute
    from fastapi_offline import FastAPIOffline
    from starlette.exceptions import HTTPException

T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]

RERANK = ("/rerank", "/v1/rerank", "/v2/rerank")
OWN_OPTIONS = ("score_threshold", "min_score", "first_stage", "max_seconds", "evidence")
SHOWN_PROBLEMS = 3
"""Maximum number of invalid fields that an error names."""
DOCUMENTS = ("documents", "texts")
"""Names of the list of documents in a request."""
DIALECTS = (("rerank",), ("tei",))
"""Where pydantic says which of the two kinds of requests a body is."""
ERRORS = (401, 408, 413, 415, 422, 424, 429, 500, 503, 504)
"""Statuses of errors that the schema names."""
HUNG_UP = 499
"""Status of a reply that nobody receives."""
TEST_QUERY = "What is bread made of?"
TEST_DOCUMENTS = ("Bread is made of flour.", "Bell patented the telephone.")
CHECK_SECONDS = 1.0
"""Time between two checks of the model."""
FIRST_RESTART_SECONDS = 1.0
"""Time from the death of vLLM's engine to its restart; each further time twice as long."""
MAX_RESTART_SECONDS = 60.0
"""Longest such time. After an engine has lived so long, the first one holds again."""

_log = logging.getLogger(__name__)


class Service:
    """The model behind the routes, from its loading to its end.

    Args:
        load: Loads the model.
        limits: The limits.
        metrics: The figures.

    Attributes:
        is_closing: Whether the server is being stopped; it then answers no new request.
        failure: Why the model could not be loaded.
        on_failure: Called if the model could not be loaded.
        loaded: Set when the model is loaded, or could not be.
    """

    def __init__(self, load: Callable[[], CoReReranker], limits: Limits, metrics: Metrics) -> None:
        self._load = load
        self._limits = limits
        self._metrics = metrics
        self._model: tuple[CoReReranker, RequestQueue] | None = None
        self.is_closing = False
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.loaded = asyncio.Event()
        self.created = int(time.time())

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered."""
        return self._model is not None and self._model[0].is_alive and not self.is_closing

    @property
    def model(self) -> tuple[CoReReranker, RequestQueue]:
        """The loaded model and its queue.

        Raises:
            RefusedError: The model is being loaded, for the first time or again.
        """
        if self._model is None or not self._model[0].is_alive:
            raise RefusedError(503, "The model is being loaded: try again in a moment")
        return self._model

    async def start(self) -> None:
        """Load the model and test it."""
        # Clients do not see warnings, and Python keeps each text, with the numbers of a document.
        for category in (DocumentTruncatedWarning, LongDocumentWarning):
            warnings.simplefilter("ignore", category)
        begun = time.perf_counter()
        try:
            reranker = await run_in_thread(self._tested)
        except Exception as error:
            self.failure = error
            self.loaded.set()
            self.on_failure()
            return
        self._metrics.watch(reranker)
        self._model = reranker, RequestQueue(reranker, self._metrics, self._limits.max_waiting)
        self.loaded.set()
        _log.info(
            "%s is ready after %.1f s: %s", reranker.model, time.perf_counter() - begun, reranker
        )

    def _tested(self) -> CoReReranker:
        reranker = self._load()
        reranker.rerank(TEST_QUERY, TEST_DOCUMENTS)  # Raises an error if a score is not a number.
        return reranker

    async def keep_alive(self) -> None:
        """Restart vLLM's engine whenever it has died, each time later if it dies again soon."""
        seconds, loaded = FIRST_RESTART_SECONDS, time.monotonic()
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if self._model is None or self._model[0].is_alive:
                continue
            if self.is_closing:  # Ctrl+C ends an engine too.
                return
            reranker, _ = self._model
            if time.monotonic() - loaded > MAX_RESTART_SECONDS:
                seconds = FIRST_RESTART_SECONDS
            _log.warning("%s has died, and is loaded again in %g s", reranker.model, seconds)
            await asyncio.sleep(seconds)
            seconds = min(2 * seconds, MAX_RESTART_SECONDS)
            try:
                await run_in_thread(reranker.restart)
                _log.info("%s is ready again", reranker.model)
            except Exception as error:
                _log.error("%s could not be loaded again: %s", reranker.model, error)
            loaded = time.monotonic()

    async def end_requests(self) -> None:
        """End requests that wait or are being read; their clients may ask elsewhere."""
        if self._model is not None:
            await self._model[1].close()

    async def stop(self) -> None:
        """End requests and free the model."""
        self.is_closing = True
        await self.end_requests()
        if self._model is not None:
            await self._model[0].aclose()


class _Request(Request):
    """A request whose JSON is checked as a whole: depth, numbers, Unicode and length of lists."""

    limits: Limits

    async def json(self) -> Any:
        # Of other errors than HTTP's, FastAPI makes one without a reason.
        try:
            body = from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(422, f"The body is not JSON: {error}") from error
        # An object is made of each document, which takes far more memory than its text.
        lists = [body.get(name) for name in DOCUMENTS] if isinstance(body, dict) else []
        try:
            for documents in lists:
                self.limits.check_number(len(documents) if isinstance(documents, list) else 0)
        except RefusedError as error:
            raise HTTPException(error.status, error.message) from error
        return body


class _Route(APIRoute):
    """A route whose errors are replies that clients can read, and never their texts in a log."""

    limits: Limits

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_or_explain(request: Request) -> Response:
            request = _Request(request.scope, request.receive)
            request.limits = self.limits
            try:
                if request.method == "POST":
                    _check_type(request)
                return await handle(request)
            except Exception as error:
                return _explained(request, error)

        return handle_or_explain


def create_app(
    load: Callable[[], CoReReranker], limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """Return the server as an ASGI application, which loads the model when it starts.

    Args:
        load: Loads the model, in a thread.
        limits: The limits; ``None`` for the defaults.
        api_key: The key that requests have to carry; ``None`` for none.
    """
    limits = limits or Limits()
    metrics = Metrics()
    service = Service(load, limits, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.start())
        keeping = asyncio.create_task(service.keep_alive())
        yield
        service.is_closing = True
        keeping.cancel()
        await asyncio.wait([loading])  # A model that is being loaded cannot be freed.
        await service.stop()

    # The page of FastAPI itself makes browsers load its script from a public server.
    app = FastAPIOffline(
        title="CoRe reranker",
        version=__version__,
        lifespan=lifespan,
        redoc_url=None,
        static_url="/docs/files",
        responses={status: {"model": ErrorReply | TEIErrorReply} for status in ERRORS},
    )
    app.state.service = service
    app.state.metrics = metrics
    routes: list[str] = []
    for router in (rerank_router(service, limits), _server_router(service, limits, metrics)):
        app.include_router(router)
        # From FastAPI 0.137 on, the app does not list the routes of its routers.
        routes += [route.path for route in router.routes if isinstance(route, APIRoute)]
    app.add_exception_handler(HTTPException, _explain_http)
    keys = [] if api_key is None else [api_key]
    app.add_middleware(Guard, limits=limits, api_keys=keys, is_closing=lambda: service.is_closing)
    app.add_middleware(Measured, metrics=metrics, routes=routes)
    return app


def rerank_router(service: Service, limits: Limits) -> APIRouter:
    """Return the routes that need the model.

    Args:
        service: The model.
        limits: The limits.
    """
    router = APIRouter(route_class=_route_class(limits))

    async def rerank(request: Request, body: AnyRequest) -> Response:
        reranker, queue = service.model
        if isinstance(body, TEIRequest):
            documents, options = body.texts, RerankOptions(top_n=body.top_n or None)
            scores, max_tokens = None, None
        else:
            documents = [text_of(document) for document in body.documents]
            own = {name: getattr(body, name) for name in OWN_OPTIONS}
            own["evidence"] = body.evidence or wants_spans(body)
            options = RerankOptions.checked(top_n=body.top_n or body.top_k or None, **own)
            scores, max_tokens = body.first_stage_scores, body.max_tokens_per_doc
        limits.check(documents, body.query)
        candidates = check_candidates(body.query, documents, scores)
        ranked = await _unless_hung_up(
            request, queue.rank(candidates, options, max_tokens), limits.max_request_seconds
        )
        if isinstance(body, TEIRequest):
            return tei_reply(body, ranked.results)
        if body.is_from_voyage:
            return voyage_reply(body, ranked.results, ranked.tokens, reranker.model)
        name = f"rerank-{uuid.uuid4().hex}"
        return rerank_reply(name, body, ranked, reranker.model, reranker.heads)

    for path in RERANK:
        router.add_api_route(
            path,
            rerank,
            methods=["POST"],
            response_model=RerankReply | VoyageReply | list[TEIResult],
            summary="Rank documents by their relevance to a query",
        )

    if limits.cache_documents:

        @router.post("/v1/documents", response_model=DocumentsReply)
        async def documents(request: Request, body: DocumentsRequest) -> Response:
            """Read documents ahead and store them, so that later requests are fast."""
            _, queue = service.model
            texts = tuple(map(text_of, body.documents))
            limits.check(texts)
            written = await _unless_hung_up(request, queue.store(texts), limits.max_request_seconds)
            return json_reply(DocumentsReply(cached=len(texts), bytes_written=written))

    @router.get("/ready")
    async def ready() -> Response:
        """Say whether the model is loaded and tested."""
        if not service.is_ready:
            state = "being stopped" if service.is_closing else "loading the model"
            return error_reply(503, f"The server is {state}")
        return Response('{"status":"ready"}', media_type="application/json")

    return router


def _route_class(limits: Limits) -> type[_Route]:
    """Return the class of the routes of a server with these limits."""
    return type("_Route", (_Route,), {"limits": limits})


def _server_router(service: Service, limits: Limits, metrics: Metrics) -> APIRouter:
    """Return the other routes of a server of this package."""
    router = APIRouter(route_class=_route_class(limits))

    @router.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """List the model."""
        reranker, _ = service.model
        card = ModelCard(
            id=reranker.model, object="model", created=service.created, owned_by="core-rerank"
        )
        return json_reply(ModelList(object="list", data=[card]))

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server is alive."""
        return {"status": "alive"}

    @router.get("/metrics", include_in_schema=False)
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _check_type(request: Request) -> None:
    """Check that the body is JSON, which a page of another site cannot send unasked.

    Raises:
        RefusedError: It is something else.
    """
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(415, "The body must be JSON: send 'Content-Type: application/json'")


async def _unless_hung_up(request: Request, work: Awaitable[T], seconds: float) -> T:
    """Return the result of work, which is cancelled if the client hangs up or the time ends.

    Raises:
        RefusedError: The client has hung up, or the time is over.
    """
    working = asyncio.ensure_future(work)
    hang_up = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait((working, hang_up), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if hang_up.done():
            raise RefusedError(HUNG_UP, "The client has hung up")
        raise RefusedError(
            504, f"The request was not answered within {seconds:g} seconds: send fewer documents"
        )
    finally:
        working.cancel()
        hang_up.cancel()


async def _hang_up(request: Request) -> None:
    """Wait until the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _explained(request: Request, error: Exception) -> Response:
    """Return an error in the shape that the request's client reads."""
    if isinstance(error, RequestValidationError):
        status, message = 422, _problems(error)
    elif isinstance(error, RefusedError):
        status, message = error.status, error.message
    elif isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    elif isinstance(error, InvalidInputError):
        status, message = 422, str(error)
    elif isinstance(error, ClosedError):
        status, message = 503, "The server is being stopped: try again later"
    elif isinstance(error, CoReError):
        status, message = 500, str(error)
    else:
        status, message = 500, "Internal error: see the log of the server"
    if status >= 500 and not isinstance(error, (RefusedError, ClosedError)):
        # Messages of errors may quote texts.
        _log.error(
            "%s in %s:\n%s",
            type(error).__name__,
            request.scope["path"],
            "".join(traceback.format_tb(error.__traceback__)),
        )
    return error_reply(status, message, for_tei=_is_from_tei(request))


def _is_from_tei(request: Request) -> bool:
    body = getattr(request, "_body", b"")
    if not body or request.scope["path"] not in RERANK:
        return False
    try:
        return is_tei(from_json(body))
    except ValueError:
        return False


async def _explain_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reply = error_reply(error.status_code, error.detail)
    reply.headers.update(error.headers or {})  # Such as the methods that a path allows.
    return reply


def _problems(error: RequestValidationError) -> str:
    """Return what is wrong with the fields of a request, without their values."""
    places = [problem["loc"][1:] for problem in error.errors()]
    fields = [place[1:] if place[:1] in DIALECTS else place for place in places]
    problems = [
        f"{'.'.join(map(str, field)) or 'body'}: {problem['msg']}"
        for field, problem in zip(fields, error.errors(), strict=True)
    ]
    more = len(problems) - SHOWN_PROBLEMS
    return "; ".join(problems[:SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else []))
