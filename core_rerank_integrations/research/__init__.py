"""The research wing: which heads of a model tell the relevant document, and how well they do.

    collection.py    judged questions, in the layouts of BEIR and TREC
    sources.py       which of them are drawn, with which candidates
    features.py      what every head gives to every document
    detection.py     SCoRe and QR: the best heads                    `find_heads`
    evidence.py      weights that tell sentences apart               `fit_evidence`
    abstention.py    when nothing in a list is relevant              `fit_abstention`
    weights.py       a weight for each of them
    ranking_rule.py  a first stage's part, and probabilities
    fitting.py       from judged candidates to a head set            `fit_heads`
    measures.py      how good rankings and probabilities are
    methods.py       ways to order candidates, in one pass
    evaluation.py    methods side by side, and their differences     `evaluate`
    report.py        tables, runs and pictures of that
    plots.py         the pictures

What reranks never imports it; the commands `heads find`, `heads fit` and `evaluate` do, and the
demo. `make lint` checks that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core_rerank_integrations.exports import lazy_exports

if TYPE_CHECKING:
    from core_rerank_integrations.research.detection import FoundHeads, find_heads
    from core_rerank_integrations.research.evaluation import Evaluation, MethodResult, evaluate
    from core_rerank_integrations.research.features import HeadReader
    from core_rerank_integrations.research.fit_abstention import fit_abstention
    from core_rerank_integrations.research.fit_evidence import fit_evidence
    from core_rerank_integrations.research.fitting import FittedHeads, fit_heads
    from core_rerank_integrations.research.methods import Method
    from core_rerank_integrations.research.report import save_report
    from core_rerank_integrations.research.sources import JudgedRun

__all__ = [
    "Evaluation",
    "FittedHeads",
    "FoundHeads",
    "HeadReader",
    "JudgedRun",
    "Method",
    "MethodResult",
    "evaluate",
    "find_heads",
    "fit_abstention",
    "fit_evidence",
    "fit_heads",
    "save_report",
]

_MODULES = {
    "Evaluation": "evaluation",
    "FittedHeads": "fitting",
    "FoundHeads": "detection",
    "HeadReader": "features",
    "JudgedRun": "sources",
    "Method": "methods",
    "MethodResult": "evaluation",
    "evaluate": "evaluation",
    "find_heads": "detection",
    "fit_abstention": "abstention",
    "fit_evidence": "evidence",
    "fit_heads": "fitting",
    "save_report": "report",
}

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
