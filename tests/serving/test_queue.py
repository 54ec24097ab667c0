"""Many clients at once: right answers, turns, places that are given back, and shutdown."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from support.servers import Running, running

from core_rerank_integrations import CoReReranker, InvalidInputError, RerankOptions
from core_rerank_integrations._internal.cancellation import check_cancelled
from core_rerank_integrations.method.windows import Candidates
from core_rerank_integrations.scorer import AttentionScorer
from core_rerank_integrations.serving.guard import HELD_BODIES
from core_rerank_integrations.serving.metrics import Metrics
from core_rerank_integrations.serving.queue import BATCH_DOCUMENTS, RequestQueue

CLOSE = {"rel": 1e-3, "abs": 1e-5}


class Held(AttentionScorer):
    """Reads only while it is let, and notes the number of documents of each list of a batch."""

    def __init__(self, scorer: AttentionScorer) -> None:
        super().__init__(scorer.encoder, scorer.backend)
        self.let = threading.Event()
        self.let.set()
        self.batches: list[list[int]] = []
        self.cancelled = 0

    def score(self, lists, *arguments: Any, **options: Any):
        self.batches.append([len(one.documents) for one in lists])
        while not self.let.wait(0.01):
            try:
                check_cancelled()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return super().score(lists, *arguments, **options)


@pytest.fixture
def held(default: CoReReranker) -> Held:
    return Held(default.scorer)


@pytest.fixture
def slow(held: Held) -> Iterator[Running]:
    limits = {"max_waiting": 3, "shutdown_seconds": 20}
    with running(lambda: CoReReranker.from_scorer(held), **limits) as server:
        server.wait_until_ready()
        held.batches.clear()
        yield server
        held.let.set()


def figure(server: Running, name: str) -> float:
    found = re.search(rf"^{name} (.+)$", server.client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.commands
def test_sixteen_clients_get_their_own_answers(server: Running, default: CoReReranker) -> None:
    lists = [
        (f"Which town number {n}?", [f"Town {n} has {m} streets." for m in range(1 + n % 5)])
        for n in range(32)
    ]
    expected = default.rerank_batch(lists)

    def ask(item: tuple[str, list[str]]) -> list[dict[str, Any]]:
        body = {"query": item[0], "documents": item[1]}
        response = httpx.post(f"{server.url}/v2/rerank", json=body, timeout=120)
        assert response.status_code == 200, response.text
        return response.json()["results"]

    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(ask, lists))
    for rows, results in zip(replies, expected, strict=True):
        found = {row["index"]: row["core_rerank"]["score"] for row in rows}
        assert found == pytest.approx({r.index: r.score for r in results}, **CLOSE)


def test_metrics_say_how_many_documents_were_known(server: Running) -> None:
    documents = [f"Village {n} has a mill." for n in range(5)]

    def counted() -> tuple[float, float]:
        body = {"query": "Who has a mill?", "documents": documents}
        assert server.client.post("/rerank", json=body).status_code == 200
        names = ("core_rerank_asked_documents_total", "core_rerank_known_documents_total")
        asked, known = (figure(server, name) for name in names)
        return asked, known

    asked, known = counted()
    assert counted() == (asked + 5, known + 5)


@pytest.mark.commands
def test_a_long_list_in_parts_is_what_the_library_returns(
    server: Running, default: CoReReranker
) -> None:
    documents = [f"Town {n} has {n % 7} streets and a mayor." for n in range(100)]
    body = {"query": "Which town has six streets?", "documents": documents}
    options = {"first_stage": "dense", "top_n": 30, "evidence": True}
    reply = server.client.post("/v2/rerank", json=body | options).json()
    results = default.rerank(body["query"], documents, **options)
    assert [row["core_rerank"]["score"] for row in reply["results"]] == pytest.approx(
        [result.score for result in results], **CLOSE
    )
    assert reply["core_rerank"]["answerability"] == pytest.approx(results.answerability, **CLOSE)
    assert reply["results"][0]["core_rerank"]["evidence"]


@pytest.mark.commands
def test_requests_are_read_together_and_a_long_one_lets_others_pass(
    slow: Running, held: Held
) -> None:
    held.let.clear()
    documents = [f"Town {n} has a mayor." for n in range(60)]
    finished = []

    def ask(name: str, some: list[str]) -> None:
        body = {"query": "Who has a mayor?", "documents": some}
        assert httpx.post(f"{slow.url}/rerank", json=body, timeout=120).status_code == 200
        finished.append(name)

    with ThreadPoolExecutor(3) as pool:
        pool.submit(ask, "long", documents)
        wait_for(lambda: len(held.batches) == 1)
        pool.submit(ask, "short", documents[:20])
        pool.submit(ask, "short", documents[:25])
        wait_for(lambda: figure(slow, "core_rerank_waiting_requests") == 3)
        held.let.set()
    assert finished == ["short", "short", "long"]
    assert sorted(held.batches[1]) == [20, 25], "both are about the same 25, and wait for one part"
    parts = [batch for batch in held.batches if sorted(batch) != [20, 25]]
    assert all(len(batch) == 1 for batch in parts)
    assert sum(map(sum, parts)) == 60
    assert len(parts) > 1
    assert figure(slow, "core_rerank_waiting_requests") == 0


def test_a_full_queue_and_a_client_that_hangs_up(slow: Running, held: Held) -> None:
    held.let.clear()
    body = {"query": "q", "documents": ["a"]}
    with ThreadPoolExecutor(3) as pool:

        def ask(seconds: float) -> int:
            try:
                return httpx.post(f"{slow.url}/rerank", json=body, timeout=seconds).status_code
            except httpx.ReadTimeout:
                return 0

        staying = [pool.submit(ask, 60) for _ in range(2)]
        wait_for(lambda: figure(slow, "core_rerank_waiting_requests") == 2)
        leaving = pool.submit(ask, 1.5)
        wait_for(lambda: figure(slow, "core_rerank_waiting_requests") == 3)
        full = slow.client.post("/rerank", json=body)
        assert full.status_code == 429
        assert full.headers["retry-after"] == "1"
        assert full.json()["error"]["type"] == "rate_limit_error"
        tei = slow.client.post("/rerank", json={"query": "q", "texts": ["a"]})
        assert (tei.status_code, tei.json()["error_type"]) == (429, "Overloaded")
        assert leaving.result() == 0
        wait_for(lambda: figure(slow, "core_rerank_waiting_requests") == 2)
        held.let.set()
        assert [future.result() for future in staying] == [200, 200]
    assert slow.client.post("/rerank", json=body).status_code == 200
    assert 'status="499"' in slow.client.get("/metrics").text


def test_a_batch_that_nobody_waits_for_ends(slow: Running, held: Held) -> None:
    held.let.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{slow.url}/rerank", json={"query": "q", "documents": ["a"]}, timeout=0.5)
    wait_for(lambda: held.cancelled == 1)
    held.let.set()
    assert slow.client.post("/rerank", json={"query": "q", "documents": ["a"]}).status_code == 200


def test_an_error_of_one_request_is_not_that_of_others(slow: Running, held: Held) -> None:
    held.let.clear()
    with ThreadPoolExecutor(3) as pool:

        def ask(query: str) -> int:
            body = {"query": query, "documents": ["a"]}
            return httpx.post(f"{slow.url}/rerank", json=body, timeout=60).status_code

        first = pool.submit(ask, "first")
        wait_for(lambda: len(held.batches) == 1)
        asked = [pool.submit(ask, query) for query in ("fine", "word " * 2000)]
        wait_for(lambda: figure(slow, "core_rerank_waiting_requests") == 3)
        held.let.set()
        assert first.result() == 200
        assert [future.result() for future in asked] == [200, 422]


def test_the_time_of_a_request_ends(default: CoReReranker) -> None:
    held = Held(default.scorer)
    with running(lambda: CoReReranker.from_scorer(held), max_request_seconds=0.5) as server:
        server.wait_until_ready()
        held.let.clear()
        response = server.client.post("/rerank", json={"query": "q", "documents": ["a"]})
        assert response.status_code == 504
        held.let.set()
        assert figure(server, "core_rerank_waiting_requests") == 0


def test_a_time_budget_includes_waiting(slow: Running, held: Held) -> None:
    held.let.clear()
    documents = [f"Town {n} has a mayor." for n in range(60)]
    body = {"query": "Who?", "documents": documents, "max_seconds": 0.3}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{slow.url}/rerank", json=body, timeout=60)
        time.sleep(0.6)
        held.let.set()
        rows = asked.result().json()["results"]
    assert len(rows) == 60
    read = [row["core_rerank"]["reranked"] for row in rows]
    assert read[0]
    assert not read[-1]
    assert read == sorted(read, reverse=True)


def test_a_request_whose_time_ends_before_its_turn_is_answered(slow: Running, held: Held) -> None:
    held.let.clear()
    body = {"query": "q", "documents": ["a"]}
    hurried = {"query": "Who?", "documents": ["b", "c"], "max_seconds": 0.2}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{slow.url}/rerank", json=body, timeout=60)
        try:
            wait_for(lambda: held.batches == [[1]])
            reply = httpx.post(f"{slow.url}/rerank", json=hurried, timeout=30).json()
            assert figure(slow, "core_rerank_waiting_requests") == 1
            assert not first.done()
        finally:
            held.let.set()
        assert first.result().status_code == 200
    assert [row["index"] for row in reply["results"]] == [0, 1]
    assert not any(row["core_rerank"]["reranked"] for row in reply["results"])
    assert reply["core_rerank"]["answerability"] is None
    assert reply["core_rerank"]["answerable"] is None
    assert slow.client.post("/rerank", json=body).status_code == 200
    assert held.batches == [[1], [1]], "nothing of it was read"


def test_small_requests_of_unknown_length_find_room(held: Held) -> None:
    limits = {"max_waiting": HELD_BODIES + 1}
    with (
        running(lambda: CoReReranker.from_scorer(held), **limits) as server,
        ThreadPoolExecutor(HELD_BODIES + 1) as pool,
    ):
        server.wait_until_ready()
        held.let.clear()

        def ask() -> int:
            body = iter([b'{"query":"q",', b'"documents":["a"]}'])
            headers = {"content-type": "application/json"}
            url = f"{server.url}/rerank"
            return httpx.post(url, content=body, headers=headers, timeout=120).status_code

        waiting = "core_rerank_waiting_requests"
        asked: list[Future[int]] = []
        try:
            for _ in range(HELD_BODIES + 1):
                asked.append(pool.submit(ask))
                wait_for(lambda: asked[-1].done() or figure(server, waiting) == len(asked))
        finally:
            held.let.set()
        assert [future.result() for future in asked] == [200] * len(asked)


def test_shutdown_answers_what_runs(held: Held) -> None:
    with running(lambda: CoReReranker.from_scorer(held)) as server, ThreadPoolExecutor(1) as pool:
        server.wait_until_ready()
        held.let.clear()
        body = {"query": "q", "documents": ["a"]}
        asked = pool.submit(httpx.post, f"{server.url}/rerank", json=body, timeout=60)
        wait_for(lambda: figure(server, "core_rerank_waiting_requests") == 1)
        with httpx.Client(base_url=server.url) as kept:
            kept.get("/health")
            server.server.handle_exit(signal.SIGTERM, None)
            server.server.should_exit = False  # Sockets stay open for what follows.
            refused = kept.post("/rerank", json=body)
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert kept.get("/ready").status_code == 503
        server.server.stop()
        time.sleep(0.3)
        held.let.set()
        assert asked.result().status_code == 200


def test_shutdown_ends_what_takes_too_long(held: Held) -> None:
    load = lambda: CoReReranker.from_scorer(held)  # noqa: E731
    with running(load, shutdown_seconds=1) as server, ThreadPoolExecutor(1) as pool:
        server.wait_until_ready()
        held.let.clear()
        body = {"query": "q", "documents": ["a"]}
        asked = pool.submit(httpx.post, f"{server.url}/rerank", json=body, timeout=60)
        wait_for(lambda: figure(server, "core_rerank_waiting_requests") == 1)
        server.server.stop()
        reply = asked.result()
        held.let.set()
        assert reply.status_code == 503
        assert "stopped" in reply.json()["message"]
        assert "retry-after" in reply.headers


async def test_lists_of_heads_that_read_several_documents_per_prompt_are_not_divided(
    reranker: CoReReranker,
) -> None:
    held = Held(reranker.scorer)
    listwise = CoReReranker.from_scorer(held, reranker.model, reranker.heads)
    queue = RequestQueue(listwise, Metrics(), 8)
    documents = tuple(f"Town {n} has a mayor." for n in range(BATCH_DOCUMENTS + 8))
    ranked = await queue.rank(Candidates("Who?", documents), RerankOptions())
    assert held.batches == [[len(documents)]]
    expected = [result.index for result in listwise.rerank("Who?", documents)]
    assert [result.index for result in ranked.results] == expected
    assert ranked.tokens > 0
    with pytest.raises(InvalidInputError, match="documents_per_prompt=1"):
        await queue.store(documents)
    with pytest.raises(InvalidInputError, match="not calibrated"):
        await queue.rank(Candidates("Who?", documents), RerankOptions(score_threshold=0.5))
    await queue.close()
