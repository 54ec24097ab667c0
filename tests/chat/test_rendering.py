"""Documents show as text, whatever they contain."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, strategies as st
from langchain_core.documents import Document

from core_rerank_integrations.chat import rendering
from core_rerank_integrations.chat.conversation import Turn
from core_rerank_integrations.integrations.rag.prompts import NO_ANSWER

OWN_TAGS = {
    "a",
    "article",
    "details",
    "div",
    "h2",
    "h3",
    "header",
    "li",
    "mark",
    "ol",
    "p",
    "section",
}
OWN_TAGS |= {"small", "span", "summary"}
HOSTILE = st.text(st.sampled_from("<>&\"'`${}[]()=/ \n1ascript"), max_size=60) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "${alert(1)}",
        "{{constructor}}",
        "</p></li><a href='javascript:alert(1)'>[1]</a>",
    ]
)


class ParsedHtml(HTMLParser):
    """The tags, attributes and text of a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def passage(text: str, **metadata: Any) -> Document:
    return Document(text, id=text, metadata={"source": "a.md", **metadata})


@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
def test_no_value_becomes_a_tag_an_attribute_or_a_template(
    content: str, source: str, question: str, answer: str
) -> None:
    evidence = [[0, len(content) // 2, 0.4], [len(content) // 2, len(content), 0.3]]
    metadata = {
        "source": source,
        "title": source,
        "core_rerank": {"probability": 0.1, "evidence": evidence},
    }
    document = Document(content, id="1", metadata=metadata)
    turn = Turn(question, source, search=question[::-1], is_done=True, milliseconds={"answer": 2})
    turn.candidates = turn.reranked = turn.documents = [document]
    turn.answer, turn.error = f"{answer} [1]", content
    for html in (rendering.conversation([turn, turn]), rendering.findings([turn, turn])):
        assert not set("${}`") & set(html)
        parsed = ParsedHtml(html)
        assert set(parsed.tags) <= OWN_TAGS
        assert not {name for name, _ in parsed.attributes if name.startswith("on")}
        links = [value for name, value in parsed.attributes if name == "href"]
        assert all(value and value.startswith("#core-") for value in links)
    shown = ParsedHtml(rendering.findings([turn]).rpartition('class="core-text')[2]).text
    assert content.removeprefix(f"{source}\n\n") in shown


@pytest.mark.parametrize("show", [rendering.text, rendering.notice])
def test_text_is_shown_unchanged(show: Callable[[str], str]) -> None:
    hostile = "<b>&amp; ${x} {{y}} `z` \"'"
    assert ParsedHtml(show(hostile)).text == hostile


def test_citations_link_to_passages() -> None:
    turn = Turn("Who?", "x", documents=[passage("Bell did.")], answer="Bell. [1] Or not. [2]")
    html = rendering.conversation([turn])
    assert '<a class="core-cite" href="#core-0-1" aria-label="Passage 1">1</a>' in html
    assert "[2]" in html
    assert 'id="core-0-1"' in rendering.findings([turn])


def test_ranks_that_passages_moved() -> None:
    first, second, third = (passage(name, title=name) for name in ("First", "Second", "Third"))
    turn = Turn("Who?", "x", True, "Who?", [first, second, third], [third, second, first])
    text = ParsedHtml(rendering.findings([turn])).text
    assert "1Third▲2 ranks up2Second3First▼2 ranks down" in text


def test_strongest_sentences_are_marked_and_left_out_sentences_are_pale() -> None:
    text = "Head\n\nWeak. Strong. Near."
    evidence = [[12, 19, 0.5], [20, 25, 0.4], [6, 11, 0.1], [0, 4, 0.9]]
    shown = passage(text, title="Head", core_rerank={"probability": 0.5, "evidence": evidence})
    ranked = {**shown.metadata["core_rerank"], "extracted": [[12, 25]]}
    cut = Document(
        "Strong. Near.",
        id=text,
        metadata={"title": "Head", "core_rerank": ranked, "source": "a.md"},
    )
    turn = Turn("Who?", "x", candidates=[passage(text)], documents=[cut])
    html = rendering.findings([turn])
    assert (
        '<span class="core-left-out">Weak. </span><mark>Strong.</mark> <mark>Near.</mark>' in html
    )
    turn.documents = [shown]
    assert "Weak. <mark>Strong.</mark> <mark>Near.</mark>" in rendering.findings([turn])
    evidence[:] = [[start, stop, score - 1] for start, stop, score in evidence]
    assert "Weak. <mark>Strong.</mark> Near." in rendering.findings([turn])


def test_missing_parts_are_not_shown() -> None:
    waiting = Turn("Who?", "x")
    assert "Reading" in rendering.conversation([waiting])
    assert rendering.findings([waiting]) == ""
    assert "Ask a question" in rendering.findings([])
    none = Turn("Who?", "x", answer=NO_ANSWER, is_done=True)
    assert "core-none" in rendering.conversation([none])


def test_times_of_stages() -> None:
    turn = Turn("Who?", "An <llm>", is_done=True, answerable=0.734, search="Who?")
    turn.milliseconds = {"search": 1.6, "candidates": 12.3, "reranked": 1234.5, "answer": 4.0}
    text = ParsedHtml(rendering.conversation([turn])).text
    assert (
        "An <llm> · first stage 12 ms · reranking 1,234 ms · answer 4 ms · answerability 73%"
        in text
    )
