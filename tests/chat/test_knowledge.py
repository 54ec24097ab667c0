"""Documents are added, found, replaced, removed, and still there after a restart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.chat.knowledge import (
    HANDBOOK,
    KnowledgeBase,
    KnowledgeRetriever,
    printable,
)
from core_rerank_integrations.errors import InvalidInputError, StorageError


def add(knowledge: KnowledgeBase, path: Path, text: str) -> None:
    path.write_text(text)
    list(knowledge.add_file(path))


def texts(knowledge: KnowledgeBase, question: str) -> list[str]:
    return [document.page_content for document in knowledge.search(question, 3)]


def test_added_documents_are_found_after_a_restart(
    tmp_path: Path, chat_reranker: CoReReranker, write_pdf: Callable[[Path, list[str]], Path]
) -> None:
    pdf = write_pdf(tmp_path / "boats.pdf", ["Boats are blue.", "Sails are white."])
    first = KnowledgeBase(tmp_path / "data", chat_reranker)
    assert first.is_new
    assert len(first) == 0
    assert [(p.source, p.done, p.total) for p in first.add_file(pdf)] == [
        ("boats.pdf", 0, 2),
        ("boats.pdf", 2, 2),
    ]
    (sails,) = first.search("Which colour is a sail?", 1)
    assert sails.metadata == {"source": "boats.pdf", "title": "", "page": 2}
    first.close()

    second = KnowledgeBase(tmp_path / "data", chat_reranker)
    assert not second.is_new
    assert second.sources == {"boats.pdf": 2}
    assert second.search("Which colour is a sail?", 1) == [sails]
    second.close()


def test_document_replaces_one_of_the_same_name(knowledge: KnowledgeBase, tmp_path: Path) -> None:
    add(knowledge, tmp_path / "rules.md", "# Pets\n\nDogs may come.\n\n# Food\n\nThere is soup.")
    add(knowledge, tmp_path / "rules.md", "# Pets\n\nDogs must stay away.")
    assert knowledge.sources == {"rules.md": 1}
    assert texts(knowledge, "pets") == ["Pets\n\nDogs must stay away."]
    add(knowledge, tmp_path / "others.md", "Cats may come.")
    knowledge.remove("rules.md")
    knowledge.remove("rules.md")
    assert knowledge.sources == {"others.md": 1}
    assert texts(knowledge, "pets") == ["Cats may come."]
    assert len(list((knowledge.folder / "documents").iterdir())) == 1


def test_unchanged_file_is_not_read_again(knowledge: KnowledgeBase, tmp_path: Path) -> None:
    add(knowledge, tmp_path / "rules.md", "Dogs may come.")
    assert [p.done for p in knowledge.add_file(tmp_path / "rules.md")] == [1]
    assert knowledge.sources == {"rules.md": 1}


def test_added_documents_are_cached(
    knowledge: KnowledgeBase, tmp_path: Path, chat_reranker: CoReReranker
) -> None:
    add(knowledge, tmp_path / "new.txt", "The museum's boat was built in Bergen, of larch.")
    assert chat_reranker.cache_documents(texts(knowledge, "boat")) == 0


def test_handbook(knowledge: KnowledgeBase) -> None:
    *_, last = knowledge.add_handbook()
    assert (last.source, last.done, last.total) == (HANDBOOK, 72, 72)
    assert len(knowledge) == 72
    retriever = KnowledgeRetriever(knowledge=knowledge, k=5)
    found = retriever.invoke("What ear protection do the compressors call for?")
    assert len({document.id for document in found}) == 5
    assert found[0].metadata["source"] == HANDBOOK


def test_names_are_not_paths(knowledge: KnowledgeBase, tmp_path: Path) -> None:
    path = tmp_path / "x.md"
    path.write_text("Some text.")
    list(knowledge.add_file(path, "../../../etc/pass\u202ewd\n.md"))
    assert list(knowledge.sources) == ["passwd.md"]
    written = [path.name for path in (knowledge.folder / "documents").iterdir()]
    assert all(name.removesuffix(".safetensors").isalnum() for name in written)
    assert printable("C:\\folder\\a b.pdf") == "a b.pdf"
    assert printable("\u200b/") == "unnamed"


def test_unreadable_file_adds_nothing(knowledge: KnowledgeBase, tmp_path: Path) -> None:
    (tmp_path / "bad.pdf").write_bytes(b"garbage")
    with pytest.raises(InvalidInputError, match=r"'bad\.pdf' cannot be read"):
        list(knowledge.add_file(tmp_path / "bad.pdf"))
    assert knowledge.sources == {}
    assert texts(knowledge, "anything") == []


def test_second_process_is_refused(knowledge: KnowledgeBase) -> None:
    code = (
        "import sys, pathlib\n"
        "from core_rerank_integrations.chat.knowledge import KnowledgeBase\n"
        "try: KnowledgeBase(pathlib.Path(sys.argv[1]), None)\n"
        "except OSError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(knowledge.folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"the documents in {knowledge.folder} are in use by another process" in output
    assert "--data" in output


def test_error_names_a_damaged_file(tmp_path: Path, chat_reranker: CoReReranker) -> None:
    damaged = tmp_path / "documents" / "0.safetensors"
    damaged.parent.mkdir()
    damaged.write_bytes(b"\x80\x04garbage")
    with pytest.raises(StorageError, match=r"0\.safetensors is not a document.+delete it"):
        KnowledgeBase(tmp_path, chat_reranker)
    damaged.unlink()
    KnowledgeBase(tmp_path, chat_reranker).close()


def test_error_names_a_folder_that_cannot_be_created(
    tmp_path: Path, chat_reranker: CoReReranker
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be stored in .+--data"):
        KnowledgeBase(tmp_path / "file" / "data", chat_reranker)
