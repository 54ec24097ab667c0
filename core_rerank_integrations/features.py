"""What every head of a model gives to every document: the raw material of finding heads."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.errors import StorageError
from core_rerank_integrations.files import write_whole
from core_rerank_integrations.heads import HeadSet
from core_rerank_integrations.loading import load_backend, load_encoder
from core_rerank_integrations.models import LocalModel, cache_folder, model_shape, resolve
from core_rerank_integrations.prompt import PromptTemplate
from core_rerank_integrations.scoring import document_scores
from core_rerank_integrations.windows import Window, WindowPlanner

Features = npt.NDArray[np.float32]

FINGERPRINT_BYTES = 1 << 20


@dataclass(frozen=True)
class HeadFeatures:
    """Of one query and its documents.

    Attributes:
        attention: Attention mass of the query on each document, uncalibrated and without the
            token after the document, as detection uses it. Shape [documents, heads].
        sums: Calibrated attention mass of each head, over all tokens of a document: what a
            weighted sum over heads is made of. Shape [documents, heads].
        scores: The same without the tokens that `document_scores` drops, for each head by
            itself. Shape [documents, heads].
    """

    attention: Features
    sums: Features
    scores: Features


class HeadReader:
    """Reads all heads of a model up to a layer, and keeps on disk what it has read.

    A prompt's features are stored under a hash of the model, the heads, the precision and the
    prompt's tokens: an interrupted run goes on where it was, and a second one takes seconds.

    Args:
        model: Alias, hub id, folder or GGUF file.
        max_layer: Highest layer to read; ``None`` reads all.
        template: As for `CoReReranker`.
        backend: ``auto``, ``transformers`` or ``vllm``.
        dtype: As for `CoReReranker`.
        device: As for `CoReReranker`.
        cache: Folder for what was read; ``None`` takes the package's own.

    Raises:
        HeadSetError: The model has no layer ``max_layer``.
        UnsupportedModelError: The model's attention cannot be read.
    """

    def __init__(
        self,
        model: str | Path,
        max_layer: int | None = None,
        template: str | PromptTemplate | None = None,
        backend: str = "auto",
        dtype: str = "auto",
        device: str | None = None,
        cache: Path | None = None,
    ) -> None:
        local_model = resolve(model)
        self.shape = model_shape(local_model.config())
        self.heads = HeadSet.every(self.shape, max_layer, model=local_model.model_id)
        encoder = load_encoder(local_model, template)
        self.template = encoder.template
        self._backend = load_backend(backend, local_model, self.heads, dtype, device)
        self._planner = WindowPlanner(encoder, self._backend.max_context)
        self._cache = cache or cache_folder("features")
        identity = (_fingerprint(local_model), len(self.heads.heads), backend, dtype)
        self._identity = repr(identity).encode()

    def read(
        self,
        query: str,
        documents: Sequence[str],
        window: int | None = None,
        reverse: bool = False,
    ) -> HeadFeatures:
        """Features of ``documents`` for ``query``, ranked in prompts of at most ``window``.

        With ``reverse`` a prompt shows its documents last first.

        Raises:
            StorageError: What was read cannot be written or read back.
        """
        windows = self._planner.windows(query, documents, window, reverse)
        path = self._path(windows)
        features = _load(path)
        if features is None:
            features = self._compute(windows, len(documents))
            _store(path, features)
        return features

    def close(self) -> None:
        """Free the model."""
        self._backend.close()

    def __enter__(self) -> HeadReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _compute(self, windows: Sequence[Window], documents: int) -> HeadFeatures:
        shape = (documents, len(self.heads.heads))
        features = HeadFeatures(*(np.zeros(shape, np.float32) for _ in range(3)))
        prompts = [window.prompt for window in windows]
        twins = [self._planner.baseline(window) for window in windows]
        masses = self._backend.head_mass([*prompts, *twins])
        baselines = masses[len(prompts) :]
        for window, mass, baseline in zip(windows, masses, baselines, strict=False):
            spans = window.prompt.document_spans
            attention = [mass[:, span.start : span.stop - 1].sum(axis=1) for span in spans]
            features.attention[window.indices] = np.stack(attention)
            features.scores[window.indices] = document_scores(mass, baseline, spans).T
            features.sums[window.indices] = document_scores(
                mass, baseline, spans, drop_outliers=False
            ).T
        return features

    def _path(self, windows: Sequence[Window]) -> Path:
        digest = hashlib.sha256(self._identity)
        for window in windows:
            for part in (window.indices, window.prompt.prefix, window.prompt.suffix):
                array = np.asarray(part, dtype=np.int64)
                digest.update(len(array).to_bytes(8) + array.tobytes())
        name = digest.hexdigest()
        return self._cache / name[:2] / f"{name}.npz"


def _load(path: Path) -> HeadFeatures | None:
    try:
        with np.load(path) as arrays:
            return HeadFeatures(**{name: arrays[name] for name in arrays.files})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise StorageError(f"cannot read {path}: {error}; delete it and run again") from error


def _store(path: Path, features: HeadFeatures) -> None:
    content = io.BytesIO()
    np.savez(content, **vars(features))
    write_whole(path, content.getvalue())


def _fingerprint(model: LocalModel) -> str:
    """Tells models apart by their configuration and the size and start of every weight file.

    Hashing all weights would take minutes for a large model.
    """
    digest = hashlib.sha256((model.path / "config.json").read_bytes())
    for path in sorted(model.path.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()
