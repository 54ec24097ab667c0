from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.head_sets import CALIBRATED, HEADS

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.models.resolve import resolve

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def smollm2() -> LocalModel:
    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def reranker(smollm2: LocalModel) -> Iterator[CoReReranker]:
    with CoReReranker(smollm2.path, heads=HEADS, dtype="float32") as reranker:
        yield reranker


@pytest.fixture(scope="session")
def calibrated(smollm2: LocalModel, reranker: CoReReranker) -> CoReReranker:
    return CoReReranker.from_scorer(reranker.scorer, smollm2.path, CALIBRATED)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Any]:
    """Return a reader of JSON files of the reference data, which skips the test without it."""

    def read(name: str) -> Any:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"reference data is not on this machine: {path}")
        return json.loads(path.read_text(encoding="utf-8"))

    return read


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Start Ray on this machine, as if it had two processors."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        logging_level="warning",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need the embedded model, for `make test-fast` to leave out."""
    for item in items:
        if {"smollm2", "reranker", "calibrated"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("model")
