"""`RemoteReranker` against a real server that gives the answers of a script."""

from __future__ import annotations

import asyncio
import copy
import logging
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import Any

import pytest
from support.canned_server import (
    CannedServer,
    Handler,
    Received,
    answered,
    canned_server,
    reply,
    result,
)
from tenacity import wait_none

from core_rerank_integrations import (
    BackendError,
    ClosedError,
    CoReError,
    InvalidInputError,
    RemoteReranker,
    RerankResult,
)
from core_rerank_integrations.method.evidence import Evidence, Word
from core_rerank_integrations.remote import connection

KEY = "sk-very-secret"
QUERY = "who invented the telephone"
DOCUMENTS = ["a recipe", "Bell invented the telephone", "the ferry"]
BUSY = (429, {"Retry-After": "0"}, {"message": "too many requests"})


@pytest.fixture
def server() -> Iterator[CannedServer]:
    with canned_server() as server:
        yield server


@pytest.fixture
def remote(server: CannedServer) -> Iterator[RemoteReranker]:
    with RemoteReranker(server.url, KEY, timeout=30) as remote:
        yield remote


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without the random times."""
    monkeypatch.setattr(connection, "_backoff", wait_none())


async def test_results_are_those_of_the_library(
    server: CannedServer, remote: RemoteReranker
) -> None:
    sentences = [[0, 27, 0.4, [[0, 4, 0.3], [5, 13, 0.1]], 6]]
    server.answers = 2 * [
        (
            200,
            {},
            reply(
                [
                    result(1, 0.4, best_passage=[0, 27], evidence=sentences),
                    result(0, -0.1, probability=None),
                    result(2, None, probability=None, reranked=False),
                ]
            ),
        )
    ]
    options: Any = {"top_n": 3, "score_threshold": "auto", "first_stage": "dense", "evidence": True}
    results = remote.rerank(QUERY, DOCUMENTS, first_stage_scores=[3, 2, 1], **options)
    evidence = Evidence(0, 27, 0.4, (Word(0, 4, 0.3), Word(5, 13, 0.1)), 6)
    assert list(results) == [
        RerankResult(1, 0.4, DOCUMENTS[1], 0.4, (0, 27), True, (evidence,)),
        RerankResult(0, -0.1, DOCUMENTS[0]),
        RerankResult(2, -inf, DOCUMENTS[2], reranked=False),
    ]
    assert results.answerability == 0.75
    assert results[0].extract(1.0).text == DOCUMENTS[1]
    assert results == await remote.arerank(
        QUERY, DOCUMENTS, first_stage_scores=[3, 2, 1], **options
    )
    expected = {
        "query": QUERY,
        "documents": DOCUMENTS,
        "return_documents": False,
        "first_stage_scores": [3.0, 2.0, 1.0],
        **options,
    }
    assert server.bodies == [expected, expected]
    assert {request.path for request in server.received} == {"/v1/rerank"}


def test_a_text_with_half_a_character_is_sent(server: CannedServer, remote: RemoteReranker) -> None:
    (found,) = remote.rerank("\ud83d", ["a \ud800 b"])
    assert found.document == "a \ud800 b"
    assert server.bodies[0]["documents"] == ["a \ufffd b"]


@pytest.mark.parametrize(
    ("query", "documents", "options", "message"),
    [
        ("", DOCUMENTS, {}, "the query is empty: ''"),
        (None, DOCUMENTS, {}, "the query must be a string, got NoneType"),
        (QUERY, "one text", {}, "documents must be a list of strings, got str"),
        (QUERY, ["a", 7], {}, "document 1 must be a string, got int"),
        (QUERY, DOCUMENTS, {"top_n": 0}, "top_n: .*greater than or equal to 1, got 0"),
        (QUERY, DOCUMENTS, {"min_score": inf}, "min_score: .*finite number, got inf"),
        (QUERY, DOCUMENTS, {"first_stage": "colbert"}, "'other', got 'colbert'"),
        (QUERY, DOCUMENTS, {"first_stage_scores": [1]}, "one number for each of the 3 documents"),
    ],
)
async def test_invalid_input_is_refused_before_anything_is_sent(
    query: Any,
    documents: Any,
    options: Any,
    message: str,
    server: CannedServer,
    remote: RemoteReranker,
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        remote.rerank(query, documents, **options)
    with pytest.raises(InvalidInputError, match=message):
        await remote.arerank(query, documents, **options)
    scores = options.pop("first_stage_scores", None)
    with pytest.raises(InvalidInputError, match=message):
        remote.rerank_batch([(query, documents)], first_stage_scores=scores and [scores], **options)
    with pytest.raises(InvalidInputError, match="document 0 must be a string"):
        remote.cache_documents([7])  # type: ignore[list-item]
    assert not server.received


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "127.0.0.1:8080"}, "must be the address of a server.*got '127.0.0.1:8080'"),
        ({"base_url": "ftp://host"}, "must be the address of a server"),
        ({"base_url": "http://host:many"}, "must be the address of a server"),
        ({"base_url": "http://host\n"}, "must be the address of a server"),
        ({"base_url": "me:secret@host"}, r"got '\.\.\.@host'"),
        ({"base_url": "http://me:secret@host"}, "must not contain a user name, a password"),
        ({"base_url": "http://host/?key=secret"}, "must not contain a user name, a password"),
        ({"base_url": None}, "base_url is missing"),
        ({"timeout": 0}, "timeout: .*greater than 0, got 0"),
        ({"timeout": True}, "timeout: must be a number, got True"),
        ({"max_retries": -1}, "max_retries: .*greater than or equal to 0, got -1"),
        ({"max_retries": 1.5}, "max_retries: must be an integer, got 1.5"),
        ({"api_key": "secret\n"}, "not visible ASCII, such as a line break"),
        ({"api_key": 7}, "api_key: "),
    ],
)
def test_invalid_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as error:
        RemoteReranker(**{"base_url": "http://host", **arguments})
    assert "secret" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize("url", ["{}/", "{}/v1", "{}/v1/", "{}/path/", "{}/path/v1"])
def test_the_address_may_end_like_that_of_other_apis(url: str, server: CannedServer) -> None:
    with RemoteReranker(url.format(server.url)) as remote:
        remote.rerank(QUERY, DOCUMENTS)
    expected = "/path/v1/rerank" if "path" in url else "/v1/rerank"
    assert [request.path for request in server.received] == [expected]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("status", [429, 502, 503])
async def test_a_busy_server_is_asked_again(
    status: int, server: CannedServer, remote: RemoteReranker
) -> None:
    server.answers = [(status, {}, "busy"), (status, {"Retry-After": "soon"}, "busy")]
    assert remote.rerank(QUERY, DOCUMENTS)[0].index == 1
    server.answers = [(status, {}, "busy")]
    assert (await remote.arerank(QUERY, DOCUMENTS))[0].index == 1
    assert len(server.received) == 5
    server.answers = 4 * [(status, {}, {"message": "full house"})]
    with pytest.raises(BackendError, match=f"answered {status}: full house; .*raise max_retries"):
        remote.rerank(QUERY, DOCUMENTS)
    assert len(server.received) == 9, "the first attempt and three more"


@pytest.mark.usefixtures("at_once")
def test_it_waits_as_long_as_the_server_asks(server: CannedServer, remote: RemoteReranker) -> None:
    server.answers = [(429, {"Retry-After": "1"}, "busy")]
    remote.rerank(QUERY, DOCUMENTS)
    first, second = server.received
    assert second.time - first.time >= 1
    for later in ["31", "Fri, 01 Jan 2100 00:00:00 GMT"]:
        server.answers = [(503, {"Retry-After": later}, "loading")]
        with pytest.raises(BackendError, match="answered 503: loading"):
            remote.rerank(QUERY, DOCUMENTS)
    assert len(server.received) == 4, "the server asked for more than the time limit"


@pytest.mark.usefixtures("at_once")
def test_a_lost_connection_is_made_again(server: CannedServer, remote: RemoteReranker) -> None:
    server.answers = [lambda *_: None, lambda *_: None]
    assert remote.rerank(QUERY, DOCUMENTS)[0].index == 1
    assert len(server.received) == 3


@pytest.mark.usefixtures("at_once")
async def test_a_server_that_is_not_there() -> None:
    with canned_server() as server:
        url = server.url
    async with RemoteReranker(url) as remote:
        with pytest.raises(BackendError, match=f"cannot reach {url}.*core-rerank serve"):
            await remote.arerank(QUERY, DOCUMENTS)
        with pytest.raises(BackendError, match="check base_url"):
            await asyncio.to_thread(remote.cache_documents, DOCUMENTS)


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, {"message": "bad", "error": None}, InvalidInputError, "answered 400: bad$"),
        (401, {"detail": "who?"}, InvalidInputError, "401: who.; pass the server's api_key"),
        (403, "forbidden", InvalidInputError, "403: forbidden; pass the server's api_key"),
        (404, "", InvalidInputError, "404: Not Found; check base_url"),
        (413, {"error": {"message": "too large"}}, InvalidInputError, "413: too large$"),
        (422, {"error": "no texts", "error_type": "V"}, InvalidInputError, "422: no texts$"),
        (422, {"detail": [{"msg": "a list"}]}, InvalidInputError, "422: .*a list"),
        (500, {"message": "oops"}, BackendError, "500: oops; see the server's log"),
        (504, {"message": "late"}, BackendError, "504: late"),
        (200, "<html>", BackendError, "did not answer with JSON, but with '<html>'"),
        (200, [{"index": 0, "score": 0.5}], BackendError, "not send the field `core_rerank`"),
        (
            200,
            {"results": [{"index": 0, "relevance_score": 0.5}]},
            BackendError,
            r"results.0.core_rerank: Field required.*Cohere, Jina",
        ),
        (200, reply([result(0, 0.5, evidence=[[0, 8, 1]])]), BackendError, "Field required"),
        (200, reply([result(3, 0.5)]), BackendError, r"documents \[3\] of a list of 3"),
        (200, reply([result(0, 1), result(0, 1)]), BackendError, r"documents \[0, 0\]"),
    ],
)
async def test_other_errors_are_not_tried_again(
    status: int,
    body: Any,
    kind: type[CoReError],
    message: str,
    server: CannedServer,
    remote: RemoteReranker,
) -> None:
    server.answers = 2 * [(status, {}, body)]
    with pytest.raises(kind, match=message):
        remote.rerank(QUERY, DOCUMENTS)
    with pytest.raises(kind, match=message):
        await remote.arerank(QUERY, DOCUMENTS)
    assert len(server.received) == 2


async def test_a_slow_server_is_given_up(server: CannedServer) -> None:
    go = threading.Event()

    def slow(request: Received, handler: Handler) -> Any:
        go.wait(20)
        return answered(request, handler)

    server.answers = [slow, slow]
    with RemoteReranker(server.url, timeout=0.2) as remote:
        with pytest.raises(BackendError, match=r"did not answer within 0\.2 s: raise timeout"):
            remote.rerank(QUERY, DOCUMENTS)
        with pytest.raises(BackendError, match=r"within 0\.2 s"):
            await remote.arerank(QUERY, DOCUMENTS)
    assert len(server.received) == 2, "it is not tried again"
    go.set()


def test_other_statuses_are_errors(server: CannedServer, remote: RemoteReranker) -> None:
    server.answers = [(304, {}, "")]
    with pytest.raises(BackendError, match="answered 304"):
        remote.rerank(QUERY, DOCUMENTS)


@pytest.mark.usefixtures("at_once")
def test_the_key_is_seen_by_the_server_alone(
    server: CannedServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    echo = {"message": f"I got Bearer {KEY}"}
    with canned_server() as other, RemoteReranker(server.url, KEY) as remote:
        server.answers = [
            BUSY,
            (200, {}, reply([])),
            (401, {}, echo),
            (500, {}, echo),
            (307, {"Location": f"{other.url}/v1/rerank?more=1"}, ""),
            (308, {"Location": f"{other.url}/v1/rerank"}, ""),
        ]
        remote.rerank(QUERY, DOCUMENTS)
        for message in ["I got Bearer ...", "I got Bearer ...", *2 * ["redirects to 'http://.*'"]]:
            with pytest.raises(CoReError, match=message) as error:
                remote.rerank(QUERY, DOCUMENTS)
            assert KEY not in repr(error.value)
        assert {request.headers["authorization"] for request in server.received} == {
            f"Bearer {KEY}"
        }
        assert not other.received, "redirects are not followed"
        shown = [repr(remote), repr(remote.settings), str(dict(remote.settings)), caplog.text]
        assert not any(KEY in text for text in shown)
        assert "trying again" in caplog.text
        assert KEY.encode() not in pickle.dumps(remote)
        assert KEY not in remote.settings.model_dump_json()
        monkeypatch.setenv("CORE_RERANK_API_KEY", "from-the-environment")
        with pickle.loads(pickle.dumps(remote)) as copied:
            assert copied.settings.base_url == remote.settings.base_url
            copied.rerank(QUERY, DOCUMENTS)
        with RemoteReranker(server.url, "") as without:
            without.rerank(QUERY, DOCUMENTS)
    assert server.received[-2].headers["authorization"] == "Bearer from-the-environment"
    assert "authorization" not in server.received[-1].headers


async def test_calls_run_at_once_and_share_connections(
    server: CannedServer, remote: RemoteReranker
) -> None:
    together = threading.Barrier(12)

    def all_at_once(request: Received, handler: Handler) -> Any:
        together.wait(20)
        return answered(request, handler)

    server.answers = [all_at_once] * 12
    calls = [remote.arerank(QUERY, DOCUMENTS) for _ in range(12)]
    assert [results[0].index for results in await asyncio.gather(*calls)] == [1] * 12
    server.answers = [all_at_once] * 12
    batch = await asyncio.to_thread(remote.rerank_batch, [(QUERY, DOCUMENTS)] * 12)
    assert [results[0].index for results in batch] == [1] * 12
    assert len({request.connection for request in server.received}) == 12


def test_threads_event_loops_and_forks_share_one_reranker(
    server: CannedServer, remote: RemoteReranker
) -> None:
    async def best() -> int:
        return (await remote.arerank(QUERY, DOCUMENTS))[0].index

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: asyncio.run(best()), range(8)))
        found += pool.map(lambda _: remote.rerank(QUERY, DOCUMENTS)[0].index, range(8))
    assert found == [1] * 16
    with multiprocessing.get_context("fork").Pool(1) as processes:
        assert processes.apply(_best_of_fork, (server.url,)) == 1
    child = multiprocessing.get_context("fork").Process(target=_rank_and_exit, args=(remote,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert remote.rerank(QUERY, DOCUMENTS)[0].index == 1
    assert copy.deepcopy(remote) is remote


def _best_of_fork(url: str) -> int:
    with RemoteReranker(url) as remote:
        return remote.rerank(QUERY, DOCUMENTS)[0].index


def _rank_and_exit(remote: RemoteReranker) -> None:
    with remote:
        sys.exit(remote.rerank(QUERY, DOCUMENTS)[0].index - 1)


async def test_close_ends_waiting_calls(server: CannedServer) -> None:
    go, begun = threading.Event(), threading.Semaphore(0)

    def slow(request: Received, handler: Handler) -> Any:
        begun.release()
        go.wait(20)
        return answered(request, handler)

    server.answers = [slow, slow]
    remote = RemoteReranker(server.url)
    waiting = [
        asyncio.create_task(remote.arerank(QUERY, DOCUMENTS)),
        asyncio.create_task(asyncio.to_thread(remote.rerank, QUERY, DOCUMENTS)),
    ]
    for _ in waiting:
        assert await asyncio.to_thread(begun.acquire, timeout=20)
    remote.close()
    errors = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 20)
    assert {type(error) for error in errors} == {ClosedError}
    await remote.aclose()
    with pytest.raises(ClosedError, match="this RemoteReranker is closed; make a new one"):
        await remote.arerank(QUERY, DOCUMENTS)
    with pytest.raises(ClosedError):
        remote.rerank(QUERY, DOCUMENTS)
    assert not [thread for thread in threading.enumerate() if thread.name == "core-rerank-client"]
    go.set()


async def test_a_cancelled_call_hangs_up(server: CannedServer, remote: RemoteReranker) -> None:
    begun, ended = threading.Event(), threading.Event()

    def until_hung_up(_: Received, handler: Handler) -> None:
        begun.set()
        handler.connection.settimeout(20)
        if handler.connection.recv(1) == b"":
            ended.set()

    server.answers = [until_hung_up]
    call = asyncio.create_task(remote.arerank(QUERY, DOCUMENTS))
    assert await asyncio.to_thread(begun.wait, 20)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(ended.wait, 20)
    assert (await remote.arerank(QUERY, DOCUMENTS))[0].index == 1


def test_a_reranker_that_nobody_refers_to_ends_its_thread(server: CannedServer) -> None:
    remote = RemoteReranker(server.url)
    remote.rerank(QUERY, DOCUMENTS)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "core-rerank-client"]
    del remote
    thread.join(20)
    assert not thread.is_alive()


def test_lists_of_a_batch_share_its_time(server: CannedServer, remote: RemoteReranker) -> None:
    requests = [(QUERY, DOCUMENTS), ("the ferry", DOCUMENTS), ("recipe", [])]
    batch = remote.rerank_batch(requests, max_seconds=20, top_n=1)
    assert [[found.index for found in results] for results in batch] == [[1], [2], []]
    assert all(0 < body["max_seconds"] <= 20 for body in server.bodies)
    assert remote.rerank_batch([]) == []
    server.answers = [(422, {}, "no")]
    with pytest.raises(InvalidInputError, match="answered 422: no"):
        remote.rerank_batch([requests[0]] * 3)


@pytest.mark.usefixtures("at_once")
def test_an_attempt_has_the_time_that_is_left(server: CannedServer, remote: RemoteReranker) -> None:
    def busy(*_: Any) -> Any:
        time.sleep(0.2)
        return BUSY

    server.answers = [busy, busy]
    remote.rerank(QUERY, DOCUMENTS, max_seconds=20)
    first, second, third = (body["max_seconds"] for body in server.bodies)
    assert first <= 20
    assert second <= first - 0.2
    assert third <= second - 0.2


def test_parts_that_are_too_large_are_halved(server: CannedServer, remote: RemoteReranker) -> None:
    accepted: list[str] = []

    def limited(request: Received, handler: Handler) -> Any:
        documents = request.body["documents"]
        if len(documents) > 10 or "long" in documents:
            return 413, {}, {"message": "too large"}
        accepted.extend(documents)
        return answered(request, handler)

    server.answers = [limited] * 50
    documents = [f"{number}" for number in range(41)]
    assert remote.cache_documents(documents) == 410
    assert accepted == documents
    with pytest.raises(InvalidInputError, match="answered 413: too large"):
        remote.cache_documents(["a", "long", "b"])
    assert server.bodies[-1] == {"documents": ["long"]}


def test_documents_are_cached_in_parts(server: CannedServer, remote: RemoteReranker) -> None:
    documents = [*(f"{number}" for number in range(40)), "a" * 60_000, "b" * 60_000]
    assert remote.cache_documents(documents, show_progress=True) == 420
    assert {request.path for request in server.received} == {"/v1/documents"}
    assert [len(body["documents"]) for body in server.bodies] == [32, 9, 1]
    assert [text for body in server.bodies for text in body["documents"]] == documents
    assert remote.cache_documents([]) == 0
    server.answers = [(404, {}, {"message": "this server stores no documents"})]
    with pytest.raises(InvalidInputError, match="stores no documents"):
        remote.cache_documents(["a"])


IMPORTS = """
import sys
from langchain_core.documents import Document
from core_rerank_integrations import CoReDocumentCompressor, RemoteReranker

query, texts = "invented the telephone", ["a recipe", "Bell invented the telephone"]
with RemoteReranker(sys.argv[1]) as remote:
    remote.rerank(query, texts)
    remote.cache_documents(texts)
compressor = CoReDocumentCompressor(base_url=sys.argv[1])
compressor.compress_documents([Document(text) for text in texts], query)
compressor.close()
heavy = ["openvino", "safetensors", "tokenizers", "torch", "transformers", "vllm"]
print([name for name in heavy if name in sys.modules])
"""


def test_it_imports_no_library_that_runs_models(server: CannedServer) -> None:
    command = [sys.executable, "-c", IMPORTS, server.url]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "[]", found.stderr
    assert [request.path for request in server.received] == [
        "/v1/rerank",
        "/v1/documents",
        "/v1/rerank",
    ]
