"""Measure the time of a rerank on a CPU, by engine, against the alternatives; `make bench-cpu`.

In one process, in turn: a plain float32 prefill of the same list by the full model, a cross-encoder
of MiniLM-L6's shape (random weights, because only its time counts) in sentence-transformers and in
OpenVINO, and reranks of documents that are new, cached in memory, or cached on disk. Prints
Markdown tables. Takes some ten minutes on two cores, and ten more with `--knowledge-base 5000`.
With `--heads`, head sets are compared with each other instead, in OpenVINO.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import LONG_WORDS, MODEL, NQ_WORDS, WORDS, machine, prompt_ids, requests, tracked
from sentence_transformers import CrossEncoder
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from core_rerank_integrations import CoReReranker, DocumentCache
from core_rerank_integrations.backends.openvino.runtime import openvino
from core_rerank_integrations.models.encoder import load_encoder
from core_rerank_integrations.models.resolve import resolve

DOCUMENTS = 20
CACHED_COUNTS = (20, 100, 500)
REST_SECONDS = 0.3
"""Pause between two runs, because PyTorch's threads spin for a while after their work."""

Run = Callable[[int], Any]


def in_turn(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Return wall seconds of each, which run in turn; one round of all does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in tracked(range(rounds + 1), "in turn"):
        for name, run in runs.items():
            time.sleep(REST_SECONDS)
            start = time.perf_counter()
            run(number)
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def cross_encoder() -> CrossEncoder:
    """Create a cross-encoder of MiniLM-L6's shape, with random weights and our tokenizer."""
    config = BertConfig(
        vocab_size=resolve(MODEL).config().vocab_size,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=1024,
        num_labels=1,
    )
    with TemporaryDirectory() as folder:
        BertForSequenceClassification(config).save_pretrained(folder)
        tokenizer = resolve(MODEL).tokenizer()
        tokenizer.save_pretrained(folder)
        return CrossEncoder(folder, device="cpu", max_length=512)


class OpenVINOCrossEncoder:
    """The same network in OpenVINO, padded to the longest pair."""

    def __init__(self, encoder: CrossEncoder, precision: str) -> None:
        self._tokenizer = encoder.tokenizer
        model = encoder.model.eval()
        example = {
            "input_ids": torch.ones(2, 8, dtype=torch.long),
            "attention_mask": torch.ones(2, 8, dtype=torch.long),
        }
        graph = openvino.convert_model(model, example_input=example)
        settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        self._run = openvino.Core().compile_model(graph, "CPU", settings)

    def predict(self, pairs: Sequence[tuple[str, str]]) -> Any:
        tokens = self._tokenizer(
            [list(pair) for pair in pairs],
            padding=True,
            truncation=True,
            max_length=512,
            return_tensors="np",
        )
        return self._run([tokens["input_ids"], tokens["attention_mask"]])[0]


def engines() -> list[tuple[str, str]]:
    """Return the backends and dtypes for this processor."""
    has_bfloat16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    half = ["bfloat16"] if has_bfloat16 else []
    return [
        *(("transformers", dtype) for dtype in ("float32", *half)),
        *(("openvino", dtype) for dtype in ("float32", *half, "int8")),
    ]


class Engine:
    """A reranker whose documents are new, cached in memory, or cached on disk."""

    def __init__(self, backend: str, dtype: str, folder: Path, heads: str | None = None) -> None:
        self.name = heads or f"{backend}, {dtype}"
        cache = DocumentCache(folder=folder)
        self.reranker = CoReReranker(
            MODEL, heads, backend=backend, dtype=dtype, document_cache=cache
        )

    def from_disk(self, query: str, documents: Sequence[str]) -> None:
        self.reranker.clear_cache()  # As in a process that was just started.
        self.reranker.score(query, documents)


def compare(words: int, rounds: int, running: Sequence[Engine], query_words: int | None) -> None:
    """Print the table of one length of documents."""
    model = AutoModelForCausalLM.from_pretrained(resolve(MODEL).path, dtype=torch.float32).eval()
    new = requests(rounds + 1, DOCUMENTS, words, longest_query=query_words)
    ((_, cached),) = requests(1, DOCUMENTS, words, label="known ")
    encoder = load_encoder(resolve(MODEL))
    tokens = [prompt_ids(encoder, query, documents) for query, documents in new]

    def prefill(number: int) -> None:
        with torch.inference_mode():
            model(tokens[number], use_cache=False, logits_to_keep=1)

    plain = cross_encoder()
    has_bfloat16 = any("bfloat16" in engine.name for engine in running)
    precisions = {"float32": "f32", **({"bfloat16": "bf16"} if has_bfloat16 else {})}
    encoders = {"sentence-transformers, float32": plain.predict} | {
        f"openvino, {name}": OpenVINOCrossEncoder(plain, precision).predict
        for name, precision in precisions.items()
    }
    runs: dict[str, Run] = {"prefill": prefill}
    for name, predict in encoders.items():
        runs[f"cross-encoder, {name}"] = lambda number, predict=predict: predict(
            [(new[number][0], text) for text in cached]
        )
    for engine in running:
        engine.reranker.cache_documents(cached)
        score, from_disk = engine.reranker.score, engine.from_disk
        runs |= {
            f"{engine.name}: new": lambda number, score=score: score(*new[number]),
            f"{engine.name}: from disk": lambda number, from_disk=from_disk: from_disk(
                f"{new[number][0]} on disk", cached
            ),
            f"{engine.name}: cached": lambda number, score=score: score(new[number][0], cached),
        }
    times = in_turn(runs, rounds)

    def ratio(name: str, other: str) -> str:
        ratios = [a / b for a, b in zip(times[name], times[other], strict=True)]
        return f"**{statistics.median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f})"

    length = np.mean([ids.shape[1] for ids in tokens])
    print(
        f"\n{words} words per document, {length:.0f} tokens per list, "
        f"questions of {np.mean([len(query.split()) for query, _ in new]):.0f} words.\n"
    )
    print("| run | s | of the plain prefill | of the cross-encoder of its engine |")
    print("| --- | --- | --- | --- |")
    for name in runs:
        seconds = statistics.median(times[name])
        beside = f"cross-encoder, {name.partition(':')[0].replace('int8', 'bfloat16')}"
        if name.startswith("transformers"):
            beside = "cross-encoder, sentence-transformers, float32"
        to_encoder = ratio(name, beside) if ":" in name and beside in times else ""
        print(f"| {name} | {seconds:.3f} | {ratio(name, 'prefill')} | {to_encoder} |", flush=True)


def compare_heads(running: Sequence[Engine], rounds: int, query_words: int | None) -> None:
    """Print the times of head sets in one precision, as ratios to the first one."""
    new = requests(rounds + 1, DOCUMENTS, label="new ", longest_query=query_words)
    unread = requests(rounds + 1, DOCUMENTS, label="unread ")
    ((_, cached),) = requests(1, DOCUMENTS, label="known ")
    precision = "bf16" if running[0].reranker.scorer.backend.dtype == "bfloat16" else "f32"
    encoder = OpenVINOCrossEncoder(cross_encoder(), precision)
    runs: dict[str, Run] = {
        "cross-encoder": lambda number: encoder.predict([(new[number][0], t) for t in cached])
    }
    for engine in running:
        engine.reranker.cache_documents(cached)
        score, read = engine.reranker.score, engine.reranker.cache_documents
        runs |= {
            f"{engine.name}: new": lambda number, score=score: score(*new[number]),
            f"{engine.name}: cached": lambda number, score=score: score(new[number][0], cached),
            f"{engine.name}: reading": lambda number, read=read: read(unread[number][1]),
        }
    times = in_turn(runs, rounds)

    def ratio(name: str, other: str) -> str:
        ratios = [a / b for a, b in zip(times[name], times[other], strict=True)]
        return f"**{statistics.median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f})"

    print(f"\n| heads | s | of {running[0].name} | of the cross-encoder |\n|{' --- |' * 4}")
    for name in runs:
        _, _, what = name.partition(": ")
        first = f"{running[0].name}: {what}"
        cells = [ratio(name, first), ratio(name, "cross-encoder")] if what else ["", ""]
        print(
            f"| {name} | {statistics.median(times[name]):.3f} | {' | '.join(cells)} |", flush=True
        )
    for engine in running:
        engine.reranker.clear_cache()
        engine.reranker.score("Who?", cached)
        size = engine.reranker.stats.bytes_cached / len(cached) / 2**20
        print(f"\n{engine.name}: {size:.2f} MiB per passage")


def cached_lists(engine: Engine, rounds: int) -> None:
    """Print how the cost of cached documents grows with their number."""
    queries = [query for query, _ in requests(rounds + 1, 1)]
    ((_, documents),) = requests(1, max(CACHED_COUNTS), WORDS, label="many ")
    engine.reranker.cache_documents(documents)
    runs = {
        str(count): lambda number, count=count: engine.reranker.score(
            queries[number], documents[:count]
        )
        for count in CACHED_COUNTS
    }
    print(f"\nCached documents, {engine.name}.\n")
    print("| documents | s | ms per document |\n| --- | --- | --- |")
    for count, seconds in in_turn(runs, rounds).items():
        median = statistics.median(seconds)
        print(f"| {count} | {median:.3f} | {1000 * median / int(count):.1f} |", flush=True)


def knowledge_base(engine: Engine, size: int) -> None:
    """Cache a knowledge base, and rerank 20 of its passages for each of a hundred questions."""
    ((_, documents),) = requests(1, size, WORDS, label="base ")
    start = time.perf_counter()
    written = engine.reranker.cache_documents(documents, show_progress=True)
    reading = time.perf_counter() - start
    engine.reranker.clear_cache()
    before = resident()
    draw = np.random.default_rng(0)
    seconds = []
    for query, _ in requests(100, 1, label="base "):
        chosen = [documents[index] for index in draw.choice(size, DOCUMENTS, replace=False)]
        start = time.perf_counter()
        engine.reranker.score(query, chosen)
        seconds.append(time.perf_counter() - start)
    print(f"\nA knowledge base of {size} passages, {engine.name}.\n")
    print("| ms to read a passage | on disk GiB | 100 reranks of 20: median s | added memory MiB |")
    print("| --- | --- | --- | --- |")
    print(
        f"| {1000 * reading / size:.0f} | {written / 2**30:.1f} | "
        f"{statistics.median(seconds):.3f} | {resident() - before:.0f} |"
    )


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--query-words",
        type=int,
        default=NQ_WORDS,
        help="maximum words of a question; by default like those of Natural Questions",
    )
    parser.add_argument("--knowledge-base", type=int, metavar="PASSAGES")
    parser.add_argument("--heads", nargs="+", help="head sets to compare with each other")
    arguments = parser.parse_args()
    print(machine("torch", "transformers", "openvino", "sentence-transformers"))
    with TemporaryDirectory() as folder:
        if arguments.heads:
            sets = [Engine("openvino", "auto", Path(folder), heads) for heads in arguments.heads]
            compare_heads(sets, arguments.rounds, arguments.query_words)
            return
        running = [Engine(*names, Path(folder)) for names in engines()]
        for words in (WORDS, LONG_WORDS):
            compare(words, arguments.rounds, running, arguments.query_words)
        best = Engine("openvino", "auto", Path(folder))
        cached_lists(best, arguments.rounds)
        if arguments.knowledge_base:
            knowledge_base(best, arguments.knowledge_base)


if __name__ == "__main__":
    main()
