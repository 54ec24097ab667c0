"""LlamaIndex: a node postprocessor that reranks, and an ingestion step that caches nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from itertools import pairwise
from math import isfinite
from typing import Any, Self
from uuid import uuid4

from pydantic import ConfigDict, Field

from core_rerank_integrations._internal.cancellation import run_in_thread
from core_rerank_integrations.backends.local.store import last_changes
from core_rerank_integrations.errors import InvalidInputError, requires_extra
from core_rerank_integrations.integrations.fields import ModelFields, RerankerFields
from core_rerank_integrations.integrations.outputs import (
    METADATA_KEY,
    falling_scores,
    result_metadata,
)
from core_rerank_integrations.method.extraction import evidence_within, extract
from core_rerank_integrations.models.local_model import cache_folder
from core_rerank_integrations.results import RerankResults
from core_rerank_integrations.settings import VLLM_BACKENDS, DocumentCache
from core_rerank_integrations.tracing import without_second_span

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

MARK = "\0"
"""Stands for a node's own text where its place is searched for."""
FILES_KEY = "files"
"""Key of the state of a `CoReNodeIndexer`'s files, among its fields."""

_dispatcher = instrumentation.get_dispatcher(__name__)  # type: ignore[attr-defined]


class CoReNodePostprocessor(RerankerFields, BaseNodePostprocessor):
    """Rerank retrieved nodes by the text that they are embedded with.

    Returns copies, sorted by their ``score``, which is the `RerankResult.score`. Nodes that were
    not read in time have a score below those of the others. Retrieval scores are passed on as
    ``first_stage_scores`` if the nodes are sorted by them. ``metadata["core_rerank"]`` holds the
    rest, and is hidden from embeddings and models. Its offsets are those of the node's own text,
    without the metadata that is ranked with it and before ``extract`` cuts it:

    - ``probability``: the probability that the node is relevant, from query and node alone;
      ``None`` if the heads are not calibrated or the node was not read.
    - ``reranked``: ``False`` if the node was not read within ``max_seconds``.
    - ``best_passage``: start and stop of the characters that the score comes from, if the node
      was read as several passages, and the best one is not all metadata.
    - ``evidence``: start, stop and score of each sentence, best first, with ``evidence=True``. A
      sentence that begins in the metadata is cut to its part in the text, and to its share of the
      score; see `method.extraction.evidence_within`.
    - ``extracted``: start and stop of the parts that are kept, with ``extract``.
    - ``retrieval_score``: the retriever's score, with ``keep_retrieval_score=True``.

    Examples:
        >>> index.as_query_engine(
        ...     similarity_top_k=20, node_postprocessors=[CoReNodePostprocessor(top_n=5)]
        ... )
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    keep_retrieval_score: bool = Field(
        default=False,
        description="Keep the retriever's score in the metadata, as `retrieval_score`.",
    )

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serializes this class."""
        return "CoReNodePostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        with self._events(nodes, query) as ranked_nodes:
            scores = self._first_stage_scores(nodes)
            results = self._rerank(query, self._texts(nodes), first_stage_scores=scores)
            ranked_nodes += self._copies(nodes, results)
        return ranked_nodes

    @_dispatcher.span  # LlamaIndex itself does this for the method above.
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        with self._events(nodes, query) as ranked_nodes:
            scores = self._first_stage_scores(nodes)
            results = await self._arerank(query, self._texts(nodes), first_stage_scores=scores)
            ranked_nodes += self._copies(nodes, results)
        return ranked_nodes

    def _texts(self, nodes: Sequence[NodeWithScore]) -> list[str]:
        texts = [embedded_text(node.node) for node in nodes]
        for node, text in zip(nodes, texts, strict=True):
            if self.extract is not None and own_text_start(node.node, text) is None:
                raise InvalidInputError(
                    f"node {node.node_id!r} cannot be cut to its sentences: its text_template "
                    "changes its text; leave extract out"
                )
        return texts

    def _first_stage_scores(self, nodes: Sequence[NodeWithScore]) -> list[float] | None:
        """Return the retriever's scores if all nodes have one and are sorted by it."""
        scores = [
            float(node.score) for node in nodes if node.score is not None and isfinite(node.score)
        ]
        is_sorted = all(left >= right for left, right in pairwise(scores))
        is_usable = self.first_stage is not None and is_sorted and len(scores) == len(nodes)
        return scores if is_usable else None

    @contextmanager
    def _events(self, nodes: list[NodeWithScore], query: str) -> Iterator[list[NodeWithScore]]:
        """Send the events of a rerank, of LlamaIndex's old and new kind.

        Yields:
            An empty list, to be filled with the ranked nodes.
        """
        ranked_nodes: list[NodeWithScore] = []
        top_n = min(self.top_n or len(nodes), len(nodes))
        model = self._model_name
        _dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=top_n, model_name=model))
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: model,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: top_n,
        }
        try:
            with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
                with without_second_span():
                    yield ranked_nodes
                event.on_end(payload={EventPayload.NODES: ranked_nodes})
        finally:
            _dispatcher.event(ReRankEndEvent(nodes=ranked_nodes))

    def _copies(
        self, nodes: Sequence[NodeWithScore], results: RerankResults
    ) -> list[NodeWithScore]:
        copies = []
        for result, score in zip(results, falling_scores(results), strict=True):
            retrieved = nodes[result.index]
            text = retrieved.node.get_content(metadata_mode=MetadataMode.NONE)
            start = own_text_start(retrieved.node, result.document)
            if start is None:
                start, text = len(result.document), ""
            stop = start + len(text)
            ours = result_metadata(result, self.evidence, start, stop)
            if self.keep_retrieval_score:
                ours["retrieval_score"] = retrieved.score
            node = _copy(retrieved.node, ours)
            evidence = evidence_within(result.evidence, start, stop)
            if self.extract is not None and evidence:
                text, spans = extract(text, evidence, self.extract, self.extract_by)
                ours["extracted"] = [list(span) for span in spans]
                node.set_content(text)
            copies.append(NodeWithScore(node=node, score=score))
        return copies


class CoReNodeIndexer(ModelFields, TransformComponent):
    """Cache nodes when an index is built, so that a rerank computes only the question.

    It belongs last before the embeddings, because it reads the text that is embedded. Returns the
    nodes unchanged; see `CoReReranker.cache_documents` for what is stored and for the errors. The
    postprocessor needs the same model and heads. A pipeline's own cache skips this step only while
    the files of the documents are unchanged.

    Examples:
        >>> IngestionPipeline(transformations=[SentenceSplitter(), CoReNodeIndexer(), embedding])
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serializes this class."""
        return "CoReNodeIndexer"

    def __call__(
        self,
        nodes: Sequence[BaseNode],
        **kwargs: Any,  # noqa: ARG002  Part of the interface.
    ) -> Sequence[BaseNode]:
        """Cache ``nodes`` and return them."""
        self._loaded_reranker().cache_documents([embedded_text(node) for node in nodes])
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Cache nodes without blocking the event loop."""
        return await run_in_thread(partial(self, nodes, **kwargs))

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return the fields, and the state of the files.

        An `IngestionPipeline` compares this to tell whether it has run the step on the same nodes.
        """
        return {**super().to_dict(**kwargs), FILES_KEY: self._files_state()}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """Make an indexer from the output of `to_dict`."""
        fields = {name: value for name, value in data.items() if name != FILES_KEY}
        return super().from_dict(fields, **kwargs)

    def _files_state(self) -> str:
        """Return what changes with each new or dropped file; always new if there are no files."""
        config = self.document_cache or DocumentCache()
        changes = []
        has_files = self.base_url is None and self.backend not in VLLM_BACKENDS
        if config.disk_bytes and has_files:
            changes = last_changes(config.folder or cache_folder("documents"))
        return sha256(repr(changes).encode()).hexdigest() if changes else uuid4().hex


def own_text_start(node: BaseNode, embedded: str) -> int | None:
    """Find a node's own text in the text that it is embedded with, after its metadata.

    Returns:
        Index of its first character, negative if whitespace before it was stripped; ``None`` if
        the node's ``text_template`` changes the text.
    """
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    if text == embedded:
        return 0
    # The metadata may repeat the text, so a mark that it does not hold is searched for.
    marked = node.model_copy()
    marked.set_content(MARK)
    before, mark, _ = embedded_text(marked).partition(MARK)
    start = len(before) or len(text.lstrip()) - len(text)  # LlamaIndex strips the whole.
    is_kept = embedded[max(start, 0) : start + len(text)].strip() == text.strip()
    return start if mark and is_kept else None


def embedded_text(node: BaseNode) -> str:
    """Return the text that a node is embedded with and ranked by, metadata included."""
    return node.get_content(metadata_mode=MetadataMode.EMBED)


def _query(query_bundle: QueryBundle | None) -> str:
    if query_bundle is None:
        raise InvalidInputError(
            "reranking needs the query: pass query_bundle=QueryBundle(...) or query_str=..."
        )
    return query_bundle.query_str


def _copy(node: BaseNode, ours: dict[str, Any]) -> BaseNode:
    """Copy a node with our metadata, which is hidden from embeddings and models."""
    excluded = {
        name: list(dict.fromkeys([*getattr(node, name), METADATA_KEY]))
        for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
    }
    return node.model_copy(update={"metadata": {**node.metadata, METADATA_KEY: ours}, **excluded})
