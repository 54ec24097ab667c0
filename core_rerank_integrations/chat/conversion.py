"""Files become chunks of text that know their page and their heading."""

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
"""Most tokens of a chunk; the embedding model reads 256."""
HEADINGS = [("#" * level, str(level)) for level in range(1, 5)]

_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


@dataclass(frozen=True)
class Chunk:
    """A piece of a document, as it is embedded and ranked.

    Attributes:
        text: Its heading, where there is one, and what stands below it.
        title: The heading, or an empty string.
        page: The page it begins on, from 1; ``None`` where the format knows none.
    """

    text: str
    title: str = ""
    page: int | None = None


def chunks_of_file(path: Path, name: str, count_tokens: Callable[[str], int]) -> list[Chunk]:
    """What stands in a file, cut to chunks.

    Args:
        path: Where it lies; its ending says what it is.
        name: What to call it in errors.
        count_tokens: How long a text is.

    Raises:
        InvalidInputError: It is too large, of another kind, damaged, locked or without text.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidInputError(
            f"{name!r} cannot be read: files may be {', '.join(SUFFIXES)}; save it as one of these"
        )
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise InvalidInputError(
            f"{name!r} has {size / (1 << 20):.0f} MiB, and {MAX_FILE_BYTES >> 20} are read at "
            "most; split it"
        )
    chunks = [
        chunk
        for page, text in _pages(path, name)
        for chunk in chunks_of_text(text, count_tokens, page)
    ]
    if not chunks:
        raise InvalidInputError(
            f"{name!r} holds no text; of a scan, make one with OCR that can be searched"
        )
    return chunks


def chunks_of_text(
    text: str, count_tokens: Callable[[str], int], page: int | None = None
) -> list[Chunk]:
    """Markdown or plain text, cut to chunks: at headings first, then at paragraphs."""
    by_heading = MarkdownHeaderTextSplitter(HEADINGS).split_text(text)
    found = []
    for section in by_heading:
        levels = section.metadata
        title = levels[max(levels)] if levels else ""
        room = max(CHUNK_TOKENS - count_tokens(title), CHUNK_TOKENS // 2)
        splitter = RecursiveCharacterTextSplitter.from_language(
            Language.MARKDOWN, chunk_size=room, chunk_overlap=0, length_function=count_tokens
        )
        for part in splitter.split_text(section.page_content):
            found.append(Chunk(f"{title}\n\n{part}" if title else part, title, page))
    return found


def _pages(path: Path, name: str) -> Iterator[tuple[int | None, str]]:
    """The text of each page with its number; of formats without pages, all of it."""
    suffix = path.suffix.lower()
    if suffix in (".md", ".markdown", ".txt"):
        yield None, _decoded(path.read_bytes())
        return
    # Djot differs from Markdown in nothing that matters here, and puts a page's own metadata where
    # it can be taken off. The cache would lie in the user's files, with all that was uploaded.
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


def _decoded(content: bytes) -> str:
    """Text of an unknown encoding: Unicode where it is, else Western European."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")
