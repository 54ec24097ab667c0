from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from core_rerank_integrations import DocumentCache, HeadSet, StorageError
from core_rerank_integrations._internal.files import sync, write_atomically
from core_rerank_integrations.heads.shipped import named_head_set
from core_rerank_integrations.models.local_model import cache_folder

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no modes, limits and HOME")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> None:
    """Set the usual file mode creation mask; other tests do not depend on it."""
    os.umask(0o022)


@posix
@pytest.mark.usefixtures("umask")
def test_documents_are_for_their_owner_alone(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "folder" / "document", "text", private=True)
    write_atomically(tmp_path / "reports" / "report", "text")
    assert mode(tmp_path / "new" / "folder" / "document") == 0o600
    assert mode(tmp_path / "new") == mode(tmp_path / "new" / "folder") == 0o700
    assert mode(tmp_path / "reports" / "report") == 0o644
    assert mode(tmp_path / "reports") == 0o755


@posix
def test_a_full_disk_leaves_nothing_and_the_error_names_the_file(tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"heads\.json: .*; free space or"):
            write_atomically(tmp_path / "heads.json", "content" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_writers_with_the_same_ids_do_not_share_a_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers on one volume have the same process ids."""
    names = []

    def interrupted(path: Path, _: Path) -> None:
        names.append(path.name)
        raise OSError("the volume is gone")

    monkeypatch.setattr(Path, "replace", interrupted)
    for _ in range(2):
        with pytest.raises(StorageError):
            write_atomically(tmp_path / "file", "content")
    assert len(set(names)) == 2


@posix
def test_a_file_and_its_name_are_written_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: written.append(os.fstat(file).st_ino))
    path = tmp_path / "file"
    with pytest.raises(StorageError, match=f"cannot write {path}"):
        sync(path)
    path.write_text("content")
    sync(path)
    assert written == [path.stat().st_ino, tmp_path.stat().st_ino]
    assert path.read_text() == "content"


@posix
def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CORE_RERANK_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache" / "models"
    assert DocumentCache(folder=Path("~/documents")).folder == tmp_path / "documents"
    HeadSet.from_pairs([(0, 1)]).save("~/heads.json")
    assert (tmp_path / "heads.json").exists()
    assert named_head_set("~/heads.json").heads == HeadSet.load("~/heads.json").heads


@posix
def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "CORE_RERANK_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["unknown"])
    with pytest.raises(StorageError, match=r"no home folder .* CORE_RERANK_CACHE"):
        cache_folder()
    with pytest.raises(StorageError, match="cannot expand '~/documents'"):
        DocumentCache(folder=Path("~/documents"))
