"""Documents are added, found, replaced, removed, and still there after a restart."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.chat.knowledge import (
    HANDBOOK,
    KnowledgeBase,
    KnowledgeRetriever,
    Progress,
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
    steps = [(p.source, p.step, p.done, p.total) for p in first.add_file(pdf)]
    assert [step for step in steps if "converting" not in step[1]] == [
        ("boats.pdf", "indexing", 0, 2),
        ("boats.pdf", "can be asked; reading ahead", 0, 2),
        ("boats.pdf", "added", 2, 2),
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
    assert "indexing" not in {p.step for p in knowledge.add_file(tmp_path / "rules.md")}
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


def test_interrupted_handbook_comes_at_the_next_start(
    tmp_path: Path, chat_reranker: CoReReranker
) -> None:
    with closing(KnowledgeBase(tmp_path / "data", chat_reranker)) as first:
        adding = first.add_handbook()
        next(adding)
        next(adding)
        adding.close()
    with closing(KnowledgeBase(tmp_path / "data", chat_reranker)) as second:
        assert second.is_new
        note = tmp_path / "note.txt"
        add(second, note, "A note.")
        second.remove("note.txt")
    with closing(KnowledgeBase(tmp_path / "data", chat_reranker)) as third:
        assert not third.is_new, "a knowledge base whose documents were removed stays empty"


def test_adding_can_be_stopped(knowledge: KnowledgeBase, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(f"{number} " + "sail " * 200 for number in range(12)))
    for step in ("converting", "indexing"):
        adding = knowledge.add_file(path)
        while step not in next(adding).step:
            pass
        adding.close()
        assert knowledge.sources == {}
    adding = knowledge.add_file(path)
    while "reading ahead" not in next(adding).step:
        pass
    assert knowledge.sources == {"long.txt": 12}, "it can be asked before it is read"
    knowledge.remove("long.txt")
    assert list(adding) == []
    assert knowledge.sources == {}


def test_files_are_converted_one_after_another(knowledge: KnowledgeBase, tmp_path: Path) -> None:
    path = tmp_path / "rules.md"
    path.write_text("Dogs may come.")
    first, second = knowledge.add_file(path), knowledge.add_file(path, "others.md")
    assert "converting" in next(first).step
    assert next(second).step == "waiting for another file"
    first.close()
    assert [progress.step for progress in second][-1] == "added"


def test_long_documents_are_read_as_they_come_up(
    knowledge: KnowledgeBase,
    tmp_path: Path,
    chat_reranker: CoReReranker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("core_rerank_integrations.chat.knowledge.READ_AHEAD", 1)
    add(knowledge, tmp_path / "two.md", "# Elks\n\nElks swim.\n\n# Owls\n\nOwls do not.")
    assert chat_reranker.cache_documents(["Elks\n\nElks swim."]) == 0
    assert texts(knowledge, "owls")[0] == "Owls\n\nOwls do not."
    assert chat_reranker.cache_documents(["Owls\n\nOwls do not."]) > 0


def test_progress_shows_the_time_left() -> None:
    assert str(Progress("a.txt", "indexing", 8, 9000, 170.0)) == (
        "a.txt: indexing, 8 of 9,000 passages, 3 min left"
    )
    assert str(Progress("a.txt", "indexing", 8, 20, 11.6)).endswith("12 s left")
    assert str(Progress("a.txt", "waiting")) == "a.txt: waiting"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
def test_documents_are_their_owners_alone(knowledge: KnowledgeBase, tmp_path: Path) -> None:
    add(knowledge, tmp_path / "rules.md", "Dogs may come.")
    documents = knowledge.folder / "documents"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (documents, *documents.iterdir())]
    assert modes == [0o700, 0o600]
