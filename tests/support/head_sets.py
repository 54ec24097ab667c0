"""Head sets of the embedded model that tests read, whatever the package ships."""

from __future__ import annotations

from core_rerank_integrations import HeadSet
from support import reference

HEADS = HeadSet.from_pairs(
    reference.HEADS,
    name="four",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    model_type="llama",
    template="chatml",
    scoring={"documents_per_prompt": 20},
)
"""The heads of the reference scores, whatever the package ships."""
CALIBRATED = HEADS.with_scoring(
    documents_per_prompt=1, passage_tokens=40, calibration={"slope": 30.0, "intercept": -2.0}
)
"""The same, each document by itself, with a calibration of no meaning."""
