"""What finding heads costs, against plain prefills of the same prompts; `make bench-heads`.

Questions of 20 documents of about 110 tokens. The full model runs both ways; finding heads adds the
attention of every head, the `N/A` baseline that QR scores need, and the files that keep it all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import MODEL, alternate, machine, requests
from transformers import AutoModelForCausalLM

from core_rerank_integrations.research.detection import Case, score_heads
from core_rerank_integrations.research.features import HeadReader
from core_rerank_integrations.backends.loading import load_encoder
from core_rerank_integrations.models.resolve import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    model = resolve(MODEL)
    encoder = load_encoder(model)
    plain = AutoModelForCausalLM.from_pretrained(
        model.path, dtype=getattr(torch, arguments.dtype)
    ).eval()
    work = requests(arguments.questions + 1, 20, label="f")
    prompts = [encoder.encode(query, documents) for query, documents in work]

    @torch.inference_mode()
    def prefill(number: int) -> None:
        prompt = prompts[number]
        tokens = torch.tensor([*prompt.prefix.tolist(), *prompt.suffix.tolist()])
        plain(tokens[None], use_cache=False, logits_to_keep=1)

    print(f"{machine('torch', 'transformers')}, {arguments.dtype}\n")
    with (
        tempfile.TemporaryDirectory() as folder,
        HeadReader(MODEL, dtype=arguments.dtype, cache=Path(folder)) as reader,
    ):

        def find(number: int) -> None:
            query, documents = work[number]
            score_heads(reader.read, reader.heads.heads, [Case("q", query, tuple(documents), 0)])

        ours, theirs = alternate(find, prefill, arguments.questions)
        start = time.perf_counter()
        for number in range(1, arguments.questions + 1):
            find(number)
        again = time.perf_counter() - start
    ratio = sum(ours) / sum(theirs)
    print("| questions | finding s a prompt | plain prefill s | ratio | again, from files, s |")
    print("| --- | --- | --- | --- | --- |")
    print(
        f"| {arguments.questions} | {statistics.median(ours):.2f} | "
        f"{statistics.median(theirs):.2f} | **{ratio:.2f}** | {again:.1f} |"
    )


if __name__ == "__main__":
    main()
