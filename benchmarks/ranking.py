"""Measure how rankings depend on position, length and wording; `make bench-ranking`.

Everyday questions over five sentences need only this repository. `--data` adds a collection in the
layout of BEIR, for shuffled lists; `--lengths` adds the folder `lengths` of `benchmarks/lists.py`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from common import machine, tracked
from scipy.stats import kendalltau

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.research.collection import Collection, Run, load_run

EVERYDAY = Path(__file__).parents[1] / "tests" / "data"
SHUFFLES = 5


def everyday(reranker: CoReReranker, path: Path) -> str:
    """Measure how often the sentence with the answer is first of five, at each position once."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = []
    for line in tracked(lines, path.stem):
        item = json.loads(line)
        lists = [
            [*item["wrong"][:index], item["right"], *item["wrong"][index:]] for index in range(5)
        ]
        results = reranker.rerank_batch([(item["question"], documents) for documents in lists])
        first += [ranked[0].index == index for index, ranked in enumerate(results)]
    cells = ", ".join(f"{fmean(first[index::5]):.2f}" for index in range(5))
    return f"| {path.stem} | {len(lines)} | {fmean(first):.3f} | {cells} |"


def shuffled(
    reranker: CoReReranker, collection: Collection, run: Run, queries: Sequence[str], apart: bool
) -> str:
    """Measure how well a ranking stays the same when its list is shuffled."""
    draw = random.Random(0)
    same, taus = [], []
    for query in tracked(queries, "shuffled lists"):
        names = run[query]
        orders = [draw.sample(names, len(names)) for _ in range(SHUFFLES)]
        requests = [
            (collection.queries[query], [collection.passages[name].content for name in order])
            for order in orders
        ]
        if apart:
            rankings = [reranker.rerank(*request) for request in requests]
        else:
            rankings = reranker.rerank_batch(requests)
        ranked = [
            [order[result.index] for result in results]
            for order, results in zip(orders, rankings, strict=True)
        ]
        same += [ranking[0] == ranked[0][0] for ranking in ranked[1:]]
        taus += [
            kendalltau([ranked[0].index(n) for n in names], [ranking.index(n) for n in names])[0]
            for ranking in ranked[1:]
        ]
    mode = "apart" if apart else "together"
    return f"| {len(queries)} | {mode} | {fmean(same):.4f} | {fmean(taus):.4f} |"


def lengths(reranker: CoReReranker, collection: Collection, run: Run) -> list[str]:
    """Measure how often the relevant document is first, by its length and the others'."""
    first = defaultdict(list)
    for query in tracked(list(run), "lists of two lengths"):
        texts = [collection.passages[name].content for name in run[query]]
        (best,) = reranker.rerank(collection.queries[query], texts, top_n=1)
        relevant = collection.qrels[query].get(run[query][best.index], 0) > 0
        first[query.partition("-")[2]].append(relevant)
    return [f"| {name} | {len(hits)} | {fmean(hits):.3f} |" for name, hits in first.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--heads")
    parser.add_argument("--documents-per-prompt", type=int)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run", default="bm25")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--apart", type=int, default=10, help="queries whose shuffles run apart")
    parser.add_argument("--lengths", type=Path)
    arguments = parser.parse_args()
    print(machine("torch", "transformers") + "\n")
    with CoReReranker(
        arguments.model,
        arguments.heads,
        documents_per_prompt=arguments.documents_per_prompt,
    ) as reranker:
        print(f"Heads: {reranker.heads.name}\n")
        print("| questions | | right first | at positions 1 to 5 |\n| --- | --- | --- | --- |")
        for name in ("everyday", "everyday-other-words"):
            print(everyday(reranker, EVERYDAY / f"{name}.jsonl"), flush=True)
        if arguments.data:
            collection = Collection.load(arguments.data, "dev", partial=True)
            run = load_run(arguments.data / "runs" / f"dev.{arguments.run}.trec", collection)
            run = {query: names[:20] for query, names in run.items()}
            queries = list(run)[: arguments.queries]
            print("\n| lists | shuffles run | same document first | Kendall's tau |")
            print("| --- | --- | --- | --- |")
            print(shuffled(reranker, collection, run, queries[: arguments.apart], True), flush=True)
            print(shuffled(reranker, collection, run, queries, False), flush=True)
        if arguments.lengths:
            collection = Collection.load(arguments.lengths, "dev")
            run = load_run(arguments.lengths / "runs" / "dev.given.trec", collection)
            print("\n| relevant among others | lists | relevant first |\n| --- | --- | --- |")
            print(*lengths(reranker, collection, run), sep="\n")


if __name__ == "__main__":
    main()
