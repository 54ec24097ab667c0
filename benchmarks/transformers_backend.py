"""What a rerank costs on the Transformers backend, against plain Transformers, in one process.

Prints a Markdown table of ratios; `make bench`. Takes some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import HEADS, MODEL, alternate, machine, requests, tracked
from transformers import AutoModelForCausalLM

from core_rerank_integrations import CoReReranker, HeadSet
from core_rerank_integrations.heads.head_set import named_head_set
from core_rerank_integrations.models.resolve import resolve

BACKEND = "transformers"
SHIPPED = ("core", "qr", "fit", "fast")
LIST_LENGTHS = (5, 20, 40, 100)


def compare_with_full_prefill(name: str, heads: HeadSet, dtype: str, rounds: int) -> str:
    """A rerank of 20 documents, N/A included, over a plain prefill of them in one prompt."""
    folder = resolve(MODEL).path
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with CoReReranker(MODEL, heads=heads, backend=BACKEND, dtype=dtype) as reranker:
        work = requests(rounds + 1, 20)
        prompts = [reranker.reader.encoder.encode(*request) for request in work]
        tokens = [
            torch.as_tensor(np.concatenate((prompt.prefix, prompt.suffix)))[None]
            for prompt in prompts
        ]

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


def cost_over_list_length(window: int | None, rounds: int) -> list[str]:
    """Seconds a document for lists of several lengths, every list fresh."""
    rows = []
    with CoReReranker(
        MODEL, heads=HEADS, backend=BACKEND, dtype="float32", window=window
    ) as reranker:
        work = {count: requests(rounds + 1, count) for count in LIST_LENGTHS}
        times: dict[int, list[float]] = {count: [] for count in LIST_LENGTHS}
        for number in tracked(rounds + 1, "list lengths"):
            for count in LIST_LENGTHS:
                start = time.perf_counter()
                reranker.score(*work[count][number])
                times[count].append(time.perf_counter() - start)
    reference = statistics.median(times[20][1:]) / 20
    for count in LIST_LENGTHS:
        seconds = statistics.median(times[count][1:])
        rows.append(
            f"| {window or 'shipped (20)'} | {count} | {seconds:.2f} | "
            f"{1000 * seconds / count:.0f} | {seconds / count / reference:.2f} |"
        )
    return rows


def peak_memory(what: str) -> float:
    """Peak resident MiB of a fresh process that runs ``what`` on one prompt of 20 documents."""
    command = [sys.executable, __file__, "--memory-of", what]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.splitlines()[-1])


def measure_memory(what: str) -> None:
    # Both sides encode the prompt alike; the rerank also loads, verifies and caches.
    query, documents = requests(1, 20)[0]
    if what == "rerank":
        CoReReranker(MODEL, heads=HEADS, backend=BACKEND, dtype="float32").score(query, documents)
    elif what == "full":
        from core_rerank_integrations.method.prompt import TEMPLATES, PromptEncoder

        local = resolve(MODEL)
        encoder = PromptEncoder(local.tokenizer().backend_tokenizer, TEMPLATES["chatml"])
        prompt = encoder.encode(query, documents)
        model = AutoModelForCausalLM.from_pretrained(local.path, dtype=torch.float32).eval()
        with torch.inference_mode():
            tokens = torch.as_tensor(np.concatenate((prompt.prefix, prompt.suffix)))[None]
            model(tokens, use_cache=False, logits_to_keep=1)
    # Not getrusage, whose peak a child process inherits from its parent.
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
    print("\n| window | documents | rerank s | ms a document | against 20 |")
    print("| --- | --- | --- | --- | --- |")
    for window in (None, 1):
        for row in cost_over_list_length(window, max(arguments.rounds // 2, 1)):
            print(row, flush=True)
    base, full, rerank = (peak_memory(what) for what in ("nothing", "full", "rerank"))
    print("\n| peak memory, float32 | MiB | above the libraries | against the full model |")
    print("| --- | --- | --- | --- |")
    print(f"| libraries alone | {base:.0f} | | |")
    print(f"| plain prefill | {full:.0f} | {full - base:.0f} | 1 |")
    ratio = (rerank - base) / (full - base)
    print(f"| rerank | {rerank:.0f} | {rerank - base:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
