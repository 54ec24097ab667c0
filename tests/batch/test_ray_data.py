"""Lists and runs on Ray Data, with the default model; `make test-ray`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ray_processes import processes

from core_rerank_integrations import CoReReranker, RerankOptions
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.batch import PoolOptions, RunOptions, rerank_run
from core_rerank_integrations.errors import BackendError, InvalidInputError
from core_rerank_integrations.research.collection import Collection, Run, load_scored_run
from core_rerank_integrations.settings import RerankerSettings

pytestmark = [
    pytest.mark.ray,
    pytest.mark.model,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's, of its own settings.
]

SETTINGS = RerankerSettings(dtype="float32")
DEMO = resource_folder("examples/data")
CANDIDATES = 5


@pytest.fixture(scope="module")
def collection() -> Collection:
    return Collection.unjudged(DEMO / "corpus.jsonl", DEMO / "queries.jsonl")


@pytest.fixture(scope="module")
def candidates(collection: Collection) -> Run:
    documents = list(collection.passages)
    return {
        query: [documents[(3 * index + rank) % len(documents)] for rank in range(CANDIDATES)]
        for index, query in enumerate(collection.queries)
    }


@pytest.fixture(scope="module")
def default() -> Iterator[CoReReranker]:
    with CoReReranker(**dict(SETTINGS)) as reranker:
        yield reranker


@pytest.fixture
def run(tmp_path: Path, candidates: Run) -> RunOptions:
    (tmp_path / "in.trec").write_text(
        "".join(
            f"{query} Q0 {document} {rank} {-rank} bm25\n"
            for query, documents in candidates.items()
            for rank, document in enumerate(documents, start=1)
        )
    )
    return RunOptions(
        run=tmp_path / "in.trec",
        corpus=DEMO,
        output=tmp_path / "out.trec",
        replicas=2,
        lists_per_batch=1,
    )


def test_a_dataset(collection: Collection, candidates: Run, default: CoReReranker) -> None:
    import ray

    from core_rerank_integrations.batch import rerank_dataset

    rows = [
        {"id": query, "query": text, "documents": list(documents)}
        for query, (text, documents, _) in (
            (query, collection.candidates(query, documents))
            for query, documents in list(candidates.items())[:6]
        )
    ]
    options = RerankOptions(top_n=3, evidence=True)
    pool = PoolOptions(replicas=1, lists_per_batch=4)
    with pytest.raises(InvalidInputError, match="no column documents"):
        rerank_dataset(ray.data.from_items([{"query": "q", "texts": []}]))
    dataset = rerank_dataset(ray.data.from_items(rows), SETTINGS, options, pool)
    found = {row["id"]: row for row in dataset.take_all()}
    assert len(found) == len(rows)
    for row in rows:
        expected = default.rerank(row["query"], row["documents"], top_n=3, evidence=True)
        answer = found[row["id"]]
        assert answer["documents"] == row["documents"]
        assert answer["answerability"] == pytest.approx(expected.answerability, abs=1e-4)
        for result, wanted in zip(answer["results"], expected, strict=True):
            assert result["index"] == wanted.index
            assert result["score"] == pytest.approx(wanted.score, abs=1e-4)
            assert result["probability"] == pytest.approx(wanted.probability, abs=1e-4)
            (best, *_), (wanted_best, *_) = result["evidence"], wanted.evidence
            assert (best["start"], best["stop"]) == (wanted_best.start, wanted_best.stop)


def test_a_killed_worker_loses_and_repeats_nothing(
    run: RunOptions, collection: Collection, candidates: Run, default: CoReReranker
) -> None:
    killed = []

    def kill() -> None:
        journal = run.output.with_name("out.trec.unfinished")
        while not journal.exists() or journal.read_text().count("\n") < 3:  # Two finished queries.
            time.sleep(0.005)
        worker = processes("ray::MapWorker")[0]
        worker.kill()
        killed.append(worker.pid)

    killing = threading.Thread(target=kill)
    killing.start()
    rerank_run(run, SETTINGS)
    killing.join()
    assert killed
    found = load_scored_run(run.output, collection)  # Refuses a document that is there twice.
    assert list(found) == list(candidates)
    for query, documents in candidates.items():
        text, texts, _ = collection.candidates(query, documents)
        expected = dict(zip(documents, default.score(text, texts), strict=True))
        assert dict(found[query]) == pytest.approx(expected, abs=1e-4)


def test_half_a_character_is_read(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(r'{"_id": "d1", "text": "Bell \ud83d patented"}')
    (tmp_path / "queries.jsonl").write_text(r'{"_id": "q1", "text": "who patented \ud83d"}')
    (tmp_path / "in.trec").write_text("q1 Q0 d1 1 1.0 bm25\n")
    one = RunOptions(run=tmp_path / "in.trec", corpus=tmp_path, output=tmp_path / "one.trec")
    rerank_run(one, SETTINGS)
    ray = one.model_copy(update={"output": tmp_path / "ray.trec", "replicas": 1})
    rerank_run(ray, SETTINGS)
    assert ray.output.read_text().split()[:4] == one.output.read_text().split()[:4]


@pytest.fixture
def no_logs() -> Iterator[None]:
    """Log nothing: pytest would keep the logged error of Ray, and what it refers to."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("no_logs")
def test_the_reason_of_a_failure_is_named_and_its_process_ends(
    run: RunOptions, tmp_path: Path
) -> None:
    one = run.model_copy(update={"replicas": 1})
    with pytest.raises(BackendError, match=r"^query '\w+': the query takes .*max_query_tokens"):
        rerank_run(one, SETTINGS.model_copy(update={"max_query_tokens": 2}))
    end = time.monotonic() + 10
    while processes("ray::MapWorker"):
        assert time.monotonic() < end, "it keeps its processor"
        time.sleep(0.1)
    one.output = tmp_path / "other.trec"
    with pytest.raises(BackendError, match=str(tmp_path)) as failed:
        rerank_run(one, RerankerSettings(model=tmp_path))
    assert "\n" not in str(failed.value)
