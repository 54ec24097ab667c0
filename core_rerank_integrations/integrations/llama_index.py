"""LlamaIndex: a node postprocessor, and an ingestion step that reads nodes ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import isfinite
from typing import Any

from pydantic import ConfigDict, Field

from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.integrations.fields import ModelFields, RerankerFields
from core_rerank_integrations.method.extraction import Extract, evidence_within, extract
from core_rerank_integrations.results import RerankResult

with requires_extra("llama-index"):
    import llama_index.core.instrumentation as instrumentation
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import (
        BaseNode,
        MetadataMode,
        NodeWithScore,
        QueryBundle,
        TransformComponent,
    )

_dispatcher = instrumentation.get_dispatcher(__name__)  # type: ignore[attr-defined]

RETRIEVAL_SCORE_KEY = "retrieval_score"
BEST_PASSAGE_KEY = "best_passage"
EXTRACTED_KEY = "extracted"
RERANKED_KEY = "reranked"


class CoReNodePostprocessor(RerankerFields, BaseNodePostprocessor):
    """Reorders retrieved nodes by CoRe scores, and keeps the best.

    Nodes are ranked by the text they are embedded with. Returns copies; the nodes passed in are
    not touched. Their score is the probability that they are relevant, from question and node
    alone, or where the heads are not calibrated the score that they are sorted by. Of a text that
    was too long to be read at once, ``metadata["best_passage"]`` holds the start and stop of the
    characters that it was ranked by, hidden from embeddings and models. With ``extract=0.3`` texts
    come back cut to their strongest sentences, the characters that were kept in
    ``metadata["extracted"]``, hidden likewise.

    Examples:
        >>> index.as_query_engine(
        ...     similarity_top_k=20, node_postprocessors=[CoReNodePostprocessor(top_n=5)]
        ... )
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    keep_retrieval_score: bool = Field(
        default=False,
        description=f"Keep the first stage's score as metadata[{RETRIEVAL_SCORE_KEY!r}], "
        "hidden from embeddings, models and later rerankers.",
    )

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serializes this class."""
        return "CoReNodePostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        with self._events(nodes, query) as ranked_nodes:
            given = self._first_stage_scores(nodes)
            results = self._rerank(query, self._texts(nodes), first_stage_scores=given)
            ranked_nodes += self._scored(nodes, results)
        return ranked_nodes

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        with self._events(nodes, query) as ranked_nodes:
            given = self._first_stage_scores(nodes)
            results = await self._arerank(query, self._texts(nodes), first_stage_scores=given)
            ranked_nodes += self._scored(nodes, results)
        return ranked_nodes

    def _texts(self, nodes: Sequence[NodeWithScore]) -> list[str]:
        texts = [_text(node.node) for node in nodes]
        if self.extract is not None:
            for node, text in zip(nodes, texts, strict=True):
                _own_text(node.node, text)  # What cannot be cut is refused before it is read.
        return texts

    def _first_stage_scores(self, nodes: Sequence[NodeWithScore]) -> list[float] | None:
        """The retriever's, where its order counts and they are what it is ordered by."""
        scores = [
            float(node.score) for node in nodes if node.score is not None and isfinite(node.score)
        ]
        falling = all(left >= right for left, right in pairwise(scores))
        return scores if self.ranked and falling and len(scores) == len(nodes) else None

    @contextmanager
    def _events(self, nodes: list[NodeWithScore], query: str) -> Iterator[list[NodeWithScore]]:
        """Start and end events, old style and new, around the list to be filled."""
        ranked_nodes: list[NodeWithScore] = []
        top_n = min(self.top_n or len(nodes), len(nodes))
        model = str(self.model)
        _dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=top_n, model_name=model))
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: model,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: top_n,
        }
        try:
            with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
                yield ranked_nodes
                event.on_end(payload={EventPayload.NODES: ranked_nodes})
        finally:
            _dispatcher.event(ReRankEndEvent(nodes=ranked_nodes))

    def _scored(
        self, nodes: Sequence[NodeWithScore], results: Sequence[RerankResult]
    ) -> list[NodeWithScore]:
        scored = []
        for result in results:
            retrieved = nodes[result.index]
            added: dict[str, Any] = {}
            if self.keep_retrieval_score:
                added[RETRIEVAL_SCORE_KEY] = retrieved.score
            if result.passage is not None:
                added[BEST_PASSAGE_KEY] = list(result.passage)
            added |= self._evidence_of(result)
            if not result.reranked:
                added[RERANKED_KEY] = False
            kept: Extract | None = None
            if self.extract is not None and result.reranked:
                text, start = _own_text(retrieved.node, result.document)
                evidence = evidence_within(result.evidence, start, start + len(text))
                kept = extract(text, evidence, self.extract, self.extract_by)
                added[EXTRACTED_KEY] = [list(span) for span in kept.spans]
            node = _copy(retrieved.node, added)
            if kept is not None:
                node.set_content(kept.text)
            score = self._score_of(result) if result.reranked else None
            scored.append(NodeWithScore(node=node, score=score))
        return scored


class CoReNodeIndexer(ModelFields, TransformComponent):
    """Reads nodes when an index is built, so that reranking them costs the question alone.

    The last step before the embeddings: what is read is the text that the postprocessor will
    see, metadata included. Nodes pass through unchanged; see `CoReReranker.cache_documents` for what is
    kept and the errors. The postprocessor must have the same model and heads.

    Examples:
        >>> IngestionPipeline(transformations=[SentenceSplitter(), CoReNodeIndexer(), embedding])
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serializes this class."""
        return "CoReNodeIndexer"

    def __call__(
        self,
        nodes: Sequence[BaseNode],
        **kwargs: Any,  # noqa: ARG002  Part of the interface.
    ) -> Sequence[BaseNode]:
        """Read ``nodes``, and hand them on."""
        self._ready_reranker().cache_documents([_text(node) for node in nodes])
        return nodes


def _query(query_bundle: QueryBundle | None) -> str:
    if query_bundle is None:
        raise InvalidInputError(
            "reranking needs the query: pass query_bundle=QueryBundle(...) or query_str=..."
        )
    return query_bundle.query_str


def _text(node: BaseNode) -> str:
    return node.get_content(metadata_mode=MetadataMode.EMBED)


def _own_text(node: BaseNode, ranked_text: str) -> tuple[str, int]:
    """A node's own text, and where it begins in what it is ranked by, its metadata before it.

    Raises:
        InvalidInputError: It does not stand there as it is.
    """
    own_text = node.get_content(metadata_mode=MetadataMode.NONE)
    start = ranked_text.rfind(own_text.strip())
    if start < 0:
        raise InvalidInputError(
            f"node {node.node_id!r} cannot be cut to its sentences: its text_template changes its "
            "text; leave extract out"
        )
    # The whole may have been stripped.
    return own_text, start - (len(own_text) - len(own_text.lstrip()))


def _copy(node: BaseNode, added: dict[str, Any]) -> BaseNode:
    """With ``added`` metadata, hidden from embeddings and models."""
    hidden = {
        name: [*keys, *(key for key in added if key not in keys)]
        for name, keys in (
            ("excluded_embed_metadata_keys", node.excluded_embed_metadata_keys),
            ("excluded_llm_metadata_keys", node.excluded_llm_metadata_keys),
        )
    }
    return node.model_copy(update={"metadata": {**node.metadata, **added}, **hidden})
