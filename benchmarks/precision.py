"""Measure how precisions below float32 change rankings; `make bench-precision`.

Ranks every list of a collection in each precision, and prints how many lists keep their best three,
and nDCG@10. Each precision is a pass over all lists, which takes minutes to half an hour.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import MODEL, machine

from core_rerank_integrations._internal.progress import progress_bar
from core_rerank_integrations.heads.shipped import named_head_set
from core_rerank_integrations.models.resolve import resolve
from core_rerank_integrations.research.collection import Collection, load_run
from core_rerank_integrations.research.measures import mean_measures
from core_rerank_integrations.research.methods import JointReranker, Method
from core_rerank_integrations.settings import RerankerSettings

FIT, FAST = (named_head_set(f"{kind}-{MODEL}-instruct") for kind in ("fit", "fast"))
METHODS = [Method("fit", FIT), Method("fit+first-stage", FIT, "other"), Method("fast", FAST)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beir", type=Path, required=True)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    arguments = parser.parse_args()
    collection = Collection.load(arguments.beir, arguments.split, partial=True)
    run = {
        query: ranking[: arguments.candidates]
        for query, ranking in load_run(arguments.run, collection).items()
    }
    queries = list(collection.queries)[: arguments.queries]
    qrels = {query: collection.qrels[query] for query in queries}

    rankings: dict[str, dict[str, dict[str, list[str]]]] = {}
    for dtype in ("float32", *arguments.dtypes):
        settings = RerankerSettings(backend=arguments.backend, dtype=dtype)
        reranker = JointReranker(resolve(MODEL), METHODS, settings)
        ranked = reranker.rank(collection, run, queries, progress_bar(True, dtype))
        reranker.close()
        rankings[dtype] = {
            method: {query: [document for document, _ in pairs] for query, pairs in lists.items()}
            for method, lists in ranked.items()
        }

    print(f"{machine('torch', 'transformers')}, {len(queries)} queries\n")
    print("| heads | dtype | same best three, in order | same three | nDCG@10 float32 | its own |")
    print("| --- | --- | --- | --- | --- | --- |")
    for method in METHODS:
        full = rankings["float32"][method.name]
        for dtype in arguments.dtypes:
            rounded = rankings[dtype][method.name]
            ordered = [full[query][:3] == rounded[query][:3] for query in queries]
            kept = [set(full[query][:3]) == set(rounded[query][:3]) for query in queries]
            quality = [mean_measures(qrels, ranking)["nDCG@10"] for ranking in (full, rounded)]
            print(
                f"| {method.name} | {dtype} | {sum(ordered) / len(ordered):.1%} | "
                f"{sum(kept) / len(kept):.1%} | {quality[0]:.4f} | {quality[1]:.4f} |"
            )


if __name__ == "__main__":
    main()
