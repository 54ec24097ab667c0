"""Seven passages and one question, reranked in ten lines."""

import sys

from core_rerank_integrations import CoReReranker

PASSAGES = [
    "On 7 March 1876 Alexander Graham Bell received the patent that covers the telephone. Three "
    "days later his assistant heard his voice over a wire for the first time.",
    "Thomas Edison's lamp with a carbon filament burned for more than thirteen hours in October "
    "1879; the patent followed in January 1880.",
    "The telegraph had carried Morse code between American cities since 1844.",
    "Joseph Swan showed an incandescent bulb in Newcastle in February 1879, and lit his house by "
    "electricity a year later.",
    "Elisha Gray and Bell handed in papers about sending speech by wire on the same day, 14 "
    "February 1876.",
    "A light bulb glows because its filament resists the current and grows hot.",
    "The first telephone exchange opened in New Haven in 1878 and had twenty-one subscribers.",
]

with CoReReranker(*sys.argv[1:2]) as reranker:  # The default model, or the one that is named.
    for result in reranker.rerank(
        "Which came first, the telephone or the light bulb?", PASSAGES, top_n=3
    ):
        print(f"{result.relevance_score:7.4f}  [{result.index}] {result.document[:80]}")
