from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import pytest
import torch

from core_rerank_integrations import CoReReranker, HeadSet
from core_rerank_integrations.errors import HeadSetError, InvalidInputError, StorageError
from core_rerank_integrations.heads.scoring_config import ScoringConfig
from core_rerank_integrations.method.windows import Candidates, Layout
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.research.features import HeadReader
from core_rerank_integrations.research.options import ReaderOptions
from core_rerank_integrations.scorer import AttentionScorer
from core_rerank_integrations.settings import Backend

CANDIDATES = Candidates(
    "How long does the crossing take?",
    ("Eighteen minutes by ferry.", "Bread rises.", "No crossings in a gale."),
)


def reader_of(
    model: LocalModel,
    cache: Path,
    max_layer: int,
    dtype: str = "auto",
    backend: Backend = "auto",
) -> HeadReader:
    return HeadReader(
        ReaderOptions(
            model=model.path,
            max_layer=max_layer,
            template="chatml",
            backend=backend,
            dtype=dtype,
            cache=cache,
        )
    )


@pytest.mark.parametrize("documents_per_prompt", [None, 2, 1])
def test_features_of_a_head_are_its_scores(
    smollm2: LocalModel, tmp_path: Path, documents_per_prompt: int | None
) -> None:
    with reader_of(smollm2, tmp_path, max_layer=4, dtype="float32") as reader:
        features = reader.read(CANDIDATES, Layout(documents_per_prompt))
    assert features.attention.shape == (3, 5 * 9)
    for linear, values in ((False, features.scores), (True, features.sums)):
        heads = HeadSet.from_pairs(
            [(3, 7)], template="chatml", scoring={"drop_outliers": not linear}
        )
        with CoReReranker(
            smollm2.path, heads, documents_per_prompt=documents_per_prompt, dtype="float32"
        ) as reranker:
            expected = reranker.score(CANDIDATES.query, CANDIDATES.documents)
        np.testing.assert_allclose(values[:, 3 * 9 + 7], expected, rtol=0, atol=1e-6)


def test_what_was_read_is_not_computed_again(
    smollm2: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reader_of(smollm2, tmp_path, max_layer=2) as reader:
        first = reader.read(CANDIDATES, Layout())
        with monkeypatch.context() as patched:
            patched.setattr(AttentionScorer, "read", lambda *_: pytest.fail("computed again"))
            np.testing.assert_array_equal(reader.read(CANDIDATES, Layout()).sums, first.sums)
    with reader_of(smollm2, tmp_path, max_layer=1) as other:
        assert other.read(CANDIDATES, Layout()).sums.shape == (3, 18), "other heads, other files"
        assert other.read(Candidates("?", ()), Layout()).sums.shape == (0, 18)


def test_features_belong_to_the_dtype_that_auto_selects(
    smollm2: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reader_of(smollm2, tmp_path, max_layer=1) as reader:
        selected = reader.dtype
        assert selected in {"float32", "bfloat16"}
        reader.read(CANDIDATES, Layout())
        found = reader.head_set("found", reader.heads.heads, ScoringConfig(), "core", {})
    assert found.provenance.details["dtype"] == selected
    if selected == "bfloat16":  # An explicit float32 does not round what auto rounds.
        with monkeypatch.context() as patched, reader_of(smollm2, tmp_path, 1, selected) as reader:
            patched.setattr(AttentionScorer, "read", lambda *_: pytest.fail("computed again"))
            reader.read(CANDIDATES, Layout())
    before = len(list(tmp_path.rglob("*.npy")))
    with reader_of(smollm2, tmp_path, 1, "int8") as reader:
        reader.read(CANDIDATES, Layout())
    assert len(list(tmp_path.rglob("*.npy"))) == 2 * before


@pytest.mark.parametrize("backend", ["transformers", "openvino"])
def test_exact_features_are_not_those_with_rounded_states(
    smollm2: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: [])  # No bfloat16.
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)

    def sums(dtype: str, cache: str) -> np.ndarray:
        with reader_of(smollm2, tmp_path / cache, 3, dtype, backend) as reader:
            assert reader.dtype == "float32"
            return reader.read(CANDIDATES, Layout()).sums

    rounded, exact = sums("auto", "shared"), sums("float32", "own")
    assert np.abs(rounded - exact).max() > 1e-5
    np.testing.assert_allclose(sums("float32", "shared"), exact, rtol=0, atol=1e-6)


def test_damaged_and_unwritable_files_are_named(smollm2: LocalModel, tmp_path: Path) -> None:
    with reader_of(smollm2, tmp_path / "cache", max_layer=1) as reader:
        reader.read(CANDIDATES, Layout())
        (path,) = (tmp_path / "cache").rglob("*.npy")
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(StorageError, match=r"cannot read .*delete it and run again"):
            reader.read(CANDIDATES, Layout())
    blocked = tmp_path / "file"
    blocked.write_text("")
    with (
        reader_of(smollm2, blocked, max_layer=1) as reader,
        pytest.raises(StorageError),
    ):
        reader.read(CANDIDATES, Layout())


def test_layers_that_are_not_there(smollm2: LocalModel) -> None:
    with pytest.raises(HeadSetError, match="between 0 and 29, the model's last layer, got 30"):
        HeadReader(ReaderOptions(model=smollm2.path, max_layer=30))
    with pytest.raises(InvalidInputError, match="a highest layer or a share to prune, not both"):
        ReaderOptions.checked(max_layer=3, prune=0.5)
    with HeadReader(ReaderOptions(model=smollm2.path, prune=0.9)) as reader:
        assert reader.heads.highest_layer == 2


def test_options_that_do_not_belong_together_are_named(smollm2: LocalModel) -> None:
    with pytest.raises(InvalidInputError, match="device='cpu' is not for 'vllm'"):
        HeadReader(ReaderOptions(model=smollm2.path, backend="vllm", device="cpu"))
