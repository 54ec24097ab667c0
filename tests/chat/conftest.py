from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from core_rerank_integrations import CoReReranker, DocumentCache
from core_rerank_integrations.models.local_model import LocalModel

if all(map(find_spec, ("gradio", "docx", "fpdf"))):
    import docx
    import fpdf

    from core_rerank_integrations.chat.knowledge import KnowledgeBase
else:  # The extra `chat` is not installed.
    collect_ignore_glob = ["test_*"]


@pytest.fixture(scope="session")
def chat_reranker(
    smollm2: LocalModel,  # noqa: ARG001  Puts the model into the cache.
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[CoReReranker]:
    cache = DocumentCache(folder=tmp_path_factory.mktemp("cache"))
    with CoReReranker(document_cache=cache) as reranker:
        yield reranker


@pytest.fixture
def knowledge(tmp_path: Path, chat_reranker: CoReReranker) -> Iterator[KnowledgeBase]:
    knowledge = KnowledgeBase(tmp_path / "data", chat_reranker)
    yield knowledge
    knowledge.close()


@pytest.fixture(scope="session")
def write_pdf() -> Callable[[Path, list[str]], Path]:
    """Return a function that writes a PDF with a page for each text."""

    def write(path: Path, pages: list[str]) -> Path:
        document = fpdf.FPDF()
        document.set_font("helvetica", size=11)
        for page in pages:
            document.add_page()
            document.multi_cell(0, 6, page)
        document.output(str(path))
        return path

    return write


@pytest.fixture(scope="session")
def write_docx() -> Callable[[Path, dict[str, str]], Path]:
    """Return a function that writes a DOCX file with a paragraph under each heading."""

    def write(path: Path, sections: dict[str, str]) -> Path:
        document = docx.Document()
        for heading, paragraph in sections.items():
            document.add_heading(heading, 1)
            document.add_paragraph(paragraph)
        document.save(str(path))
        return path

    return write
