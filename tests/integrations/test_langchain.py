from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_tests.integration_tests import RetrieversIntegrationTests
from pydantic import ValidationError
from support.head_sets import CALIBRATED, HEADS

from core_rerank_integrations import (
    CoReDocumentCompressor,
    CoReDocumentIndexer,
    CoReReranker,
    CoReRetriever,
    DocumentCache,
    create_reranked_search_tool,
)
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.models.local_model import LocalModel

QUERY = "Who patented the telephone?"
DOCUMENTS = [
    Document("Bread is baked from flour.", id="bread", metadata={"page": 1}),
    Document("Bell patented the telephone in 1876.", id="bell", metadata={"tags": ["a"]}),
    Document("March is often wet.", metadata={"relevance_score": "mine", "page": 3}),
    Document("Edison patented the phonograph.", id="edison"),
]


class FixedRetriever(BaseRetriever):
    """Stands for a vector store."""

    documents: list[Document] = DOCUMENTS

    def _get_relevant_documents(self, _: str, **__: Any) -> list[Document]:
        return self.documents


@pytest.fixture(scope="module")
def compressor(reranker: CoReReranker) -> CoReDocumentCompressor:
    return CoReDocumentCompressor(reranker=reranker, top_n=3)


def test_order_scores_ids_and_metadata(compressor: CoReDocumentCompressor) -> None:
    before = [document.model_copy(deep=True) for document in DOCUMENTS]
    compressed = compressor.compress_documents(DOCUMENTS, QUERY)
    assert before == DOCUMENTS
    assert compressed[0].id == "bell"
    assert len(compressed) == 3
    scores = [document.metadata["relevance_score"] for document in compressed]
    assert scores == sorted(scores, reverse=True)
    assert all(type(score) is float for score in scores)
    assert compressed[0].metadata["tags"] == ["a"]
    assert compressed[0].page_content == DOCUMENTS[1].page_content


def test_the_order_of_a_first_stage_counts_by_default(smollm2: LocalModel) -> None:
    heavy = HEADS.with_scoring(rank_weight=100.0)
    texts = [document.page_content for document in DOCUMENTS]
    with CoReReranker(smollm2.path, heads=heavy) as shared:
        for own in ({"model": smollm2.path, "heads": heavy}, {"reranker": shared}):
            kept = CoReDocumentCompressor(**own).compress_documents(DOCUMENTS, QUERY)
            assert [document.page_content for document in kept] == texts
            unordered = CoReDocumentCompressor(**own, first_stage=None)
            assert unordered.compress_documents(DOCUMENTS, QUERY)[0].id == "bell"


FILLER = "The harbour was quiet and nobody came. "
LONG = Document(f"{FILLER * 8}{DOCUMENTS[1].page_content} {FILLER * 8}", id="long")


def test_probabilities_stand_beside_the_scores(calibrated: CoReReranker) -> None:
    compressor = CoReDocumentCompressor(reranker=calibrated, first_stage=None)
    found = {d.id: d.metadata for d in compressor.compress_documents([*DOCUMENTS, LONG], QUERY)}
    probabilities = {key: metadata["core_rerank"]["probability"] for key, metadata in found.items()}
    assert all(0 < probability < 1 for probability in probabilities.values())
    by_hand = calibrated.rerank(QUERY, [DOCUMENTS[1].page_content])[0]
    assert probabilities["bell"] == pytest.approx(by_hand.probability, abs=1e-5)
    assert found["bell"]["relevance_score"] == pytest.approx(by_hand.score, abs=1e-5)

    start, stop = found["long"]["core_rerank"]["best_passage"]
    assert "telephone" in LONG.page_content[start:stop]
    assert "best_passage" not in found["bell"]["core_rerank"]
    half = CoReDocumentCompressor(reranker=calibrated, score_threshold=probabilities["bell"] - 1e-6)
    assert "bell" in [document.id for document in half.compress_documents(DOCUMENTS, QUERY)]


def test_metadata_of_the_user_stays(reranker: CoReReranker) -> None:
    mine = dict.fromkeys(
        ("probability", "score", "reranked", "best_passage", "evidence", "extracted"), "mine"
    )
    documents = [d.model_copy(update={"metadata": {**d.metadata, **mine}}) for d in DOCUMENTS]
    before = [document.model_copy(deep=True) for document in documents]
    cutting = CoReDocumentCompressor(reranker=reranker, evidence=True, extract=1.0)
    ranked = cutting.compress_documents(documents, QUERY)
    assert documents == before
    for document in ranked:
        assert document.metadata.keys() - {"page", "tags"} == {
            "relevance_score", "core_rerank", *mine
        }  # fmt: skip
        assert {key: document.metadata[key] for key in mine} == mine
        assert json.loads(json.dumps(document.metadata)) == document.metadata
    again = CoReDocumentCompressor(reranker=reranker).compress_documents(ranked, QUERY)
    assert again[0].metadata["core_rerank"] == {"probability": None, "reranked": True}


@pytest.mark.parametrize("limit", [{}, {"max_seconds": 1e-9}, {"max_seconds": 1e-9, "top_n": 3}])
def test_scores_fall_along_the_list(calibrated: CoReReranker, limit: dict[str, Any]) -> None:
    trusting = calibrated.heads.with_scoring(rank_weight=100.0)
    shared = CoReReranker.from_scorer(calibrated.scorer, calibrated.model, trusting)
    compressor = CoReDocumentCompressor(reranker=shared, **limit)
    ranked = compressor.compress_documents([*DOCUMENTS, *DOCUMENTS], QUERY)
    scores = [document.metadata["relevance_score"] for document in ranked]
    assert scores == sorted(set(scores), reverse=True), "no sorter changes the order"
    assert all(type(score) is float for score in scores)


def test_thresholds(reranker: CoReReranker, compressor: CoReDocumentCompressor) -> None:
    best = compressor.compress_documents(DOCUMENTS, QUERY)[0].metadata["relevance_score"]
    strict = CoReDocumentCompressor(reranker=reranker, min_score=best - 1e-6)
    assert [document.id for document in strict.compress_documents(DOCUMENTS, QUERY)] == ["bell"]
    uncalibrated = CoReDocumentCompressor(reranker=reranker, score_threshold=0.5)
    with pytest.raises(InvalidInputError, match="not calibrated; use min_score"):
        uncalibrated.compress_documents(DOCUMENTS, QUERY)


def test_async_gives_the_same(compressor: CoReDocumentCompressor) -> None:
    async def run() -> list[Any]:
        return await asyncio.gather(
            *(compressor.acompress_documents(DOCUMENTS, QUERY) for _ in range(3))
        )

    expected = compressor.compress_documents(DOCUMENTS, QUERY)
    for compressed in asyncio.run(run()):
        assert [d.page_content for d in compressed] == [d.page_content for d in expected]


def test_no_documents(compressor: CoReDocumentCompressor) -> None:
    assert compressor.compress_documents([], QUERY) == []


def test_in_a_retriever_and_a_pipeline(compressor: CoReDocumentCompressor) -> None:
    pipeline = DocumentCompressorPipeline(transformers=[compressor])
    for base_compressor in (compressor, pipeline):
        retriever = ContextualCompressionRetriever(
            base_compressor=base_compressor, base_retriever=FixedRetriever()
        )
        assert retriever.invoke(QUERY)[0].id == "bell"


def test_indexed_documents_pass_through_and_are_cached(smollm2: LocalModel, tmp_path: Path) -> None:
    cache = DocumentCache(folder=tmp_path)
    indexer = CoReDocumentIndexer(model=smollm2.path, heads=CALIBRATED, document_cache=cache)
    assert list(indexer.transform_documents(DOCUMENTS)) == DOCUMENTS
    assert list(asyncio.run(indexer.atransform_documents(DOCUMENTS))) == DOCUMENTS
    with CoReReranker(smollm2.path, heads=CALIBRATED, document_cache=cache) as ranking:
        texts = [document.page_content for document in DOCUMENTS]
        assert ranking.cache_documents(texts) == 0, "they are on disk already"
        shared = CoReDocumentIndexer(reranker=ranking)
        assert list(shared.transform_documents(DOCUMENTS)) == DOCUMENTS
        assert shared.heads == CALIBRATED


def test_documents_not_read_in_time_are_marked(calibrated: CoReReranker) -> None:
    hurried = CoReDocumentCompressor(reranker=calibrated, max_seconds=1e-9)
    first, *rest = hurried.compress_documents(DOCUMENTS, QUERY)
    assert first.id == "bread"
    assert first.metadata["core_rerank"]["reranked"]
    assert [document.page_content for document in rest] == [d.page_content for d in DOCUMENTS[1:]]
    for document in rest:
        assert document.metadata["core_rerank"] == {"probability": None, "reranked": False}
        assert document.metadata["relevance_score"] < first.metadata["relevance_score"]


class Recorder(BaseCallbackHandler):
    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.parents: list[UUID | None] = []

    def on_chain_start(self, *_: Any, name: str, parent_run_id: UUID | None, **__: Any) -> None:
        self.events.append(("start", name))
        self.parents.append(parent_run_id)

    def on_chain_end(self, outputs: Any, **_: Any) -> None:
        self.events.append(("end", len(outputs)))

    def on_chain_error(self, error: BaseException, **_: Any) -> None:
        self.events.append(("error", type(error)))


def test_a_run_of_its_own_in_traces(compressor: CoReDocumentCompressor) -> None:
    expected = [("start", "CoReDocumentCompressor"), ("end", 3)]
    recorder = Recorder()
    compressor.compress_documents(DOCUMENTS, QUERY, callbacks=[recorder])
    assert recorder.events == expected

    recorder = Recorder()
    asyncio.run(compressor.acompress_documents(DOCUMENTS, QUERY, callbacks=[recorder]))
    assert recorder.events == expected

    recorder = Recorder()
    with pytest.raises(InvalidInputError):
        compressor.compress_documents(DOCUMENTS, "", callbacks=[recorder])
    assert recorder.events == [("start", "CoReDocumentCompressor"), ("error", InvalidInputError)]

    recorder = Recorder()
    ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=FixedRetriever()
    ).invoke(QUERY, config={"callbacks": [recorder]})
    assert recorder.events == expected
    assert recorder.parents[0] is not None, "the run hangs below the retriever's"


@pytest.mark.parametrize(
    "fields",
    [
        {"top_n": 0},
        {"top_n": -1},
        {"documents_per_prompt": 0},
        {"min_score": float("nan")},
        {"topn": 3},
    ],
)
def test_invalid_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        CoReDocumentCompressor(**fields)


def test_no_model_is_loaded_before_it_is_needed() -> None:
    compressor = CoReDocumentCompressor(model="/nowhere/at/all")
    with pytest.raises(InvalidInputError, match="/nowhere/at/all"):
        compressor.compress_documents(DOCUMENTS, QUERY)


def test_a_shared_reranker_gives_the_fields_its_settings(reranker: CoReReranker) -> None:
    compressor = CoReDocumentCompressor(reranker=reranker)
    assert compressor.model == reranker.settings.model
    assert compressor.heads == reranker.settings.heads
    with pytest.raises(ValidationError, match="contradicts the given reranker"):
        CoReDocumentCompressor(reranker=reranker, dtype="bfloat16")


def test_a_shared_reranker_may_use_a_loaded_scorer(reranker: CoReReranker) -> None:
    own = CoReReranker.from_scorer(reranker.scorer, reranker.model, reranker.heads)
    compressor = CoReDocumentCompressor(reranker=own)
    assert compressor.compress_documents(DOCUMENTS, QUERY)[0].id == "bell"


def no_model(*_: Any, **__: Any) -> None:
    pytest.fail("a model is loaded")


def test_a_pickle_holds_the_settings_and_no_model(
    compressor: CoReDocumentCompressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = CoReDocumentCompressor(**compressor.model_dump())
    assert lazy.compress_documents(DOCUMENTS, QUERY)[0].id == "bell"
    with monkeypatch.context() as patch:
        patch.setattr(CoReReranker, "__init__", no_model)
        restored = pickle.loads(pickle.dumps(lazy))
    assert restored.model_dump() == lazy.model_dump() == compressor.model_dump()


def test_a_retriever_that_reranks(reranker: CoReReranker) -> None:
    retriever = CoReRetriever(retriever=FixedRetriever(), reranker=reranker, top_n=2)
    assert retriever.invoke(QUERY)[0].id == "bell"
    assert len(retriever.invoke(QUERY)) == 2
    assert len(asyncio.run(retriever.ainvoke(QUERY, k=3))) == 3

    recorder = Recorder()
    retriever.invoke(QUERY, config={"callbacks": [recorder]})
    assert recorder.events == [("start", "CoReReranker"), ("end", 2)]
    assert recorder.parents[0] is not None, "the run hangs below the retriever's"
    with pytest.raises(ValidationError, match="retriever"):
        CoReRetriever(reranker=reranker)


class FailingRetriever(FixedRetriever):
    def _get_relevant_documents(self, _: str, **__: Any) -> list[Document]:
        raise ConnectionError


def retrievers() -> dict[str, Any]:
    """Return what LangChain takes for a retriever."""
    documents = ConfigurableField("documents")
    return {
        "configurable fields": FixedRetriever(documents=[]).configurable_fields(
            documents=documents
        ),
        "with_config": FixedRetriever().with_config(tags=["inner"]),
        "fallbacks": FailingRetriever().with_fallbacks([FixedRetriever()]),
        "a function": RunnableLambda(lambda _: DOCUMENTS),
        "a chain": FixedRetriever() | (lambda documents: documents[::-1]),
        "a compressor": ContextualCompressionRetriever(
            base_compressor=DocumentCompressorPipeline(transformers=[]),
            base_retriever=FixedRetriever(),
        ),
    }


@pytest.mark.parametrize("name", retrievers())
def test_whatever_langchain_takes_for_a_retriever(reranker: CoReReranker, name: str) -> None:
    inner = retrievers()[name]
    recorder = Recorder()
    config: Any = {"configurable": {"documents": DOCUMENTS}, "callbacks": [recorder]}
    config |= {"run_name": "outer", "run_id": uuid4()}
    retriever = CoReRetriever(retriever=inner, reranker=reranker, top_n=2)
    assert retriever.invoke(QUERY, config)[0].id == "bell"
    assert ("start", "CoReReranker") in recorder.events
    assert None not in recorder.parents, "all runs hang below the retriever's"
    assert asyncio.run(retriever.ainvoke(QUERY, {**config, "run_id": None}))[0].id == "bell"
    del config["run_id"]
    (found,) = retriever.batch([QUERY], config)
    (afound,) = asyncio.run(retriever.abatch([QUERY], config))
    assert (found[0].id, afound[0].id) == ("bell", "bell")
    in_a_chain = retriever | (lambda documents: documents[0].id)
    assert in_a_chain.invoke(QUERY, config) == "bell"
    assert "".join(in_a_chain.stream(QUERY, config)) == "bell"

    tool = create_reranked_search_tool(inner, reranker=reranker, top_n=1)
    assert tool.invoke({"query": QUERY}, config) == DOCUMENTS[1].page_content
    assert asyncio.run(tool.ainvoke({"query": QUERY}, config)) == DOCUMENTS[1].page_content


def test_configurable_fields_share_one_model(
    smollm2: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = CoReRetriever(retriever=FixedRetriever(), model=smollm2.path, heads=HEADS)
    configurable = retriever.configurable_fields(top_n=ConfigurableField("n"))
    monkeypatch.setattr(CoReReranker, "__init__", no_model)
    for count in (1, 3):
        config: Any = {"configurable": {"n": count}}
        assert len(configurable.invoke(QUERY, config)) == count
        assert len(asyncio.run(configurable.ainvoke(QUERY, config))) == count
    assert len(configurable.invoke(QUERY)) == len(DOCUMENTS)
    retriever.close()


def test_an_asynchronous_function_as_a_retriever(reranker: CoReReranker) -> None:
    async def find(_: str) -> list[Document]:
        return DOCUMENTS

    retriever = CoReRetriever(retriever=RunnableLambda(find), reranker=reranker)
    assert asyncio.run(retriever.ainvoke(QUERY))[0].id == "bell"


@pytest.mark.parametrize("found", [["a text"], "a text", None, {"documents": DOCUMENTS}])
def test_what_a_retriever_must_return(reranker: CoReReranker, found: Any) -> None:
    retriever = CoReRetriever(retriever=RunnableLambda(lambda _: found), reranker=reranker)
    with pytest.raises(InvalidInputError, match="must be a list of Documents, got"):
        retriever.invoke(QUERY)


def test_a_search_tool_for_agents(reranker: CoReReranker) -> None:
    tool = create_reranked_search_tool(FixedRetriever(), reranker=reranker, top_n=1)
    assert list(tool.args) == ["query"]
    call = {"type": "tool_call", "id": "1", "name": tool.name, "args": {"query": QUERY}}
    for message in (tool.invoke(call), asyncio.run(tool.ainvoke(call))):
        assert message.content == "Bell patented the telephone in 1876."
        assert [document.id for document in message.artifact] == ["bell"]


class TestRetriever(RetrieversIntegrationTests):
    """LangChain's own tests for retrievers."""

    @pytest.fixture(autouse=True)
    def _share_reranker(self, reranker: CoReReranker) -> None:
        type(self)._reranker = reranker

    @property
    def retriever_constructor(self) -> Any:
        def build(k: int | None = None) -> CoReRetriever:
            return CoReRetriever(retriever=FixedRetriever(), reranker=self._reranker, top_n=k)

        return build

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {}

    @property
    def retriever_query_example(self) -> str:
        return QUERY
