"""Features: the attention of every head of a model on every document."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from core_rerank_integrations._internal.files import write_atomically
from core_rerank_integrations._internal.progress import Progress, no_progress
from core_rerank_integrations.backends.loading import chosen_backend
from core_rerank_integrations.errors import StorageError
from core_rerank_integrations.heads.head_set import Head, HeadSet, Provenance
from core_rerank_integrations.heads.scoring_config import ScoringConfig
from core_rerank_integrations.method.list_scores import WindowAttention
from core_rerank_integrations.method.templates import TEMPLATES
from core_rerank_integrations.method.windows import Candidates, Layout, Window
from core_rerank_integrations.models.local_model import cache_folder, model_shape
from core_rerank_integrations.models.resolve import resolve
from core_rerank_integrations.research.options import ReaderOptions
from core_rerank_integrations.scorer import load_scorer
from core_rerank_integrations.settings import RerankerSettings

Array = npt.NDArray[np.float32]


class HeadFeatures(NamedTuple):
    """Features of the documents of one list, each of shape [documents, heads].

    Attributes:
        attention: Attention mass of the query on the document, uncalibrated and without the
            token after the document, as for SCoRe.
        sums: Calibrated attention mass on all tokens of the document. A weighted sum over heads
            consists of these.
        scores: The same without the tokens that `document_scores` drops, for each head by
            itself.
    """

    attention: Array
    sums: Array
    scores: Array


class HeadReader:
    """Compute the features of all heads of a model up to a layer, and store them on disk.

    The features of a prompt are stored under a hash of the model, the heads, the precision, the
    rounding and the tokens of the prompt. An interrupted run therefore continues, and a second run
    takes seconds.

    Args:
        options: The model, its layers, and the folder of the features.

    Attributes:
        heads: All heads up to the layer.
        backend: Name of the backend that was selected.
        dtype: The precision that the model runs in, which ``auto`` may have selected.

    Raises:
        InvalidInputError: Options of the runtime do not belong together.
        HeadSetError: The model has no layer ``max_layer``.
        UnsupportedModelError: The model's attention cannot be read.
    """

    def __init__(self, options: ReaderOptions) -> None:
        model = resolve(options.model)
        shape = model_shape(model.config())
        max_layer = options.max_layer
        if options.prune is not None:
            max_layer = max(1, round((1 - options.prune) * shape.num_layers)) - 1
        self.heads = HeadSet.every(shape, max_layer, model=model.model_id)
        settings = RerankerSettings.checked(template=options.template, **options.runtime)
        self.backend = chosen_backend(settings, model, self.heads)
        self._scorer = load_scorer(self.backend, settings, model, self.heads)
        self.dtype = str(self._scorer.backend.dtype).removeprefix("torch.")
        self._folder = options.cache or cache_folder("features")
        # The dtype alone is not enough: only an explicit float32 leaves keys and values exact.
        precision = self._scorer.backend.identity
        identity = (model.fingerprint(), len(self.heads.heads), self.backend, precision)
        self._identity = repr(identity).encode()

    def read(self, candidates: Candidates, layout: Layout) -> HeadFeatures:
        """Compute the features of one list; see `read_lists`."""
        (features,) = self.read_lists([candidates], layout)
        return features

    def read_lists(
        self, lists: Sequence[Candidates], layout: Layout, progress: Progress = no_progress
    ) -> list[HeadFeatures]:
        """Compute the features of the documents of each list.

        Prompts of the same documents share their computation, whichever lists they belong to.
        A long document is truncated to the context, because features of its passages are not
        features of the document.

        Args:
            lists: Queries and their documents.
            layout: How the lists become prompts.
            progress: Wraps the prompts that have to be computed.

        Raises:
            StorageError: Features cannot be written or read back.
        """
        layout = layout._replace(max_document_tokens=self._scorer.backend.max_context)
        planned = self._scorer.plan(lists, layout)
        by_path = {self._path(window): window for windows in planned for window in windows}
        features = {path: _load(path) for path in by_path}
        missing = [path for path, array in features.items() if array is None]
        attention = self._scorer.stream([by_path[path] for path in missing])
        for index, window_attention in progress(attention, len(missing)):
            features[missing[index]] = array = _features(window_attention)
            _store(missing[index], array)
        complete = cast(dict[Path, Array], features)
        empty = np.zeros((len(HeadFeatures._fields), 0, len(self.heads.heads)), dtype=np.float32)
        return [
            HeadFeatures(
                *np.concatenate(
                    [empty, *(complete[self._path(window)] for window in windows)], axis=1
                )[:, np.argsort([index for window in windows for index in window.indices])]
            )
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
        """Create a head set of this model.

        Args:
            name: Name of the head set.
            heads: The heads.
            scoring: How they rank.
            method: How they were found.
            details: Details of the provenance. Backend, precision, versions and date are added.
            ranked_heads: All heads as (layer, head, score), best first.
        """
        template = self._scorer.encoder.template.name
        details = {**details, "backend": self.backend, "dtype": self.dtype, **versions()}
        return self.heads.model_copy(
            update={
                "name": name,
                "template": template if template in TEMPLATES else None,
                "heads": heads,
                "scoring": scoring,
                "provenance": Provenance(
                    method=method, details=details, ranked_heads=tuple(ranked_heads)
                ),
            }
        )

    def close(self) -> None:
        """Free the model."""
        self._scorer.close()

    def __enter__(self) -> HeadReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _path(self, window: Window) -> Path:
        digest = hashlib.sha256(self._identity)
        for ids in (window.prefix.ids, window.question):
            digest.update(len(ids).to_bytes(8) + ids.tobytes())
        name = digest.hexdigest()
        return self._folder / name[:2] / f"{name}.npy"


def versions() -> dict[str, JsonValue]:
    """Return the versions of the packages that matter, and the date."""
    found: dict[str, JsonValue] = {}
    for package in ("core-rerank-integrations", "openvino", "torch", "transformers", "vllm"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return {**found, "python": python_version(), "date": time.strftime("%Y-%m-%d")}


def _features(attention: WindowAttention) -> Array:
    """Return the features of the documents of one prompt, shape [features, documents, heads]."""
    mass = [
        attention.mass[:, span.start : span.stop - 1].sum(axis=1)
        for span in attention.window.prefix.document_spans
    ]
    sums, scores = (attention.scores(drop_outliers=drops).T for drops in (False, True))
    return np.stack((mass, sums, scores)).astype(np.float32)


def _load(path: Path) -> Array | None:
    try:
        features: Array = np.load(path)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {error}; delete it and run again") from error
    return features


def _store(path: Path, features: Array) -> None:
    content = io.BytesIO()
    np.save(content, features)
    write_atomically(path, content.getvalue())
