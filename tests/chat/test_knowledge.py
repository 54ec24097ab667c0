"""Documents come in, are found, are replaced and removed, and are there after a restart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.chat.knowledge import HANDBOOK, KnowledgeBase, printable
from core_rerank_integrations.errors import InvalidInputError, StorageError


def add(knowledge: KnowledgeBase, path: Path, text: str) -> None:
    path.write_text(text)
    list(knowledge.add_file(path))


def texts(knowledge: KnowledgeBase, question: str) -> list[str]:
    return [document.page_content for document in knowledge.nearest(question, 3)]


def test_what_comes_in_is_found_after_a_restart(
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
    (sails,) = first.nearest("Which colour is a sail?", 1)
    assert sails.metadata == {"source": "boats.pdf", "title": "", "page": 2}
    first.close()

    second = KnowledgeBase(tmp_path / "data", chat_reranker)
    assert not second.is_new
    assert second.sources == {"boats.pdf": 2}
    assert second.nearest("Which colour is a sail?", 1) == [sails]
    second.close()


def test_a_name_holds_one_document(knowledge: KnowledgeBase, tmp_path: Path) -> None:
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


def test_the_engine_knows_what_comes_in(
    knowledge: KnowledgeBase, tmp_path: Path, chat_reranker: CoReReranker
) -> None:
    add(knowledge, tmp_path / "new.txt", "The museum's boat was built in Bergen, of larch.")
    assert chat_reranker.cache_documents(texts(knowledge, "boat")) == 0


def test_the_handbook(knowledge: KnowledgeBase) -> None:
    *_, last = knowledge.add_handbook()
    assert (last.source, last.done, last.total) == (HANDBOOK, 72, 72)
    assert len(knowledge) == 72
    found = knowledge.retriever(5).invoke("What ear protection do the compressors call for?")
    assert len({document.id for document in found}) == 5
    assert found[0].metadata["source"] == HANDBOOK


def test_names_lead_nowhere(knowledge: KnowledgeBase, tmp_path: Path) -> None:
    path = tmp_path / "x.md"
    path.write_text("Some text.")
    list(knowledge.add_file(path, "../../../etc/pass\u202ewd\n.md"))
    assert list(knowledge.sources) == ["passwd.md"]
    written = [path.name for path in (knowledge.folder / "documents").iterdir()]
    assert all(name.removesuffix(".safetensors").isalnum() for name in written)
    assert printable("C:\\folder\\a b.pdf") == "a b.pdf"
    assert printable("\u200b/") == "unnamed"


def test_what_cannot_be_read_leaves_nothing(knowledge: KnowledgeBase, tmp_path: Path) -> None:
    (tmp_path / "bad.pdf").write_bytes(b"garbage")
    with pytest.raises(InvalidInputError, match=r"'bad\.pdf' cannot be read"):
        list(knowledge.add_file(tmp_path / "bad.pdf"))
    assert knowledge.sources == {}
    assert texts(knowledge, "anything") == []


def test_another_process_is_refused(knowledge: KnowledgeBase) -> None:
    code = (
        "import sys, pathlib\n"
        "from core_rerank_integrations.chat.knowledge import KnowledgeBase\n"
        "try: KnowledgeBase(pathlib.Path(sys.argv[1]), None)\n"
        "except OSError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(knowledge.folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"the documents in {knowledge.folder} are in use by another process" in said
    assert "--data" in said


def test_a_damaged_file_is_named(tmp_path: Path, chat_reranker: CoReReranker) -> None:
    damaged = tmp_path / "documents" / "0.safetensors"
    damaged.parent.mkdir()
    damaged.write_bytes(b"\x80\x04garbage")
    with pytest.raises(StorageError, match=r"0\.safetensors is no document.+delete it"):
        KnowledgeBase(tmp_path, chat_reranker)
    damaged.unlink()
    KnowledgeBase(tmp_path, chat_reranker).close()


def test_a_folder_that_cannot_be_is_named(tmp_path: Path, chat_reranker: CoReReranker) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be kept in .+--data"):
        KnowledgeBase(tmp_path / "file" / "data", chat_reranker)
