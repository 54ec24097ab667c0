from __future__ import annotations

import asyncio
import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from llama_index.core import Settings
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import LongContextReorder, SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MetadataMode,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from pydantic import Field, ValidationError
from support.head_sets import CALIBRATED, HEADS

from core_rerank_integrations import (
    CoReNodeIndexer,
    CoReNodePostprocessor,
    CoReReranker,
    DocumentCache,
)
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.integrations.llama_index import embedded_text, own_text_start
from core_rerank_integrations.models.local_model import LocalModel

QUERY = "Who patented the telephone?"


def nodes() -> list[NodeWithScore]:
    texts = [
        "Bread is baked from flour.",
        "Bell patented the telephone in 1876.",
        "March is often wet.",
        "Edison patented the phonograph.",
    ]
    return [
        NodeWithScore(node=TextNode(text=text, id_=f"n{i}", metadata={"page": i}), score=1 - i / 10)
        for i, text in enumerate(texts)
    ]


def ids(scored: list[NodeWithScore]) -> list[str]:
    return [node.node.node_id for node in scored]


class Recorder(BaseEventHandler):
    events: list[Any] = []  # noqa: RUF012  pydantic copies it

    def handle(self, event: BaseEvent, **_: Any) -> None:
        if isinstance(event, ReRankStartEvent | ReRankEndEvent):
            self.events.append(event)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(recorder)
    yield recorder
    dispatcher.event_handlers.remove(recorder)


@pytest.fixture(scope="module")
def postprocessor(reranker: CoReReranker) -> CoReNodePostprocessor:
    return CoReNodePostprocessor(reranker=reranker, top_n=3)


def test_order_scores_and_copies(postprocessor: CoReNodePostprocessor) -> None:
    given = nodes()
    before = [node.model_copy(deep=True) for node in given]
    ranked = postprocessor.postprocess_nodes(given, query_str=QUERY)
    assert given == before
    assert ids(ranked)[0] == "n1"
    assert len(ranked) == 3
    scores = [node.score for node in ranked]
    assert scores == sorted(scores, reverse=True)
    assert all(type(score) is float for score in scores)
    ranked[0].node.metadata["page"] = 99
    assert given == before, "changing a result does not reach the caller's node"


def test_bundle_string_and_neither(postprocessor: CoReNodePostprocessor) -> None:
    by_bundle = postprocessor.postprocess_nodes(nodes(), query_bundle=QueryBundle(QUERY))
    assert ids(by_bundle) == ids(postprocessor.postprocess_nodes(nodes(), query_str=QUERY))
    with pytest.raises(InvalidInputError, match="needs the query"):
        postprocessor.postprocess_nodes(nodes())


def test_ranked_text_is_the_embedded_text(reranker: CoReReranker) -> None:
    hidden = TextNode(
        text="See the metadata.",
        metadata={"fact": "Bell patented the telephone."},
        excluded_embed_metadata_keys=["fact"],
    )
    shown = hidden.model_copy(update={"excluded_embed_metadata_keys": []})
    ranked = CoReNodePostprocessor(reranker=reranker).postprocess_nodes(
        [NodeWithScore(node=hidden), NodeWithScore(node=shown)], query_str=QUERY
    )
    assert "fact" not in ranked[0].node.excluded_embed_metadata_keys


def test_retrieval_score_is_kept_out_of_later_texts(reranker: CoReReranker) -> None:
    keeping = CoReNodePostprocessor(reranker=reranker, keep_retrieval_score=True)
    plain = CoReNodePostprocessor(reranker=reranker)
    once = keeping.postprocess_nodes(nodes(), query_str=QUERY)
    assert once[0].node.metadata["core_rerank"]["retrieval_score"] == 0.9
    for mode in (MetadataMode.EMBED, MetadataMode.LLM):
        assert "retrieval_score" not in once[0].node.get_content(metadata_mode=mode)
    twice = plain.postprocess_nodes(once, query_str=QUERY)
    assert ids(twice) == ids(plain.postprocess_nodes(nodes(), query_str=QUERY))
    assert "retrieval_score" not in twice[0].metadata["core_rerank"]


def test_probabilities_stand_beside_the_scores(calibrated: CoReReranker) -> None:
    filler = "The harbour was quiet and nobody came. "
    text = f"{filler * 8}Bell patented the telephone in 1876. {filler * 8}"
    long = NodeWithScore(node=TextNode(text=text, id_="long"))
    postprocessor = CoReNodePostprocessor(reranker=calibrated, first_stage=None)
    ranked = {
        n.node.node_id: n
        for n in postprocessor.postprocess_nodes([*nodes(), long], query_str=QUERY)
    }
    ours = {name: node.metadata["core_rerank"] for name, node in ranked.items()}
    assert all(0 < found["probability"] < 1 for found in ours.values())
    start, stop = ours["long"]["best_passage"]
    assert "telephone" in text[start:stop]
    for mode in (MetadataMode.EMBED, MetadataMode.LLM):
        assert "best_passage" not in ranked["long"].node.get_content(metadata_mode=mode)
    assert "best_passage" not in ours["n1"]
    by_hand = calibrated.rerank(QUERY, [nodes()[1].node.get_content(MetadataMode.EMBED)])[0]
    assert ranked["n1"].score == pytest.approx(by_hand.score, abs=1e-5)
    assert ours["n1"]["probability"] == pytest.approx(by_hand.probability, abs=1e-5)


@pytest.mark.parametrize("limit", [{}, {"max_seconds": 1e-9}, {"max_seconds": 1e-9, "top_n": 3}])
def test_scores_fall_along_the_list(calibrated: CoReReranker, limit: dict[str, Any]) -> None:
    trusting = calibrated.heads.with_scoring(rank_weight=100.0, score_weight=100.0)
    shared = CoReReranker.from_scorer(calibrated.scorer, calibrated.model, trusting)
    postprocessor = CoReNodePostprocessor(reranker=shared, **limit)
    given = [NodeWithScore(node=n.node, score=1 - i / 10) for i, n in enumerate([*nodes()] * 2)]
    ranked = postprocessor.postprocess_nodes(given, query_str=QUERY)
    assert ids(ranked) == ids(given)[: len(ranked)]
    assert sorted(ranked, key=lambda node: node.score, reverse=True) == ranked
    reordered = LongContextReorder().postprocess_nodes(ranked)
    odd, even = ids(ranked)[::2], ids(ranked)[1::2]
    assert ids(reordered) in (odd + even[::-1], even + odd[::-1]), "the best ones are at the ends"
    assert len(SimilarityPostprocessor(similarity_cutoff=-1e9).postprocess_nodes(ranked)) == len(
        ranked
    )


def test_metadata_of_the_user_stays(reranker: CoReReranker) -> None:
    mine = dict.fromkeys(
        ("probability", "reranked", "best_passage", "evidence", "extracted", "retrieval_score"), 1
    )
    given = [
        NodeWithScore(node=TextNode(text=n.text, metadata=dict(mine)), score=n.score)
        for n in nodes()
    ]
    before = [node.model_copy(deep=True) for node in given]
    cutting = CoReNodePostprocessor(
        reranker=reranker, evidence=True, extract=1.0, keep_retrieval_score=True
    )
    ranked = cutting.postprocess_nodes(given, query_str=QUERY)
    assert given == before
    for node in ranked:
        assert node.metadata == {**mine, "core_rerank": node.metadata["core_rerank"]}
        assert json.loads(node.to_json())["node"]["metadata"] == node.metadata
        for mode in (MetadataMode.EMBED, MetadataMode.LLM):
            assert "core_rerank" not in node.node.get_content(metadata_mode=mode)


TELEPHONE = "Bell patented the telephone in 1876."
FILLER = "The harbour was quiet and nobody came. "


def with_header(node_type: type[TextNode] = TextNode, **fields: Any) -> NodeWithScore:
    metadata = {"answer": "Bell patented the telephone.", "note": FILLER * 8}
    fields = {"text": f"  {FILLER * 8}{TELEPHONE} {FILLER * 8} ", "metadata": metadata, **fields}
    return NodeWithScore(node=node_type(**fields), score=0.5)


HEADERS = [
    {},
    {"text_template": "{content}\n\n{metadata_str}"},
    {"text_template": "{metadata_str} {content}"},
    {"node_type": IndexNode, "index_id": "table"},
    {"node_type": ImageNode},
    {"node_type": Document},
    {"metadata": {}},
]


@pytest.mark.parametrize("fields", HEADERS, ids=str)
def test_evidence_and_best_passage_quote_the_nodes_own_text(
    calibrated: CoReReranker, fields: dict[str, Any]
) -> None:
    quoting = CoReNodePostprocessor(reranker=calibrated, evidence=True)
    given = with_header(**fields)
    (ranked,) = quoting.postprocess_nodes([given], query_str=QUERY)
    assert type(ranked.node) is type(given.node)
    ours, text = ranked.metadata["core_rerank"], ranked.node.get_content(MetadataMode.NONE)
    assert text == given.node.get_content(MetadataMode.NONE)
    sentences = [text[start:stop].strip() for start, stop, _ in ours["evidence"]]
    assert set(sentences) == {TELEPHONE, FILLER.strip()}
    assert len(sentences) == 17
    if "best_passage" in ours:
        start, stop = ours["best_passage"]
        assert 0 <= start < stop <= len(text)


TEXTS = st.text(st.sampled_from("ab \n.{}é"), max_size=8)
TEMPLATES = (
    "{metadata_str}\n\n{content}",
    "{content}\n{metadata_str}",
    " {metadata_str} {content} ",
)


@given(
    st.sampled_from([TextNode, Document]),
    TEXTS,
    st.dictionaries(st.sampled_from("xyz"), TEXTS),
    st.sampled_from(TEMPLATES),
)
def test_a_nodes_own_text_is_found_also_if_its_metadata_repeat_it(
    node_type: Any, text: str, metadata: dict[str, str], template: str
) -> None:
    node = node_type(text=text, metadata=metadata, text_template=template)
    embedded = embedded_text(node)
    start = own_text_start(node, embedded)
    assert start is not None
    assert embedded[max(start, 0) : start + len(text)].strip() == text.strip()
    before, _, after = template.partition("{content}")
    if text.strip() and metadata:
        assert (start > 0) == bool(before)
        assert (len(embedded) > start + len(text.rstrip())) == ("{" in after)


def test_a_passage_of_metadata_is_not_the_best_one(calibrated: CoReReranker) -> None:
    quoting = CoReNodePostprocessor(reranker=calibrated, evidence=True)
    (winner,) = quoting.postprocess_nodes([with_header(text="Fog. Rain.")], query_str=QUERY)
    assert "best_passage" not in winner.metadata["core_rerank"], "the header has it"
    spans = [span[:2] for span in winner.metadata["core_rerank"]["evidence"]]
    assert sorted(spans) == [[0, 4], [5, 10]]
    for fields in ({"text": ""}, {"text": "  "}, {"text_template": "{metadata_str}"}):
        (bare,) = quoting.postprocess_nodes([with_header(**fields)], query_str=QUERY)
        assert bare.metadata["core_rerank"]["evidence"] == []


@pytest.mark.parametrize("first_stage", [None, "bm25", "dense", "other"])
def test_no_nodes(calibrated: CoReReranker, first_stage: Any) -> None:
    heads = calibrated.heads.with_scoring(score_weight=1.0)
    shared = CoReReranker.from_scorer(calibrated.scorer, calibrated.model, heads)
    postprocessor = CoReNodePostprocessor(
        reranker=shared, first_stage=first_stage, evidence=True, max_seconds=1
    )
    assert postprocessor.postprocess_nodes([], query_str=QUERY) == []
    assert asyncio.run(postprocessor.apostprocess_nodes([], query_str=QUERY)) == []


def test_a_retrievers_scores_count_where_the_order_does(
    smollm2: LocalModel, reranker: CoReReranker
) -> None:
    trusting = HEADS.with_scoring(rank_weight=0.0, score_weight=100.0)
    shared = CoReReranker.from_scorer(reranker.scorer, smollm2.path, trusting)
    postprocessor = CoReNodePostprocessor(reranker=shared)
    given = ["n0", "n1", "n2", "n3"]
    assert ids(postprocessor.postprocess_nodes(nodes(), query_str=QUERY)) == given
    asynchronous = asyncio.run(postprocessor.apostprocess_nodes(nodes(), query_str=QUERY))
    assert ids(asynchronous) == given
    # Scores count only if the list is sorted by them and every node has one.
    rising = [NodeWithScore(node=n.node, score=index) for index, n in enumerate(nodes())]
    some = [NodeWithScore(node=n.node, score=n.score if index else None)
            for index, n in enumerate(nodes())]  # fmt: skip
    unordered = CoReNodePostprocessor(reranker=shared, first_stage=None)
    for ranked in (
        postprocessor.postprocess_nodes(rising, query_str=QUERY),
        postprocessor.postprocess_nodes(some, query_str=QUERY),
        unordered.postprocess_nodes(nodes(), query_str=QUERY),
    ):
        assert ids(ranked)[0] == "n1"


def test_async_gives_the_same(postprocessor: CoReNodePostprocessor) -> None:
    async def run() -> list[list[NodeWithScore]]:
        return await asyncio.gather(
            *(postprocessor.apostprocess_nodes(nodes(), query_str=QUERY) for _ in range(3))
        )

    expected = ids(postprocessor.postprocess_nodes(nodes(), query_str=QUERY))
    assert [ids(ranked) for ranked in asyncio.run(run())] == [expected] * 3


@pytest.mark.parametrize("count", [0, 2, 4])
def test_events_come_in_pairs(
    count: int, postprocessor: CoReNodePostprocessor, recorder: Recorder
) -> None:
    for _ in range(2):
        ranked = postprocessor.postprocess_nodes(nodes()[:count], query_str=QUERY)
        start, end = recorder.events[-2:]
        assert isinstance(start, ReRankStartEvent)
        assert isinstance(end, ReRankEndEvent)
        assert start.top_n == min(count, 3)
        assert start.query == QUERY
        assert end.nodes == ranked
    assert len(recorder.events) == 4


def test_events_come_in_pairs_when_reranking_fails(
    postprocessor: CoReNodePostprocessor, recorder: Recorder
) -> None:
    with pytest.raises(InvalidInputError, match="the query is empty"):
        postprocessor.postprocess_nodes(nodes(), query_str="  ")
    assert [type(event) for event in recorder.events] == [ReRankStartEvent, ReRankEndEvent]


def test_callback_manager(reranker: CoReReranker) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    CoReNodePostprocessor(
        reranker=reranker, callback_manager=CallbackManager([handler])
    ).postprocess_nodes(nodes(), query_str=QUERY)
    ((start, end),) = handler.get_event_pairs(CBEventType.RERANKING)
    assert start.payload["query_str"] == QUERY
    assert ids(end.payload["nodes"])[0] == "n1"


class FixedRetriever(BaseRetriever):
    """Stands for a vector store."""

    def _retrieve(self, _: QueryBundle) -> list[NodeWithScore]:
        return nodes()


def test_in_a_query_engine(postprocessor: CoReNodePostprocessor) -> None:
    Settings.llm = None  # Sources are returned, nothing is generated.
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(),
        node_postprocessors=[postprocessor],
        response_mode="no_text",
    )
    assert ids(engine.query(QUERY).source_nodes)[0] == "n1"
    assert ids(asyncio.run(engine.aquery(QUERY)).source_nodes)[0] == "n1"


def test_dictionary_json_and_pickle(reranker: CoReReranker) -> None:
    original = CoReNodePostprocessor(reranker=reranker, top_n=2, keep_retrieval_score=True)
    fields = original.to_dict()
    assert fields["class_name"] == "CoReNodePostprocessor"
    assert CoReNodePostprocessor.from_dict(fields).to_dict() == fields
    lazy = CoReNodePostprocessor.from_dict({**fields, "model": str(fields["model"])})
    again = CoReNodePostprocessor.from_json(lazy.to_json())
    assert json.loads(again.to_json()) == json.loads(lazy.to_json())
    assert again.heads == lazy.heads
    restored = pickle.loads(pickle.dumps(lazy))
    assert restored.to_dict() == lazy.to_dict()
    assert ids(restored.postprocess_nodes(nodes(), query_str=QUERY))[0] == "n1"


def test_invalid_fields_are_refused() -> None:
    for fields in ({"top_n": 0}, {"top_n": -1}, {"topn": 3}):
        with pytest.raises(ValidationError):
            CoReNodePostprocessor(**fields)


def test_an_ingestion_pipeline_caches_nodes(smollm2: LocalModel, tmp_path: Path) -> None:
    cache = DocumentCache(folder=tmp_path)
    indexer = CoReNodeIndexer(model=smollm2.path, heads=CALIBRATED, document_cache=cache)
    pipeline = IngestionPipeline(transformations=[SentenceSplitter(), indexer])
    documents = [Document(text=node.text, metadata={"page": 3}) for node in nodes()]
    ingested = pipeline.run(documents=documents)
    assert [node.get_content() for node in ingested] == [node.text for node in nodes()]
    with CoReReranker(smollm2.path, heads=CALIBRATED, document_cache=cache) as ranking:
        seen = [node.get_content(metadata_mode=MetadataMode.EMBED) for node in ingested]
        assert all("page: 3" in text for text in seen)
        assert ranking.cache_documents(seen) == 0, "they are on disk already"
    restored = CoReNodeIndexer.from_json(indexer.to_json())
    assert restored.model_dump() == indexer.model_dump()


class CountingIndexer(CoReNodeIndexer):
    calls: int = Field(default=0, exclude=True)

    def __call__(self, nodes: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().__call__(nodes, **kwargs)


def test_a_pipelines_cache_skips_the_indexer_only_while_its_files_exist(
    smollm2: LocalModel, tmp_path: Path
) -> None:
    files, other = tmp_path / "files", tmp_path / "other"
    settings: Any = {"model": smollm2.path, "heads": CALIBRATED}
    indexer = CountingIndexer(**settings, document_cache=DocumentCache(folder=files))
    given = [node.node for node in nodes()]
    pipeline = IngestionPipeline(transformations=[indexer])
    for expected in (1, 2, 2):  # The first run has changed the files.
        assert pipeline.run(nodes=given) == given
        assert indexer.calls == expected
    pipeline.persist(str(tmp_path / "pipeline"))
    files.rename(other)
    again = IngestionPipeline(transformations=[indexer])
    again.load(str(tmp_path / "pipeline"))
    assert asyncio.run(again.arun(nodes=given)) == given
    assert indexer.calls == 3
    next(path for path in files.rglob("*") if path.is_file()).unlink()
    again.run(nodes=given)
    assert indexer.calls == 4
    names = [path.relative_to(other) for path in other.rglob("*")]
    assert sorted(names) == sorted(path.relative_to(files) for path in files.rglob("*"))
    in_memory = CountingIndexer(**settings, document_cache=DocumentCache(disk_bytes=0))
    assert in_memory.to_dict() != in_memory.to_dict(), "memory does not outlive the process"


async def test_an_asynchronous_pipeline_does_not_block_the_loop() -> None:
    async def tick() -> None:
        while not indexing.done():
            ticks.append(1)
            await asyncio.sleep(0.01)

    class Slow(CoReNodeIndexer):
        def __call__(self, nodes: Any, **_: Any) -> Any:
            time.sleep(0.2)
            return nodes

    ticks: list[int] = []
    given = [node.node for node in nodes()]
    indexing = asyncio.ensure_future(IngestionPipeline(transformations=[Slow()]).arun(nodes=given))
    await tick()
    assert indexing.result() == given
    assert len(ticks) > 5


def test_nodes_not_read_in_time_are_marked(calibrated: CoReReranker) -> None:
    hurried = CoReNodePostprocessor(reranker=calibrated, max_seconds=1e-9)
    first, *rest = hurried.postprocess_nodes(nodes(), query_str=QUERY)
    assert (first.node.node_id, first.metadata["core_rerank"]["reranked"]) == ("n0", True)
    assert ids(rest) == ["n1", "n2", "n3"]
    for node in rest:
        assert node.score < first.score
        assert node.metadata["core_rerank"] == {"probability": None, "reranked": False}
