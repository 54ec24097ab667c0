from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest

from core_rerank_integrations import CoReReranker, DocumentCache
from core_rerank_integrations.models.local_model import LocalModel

if all(map(find_spec, ("fastapi", "uvicorn", "prometheus_client"))):
    from support.servers import Running, running
else:  # The extra `server` is not installed.
    collect_ignore_glob = ["test_*"]


@pytest.fixture(scope="session")
def default(
    smollm2: LocalModel,  # noqa: ARG001  Puts the model into the cache.
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[CoReReranker]:
    # In bfloat16, other batches would give slightly other scores.
    cache = DocumentCache(folder=tmp_path_factory.mktemp("documents"))
    with CoReReranker(dtype="float32", document_cache=cache) as reranker:
        yield reranker


@pytest.fixture(scope="session")
def shared(default: CoReReranker) -> Callable[[], CoReReranker]:
    """Return what loads a reranker on the same model, which a server may close."""
    return lambda: CoReReranker.from_scorer(default.scorer)


@pytest.fixture(scope="session")
def server(shared: Callable[[], CoReReranker]) -> Iterator[Running]:
    with running(shared) as server:
        server.wait_until_ready()
        yield server
