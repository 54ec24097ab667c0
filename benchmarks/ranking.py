"""What a ranking depends on that it should not: place, length, wording; `make bench-ranking`.

Everyday questions over five sentences need nothing but this repository. `--data` adds a collection
in the layout of BEIR, for shuffled lists; `--lengths` the folder of that name that
`benchmarks/lists.py` makes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from common import machine
from rich.console import Console
from rich.progress import track
from scipy.stats import kendalltau

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.research.collection import Collection, Run, load_run

EVERYDAY = Path(__file__).parents[1] / "tests" / "data"
SHUFFLES = 5


def tracked(items: Sequence[str], what: str) -> Iterable[str]:
    return track(items, description=what, console=Console(stderr=True), transient=True)


def everyday(reranker: CoReReranker, path: Path) -> str:
    """How often the sentence with the answer is first of five; each stands at every place once."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = []
    for line in tracked(lines, path.stem):
        item = json.loads(line)
        places = [
            [*item["wrong"][:place], item["right"], *item["wrong"][place:]] for place in range(5)
        ]
        results = reranker.rerank_batch([(item["question"], documents) for documents in places])
        first += [ranked[0].index == place for place, ranked in enumerate(results)]
    by_place = [fmean(first[place::5]) for place in range(5)]
    cells = ", ".join(f"{share:.2f}" for share in by_place)
    return f"| {path.stem} | {len(lines)} | {fmean(first):.3f} | {cells} |"


def shuffled(
    reranker: CoReReranker, collection: Collection, run: Run, queries: Sequence[str], apart: bool
) -> str:
    """How far a ranking stays the same when its list is shuffled."""
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
    how = "apart" if apart else "together"
    return f"| {len(queries)} | {how} | {fmean(same):.4f} | {fmean(taus):.4f} |"


def lengths(reranker: CoReReranker, collection: Collection, run: Run) -> list[str]:
    """How often the relevant document is first, by its length and that of the others."""
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
    parser.add_argument("--window", type=int)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run", default="bm25")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--apart", type=int, default=10, help="queries whose shuffles run apart")
    parser.add_argument("--lengths", type=Path)
    arguments = parser.parse_args()
    print(machine("torch", "transformers") + "\n")
    with CoReReranker(arguments.model, heads=arguments.heads, window=arguments.window) as reranker:
        print(f"Heads: {reranker.heads.name}\n")
        print(
            "| questions | | right first | when it stands 1st to 5th |\n| --- | --- | --- | --- |"
        )
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
