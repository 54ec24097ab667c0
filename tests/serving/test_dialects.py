"""Every field of every dialect, against a running server with the real model."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from core_rerank_integrations import CoReReranker, RerankResults, __version__

QUERY = "What is the capital of Australia?"
TEXTS = [
    "Ottawa is the capital of Canada.",
    "🦘 Sydney is the largest city. Canberra is the capital of Australia. Bread is baked.",
    "Kangaroos live in Australia.",
    "",
]
PATHS = ["/rerank", "/v1/rerank", "/v2/rerank"]
CLOSE = {"rel": 1e-3, "abs": 1e-5}


@pytest.fixture(scope="module")
def expected(default: CoReReranker) -> RerankResults:
    return default.rerank(QUERY, TEXTS, evidence=True)


def post(server, path: str = "/v2/rerank", **fields: Any) -> httpx.Response:
    body = {"query": QUERY, "documents": TEXTS} | fields
    return server.client.post(path, json=body)


def ranked(server, path: str = "/v2/rerank", **fields: Any) -> dict[str, Any]:
    response = post(server, path, **fields)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("path", PATHS)
def test_one_reply_for_cohere_jina_and_vllm(server, default, expected, path: str) -> None:
    reply = ranked(server, path, model="rerank-v3.5")
    assert reply["id"].startswith("rerank-")
    assert reply["id"] != ranked(server, path)["id"]
    assert reply["model"] == "smollm2-135m"
    assert reply["object"] == "list"
    assert reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] > 4 * 20
    assert reply["meta"]["api_version"] == {"version": "2"}
    assert [row["index"] for row in reply["results"]] == [result.index for result in expected]
    for row, result in zip(reply["results"], expected, strict=True):
        assert row["relevance_score"] == pytest.approx(result.relevance_score, **CLOSE)
        assert row["document"] == {"text": result.document}
        own = row["core_rerank"]
        assert own["score"] == pytest.approx(result.score, **CLOSE)
        assert own["probability"] == pytest.approx(result.probability, **CLOSE)
        assert own["reranked"] is True
        assert own["best_passage"] is None
        assert "evidence" not in own
        assert "relevant_spans" not in row
    own = reply["core_rerank"]
    assert own["answerability"] == pytest.approx(expected.answerability, **CLOSE)
    assert own["answerable"] is (expected.answerability >= default.abstention_threshold)
    assert (own["heads"], own["version"]) == (default.heads.name, __version__)


def test_nulls_are_defaults(server, expected) -> None:
    names = [
        "model", "top_n", "max_tokens_per_doc", "return_documents", "relevant_spans",
        "score_threshold", "min_score", "first_stage", "first_stage_scores", "max_seconds",
        "evidence", "priority", "rank_fields", "max_chunks_per_doc",
    ]  # fmt: skip
    reply = ranked(server, **dict.fromkeys(names))
    assert [row["index"] for row in reply["results"]] == [result.index for result in expected]


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (0, 4), (None, 4), (4, 4), (99, 4)])
def test_top_n(server, top_n: int | None, count: int) -> None:
    assert len(ranked(server, top_n=top_n)["results"]) == count


def test_unknown_fields_are_ignored(server) -> None:
    fields = {"priority": 3, "return_len": "true", "instruction": "x", "truncation_side": "right"}
    assert len(ranked(server, **fields)["results"]) == 4


@pytest.mark.parametrize(
    ("value", "shown"),
    [(True, True), ("true", True), (None, True), (False, False), ("false", False)],
)
def test_return_documents_may_be_text(server, value: Any, shown: bool) -> None:
    reply = ranked(server, return_documents=value)
    assert ["document" in row for row in reply["results"]] == [shown] * 4


def test_objects_are_given_back_with_all_fields(server, expected) -> None:
    documents = [
        {"text": text, "id": f"d{index}", "meta": {"page": [index, None]}}
        for index, text in enumerate(TEXTS)
    ]
    reply = ranked(server, documents=documents)
    for row, result in zip(reply["results"], expected, strict=True):
        assert row["document"] == documents[row["index"]]
        assert row["relevance_score"] == pytest.approx(result.relevance_score, **CLOSE)
    mixed = ranked(server, documents=[TEXTS[0], documents[1]])
    assert {row["index"]: row["document"] for row in mixed["results"]} == {
        0: {"text": TEXTS[0]},
        1: documents[1],
    }


@pytest.mark.filterwarnings("ignore::core_rerank_integrations.DocumentTruncatedWarning")
@pytest.mark.parametrize("name", ["max_tokens_per_doc", "max_doc_length"])
def test_documents_are_cut(server, default, name: str) -> None:
    cut = CoReReranker.from_scorer(default.scorer, max_document_tokens=6)
    result = cut.rerank(QUERY, TEXTS)[0]
    reply = ranked(server, documents=[*TEXTS, "Rome."], **{name: 6})
    row = reply["results"][0]
    assert row["index"] == result.index
    assert row["core_rerank"]["score"] == pytest.approx(result.score, **CLOSE)
    (warning,) = reply["meta"]["warnings"]
    assert "documents [0, 1, 2] were truncated" in warning
    assert "warnings" not in ranked(server)["meta"]


@pytest.mark.filterwarnings("ignore::core_rerank_integrations.DocumentTruncatedWarning")
def test_truncated_documents_of_all_parts_are_named(server) -> None:
    """A long list is read in parts."""
    documents = ["Bread is baked from flour. " * 20, "Rome."] * 40
    (warning,) = ranked(server, documents=documents, max_tokens_per_doc=20)["meta"]["warnings"]
    assert f"documents {list(range(0, 80, 2))} were truncated" in warning


def test_relevant_spans_are_code_points(server, expected) -> None:
    reply = ranked(server, relevant_spans={"mode": "enabled"})
    spans = {row["index"]: row["relevant_spans"] for row in reply["results"]}
    best = spans[1][0]
    (evidence,) = (result.evidence for result in expected if result.index == 1)
    assert (best["start"], best["end"]) == evidence[0][:2]
    assert TEXTS[1][best["start"] : best["end"]] == "Canberra is the capital of Australia."
    assert sum(span["score"] for span in spans[1]) == pytest.approx(1)
    assert [span["score"] for span in spans[1]] == sorted(
        (span["score"] for span in spans[1]), reverse=True
    )
    assert all(spans[index] for index in range(3)), "also where all scores are negative"
    assert spans[3] == []
    assert "evidence" not in reply["results"][0]["core_rerank"]
    one = ranked(server, relevant_spans={"max_spans": 1, "threshold": None})
    assert {row["index"]: row["relevant_spans"] for row in one["results"]}[1] == [best]
    high = ranked(server, relevant_spans={"threshold": best["score"], "new": 1})
    assert {row["index"]: row["relevant_spans"] for row in high["results"]}[1] == [best]
    off = ranked(server, relevant_spans={"mode": "disabled"})
    assert "relevant_spans" not in off["results"][0]


def test_evidence(server, expected) -> None:
    reply = ranked(server, evidence=True)
    for row, result in zip(reply["results"], expected, strict=True):
        given = row["core_rerank"]["evidence"]
        assert [span[:2] for span in given] == [[e.start, e.stop] for e in result.evidence]
        assert [span[2] for span in given] == pytest.approx(
            [part.score for part in result.evidence], rel=1e-3, abs=1e-5
        )


def test_long_documents_tell_their_best_passage(server, default) -> None:
    text = f"{'Bread is baked from flour. ' * 120}Canberra is the capital of Australia."
    (row,) = ranked(server, documents=[text])["results"]
    (result,) = default.rerank(QUERY, [text])
    assert row["core_rerank"]["best_passage"] == list(result.best_passage)


def test_options_of_a_rerank(server, default) -> None:
    options: dict[str, Any] = {"first_stage": "bm25", "score_threshold": 1e-6, "top_n": 3}
    rows = ranked(server, **options)["results"]
    results = default.rerank(QUERY, TEXTS, **options)
    assert [row["index"] for row in rows] == [result.index for result in results]
    assert [row["core_rerank"]["score"] for row in rows] == pytest.approx(
        [result.score for result in results], **CLOSE
    )
    scores = [4.0, 3.0, 2.0, 1.0]
    rows = ranked(server, first_stage_scores=scores)["results"]
    results = default.rerank(QUERY, TEXTS, first_stage_scores=scores)
    assert [row["core_rerank"]["score"] for row in rows] == pytest.approx(
        [result.score for result in results], **CLOSE
    )
    assert ranked(server, min_score=1e9)["results"] == []
    assert ranked(server, score_threshold="auto")["core_rerank"]["answerable"] is True


def test_documents_that_are_not_read_in_time(server) -> None:
    reply = ranked(server, max_seconds=1e-6)
    assert [row["index"] for row in reply["results"]] == [0, 1, 2, 3]
    for row in reply["results"]:
        assert row["core_rerank"]["reranked"] is False
        assert row["core_rerank"]["score"] is None
        assert row["relevance_score"] == 0
    assert reply["core_rerank"]["answerability"] is None


def test_an_empty_list(server) -> None:
    reply = ranked(server, documents=[])
    assert reply["results"] == []
    assert reply["usage"]["total_tokens"] == 0
    assert server.client.post("/rerank", json={"query": "a", "texts": []}).json() == []


def test_text_embeddings_inference(server, expected) -> None:
    def rows(**fields: Any) -> list[dict[str, Any]]:
        response = server.client.post("/rerank", json={"query": QUERY, "texts": TEXTS} | fields)
        assert response.status_code == 200
        return response.json()

    plain = rows()
    assert isinstance(plain, list)
    assert [set(row) for row in plain] == [{"index", "score"}] * 4
    assert [row["index"] for row in plain] == [result.index for result in expected]
    assert [row["score"] for row in plain] == pytest.approx(
        [result.relevance_score for result in expected], **CLOSE
    )
    raw = rows(raw_scores=True, return_text=True, truncate=True, truncation_direction="Right")
    assert [row["score"] for row in raw] == pytest.approx(
        [result.score for result in expected], **CLOSE
    )
    assert [row["text"] for row in raw] == [result.document for result in expected]
    assert rows(raw_scores=None, return_text=None, truncate=None) == plain
    assert [rows(top_n=top_n) for top_n in (1, 0, None)] == [plain[:1], plain, plain]


def test_texts_that_are_null_are_not_text_embeddings_inference(server, expected) -> None:
    reply = ranked(server, "/rerank", texts=None)
    assert [row["index"] for row in reply["results"]] == [result.index for result in expected]


def test_models(server) -> None:
    (card,) = server.client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"]) == ("smollm2-135m", "model")
    assert card["created"] > 1e9


def test_documents_are_stored_ahead(server, default) -> None:
    documents = ["A new document.", {"text": "And another one.", "id": 1}]
    reply = server.client.post("/v1/documents", json={"documents": documents}).json()
    assert reply["cached"] == 2
    assert reply["bytes_written"] > 1000
    again = server.client.post("/v1/documents", json={"documents": documents}).json()
    assert again == {"cached": 2, "bytes_written": 0}
    assert default.cache_documents(["A new document."]) == 0


def test_the_schema_names_both_kinds_of_requests(server) -> None:
    schema = server.client.get("/openapi.json").json()
    names = schema["components"]["schemas"]
    assert {"RerankRequest", "TEIRequest", "ErrorReply"} <= set(names)
    assert {"RerankReply", "VoyageReply", "TEIResult"} <= set(names)
    assert set(schema["paths"]) == {*PATHS, "/v1/documents", "/v1/models", "/health", "/ready"}


def test_the_page_of_the_schema_needs_no_other_server(server) -> None:
    page = server.client.get("/docs").text
    files = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(files) == 3
    for file in files:
        assert httpx.get(f"{server.url}{file}").status_code == 200
    assert "https://" not in page
