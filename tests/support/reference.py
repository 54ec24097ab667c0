"""The method written down plainly, sharing no code with the package: the yardstick of the tests.

The whole model, one uncached prompt per query, all attention weights materialised; spans by
counting the tokens of cut-off prompts, as arXiv 2510.02219's authors do. Run as a script, it
writes the golden file that lies beside the tests.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CHATML = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
HEADS = [(18, 7), (17, 3), (14, 3), (17, 4)]
GOLDEN = Path(__file__).parents[1] / "data" / "golden.json"

QUERY = "How long does the harbour crossing take, and what if the wind is too strong?"
DOCUMENTS = [
    "Bread rises best in a warm kitchen, away from draughts.",
    "The harbour ferry needs eighteen minutes for the crossing, a little more at low tide.",
    "When the wind passes force eight, crossings stop, and tickets are valid on the next day.",
    "Eighteen gulls nest on the breakwater every spring.\n",
    "Harbour dues are paid at the office.\n\nOpen from nine to five.",
    "Ferry",
]


def rerank(
    model: Any, tokenizer: Any, query: str, documents: list[str], heads: list[tuple[int, int]]
) -> dict[str, Any]:
    """Scores and the spans they come from; spans are [first, last], both included."""
    question, spans, query_span = _mass(model, tokenizer, query, documents, heads)
    baseline, _, _ = _mass(model, tokenizer, "N/A", documents, heads)
    end = query_span[0] + 1
    calibrated = question[:end] - baseline[:end]
    scores = []
    for first, last in spans:
        tokens = calibrated[first : last + 1]
        kept = tokens > tokens.mean() - 2 * tokens.std() if len(tokens) > 1 else [True]
        scores.append(float(tokens[kept].sum()))
    return {"scores": scores, "document_spans": spans, "query_span": query_span}


def _mass(
    model: Any, tokenizer: Any, query: str, documents: list[str], heads: list[tuple[int, int]]
) -> tuple[torch.Tensor, list[list[int]], list[int]]:
    def count(text: str) -> int:
        return len(tokenizer(text).input_ids)

    prefix, suffix = CHATML
    text = prefix + " Here are some paragraphs:\n\n"
    spans = []
    for number, document in enumerate(documents, start=1):
        text += f"[document {number}]"
        first = count(text)
        text += f" {document}"
        spans.append([first, count(text)])
        text += "\n\n"
    query_first = count(text)
    text += (
        "Please find information that are relevant to the following query in the paragraphs "
        f"above.\n\nQuery: {query.strip()}"
    )
    query_last = count(text)
    tokens = tokenizer(text + suffix, return_tensors="pt").input_ids
    with torch.inference_mode():
        attentions = model(tokens, output_attentions=True, use_cache=False).attentions
    mass = sum(
        attentions[layer][0, head, query_first : query_last + 1].mean(dim=0)
        for layer, head in heads
    )
    return mass, spans, [query_first, query_last]


def load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    from core_rerank_integrations.models.resolve import resolve

    result = rerank(*load(resolve("smollm2-135m").path), QUERY, DOCUMENTS, HEADS)
    GOLDEN.write_text(
        json.dumps({"query": QUERY, "documents": DOCUMENTS, "heads": HEADS, **result}, indent=1)
        + "\n"
    )
    sys.stdout.write(f"{GOLDEN}\n")
