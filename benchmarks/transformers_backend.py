"""Measure the time of a rerank on the Transformers backend against plain Transformers.

Prints a Markdown table of ratios, from one process; `make bench`. Takes some ten minutes on two
cores.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import HEADS, MODEL, alternate, machine, prompt_ids, requests, tracked
from transformers import AutoModelForCausalLM

from core_rerank_integrations import CoReReranker, HeadSet
from core_rerank_integrations.heads.shipped import named_head_set
from core_rerank_integrations.models.encoder import load_encoder
from core_rerank_integrations.models.resolve import resolve

BACKEND = "transformers"
SHIPPED = ("core", "qr", "fit", "fast")
LIST_LENGTHS = (5, 20, 40, 100)


def compare_with_full_prefill(name: str, heads: HeadSet, dtype: str, rounds: int) -> str:
    """Compare a rerank of 20 documents, N/A included, with a plain prefill of one prompt."""
    model = resolve(MODEL)
    full = AutoModelForCausalLM.from_pretrained(model.path, dtype=getattr(torch, dtype)).eval()
    with CoReReranker(MODEL, heads=heads, backend=BACKEND, dtype=dtype) as reranker:
        work = requests(rounds + 1, 20)
        # The reranker's own encoder would cache what the timed runs tokenise.
        encoder = load_encoder(model, heads.template)
        tokens = [prompt_ids(encoder, *request) for request in work]

        def prefill(number: int) -> None:
            with torch.inference_mode():
                full(tokens[number], use_cache=False, logits_to_keep=1)

        ours, plain = alternate(lambda number: reranker.score(*work[number]), prefill, rounds)
        layers = (reranker.heads.highest_layer, 30)
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    lengths = [prompt.shape[1] for prompt in tokens]
    return (
        f"| {name} | {dtype} | {statistics.mean(lengths):.0f} | {statistics.median(ours):.2f} | "
        f"{statistics.median(plain):.2f} | **{statistics.median(ratios):.2f}** "
        f"({min(ratios):.2f} to {max(ratios):.2f}) | {layers[0]}/{layers[1]} = "
        f"{layers[0] / layers[1]:.2f} |"
    )


def cost_over_list_length(documents_per_prompt: int | None, rounds: int) -> list[str]:
    """Measure the seconds per document for lists of several lengths, of new documents."""
    rows = []
    with CoReReranker(
        MODEL,
        HEADS,
        backend=BACKEND,
        dtype="float32",
        documents_per_prompt=documents_per_prompt,
    ) as reranker:
        work = {count: requests(rounds + 1, count) for count in LIST_LENGTHS}
        times: dict[int, list[float]] = {count: [] for count in LIST_LENGTHS}
        for number in tracked(range(rounds + 1), "list lengths"):
            for count in LIST_LENGTHS:
                start = time.perf_counter()
                reranker.score(*work[count][number])
                times[count].append(time.perf_counter() - start)
    reference = statistics.median(times[20][1:]) / 20
    for count in LIST_LENGTHS:
        seconds = statistics.median(times[count][1:])
        rows.append(
            f"| {documents_per_prompt or 'shipped (20)'} | {count} | {seconds:.2f} | "
            f"{1000 * seconds / count:.0f} | {seconds / count / reference:.2f} |"
        )
    return rows


def peak_memory(run: str) -> float:
    """Return the peak resident MiB of a new process that runs one prompt of 20 documents."""
    command = [sys.executable, __file__, "--memory-of", run]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.splitlines()[-1])


def measure_memory(run: str) -> None:
    # Both sides encode the same prompt; the rerank also loads, verifies and caches.
    query, documents = requests(1, 20)[0]
    if run == "rerank":
        CoReReranker(MODEL, heads=HEADS, backend=BACKEND, dtype="float32").score(query, documents)
    elif run == "full":
        local = resolve(MODEL)
        tokens = prompt_ids(load_encoder(local, HEADS.template), query, documents)
        model = AutoModelForCausalLM.from_pretrained(local.path, dtype=torch.float32).eval()
        with torch.inference_mode():
            model(tokens, use_cache=False, logits_to_keep=1)
    # getrusage does not serve, because a child process inherits the peak of its parent.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=["nothing", "full", "rerank"])
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(arguments.memory_of)
        return
    print(machine("torch", "transformers") + "\n")
    print("| heads | dtype | prompt tokens | rerank s | plain prefill s | ratio (range) | floor |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype in ("float32", "bfloat16"):
        print(compare_with_full_prefill("four", HEADS, dtype, arguments.rounds), flush=True)
    for kind in SHIPPED:
        heads = named_head_set(f"{kind}-{MODEL}-instruct")
        print(compare_with_full_prefill(kind, heads, "bfloat16", arguments.rounds), flush=True)
    print("\n| documents per prompt | documents | rerank s | ms per document | against 20 |")
    print("| --- | --- | --- | --- | --- |")
    for documents_per_prompt in (None, 1):
        for row in cost_over_list_length(documents_per_prompt, max(arguments.rounds // 2, 1)):
            print(row, flush=True)
    base, full, rerank = (peak_memory(run) for run in ("nothing", "full", "rerank"))
    print("\n| peak memory, float32 | MiB | above the libraries | against the full model |")
    print("| --- | --- | --- | --- |")
    print(f"| libraries alone | {base:.0f} | | |")
    print(f"| plain prefill | {full:.0f} | {full - base:.0f} | 1 |")
    ratio = (rerank - base) / (full - base)
    print(f"| rerank | {rerank:.0f} | {rerank - base:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
