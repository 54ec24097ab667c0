"""Conversion of files to chunks of text with their heading and page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from core_rerank_integrations.errors import InvalidInputError, requires_extra

with requires_extra("chat"):
    import kreuzberg
    from langchain_text_splitters import (
        Language,
        MarkdownHeaderTextSplitter,
        RecursiveCharacterTextSplitter,
    )

SUFFIXES = (".pdf", ".docx", ".html", ".htm", ".md", ".markdown", ".txt")
MAX_FILE_BYTES = 20 << 20
CHUNK_TOKENS = 220
"""Maximum tokens of a chunk; the embedding model reads 256."""
HEADINGS = [("#" * level, str(level)) for level in range(1, 5)]

_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


@dataclass(frozen=True)
class Chunk:
    """A part of a document, as it is embedded and ranked.

    Attributes:
        text: The heading, if there is one, and the text below it.
        title: The heading, or an empty string.
        page: The page on which the text begins, from 1; ``None`` if the format has no pages.
    """

    text: str
    title: str = ""
    page: int | None = None


def chunk_file(path: Path, name: str, count_tokens: Callable[[str], int]) -> list[Chunk]:
    """Return the chunks of a file, in order.

    Args:
        path: Path of the file; its suffix selects the format.
        name: Name of the file in errors.
        count_tokens: Returns the number of tokens of a text.

    Raises:
        InvalidInputError: The file is too large, damaged, locked or without text, or its format
            is not supported.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidInputError(
            f"{name!r} cannot be read: files may be {', '.join(SUFFIXES)}; save it as one of these"
        )
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise InvalidInputError(
            f"{name!r} has {size / (1 << 20):.0f} MiB, and at most {MAX_FILE_BYTES >> 20} are "
            "read; split it"
        )
    chunks = [
        chunk for page, text in _pages(path, name) for chunk in chunk_text(text, count_tokens, page)
    ]
    if not chunks:
        raise InvalidInputError(
            f"{name!r} holds no text; if it is a scan, make it searchable with OCR first"
        )
    return chunks


def chunk_text(
    text: str, count_tokens: Callable[[str], int], page: int | None = None
) -> list[Chunk]:
    """Return Markdown or plain text, divided at headings, and long sections at paragraphs.

    Args:
        text: The text.
        count_tokens: Returns the number of tokens of a text.
        page: The page of the text, if it has one.
    """
    chunks = []
    for section in MarkdownHeaderTextSplitter(HEADINGS).split_text(text):
        headings = section.metadata
        title = headings[max(headings)] if headings else ""
        splitter = RecursiveCharacterTextSplitter.from_language(
            Language.MARKDOWN,
            chunk_size=max(CHUNK_TOKENS - count_tokens(title), CHUNK_TOKENS // 2),
            chunk_overlap=0,
            length_function=count_tokens,
        )
        chunks += [
            Chunk(f"{title}\n\n{part}" if title else part, title, page)
            for part in splitter.split_text(section.page_content)
        ]
    return chunks


def _pages(path: Path, name: str) -> Iterator[tuple[int | None, str]]:
    """Yield the number and text of each page, or the whole text of a format without pages.

    Raises:
        InvalidInputError: The file is damaged or locked.
    """
    suffix = path.suffix.lower()
    if suffix in (".md", ".markdown", ".txt"):
        yield None, _decode(path.read_bytes())
        return
    # Kreuzberg puts the metadata of a page at the front of Djot, where it can be removed. The
    # differences between Djot and Markdown do not matter here. Its cache would write all uploads
    # to the user's folder.
    config = kreuzberg.ExtractionConfig(
        output_format="plain" if suffix == ".pdf" else "djot",
        use_cache=False,
        pages=kreuzberg.PageConfig(extract_pages=True),
    )
    try:
        result = kreuzberg.extract_file_sync(str(path), config=config)
    except kreuzberg.KreuzbergError as error:
        raise InvalidInputError(
            f"{name!r} cannot be read as {suffix}: it is damaged or locked by a password ({error})"
        ) from error
    if suffix == ".pdf":
        for page in result.pages or []:
            yield page["page_number"], page["content"].replace("\r\n", "\n")
    else:
        yield None, _FRONT_MATTER.sub("", result.content)


def _decode(content: bytes) -> str:
    """Decode text of an unknown encoding: Unicode if it is valid, else Western European."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")
