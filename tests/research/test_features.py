from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core_rerank_integrations import CoReReranker, HeadSet
from core_rerank_integrations.errors import HeadSetError, StorageError
from core_rerank_integrations._internal.files import partial_path, write_atomically
from core_rerank_integrations.research.features import HeadReader
from core_rerank_integrations.models.resolve import LocalModel
from core_rerank_integrations.scorer import AttentionScorer

QUERY = "How long does the crossing take?"
DOCUMENTS = ["Eighteen minutes by ferry.", "Bread rises.", "No crossings in a gale."]


@pytest.mark.parametrize("window", [None, 2, 1])
def test_features_of_a_head_are_its_scores(
    smollm2: LocalModel, tmp_path: Path, window: int | None
) -> None:
    with HeadReader(
        smollm2.path, max_layer=4, template="chatml", dtype="float32", cache=tmp_path
    ) as reader:
        features = reader.read(QUERY, DOCUMENTS, window)
    assert features.attention.shape == (3, 5 * 9)
    for linear, values in ((False, features.scores), (True, features.sums)):
        heads = HeadSet.from_pairs(
            [(3, 7)], template="chatml", scoring={"drop_outliers": not linear}
        )
        with CoReReranker(smollm2.path, heads=heads, window=window, dtype="float32") as reranker:
            expected = reranker.score(QUERY, DOCUMENTS)
        np.testing.assert_allclose(values[:, 3 * 9 + 7], expected, rtol=0, atol=1e-6)


def test_what_was_read_is_not_computed_again(
    smollm2: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HeadReader(smollm2.path, max_layer=2, template="chatml", cache=tmp_path) as reader:
        first = reader.read(QUERY, DOCUMENTS)
        with monkeypatch.context() as patched:
            patched.setattr(AttentionScorer, "read", lambda *_: pytest.fail("computed again"))
            np.testing.assert_array_equal(reader.read(QUERY, DOCUMENTS).sums, first.sums)
    with HeadReader(smollm2.path, max_layer=1, template="chatml", cache=tmp_path) as other:
        assert other.read(QUERY, DOCUMENTS).sums.shape == (3, 18), "other heads, other files"
        assert other.read(QUERY, []).sums.shape == (0, 18)


def test_damaged_and_unwritable_files_are_named(smollm2: LocalModel, tmp_path: Path) -> None:
    with HeadReader(
        smollm2.path, max_layer=1, template="chatml", cache=tmp_path / "cache"
    ) as reader:
        reader.read(QUERY, DOCUMENTS)
        (path,) = (tmp_path / "cache").rglob("*.npz")
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(StorageError, match=r"cannot read .*delete it and run again"):
            reader.read(QUERY, DOCUMENTS)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with (
        HeadReader(smollm2.path, max_layer=1, template="chatml", cache=blocked) as reader,
        pytest.raises(StorageError),
    ):
        reader.read(QUERY, DOCUMENTS)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    target = tmp_path / "heads.json"
    partial_path(target).symlink_to(full)
    with pytest.raises(StorageError, match="No space left"):
        write_atomically(target, "content")
    assert list(tmp_path.iterdir()) == []


def test_layers_that_are_not_there(smollm2: LocalModel) -> None:
    with pytest.raises(HeadSetError, match="between 0 and 29, the model's last layer, got 30"):
        HeadReader(smollm2.path, max_layer=30)
