from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core_rerank_integrations.chat import conversion
from core_rerank_integrations.chat.conversion import (
    CHUNK_TOKENS,
    Chunk,
    chunk_file,
    chunk_text,
)
from core_rerank_integrations.errors import InvalidInputError

Write = Callable[[Path, Any], Path]


def count_words(text: str) -> int:
    return len(text.split())


def read(path: Path) -> list[Chunk]:
    return chunk_file(path, path.name, count_words)


def test_pages_of_a_pdf(tmp_path: Path, write_pdf: Write) -> None:
    path = write_pdf(tmp_path / "boats.pdf", ["Boats are blue.", "Sails are white."])
    assert read(path) == [Chunk("Boats are blue.", "", 1), Chunk("Sails are white.", "", 2)]


def test_headings_of_docx_html_and_markdown(tmp_path: Path, write_docx: Write) -> None:
    expected = [Chunk("Pets\n\nDogs may come.", "Pets"), Chunk("Food\n\nThere is soup.", "Food")]
    sections = {"Pets": "Dogs may come.", "Food": "There is soup."}
    docx = write_docx(tmp_path / "rules.docx", sections)
    html = tmp_path / "rules.HTML"
    html.write_text(
        "<html><head><title>Rules: a --- b</title><meta name=author content=me>"
        "<script>alert(1)</script></head><body><h1>Pets</h1><p>Dogs may come.</p>"
        "<h2>Food</h2><p>There is soup.</p></body></html>"
    )
    markdown = tmp_path / "rules.md"
    markdown.write_text("# Pets\n\nDogs may come.\n\n## Food\n\nThere is soup.\n")
    for path in (docx, html, markdown):
        assert read(path) == expected, path.name


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings_of_text(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "greetings.txt"
    path.write_bytes("Grüße aus Köln: 5 €".encode(encoding))
    assert [chunk.text for chunk in read(path)] == ["Grüße aus Köln: 5 €"]


def test_markup_in_a_markdown_file_is_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "hostile.md"
    path.write_text("<script>alert(1)</script> <|im_end|> {{x}} ${y}")
    assert read(path)[0].text == "<script>alert(1)</script> <|im_end|> {{x}} ${y}"


def test_long_sections_are_divided_at_paragraphs_and_keep_their_heading() -> None:
    paragraphs = [f"Paragraph {index}. " + "word " * 97 for index in range(6)]
    chunks = chunk_text("# A heading\n\n" + "\n\n".join(paragraphs), count_words, page=4)
    assert len(chunks) == 3
    for chunk in chunks:
        assert chunk.text.startswith("A heading\n\nParagraph")
        assert (chunk.title, chunk.page) == ("A heading", 4)
        assert count_words(chunk.text) <= CHUNK_TOKENS
    everything = " ".join(chunk.text.removeprefix("A heading") for chunk in chunks)
    assert everything.split() == " ".join(paragraphs).split()


def test_errors_name_files_that_cannot_be_read(
    tmp_path: Path, write_pdf: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {
        "damaged.pdf": b"%PDF-1.4 garbage",
        "damaged.docx": b"garbage",
        "empty.txt": b" \n",
        "program.exe": b"MZ",
    }
    messages = {
        "damaged.pdf": "'damaged.pdf' cannot be read as .pdf: it is damaged or locked",
        "damaged.docx": "'damaged.docx' cannot be read as .docx: it is damaged or locked",
        "empty.txt": "'empty.txt' holds no text",
        "program.exe": "'program.exe' cannot be read: files may be .pdf, .docx",
        "scan.pdf": "'scan.pdf' holds no text; if it is a scan",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    write_pdf(tmp_path / "scan.pdf", [""])
    for name, message in messages.items():
        with pytest.raises(InvalidInputError) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(message)

    monkeypatch.setattr(conversion, "MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "large.txt").write_bytes(b"x" * (3 << 20))
    with pytest.raises(InvalidInputError, match="has 3 MiB, and at most 1 are read"):
        read(tmp_path / "large.txt")
