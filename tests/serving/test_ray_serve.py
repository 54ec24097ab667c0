"""The server on Ray Serve, with replicas of the default model; `make test-ray`."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.ray_processes import processes

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.errors import InvalidInputError

pytestmark = [pytest.mark.ray, pytest.mark.model, pytest.mark.filterwarnings("ignore")]

REPLICA = "ray::ServeReplica"
QUERIES = ("Who patented the telephone?", "What is bread made of?", "Which city is the capital?")
DOCUMENTS = tuple(
    f"{text} This is sentence {number}."
    for number in range(4)
    for text in (
        "Bell patented the telephone.",
        "Bread is made of flour.",
        "Canberra is a capital.",
    )
)
SECONDS = 300


class Service:
    """The server on a Ray cluster with one address.

    Args:
        folder: Folder of stored documents.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.client = httpx.Client(base_url="http://127.0.0.1:8765", timeout=SECONDS)

    def deploy(self, **args: Any) -> None:
        from ray import serve

        from core_rerank_integrations.serving.ray import app

        serve.delete("default")  # A replacement beside it has no processors here.
        serve.run(app({"dtype": "float32", "folder": str(self._folder)} | args))

    def scores(self, query: str) -> list[float] | None:
        """Return the scores in the order of the documents; ``None`` for an error."""
        try:
            reply = self.client.post("/rerank", json={"query": query, "documents": DOCUMENTS})
        except httpx.TransportError:
            return None
        if reply.status_code != 200:
            assert reply.status_code >= 429
            return None
        results = sorted(reply.json()["results"], key=lambda result: result["index"])
        return [result["core_rerank"]["score"] for result in results]

    def figure(self, name: str) -> dict[str, float]:
        """Return a figure of each replica, as Ray publishes it."""
        import ray

        (node,) = ray.nodes()
        text = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}").text
        found = re.findall(rf'^ray_{name}{{.*replica="(\w+)".*}} (\S+)$', text, re.MULTILINE)
        return {replica: float(value) for replica, value in found}


@pytest.fixture(scope="module")
def service(
    ray_cluster: None,  # noqa: ARG001
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    from ray import serve

    serve.start(http_options={"port": 8765})
    service = Service(tmp_path_factory.mktemp("documents"))
    yield service
    service.client.close()
    serve.shutdown()


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    with CoReReranker(dtype="float32") as reranker:
        return {
            query: pytest.approx(reranker.score(query, DOCUMENTS), abs=1e-4) for query in QUERIES
        }


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"other": "x", "max_waiting": "3"}, "unknown arguments: max_waiting, other; known are"),
        ({"replicas": "none"}, "replicas: .*got 'none'"),
        ({"replicas": "3", "max_replicas": "2"}, "max_replicas=2 is less than replicas=3"),
        ({"backend": "gpu"}, "backend: "),
        ({"max_documents": 0}, "max_documents: "),
    ],
)
def test_arguments_are_checked(args: dict[str, Any], message: str) -> None:
    from core_rerank_integrations.serving.ray import app

    with pytest.raises(InvalidInputError, match=message):
        app(args)


def test_what_ray_is_told() -> None:
    from core_rerank_integrations.serving.ray import app

    built = app({"max_replicas": "3", "num_cpus": "4", "num_gpus": "0.5", "shutdown_seconds": "7"})
    deployment = built._bound_deployment
    options = deployment.ray_actor_options
    assert (options["num_cpus"], options["num_gpus"]) == (4, 0.5)
    assert options["runtime_env"]["env_vars"] == {"OMP_NUM_THREADS": "4"}
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 7


def test_one_replica(service: Service, expected: dict[str, Any]) -> None:
    service.deploy(num_cpus=2)
    (replica,) = processes(REPLICA)
    assert replica.environ()["OMP_NUM_THREADS"] == "2"
    for query in QUERIES:
        assert service.scores(query) == expected[query]
    assert service.client.get("/ready").json() == {"status": "ready"}
    assert service.client.post("/rerank", json={"texts": []}).json()["error_type"] == "Validation"


def test_what_one_replica_reads_ahead_both_know(service: Service, expected: dict[str, Any]) -> None:
    service.deploy(replicas=2)
    assert len(processes(REPLICA)) == 2
    reply = service.client.post("/v1/documents", json={"documents": DOCUMENTS})
    assert reply.json()["bytes_written"] > 0
    lists = 1  # Of DOCUMENTS.
    while lists < 10 or len(service.figure("core_rerank_known_documents_total")) < 2:
        with ThreadPoolExecutor() as threads:
            scores = list(threads.map(service.scores, QUERIES))
        assert scores == [expected[query] for query in QUERIES]
        lists += len(QUERIES)
    eventually(
        lambda: (
            sum(service.figure("core_rerank_documents_total").values()) == lists * len(DOCUMENTS)
        )
    )
    for replica, asked in service.figure("core_rerank_asked_documents_total").items():
        assert asked >= 2 + len(DOCUMENTS)
        # At its start each replica ranks two documents as a test, and these are new.
        assert service.figure("core_rerank_known_documents_total")[replica] == asked - 2


@contextmanager
def load(service: Service, expected: dict[str, Any]) -> Iterator[list[list[float] | None]]:
    """Ask from six threads until the block ends, and check the answers.

    Yields:
        The scores of each answer; ``None`` for an error.
    """
    stop = threading.Event()
    answers: list[list[float] | None] = []

    def ask(number: int) -> None:
        while not stop.is_set():
            query = QUERIES[number % len(QUERIES)]
            scores = service.scores(query)
            assert scores is None or scores == expected[query]
            answers.append(scores)
            number += 1

    with ThreadPoolExecutor(6) as threads:
        asking = [threads.submit(ask, number) for number in range(6)]
        try:
            yield answers
        finally:
            stop.set()
        for thread in asking:
            thread.result()


def test_a_killed_replica_comes_back(service: Service, expected: dict[str, Any]) -> None:
    """On the two replicas of the test before."""
    killed, *_ = processes(REPLICA)
    with load(service, expected) as answers:
        eventually(lambda: len(answers) > 6)
        killed.kill()
        before = len(answers)
        eventually(lambda: len(answers) > before + 20)
        eventually(lambda: len(processes(REPLICA)) == 2)
    assert killed.pid not in {replica.pid for replica in processes(REPLICA)}
    assert None not in answers[-3:]
    for query in QUERIES:
        assert service.scores(query) == expected[query]


def test_a_replica_is_added_under_load(service: Service, expected: dict[str, Any]) -> None:
    before = set(service.figure("core_rerank_documents_total"))
    service.deploy(max_replicas=2, target_ongoing_requests=1)
    assert len(processes(REPLICA)) == 1

    def answering() -> set[str]:
        # At its start each replica ranks two documents as a test.
        documents = service.figure("core_rerank_documents_total")
        return {replica for replica, count in documents.items() if count > 2} - before

    with load(service, expected) as answers:
        eventually(lambda: len(answering()) == 2)
    assert None not in answers


def test_a_full_queue(service: Service, expected: dict[str, Any]) -> None:
    service.deploy(max_ongoing_requests=2, max_queued_requests=10, shutdown_seconds=SECONDS)

    def ask(number: int) -> httpx.Response:
        query = QUERIES[number % 3]
        body = {"query": query, "documents": DOCUMENTS}
        if number % 2:
            body = {"query": query, "texts": DOCUMENTS}
        return service.client.post("/rerank", json=body)

    with ThreadPoolExecutor(40) as threads:
        replies = list(threads.map(ask, range(40)))
    refused = [reply for reply in replies if reply.status_code != 200]
    assert 2 <= len(refused) < 40
    assert {(reply.status_code, reply.headers["Retry-After"]) for reply in refused} == {(429, "1")}
    # Replicas refuse in the words of their clients; Ray itself, if its own queue is full, in text.
    own = [reply.json() for reply in refused if "json" in reply.headers["content-type"]]
    assert {"message", "detail", "error"} in map(set, own)
    assert {"error": own[0].get("message", own[0]["error"]), "error_type": "Overloaded"} in own
    assert service.scores(QUERIES[0]) == expected[QUERIES[0]]


def test_what_runs_is_answered_before_the_end(service: Service) -> None:
    """On the replica of the test before."""
    from ray import serve

    texts = [f"{text} {number}" for number in range(10) for text in DOCUMENTS]
    with ThreadPoolExecutor() as threads:
        body = {"query": QUERIES[0], "texts": texts}
        asking = threads.submit(service.client.post, "/rerank", json=body)
        time.sleep(0.5)
        assert not asking.done()
        serve.delete("default")
        assert len(asking.result().json()) == len(texts)


def test_a_model_that_cannot_be_loaded_is_named(service: Service, tmp_path: Path) -> None:
    from ray import serve

    with pytest.raises(RuntimeError, match="RerankReplica"):
        service.deploy(model=str(tmp_path))
    (deployment,) = serve.status().applications["default"].deployments.values()
    assert str(tmp_path) in deployment.message
