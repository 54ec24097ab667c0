"""Entries on disk are whole or absent, and bounded, with other writers and crashes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from core_rerank_integrations import DocumentCache
from core_rerank_integrations.backends.local.store import DocumentStore
from core_rerank_integrations.errors import StorageError

LIMIT = 1 << 30
WRITER = """
import sys
from pathlib import Path
from core_rerank_integrations.backends.local.store import DocumentStore

store = DocumentStore(Path(sys.argv[1]), 1 << 40, "model")
print("writing", flush=True)
for number in range(100_000):
    store.put(b"%d" % (number % 20), bytes([number % 251]) * 3_000_000)
"""


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path, LIMIT, "model")
    assert store.get(b"a") is None
    assert b"a" not in store
    for content in (b"one", b"another", b""):
        store.put(b"a", content)
        assert b"a" in store
        assert store.get(b"a") == content
    assert store.get(b"b") is None
    assert DocumentStore(tmp_path, LIMIT, "another model").get(b"a") is None
    assert DocumentStore(tmp_path, LIMIT, "model").get(b"a") == b""


def test_what_is_touched_stays_longer(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path, 250, "model")
    for number in range(2):
        store.put(b"%d" % number, bytes(100))
    for age, path in enumerate(files(tmp_path)):
        os.utime(path, (1000 + age, 1000 + age))
    assert store.touch(b"0")
    assert not store.touch(b"2")
    store.put(b"2", bytes(100))
    assert store.trim() == 1
    assert b"0" in store
    assert b"1" not in store


@pytest.mark.parametrize("damage", ["cut", "bit", "emptied"])
def test_a_damaged_file_is_no_entry(damage: str, tmp_path: Path) -> None:
    store = DocumentStore(tmp_path, LIMIT, "model")
    store.put(b"a", b"content" * 1000)
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[3000] ^= 1
    path.write_bytes(content[: {"cut": 500, "emptied": 0}.get(damage, len(content))])
    assert store.get(b"a") is None
    assert files(tmp_path) == []
    store.put(b"a", b"content")
    assert store.get(b"a") == b"content"


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path, 3500, "model")
    for number in range(5):
        store.put(bytes([number]), b"x" * 1000)
        for path in files(tmp_path):  # An hour goes by.
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))
    assert store.get(bytes([0])) is not None
    assert store.trim() == 2
    kept = [number for number in range(5) if bytes([number]) in store]
    assert kept == [0, 3, 4]
    assert store.trim() == 0
    with pytest.raises(StorageError, match="takes 4000 bytes on disk, and the limit is 3500"):
        store.put(b"large", b"x" * 4000)


def test_the_folder_is_seldom_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan after every write would take time by the square of the number of entries."""
    scans = []
    all_files = DocumentStore._files
    monkeypatch.setattr(DocumentStore, "_files", lambda store: scans.append(1) or all_files(store))
    store = DocumentStore(tmp_path, 100_000, "model")
    for number in range(500):
        store.put(b"%d" % number, bytes(1000))
        store.trim()
        if number % 50 == 49:
            assert sum(path.stat().st_size for path in files(tmp_path)) <= 102_000
    assert len(scans) < 250


def test_no_space_at_all_is_no_store(tmp_path: Path) -> None:
    DocumentStore(tmp_path, LIMIT, "model").put(b"a", b"content")
    off = DocumentStore(tmp_path, 0, "model")
    assert b"a" not in off
    assert off.get(b"a") is None


def test_killed_while_it_writes(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path, LIMIT, "model")
    for round_ in range(5):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.05 + 0.013 * round_)
            writer.send_signal(signal.SIGKILL)
        for number in range(20):
            content = store.get(b"%d" % number)
            assert content is None or bytes(content) == bytes([content[0]]) * 3_000_000
    for path in files(tmp_path):
        os.utime(path, (0, 0))
    store.trim()
    assert not [path for path in files(tmp_path) if path.suffix == ".partial"]


def _put_and_get(arguments: tuple[Path, int]) -> bool:
    folder, seed = arguments
    store = DocumentStore(folder, 2_000_000, "model")
    right = True
    for step in range(150):
        key = bytes([(seed * 7 + step) % 11])
        content = store.get(key)
        right = right and (content is None or bytes(content) == key * 200_000)
        store.put(key, key * 200_000)
        if step % 10 == 0:
            store.trim()
    return right


def test_threads_and_processes_on_one_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as processes, ThreadPoolExecutor(16) as threads:
        other = processes.map_async(_put_and_get, [(tmp_path, seed) for seed in range(2)])
        assert all(threads.map(_put_and_get, [(tmp_path, seed) for seed in range(16)]))
        assert all(other.get(timeout=300))
    DocumentStore(tmp_path, 2_000_000, "model").trim()
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 2_000_000


@pytest.mark.parametrize("wrong", [{"memory_bytes": -1}, {"disk_bytes": -1}, {"folders": "a"}])
def test_meaningless_sizes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DocumentCache(**wrong)  # type: ignore[arg-type]
