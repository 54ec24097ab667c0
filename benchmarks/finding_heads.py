"""Measure the time of finding heads against plain prefills; `make bench-heads`.

Questions have 20 documents of about 110 tokens. The full model runs both ways; finding heads adds
the attention of every head, the `N/A` baseline that QR scores need, and the files of the features.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import MODEL, alternate, machine, prompt_ids, requests
from transformers import AutoModelForCausalLM

from core_rerank_integrations.method.windows import Candidates
from core_rerank_integrations.models.encoder import load_encoder
from core_rerank_integrations.models.resolve import resolve
from core_rerank_integrations.research import FindOptions, HeadReader
from core_rerank_integrations.research.detection import Case, score_heads


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
    prompts = [prompt_ids(encoder, query, documents) for query, documents in work]

    @torch.inference_mode()
    def prefill(number: int) -> None:
        plain(prompts[number], use_cache=False, logits_to_keep=1)

    print(f"{machine('torch', 'transformers')}, {arguments.dtype}\n")
    with tempfile.TemporaryDirectory() as folder:
        options = FindOptions(data=[], model=MODEL, dtype=arguments.dtype, cache=Path(folder))
        reader = HeadReader(options)

        def find(number: int) -> None:
            query, documents = work[number]
            case = Case(Candidates(query, tuple(documents)), 0)
            score_heads(reader.read, reader.heads.heads, [case], options.temperature)

        ours, theirs = alternate(find, prefill, arguments.questions)
        start = time.perf_counter()
        for number in range(1, arguments.questions + 1):
            find(number)
        again = time.perf_counter() - start
        reader.close()
    ratio = sum(ours) / sum(theirs)
    print("| questions | finding s per prompt | plain prefill s | ratio | again, from files, s |")
    print("| --- | --- | --- | --- | --- |")
    print(
        f"| {arguments.questions} | {statistics.median(ours):.2f} | "
        f"{statistics.median(theirs):.2f} | **{ratio:.2f}** | {again:.1f} |"
    )


if __name__ == "__main__":
    main()
