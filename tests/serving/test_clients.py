"""Unmodified clients against the running server: the same order and scores as the library."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from core_rerank_integrations import CoReReranker, RerankResults

QUERY = "What is the capital of Australia?"
PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
TEXTS = [
    "Ottawa is the capital of Canada.",
    "Sydney is the largest city in Australia.",
    "Canberra is the capital of Australia.",
]
CLOSE = {"rel": 1e-3, "abs": 1e-5}


@pytest.fixture(scope="module")
def expected(default: CoReReranker) -> RerankResults:
    return default.rerank(QUERY, TEXTS)


def check(found: list[tuple[int, float]], expected: RerankResults) -> None:
    assert [index for index, _ in found] == [r.index for r in expected][: len(found)]
    assert [score for _, score in found] == pytest.approx(
        [r.relevance_score for r in expected][: len(found)], **CLOSE
    )


def test_cohere(server, expected: RerankResults) -> None:
    cohere = pytest.importorskip("cohere")
    first = cohere.Client("key", base_url=server.url)
    reply = first.rerank(query=QUERY, documents=TEXTS, model="m", return_documents=True)
    check([(row.index, row.relevance_score) for row in reply.results], expected)
    assert [row.document.text for row in reply.results] == [r.document for r in expected]
    objects = first.rerank(query=QUERY, documents=[{"text": text} for text in TEXTS], top_n=2)
    check([(row.index, row.relevance_score) for row in objects.results], expected)
    second = cohere.ClientV2("key", base_url=server.url)
    reply = second.rerank(query=QUERY, documents=TEXTS, model="m", top_n=2)
    assert len(reply.results) == 2
    assert reply.id
    check([(row.index, row.relevance_score) for row in reply.results], expected)


def test_errors_of_cohere_carry_the_message(server) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2("key", base_url=server.url)
    with pytest.raises(cohere.core.ApiError) as caught:
        client.rerank(query=" ", documents=TEXTS, model="m")
    assert caught.value.status_code == 422
    assert "the query is empty" in caught.value.body["message"]


async def test_asynchronous_cohere(server, expected: RerankResults) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.AsyncClientV2("key", base_url=server.url)
    reply = await client.rerank(query=QUERY, documents=TEXTS, model="m")
    check([(row.index, row.relevance_score) for row in reply.results], expected)


def test_langchain_cohere(server, expected: RerankResults) -> None:
    langchain_cohere = pytest.importorskip("langchain_cohere")
    from langchain_core.documents import Document

    compressor = langchain_cohere.CohereRerank(
        model="m", cohere_api_key="key", base_url=server.url, top_n=2
    )
    found = compressor.compress_documents([Document(text) for text in TEXTS], QUERY)
    assert [document.page_content for document in found] == [r.document for r in expected][:2]
    scores = [document.metadata["relevance_score"] for document in found]
    assert scores == pytest.approx([r.relevance_score for r in expected][:2], **CLOSE)


@pytest.mark.parametrize("name", ["cohere", "jinaai", "tei"])
def test_llama_index(server, expected: RerankResults, name: str) -> None:
    module = pytest.importorskip(f"llama_index.postprocessor.{name}_rerank")
    from llama_index.core.schema import NodeWithScore, TextNode

    postprocessor = {
        "cohere": lambda: module.CohereRerank(top_n=2, api_key="key", base_url=server.url),
        "jinaai": lambda: module.JinaRerank(top_n=2, api_key="key", base_url=f"{server.url}/v1"),
        "tei": lambda: module.TextEmbeddingInference(top_n=2, base_url=server.url),
    }[name]()
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    found = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert [node.text for node in found] == [r.document for r in expected][:2]
    assert [node.score for node in found] == pytest.approx(
        [r.relevance_score for r in expected][:2], **CLOSE
    )


def test_langchain_reranker(server, expected: RerankResults) -> None:
    langchain_reranker = pytest.importorskip("langchain_reranker.rerankers")
    from langchain_core.documents import Document

    compressor = langchain_reranker.init_reranker(
        "custom:any", base_url=server.url, api_key="key", top_n=2
    )
    found = compressor.rerank(QUERY, [Document(text) for text in TEXTS])
    check([(row.index, row.relevance_score) for row in found], expected)
    kept = compressor.compress_documents([Document(text) for text in TEXTS], QUERY)
    assert [document.page_content for document in kept] == [r.document for r in expected][:2]


@pytest.mark.parametrize("top_k", [2, None])
async def test_voyage(server, expected: RerankResults, top_k: int | None) -> None:
    voyageai = pytest.importorskip("voyageai")
    client = voyageai.Client("key", base_url=f"{server.url}/v1")
    reply = client.rerank(QUERY, TEXTS, model="m", top_k=top_k)
    check([(row.index, row.relevance_score) for row in reply.results], expected)
    assert [row.document for row in reply.results] == [r.document for r in expected][:top_k]
    assert reply.total_tokens > 0
    client = voyageai.AsyncClient("key", base_url=f"{server.url}/v1")
    reply = await client.rerank(QUERY, TEXTS, model="m", top_k=top_k)
    check([(row.index, row.relevance_score) for row in reply.results], expected)
    with pytest.raises(voyageai.error.VoyageError, match="the query is empty"):
        await client.rerank(" ", TEXTS, model="m")


LITELLM = """
import json, sys
import litellm

url, query, texts = json.loads(sys.argv[1])
for provider in ("cohere", "hosted_vllm", "jina_ai", "voyage", "huggingface"):
    reply = litellm.rerank(
        model=f"{provider}/any", query=query, documents=texts, top_n=2, api_base=url, api_key="key"
    )
    print(json.dumps([(row["index"], row["relevance_score"]) for row in reply.results]))
"""


@pytest.mark.commands
def test_litellm(server, expected: RerankResults) -> None:
    """As a client of Cohere, vLLM, Jina, Voyage and Text Embeddings Inference."""
    pytest.importorskip("litellm")
    done = subprocess.run(
        [sys.executable, "-c", LITELLM, json.dumps([server.url, QUERY, TEXTS])],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        text=True,
    )
    replies = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert len(replies) == 5
    for reply in replies:
        check(reply, expected)


def test_curl(server, default: CoReReranker) -> None:
    """The command of the page."""
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    (block,) = re.findall(r"^curl .+?^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.M)
    command = shlex.split(block.removesuffix("```").replace("http://127.0.0.1:8080", server.url))
    done = subprocess.run([*command, "--silent"], check=True, stdout=subprocess.PIPE)
    body = json.loads(command[command.index("-d") + 1])
    check(
        [(row["index"], row["relevance_score"]) for row in json.loads(done.stdout)["results"]],
        default.rerank(body["query"], body["documents"], top_n=body["top_n"]),
    )


def posted(url: str, key: str, **fields: Any) -> dict[str, Any]:
    """Return the reply to a body. Unlike httpx, this sends an empty key."""
    request = urllib.request.Request(
        url,
        json.dumps({"model": "m", "query": QUERY, "documents": TEXTS} | fields).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        reply: dict[str, Any] = json.load(response)
    return reply


def test_the_body_of_open_webui(server, expected: RerankResults) -> None:
    """It takes the scores by position, so every document has to come back."""
    rows = posted(f"{server.url}/v1/rerank", "", top_n=len(TEXTS))["results"]
    scores = [row["relevance_score"] for row in sorted(rows, key=lambda row: row["index"])]
    by_index = sorted(expected, key=lambda result: result.index)
    assert scores == pytest.approx([result.relevance_score for result in by_index], **CLOSE)
    assert all(0 <= score <= 1 for score in scores)


@pytest.mark.parametrize("fields", [{"top_n": 2}, {"top_n": 3, "score_threshold": None}])
def test_the_body_of_dify(server, expected: RerankResults, fields: dict[str, Any]) -> None:
    rows = posted(f"{server.url}/rerank", "", **fields)["results"]
    assert len(rows) == fields["top_n"]
    check([(row["index"], row["relevance_score"]) for row in rows], expected)
    assert [row["document"]["text"] for row in rows] == [TEXTS[row["index"]] for row in rows]


@pytest.mark.parametrize(
    "fields",
    [{"top_n": len(TEXTS)}, {"return_documents": "true", "return_len": "true"}],
    ids=["jina", "xinference"],
)
def test_the_body_of_ragflow(server, expected: RerankResults, fields: dict[str, Any]) -> None:
    reply = posted(f"{server.url}/v1/rerank", "key", **fields)
    rows = reply["results"]
    assert len(rows) == len(TEXTS)
    check([(row["index"], row["relevance_score"]) for row in rows], expected)
    assert reply["usage"]["total_tokens"] > 0


@pytest.mark.parametrize(("top_k", "count"), [(2, 2), (0, 3), (None, 3)])
def test_the_body_of_voyage(server, expected: RerankResults, top_k: int | None, count: int) -> None:
    """Its client sends ``top_k`` even if it is ``None``; other programs omit documents."""
    reply = posted(f"{server.url}/v1/rerank", "key", top_k=top_k, truncation=True)
    rows = reply["data"]
    assert len(rows) == count
    check([(row["index"], row["relevance_score"]) for row in rows], expected)
    assert [row["document"] for row in rows] == [TEXTS[row["index"]] for row in rows]
    assert (reply["object"], reply["model"]) == ("list", "smollm2-135m")
    assert reply["usage"]["total_tokens"] > 0
    plain = posted(f"{server.url}/v1/rerank", "key", top_k=top_k, return_documents=False)
    assert [set(row) for row in plain["data"]] == [{"index", "relevance_score"}] * count
