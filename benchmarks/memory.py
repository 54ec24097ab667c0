"""Memory of a process that reranks for a long time: list after list of other lengths.

The lists hold 1 to 50 documents of 5 to 800 words, half of which were in earlier lists. The size of
the process must not grow once the caches are full.
"""

from __future__ import annotations

import random
from collections import deque
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import psutil
import typer
from common import MODEL, requests, tracked
from transformers import AutoModelForCausalLM, LlamaConfig

from core_rerank_integrations import CoReReranker, DocumentCache
from core_rerank_integrations.models.resolve import resolve

POINTS = 10
"""Number of rows of the table."""


def main(
    backend: Annotated[str, typer.Option(help="Library that runs the model.")] = "openvino",
    lists: Annotated[int, typer.Option(help="Number of lists.")] = 3000,
    documents: Annotated[int, typer.Option(help="Maximum number of documents of a list.")] = 50,
    words: Annotated[int, typer.Option(help="Maximum number of words of a document.")] = 800,
    cache_mib: Annotated[int, typer.Option(help="Memory of the document cache.")] = 64,
    tiny: Annotated[bool, typer.Option(help="Whether the model is a small random one.")] = False,
) -> None:
    """Print the size of this process and of its children after every tenth of the lists."""
    draw = random.Random(0)
    vocabulary = [word for _, texts in requests(10, 20) for text in texts for word in text.split()]
    seen: deque[str] = deque(maxlen=500)

    def text(shortest: int, longest: int) -> str:
        return " ".join(draw.choices(vocabulary, k=draw.randint(shortest, longest)))

    def document() -> str:
        if seen and draw.random() < 0.5:
            return draw.choice(seen)
        seen.append(text(5, words))
        return seen[-1]

    is_local = backend in ("openvino", "transformers")
    cache = DocumentCache(memory_bytes=cache_mib << 20, disk_bytes=0) if is_local else None
    print(
        f"{backend}, {'a small random model' if tiny else MODEL}\n\n| lists | MiB |\n| --- | --- |"
    )
    with ExitStack() as stack:
        model: str | Path = MODEL
        if tiny:
            model = Path(stack.enter_context(TemporaryDirectory()))
            # vLLM's kernels for CPUs have no smaller heads than these.
            save_tiny(model, head_size=16 if is_local else 32)
        heads = [(2, 0), (3, 1)] if tiny else None
        reranker = stack.enter_context(
            CoReReranker(
                model, heads, backend=backend, document_cache=cache, documents_per_prompt=1
            )
        )
        for number in tracked(range(lists + 1), "reranking"):
            if number % max(lists // POINTS, 1) == 0:
                print(f"| {number} | {resident_mib()} |", flush=True)
            size = draw.randint(1, documents)
            reranker.rerank(text(3, 30), list(islice(iter(document, ""), size)))


def save_tiny(folder: Path, head_size: int) -> None:
    """Save a random model with the tokenizer of the default model."""
    tokenizer = resolve(MODEL).tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_size,
        max_position_embeddings=8192,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def resident_mib() -> int:
    """Return the resident memory of this process and its children in MiB."""
    process = psutil.Process()
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family) >> 20


if __name__ == "__main__":
    typer.run(main)
