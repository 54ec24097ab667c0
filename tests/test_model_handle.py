"""Loading, restarting and closing a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_models import HEADS, groups, masses, tiny

from core_rerank_integrations.backends.openvino.backend import OpenVINOBackend
from core_rerank_integrations.errors import ClosedError, InvalidInputError
from core_rerank_integrations.method.prompt import PromptEncoder
from core_rerank_integrations.method.templates import TEMPLATES
from core_rerank_integrations.model_handle import ModelHandle
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.scorer import AttentionScorer


def test_restart_and_close(tmp_path: Path, smollm2: LocalModel) -> None:
    model = tiny(tmp_path, "llama")
    encoder = PromptEncoder(smollm2.tokenizer().backend_tokenizer, TEMPLATES["plain"])

    def load() -> AttentionScorer:
        return AttentionScorer(encoder, OpenVINOBackend(model, HEADS, dtype="float32"))

    handle = ModelHandle(load)
    first = handle.scorer
    expected = masses(first.backend, groups())
    handle.restart()
    assert handle.scorer is not first
    with pytest.raises(ClosedError):
        first.backend.attention_mass(groups())
    for mass, again in zip(expected, masses(handle.scorer.backend, groups()), strict=True):
        np.testing.assert_allclose(again, mass, rtol=0, atol=1e-6)

    borrowed = ModelHandle(load, scorer=handle.scorer)
    with pytest.raises(InvalidInputError, match="a scorer or an engine of your own"):
        borrowed.restart()
    borrowed.close()
    handle.scorer.backend.attention_mass(groups())

    for _ in range(2):
        handle.close()
    for call in (handle.restart, lambda: handle.scorer):
        with pytest.raises(ClosedError, match="make a new one"):
            call()
