"""From the replies of a server to results."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from core_rerank_integrations.errors import BackendError
from core_rerank_integrations.heads.scoring_config import Finite, Index, Probability
from core_rerank_integrations.method.evidence import Evidence, Word
from core_rerank_integrations.results import RerankResult, RerankResults

Reply = TypeVar("Reply", bound=BaseModel)
# All of it: extracts count the tokens of a sentence, and LlamaIndex's nodes need its words.
Sentence = tuple[Index, Index, Finite, tuple[Word, ...], Index]


class _ResultDetails(BaseModel):
    score: Finite | None
    probability: Probability | None
    reranked: bool
    best_passage: tuple[Index, Index] | None
    evidence: tuple[Sentence, ...] = ()


class _Result(BaseModel):
    index: Index
    core_rerank: _ResultDetails


class _ListDetails(BaseModel):
    answerability: Probability | None
    answerable: bool | None


class _Meta(BaseModel):
    warnings: tuple[str, ...] = ()


class _RerankReply(BaseModel):
    results: list[_Result]
    core_rerank: _ListDetails
    meta: _Meta = _Meta()


class _DocumentsReply(BaseModel):
    bytes_written: Index


class Answer(NamedTuple):
    """What a server says about a list.

    Attributes:
        results: Its results.
        warnings: What the user should know about them.
    """

    results: RerankResults
    warnings: tuple[str, ...]


def answer_of(reply: Any, documents: Sequence[str], url: str) -> Answer:
    """Return the results of a list, as `CoReReranker.rerank` does, and the server's warnings.

    Args:
        reply: The server's reply.
        documents: The documents that were sent.
        url: Where the reply comes from, for errors.

    Raises:
        BackendError: The reply is not one of this package's server, or not about these documents.
    """
    checked = _checked(_RerankReply, reply, url)
    indices = [result.index for result in checked.results]
    if len(set(indices)) != len(indices) or max(indices, default=-1) >= len(documents):
        raise BackendError(
            f"{url} answered about documents {indices} of a list of {len(documents)}: it is "
            "damaged, or another server; check base_url"
        )
    results = []
    for result in checked.results:
        own = result.core_rerank
        is_read = own.reranked and own.score is not None
        results.append(
            RerankResult(
                result.index,
                own.score if is_read and own.score is not None else -inf,
                documents[result.index],
                own.probability,
                own.best_passage,
                is_read,
                tuple(Evidence(*sentence) for sentence in own.evidence),
            )
        )
    own_list = checked.core_rerank
    ranked = RerankResults(tuple(results), own_list.answerability, own_list.answerable)
    return Answer(ranked, checked.meta.warnings)


def bytes_written(reply: Any, url: str) -> int:
    """Return how many bytes a server has written to cache documents.

    Args:
        reply: The server's reply.
        url: Where the reply comes from, for errors.

    Raises:
        BackendError: The reply is not one of this package's server.
    """
    return _checked(_DocumentsReply, reply, url).bytes_written


def _checked(kind: type[Reply], reply: Any, url: str) -> Reply:
    try:
        return kind.model_validate(reply)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "the reply"
        raise BackendError(
            f"{url} is not a `core-rerank serve` of a matching version ({place}: "
            f"{problem['msg']}). Servers of Cohere, Jina, vLLM and Text Embeddings Inference do "
            "not send the field `core_rerank`, which holds score, probability, answerability and "
            "evidence: use their own clients, or check base_url"
        ) from None
