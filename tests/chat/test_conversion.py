# ruff: noqa: RUF001  Texts in other scripts.

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core_rerank_integrations.chat import conversion
from core_rerank_integrations.chat.conversion import (
    CHARACTERS_PER_TOKEN,
    CHUNK_TOKENS,
    Chunk,
    Conversion,
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


@pytest.mark.parametrize(
    "content",
    [
        bytes(range(256)) * 20,
        b"PK\x03\x04" + bytes(100),
        b"%PDF-1.4 " + bytes(range(1, 32)) * 20,
        b"words, then a zero\0 and words",
        "Greetings".encode("utf-16-le"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".html"])
def test_binary_data_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match="is not text"):
        read(path)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Паром уходит в шесть.", "cp1251"),
        ("Prom odpływa o szóstej.", "cp1250"),
        ("渡轮在晚上六点出发。", "gb18030"),
        ("フェリーは六時に出発します。", "shift_jis"),
        ("Το πλοίο φεύγει στις έξι.", "cp1253"),
    ],
)
def test_encodings_that_cannot_be_told_are_refused(
    tmp_path: Path, text: str, encoding: str
) -> None:
    path = tmp_path / "note.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(InvalidInputError, match="encoding is unknown; save it as text in UTF-8"):
        read(path)
    page = tmp_path / "page.html"
    page.write_bytes(f"<meta charset={encoding}><p>{text}</p>".encode(encoding))
    assert read(page)[0].text == text


def test_long_words_are_divided() -> None:
    count = conversion._count_tokens()
    for text in ("QUJD" * 2000, "ไ" * 3000, f"{'x' * 5000} y"):
        chunks = chunk_text(text, count)
        assert "".join(chunk.text for chunk in chunks) == text.replace(" ", "")
        assert max(len(chunk.text) for chunk in chunks) <= CHUNK_TOKENS * CHARACTERS_PER_TOKEN


def test_text_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "MAX_CHARACTERS", 1000)
    (tmp_path / "book.txt").write_text("word " * 300)
    with pytest.raises(
        InvalidInputError, match="holds 1,500 characters of text, and at most 1,000"
    ):
        read(tmp_path / "book.txt")


def convert(path: Path) -> list[Chunk]:
    with Conversion(path, path.name) as conversion:
        while not conversion.wait(0.5):
            pass
        return conversion.chunks()


def test_small_file_that_unpacks_to_a_large_one(tmp_path: Path, write_docx: Write) -> None:
    source, bomb = write_docx(tmp_path / "a.docx", {"A": "b"}), tmp_path / "bomb.docx"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            paragraph = b"<w:p><w:r><w:t>The ferry leaves at six.</w:t></w:r></w:p>"
            if name == "word/document.xml":
                content = content.replace(b"<w:p>", paragraph * 1_500_000 + b"<w:p>", 1)
            new.writestr(name, content)
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(InvalidInputError, match="unpacks to 82 MiB, and at most 64 are read"):
        convert(bomb)


@pytest.mark.parametrize(("limit", "value"), [("MAX_SECONDS", 0), ("MAX_MEMORY_BYTES", 1 << 26)])
def test_conversion_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_pdf: Write, limit: str, value: int
) -> None:
    path = write_pdf(tmp_path / "boats.pdf", ["Boats are blue."])
    assert convert(path) == [Chunk("Boats are blue.", "", 1)]
    monkeypatch.setattr(conversion, limit, value)
    with pytest.raises(InvalidInputError, match=r"'boats\.pdf' cannot be converted within"):
        convert(path)


def test_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"No such file.+gone\.txt"):
        convert(tmp_path / "gone.txt")
