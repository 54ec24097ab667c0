"""Measure all GPU figures of this project, on a machine with CUDA; prints Markdown.

The models have published shapes and random weights, so nothing is downloaded. Takes some seven
minutes with vLLM; without it, only the Transformers backend is measured. ``--tiny`` shrinks the
models and the work, to try the script without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from core_rerank_integrations import HeadSet
from core_rerank_integrations.backends.base import AttentionBackend, PromptGroup
from core_rerank_integrations.backends.transformers.backend import TransformersBackend
from core_rerank_integrations.heads.shipped import named_head_set
from core_rerank_integrations.method.prompt import SharedPrefix, Span
from core_rerank_integrations.models.local_model import LocalModel

ROUNDS = 10
CONCURRENT = 16
DOCUMENTS, DOCUMENT_TOKENS = 40, 158
"""150 tokens of text, and their marker and newlines."""
QUERY_TOKENS, BASELINE_TOKENS = 40, 27

SHAPES: dict[str, tuple[Any, str]] = {
    "Mistral-7B": (
        MistralConfig(
            vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768,
            sliding_window=None, rope_theta=1e6, architectures=["MistralForCausalLM"],
        ),
        "core-mistral-7b-instruct-v0.3",
    ),
    "Llama-3.1-8B": (
        LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
            rope_theta=5e5, architectures=["LlamaForCausalLM"],
        ),
        "core-llama-3.1-8b-instruct",
    ),
}  # fmt: skip
SMALL = LlamaConfig(
    vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=16384,
    initializer_range=0.05, architectures=["LlamaForCausalLM"],
)  # fmt: skip


class Work:
    """New prompts of the shape of a rerank: documents, a question and the baseline."""

    def __init__(self, vocabulary: int, documents: int) -> None:
        self._draw = np.random.default_rng(0)
        self._vocabulary = vocabulary
        self._prefix_tokens = documents * DOCUMENT_TOKENS

    def group(self) -> PromptGroup:
        ids, question, baseline = map(
            self._tokens, (self._prefix_tokens, QUERY_TOKENS, BASELINE_TOKENS)
        )
        return PromptGroup(SharedPrefix(ids, 0, (Span(0, len(ids)),), (), baseline), [question])

    def prompt(self) -> np.ndarray[Any, Any]:
        return self._tokens(self._prefix_tokens + QUERY_TOKENS)

    def _tokens(self, count: int) -> np.ndarray[Any, Any]:
        return self._draw.integers(3, self._vocabulary, count)


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """Return the median wall time; the first two calls do not count."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def measure(name: str, folder: Path, heads: HeadSet, work: Work, rounds: int) -> None:
    from vllm import LLM, SamplingParams

    from core_rerank_integrations.backends.vllm.caller.dedicated import VLLMBackend

    model = LocalModel(folder, None)
    config = model.config()
    pairs = [(head.layer, head.head) for head in heads.heads]
    uncut = HeadSet.from_pairs([*pairs[:-1], (config.num_hidden_layers - 1, 0)])
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 16384}
    row(f"**{name}**, bf16", "ms per rerank", f"reranks per second, {CONCURRENT} at once", "ratio")
    row("---", "---", "---", "---")

    full = LLM(str(folder), dtype="bfloat16", enable_prefix_caching=False,
               gpu_memory_utilization=0.5, disable_log_stats=True, **options)  # fmt: skip
    one = SamplingParams(max_tokens=1, temperature=0, detokenize=False)

    def generate(engine: LLM) -> None:
        engine.generate({"prompt_token_ids": work.prompt().tolist()}, one, use_tqdm=False)

    plain = seconds(partial(generate, full), rounds)
    row("vLLM `generate(max_tokens=1)`, full model", f"{1000 * plain:.0f}", "", "1")
    full.llm_engine.engine_core.shutdown()
    del full

    variants = [
        (f"this package, cut to {heads.highest_layer + 1} layers, compiled", heads, {}),
        ("the same, eager", heads, {"enforce_eager": True}),
        ("uncut, compiled", uncut, {}),
    ]
    for label, chosen, changes in variants:
        weights = chosen.weights[None]
        backend = VLLMBackend(model, chosen, dtype="bfloat16", engine_args={**options, **changes})
        with closing(backend), ThreadPoolExecutor(CONCURRENT) as pool:
            rerank = partial(backend.attention_mass, weights=weights)
            alone = seconds(lambda rerank=rerank: rerank([work.group()]), rounds)
            jobs = [[work.group()] for _ in range(CONCURRENT * 2)]
            start = time.perf_counter()
            list(pool.map(rerank, jobs))
            rate = len(jobs) / (time.perf_counter() - start)
        row(label, f"{1000 * alone:.0f}", f"{rate:.1f}", f"{alone / plain:.2f}")


def measure_transformers(
    name: str, config: Any, heads: HeadSet, work: Work, rounds: int, folder: Path
) -> None:
    """Write random weights of the layers that run to disk, because this backend loads files."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    row(f"**{name}**, bf16, Transformers alone", "ms per rerank", "", "ratio")
    row("---", "---", "---", "---")

    @torch.inference_mode()
    def prefill(model: Any) -> None:
        tokens = torch.as_tensor(work.prompt(), device=device)
        logits = model(input_ids=tokens[None], use_cache=False, logits_to_keep=1).logits
        logits.argmax().item()  # Waits for the device.

    plain = seconds(partial(prefill, model), rounds)
    row("plain prefill, full model", f"{1000 * plain:.0f}", "", "1")
    model.model.layers = model.model.layers[: heads.highest_layer + 1]
    model.config.num_hidden_layers = heads.highest_layer + 1
    model.save_pretrained(folder)
    del model
    backend = TransformersBackend(LocalModel(folder, None), heads, dtype="bfloat16")
    with closing(backend):
        weights = heads.weights[None]
        alone = seconds(lambda: backend.attention_mass([work.group()], weights), rounds)
    layers = f"cut to {heads.highest_layer + 1} layers"
    row(f"this package, {layers}", f"{1000 * alone:.0f}", "", f"{alone / plain:.2f}")


def parity(folder: Path, with_vllm: bool) -> None:
    """Compare this device with Transformers on CPU, on a small random model in float32."""
    AutoModelForCausalLM.from_config(SMALL).save_pretrained(folder)
    model, work = LocalModel(folder, None), Work(SMALL.vocab_size, 4)
    heads = HeadSet.from_pairs([(0, 1), (2, 0), (2, 5), (3, 7)])
    groups = [work.group() for _ in range(3)]

    def masses(backend: AttentionBackend) -> list[np.ndarray[Any, Any]]:
        with closing(backend):
            results = backend.attention_mass(groups, heads.weights[None])
        return [mass for result in results for mass in (result.baseline, *result.questions)]

    expected = masses(TransformersBackend(model, heads, dtype="float32", device="cpu"))

    def compare(label: str, backend: AttentionBackend) -> None:
        pairs = zip(masses(backend), expected, strict=True)
        worst = max(float(np.abs(mass - other).max()) for mass, other in pairs)
        print(f"\nParity, random small Llama, float32, {label}: largest difference {worst:.1e}")

    compare("Transformers", TransformersBackend(model, heads, dtype="float32"))
    if with_vllm:
        from core_rerank_integrations.backends.vllm.caller.dedicated import VLLMBackend

        chunks = {"enforce_eager": True, "max_num_batched_tokens": 256}
        for label, changes in {"vLLM, compiled": {}, "vLLM, eager, chunks of 256": chunks}.items():
            arguments = {"skip_tokenizer_init": True, "max_model_len": 4096, **changes}
            compare(label, VLLMBackend(model, heads, dtype="float32", engine_args=arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    with_vllm = find_spec("vllm") is not None
    if with_vllm and not any(
        point.name == "core_rerank" for point in entry_points(group="vllm.general_plugins")
    ):
        parser.error(
            "vLLM finds this package by its entry point, so it must be installed: "
            "pip install --no-deps ."
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{machine('torch', 'transformers')}, {device}\n")
    rounds = 2 if arguments.tiny else ROUNDS
    for name in arguments.models:
        config, shipped = SHAPES[name]
        heads, documents = named_head_set(shipped), DOCUMENTS
        if arguments.tiny:
            identity = {"model_type": config.model_type, "architectures": config.architectures}
            config = type(config).from_dict({**SMALL.to_dict(), **identity, "num_hidden_layers": 6})
            heads, documents = HeadSet.from_pairs([(1, 0), (3, 5)]), 4
        work = Work(config.vocab_size, documents)
        with tempfile.TemporaryDirectory() as shape, tempfile.TemporaryDirectory() as weights:
            config.save_pretrained(shape)
            if with_vllm:
                measure(name, Path(shape), heads, work, rounds)
                print()
            measure_transformers(name, config, heads, work, rounds, Path(weights))
        print()
    with tempfile.TemporaryDirectory() as folder:
        parity(Path(folder), with_vllm)


if __name__ == "__main__":
    main()
