"""What every head of a model gives to every document: the raw material of finding heads."""

from __future__ import annotations

import hashlib
import io
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import cast

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations.backends.loading import chosen_backend, load_scorer
from core_rerank_integrations.errors import InvalidInputError, StorageError
from core_rerank_integrations.heads.head_set import Head, HeadSet, Provenance
from core_rerank_integrations.heads.scoring_config import ScoringConfig
from core_rerank_integrations.method.prompt import TEMPLATES, PromptTemplate
from core_rerank_integrations.method.windows import Layout, Window
from core_rerank_integrations.models.resolve import cache_folder, model_shape, resolve
from core_rerank_integrations.scorer import Candidates, Progress, WindowAttention, no_progress

Features = npt.NDArray[np.float32]


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
        max_layer: Highest layer to read, counted from 0; ``None`` reads all.
        prune: Share of the model's layers to leave out at its top, in place of ``max_layer``.
        template: As for `CoReReranker`.
        backend: As for `CoReReranker`.
        dtype: As for `CoReReranker`.
        device: As for `CoReReranker`.
        cache: Folder for what was read; ``None`` takes the package's own.

    Raises:
        HeadSetError: The model has no layer ``max_layer``.
        InvalidInputError: ``prune`` is no share below 1, or both are given.
        UnsupportedModelError: The model's attention cannot be read.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_layer: int | None = None,
        prune: float | None = None,
        template: str | PromptTemplate | None = None,
        backend: str = "auto",
        dtype: str = "auto",
        device: str | None = None,
        cache: Path | None = None,
    ) -> None:
        local_model = resolve(model)
        self.shape = model_shape(local_model.config())
        highest = _highest_layer(self.shape.num_layers, max_layer, prune)
        self.heads = HeadSet.every(self.shape, highest, model=local_model.model_id)
        chosen = chosen_backend(backend, local_model, self.heads, dtype, device)
        self._reader = load_scorer(chosen, local_model, self.heads, dtype, device, template)
        self.backend, self.dtype = chosen, dtype
        self.template = self._reader.encoder.template
        self._cache = cache or cache_folder("features")
        identity = (local_model.fingerprint(), len(self.heads.heads), chosen, dtype)
        self._identity = repr(identity).encode()

    def read(
        self,
        query: str,
        documents: Sequence[str],
        window: int | None = None,
        reverse: bool = False,
    ) -> HeadFeatures:
        """`read_lists` for one query."""
        (features,) = self.read_lists([Candidates(query, tuple(documents))], window, reverse)
        return features

    def read_lists(
        self,
        lists: Sequence[Candidates],
        window: int | None = None,
        reverse: bool = False,
        tracked: Progress = no_progress,
    ) -> list[HeadFeatures]:
        """Features of each list's documents, ranked in prompts of at most ``window``.

        Prompts of the same documents are read together, whichever lists they come from: what
        stands before the query is then computed once for all of them.

        Args:
            lists: Queries and their documents.
            window: Most documents in one prompt; ``None`` for as many as fit.
            reverse: Whether a prompt shows its documents last first.
            tracked: Wraps the prompts that are not yet stored, as they are read.

        Raises:
            StorageError: What was read cannot be written or read back.
        """
        # A long document is read as far as the context holds it: features of its passages are
        # no features of the document.
        layout = Layout(window, reverse, max_document_tokens=self._reader.backend.max_context)
        planned = self._reader.plan(lists, layout)
        wanted = {self._path(window): window for windows in planned for window in windows}
        parts = {path: _load(path) for path in wanted}
        missing = [path for path, part in parts.items() if part is None]
        readings = self._reader.stream([wanted[path] for path in missing], by_head=True)
        for place, reading in tracked(readings, len(missing)):
            part = _features(reading)
            _store(missing[place], part)
            parts[missing[place]] = part
        found = cast(dict[Path, HeadFeatures], parts)
        nothing = np.zeros((0, len(self.heads.heads)), dtype=np.float32)
        return [
            _assembled([(window, found[self._path(window)]) for window in windows])
            if windows
            else HeadFeatures(nothing, nothing, nothing)
            for windows in planned
        ]

    def head_set(
        self,
        name: str,
        heads: tuple[Head, ...],
        scoring: ScoringConfig,
        method: str,
        details: Mapping[str, JsonValue],
        ranked_heads: Sequence[tuple[int, int, float | None]] = (),
    ) -> HeadSet:
        """A head set of this model; what it was read with joins the ``details``."""
        template = self.template.name
        return self.heads.model_copy(
            update={
                "name": name,
                "template": template if template in TEMPLATES else None,
                "heads": heads,
                "scoring": rule,
                "provenance": Provenance(
                    method=method,
                    details={
                        **details,
                        "backend": self.backend,
                        "dtype": self.dtype,
                        **_versions(),
                    },
                    ranked_heads=tuple(ranked_heads),
                ),
            }
        )

    def close(self) -> None:
        """Free the model."""
        self._reader.close()

    def __enter__(self) -> HeadReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _path(self, window: Window) -> Path:
        digest = hashlib.sha256(self._identity)
        for part in (window.prompt.prefix, window.prompt.suffix):
            digest.update(len(part).to_bytes(8) + part.tobytes())
        name = digest.hexdigest()
        return self._cache / name[:2] / f"{name}.npz"


def _highest_layer(num_layers: int, max_layer: int | None, prune: float | None) -> int | None:
    if prune is None:
        return max_layer
    if max_layer is not None:
        raise InvalidInputError("give a highest layer or a share to prune, not both")
    if not 0 <= prune < 1:
        raise InvalidInputError(f"prune must be at least 0 and below 1, got {prune}")
    return max(1, round((1 - prune) * num_layers)) - 1


def _versions() -> dict[str, JsonValue]:
    versions: dict[str, JsonValue] = {}
    for package in ("core-rerank-integrations", "openvino", "torch", "transformers", "vllm"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {**versions, "python": python_version(), "date": time.strftime("%Y-%m-%d")}


def _features(reading: WindowAttention) -> HeadFeatures:
    attention = [
        reading.mass[:, span.start : span.stop - 1].sum(axis=1)
        for span in reading.window.prompt.document_spans
    ]
    parts = (
        np.stack(attention),
        reading.scores(drop_outliers=False).T,
        reading.scores(drop_outliers=True).T,
    )
    return HeadFeatures(*(part.astype(np.float32) for part in parts))


def _assembled(parts: Sequence[tuple[Window, HeadFeatures]]) -> HeadFeatures:
    """Of a list, from its prompts."""
    order = np.argsort([index for window, _ in parts for index in window.indices])
    return HeadFeatures(
        *(
            np.concatenate([getattr(part, item.name) for _, part in parts])[order]
            for item in fields(HeadFeatures)
        )
    )


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
    write_atomically(path, content.getvalue())
