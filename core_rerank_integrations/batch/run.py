"""Rerank a TREC run over a collection."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from core_rerank_integrations import __version__
from core_rerank_integrations._internal.files import sync
from core_rerank_integrations._internal.progress import progress_bar
from core_rerank_integrations.batch.journal import Journal, Ranking
from core_rerank_integrations.batch.lists import ListReranker, Row
from core_rerank_integrations.batch.options import RunOptions
from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.ranking import check_candidates
from core_rerank_integrations.research.collection import Collection, load_scored_run, save_run
from core_rerank_integrations.settings import RerankerSettings, RerankOptions

TAG = "core-rerank"
"""Name of the rankings in the run that is written."""
IRRELEVANT_SETTINGS = {"document_cache", "local_files_only", "max_query_tokens"}
"""Settings that change no score."""

_log = logging.getLogger(__name__)


class _List(NamedTuple):
    """The candidates of a query.

    Attributes:
        query: Id of the query.
        documents: Ids of the documents.
        row: Their texts, the first stage's scores if they count, the id of the query, and a digest
            of all as the key.
    """

    query: str
    documents: list[str]
    row: Row

    @property
    def key(self) -> str:
        """Digest of ids, texts and scores, which names the list."""
        key: str = self.row["key"]
        return key


def rerank_run(
    run: RunOptions,
    settings: RerankerSettings | None = None,
    options: RerankOptions | None = None,
    *,
    show_progress: bool = False,
) -> None:
    """Rerank the candidates of a run, and write them as a run.

    A query is finished when its ranking is on disk, beside the output. If the process dies, the
    same call continues with the others. The output appears when all queries are finished.

    Args:
        run: The run, the collection, and where lists are reranked.
        settings: The model and its heads; ``None`` for the defaults.
        options: Options of each list; ``None`` for the defaults. A run has no place for
            ``evidence``, and is not cut short by ``max_seconds``.
        show_progress: Whether to show a progress bar on standard error.

    Raises:
        InvalidInputError: A file cannot be read, a query or a document is missing, a query is too
            long, the output exists, or the finished queries beside it were ranked with other
            settings.
        BackendError: A process of Ray has failed, for example because a query is too long.
        StorageError: The output cannot be written.
    """
    settings = settings or RerankerSettings()
    options = options or RerankOptions()
    if options.evidence or options.max_seconds is not None:
        raise InvalidInputError(
            "evidence and max_seconds are not for runs, which hold whole rankings: leave them out"
        )
    journal = Journal(
        run.output.with_name(f"{run.output.name}.unfinished"), _described(settings, options)
    )
    if run.output.exists() and not journal.path.exists():
        raise InvalidInputError(f"{run.output} exists: delete it, or choose another output")
    lists = _lists(run, with_scores=options.first_stage is not None)
    finished = journal.read()
    waiting = [item for item in lists if item.key not in finished]
    if len(waiting) < len(lists):
        _log.info("%d of %d queries are finished", len(lists) - len(waiting), len(lists))
    if waiting:
        progress = progress_bar(show_progress, "Reranking")
        ranked = _ranked(waiting, journal, run, settings, options)
        finished.update(progress(ranked, len(waiting)))
    save_run(run.output, {item.query: finished[item.key] for item in lists}, TAG)
    sync(run.output)
    journal.delete()


def _described(settings: RerankerSettings, options: RerankOptions) -> str:
    """Return what scores depend on besides the candidates."""
    fields = settings.model_dump(mode="json", exclude_defaults=True, exclude=IRRELEVANT_SETTINGS)
    fields |= options.model_dump(mode="json", exclude_defaults=True)
    heads, model = settings.heads, Path(settings.model)
    if isinstance(heads, (str, Path)) and Path(heads).is_file():
        fields["heads_file"] = hashlib.sha256(Path(heads).read_bytes()).hexdigest()
    if model.is_dir():
        fields["model_files"] = LocalModel(model, None).fingerprint()
    return json.dumps(fields | {"version": __version__})


def _lists(run: RunOptions, with_scores: bool) -> list[_List]:
    folder = run.corpus if run.corpus.is_dir() else None
    queries = run.queries or (folder / "queries.jsonl" if folder else None)
    if queries is None:
        raise InvalidInputError(
            f"{run.corpus} is a file of documents: give the file of queries too, as queries"
        )
    collection = Collection.unjudged(folder / "corpus.jsonl" if folder else run.corpus, queries)
    lists = []
    for query, ranking in load_scored_run(run.run, collection).items():
        documents = [document for document, _ in ranking[: run.candidates]]
        scores = [score for _, score in ranking[: run.candidates]]
        candidates = collection.candidates(query, documents)
        try:
            check_candidates(candidates.query, candidates.documents)
        except InvalidInputError as error:
            raise InvalidInputError(f"{queries}, query {query!r}: {error}") from error
        row: Row = {"query": candidates.query, "documents": list(candidates.documents)}
        if with_scores:
            row["first_stage_scores"] = scores
        content = json.dumps([query, documents, row])
        row |= {"id": query, "key": hashlib.sha256(content.encode()).hexdigest()}
        lists.append(_List(query, documents, row))
    return lists


def _ranked(
    lists: Sequence[_List],
    journal: Journal,
    run: RunOptions,
    settings: RerankerSettings,
    options: RerankOptions,
) -> Iterator[tuple[str, Ranking]]:
    """Yield the rankings of lists by their keys, in any order, when they are on disk."""
    size = run.lists_per_batch
    batches = [
        [item.row for item in lists[start : start + size]] for start in range(0, len(lists), size)
    ]
    documents = {item.key: item.documents for item in lists}
    if run.replicas is None:
        reranked = _in_this_process(batches, settings, options)
    else:
        from core_rerank_integrations.batch.dataset import rerank_batches

        reranked = rerank_batches(batches, settings, options, run)
    for rows in reranked:
        rankings = {
            row["key"]: [
                (documents[row["key"]][result["index"]], result["score"])
                for result in row["results"]
            ]
            for row in rows
        }
        journal.add(rankings)
        yield from rankings.items()


def _in_this_process(
    batches: Sequence[list[Row]], settings: RerankerSettings, options: RerankOptions
) -> Iterator[list[Row]]:
    reranker = ListReranker(settings, options)
    try:
        for batch in batches:
            reranker.check(batch)
        yield from map(reranker, batches)
    finally:
        reranker.close()
