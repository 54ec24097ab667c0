"""The model of an adapter: when it is loaded, shared and closed."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.head_sets import CALIBRATED

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.errors import ClosedError
from core_rerank_integrations.integrations import fields
from core_rerank_integrations.integrations.fields import RerankerFields
from core_rerank_integrations.models.local_model import LocalModel

QUERY = "gulls"
DOCUMENTS = ["a bowl of soup", "grey gulls"]


class Adapter(RerankerFields):
    def best(self) -> int:
        return self._rerank(QUERY, DOCUMENTS)[0].index

    async def abest(self) -> int:
        return (await self._arerank(QUERY, DOCUMENTS))[0].index


async def test_an_adapter_that_loads_delays_no_other(
    calibrated: CoReReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[str] = []
    begun, go = threading.Event(), threading.Event()

    class Load(CoReReranker):
        def __new__(cls, model: str, **_settings: Any) -> CoReReranker:
            models.append(model)
            if model == "slow":
                begun.set()
                assert go.wait(20)
            return calibrated

    monkeypatch.setattr(fields, "CoReReranker", Load)
    loaded, new, slow = Adapter(model="loaded"), Adapter(model="new"), Adapter(model="slow")
    assert loaded.best() == 1
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(slow.best) for _ in range(2)]
        assert begun.wait(20)
        assert pool.submit(loaded.best).result(20) == 1
        assert pool.submit(new.best).result(20) == 1
        assert await loaded.abest() == 1
        go.set()
        assert [call.result(20) for call in waiting] == [1, 1]
    assert models == ["loaded", "slow", "new"], "each was loaded once"


async def test_close_frees_what_was_loaded_and_a_later_call_loads_again(
    smollm2: LocalModel, calibrated: CoReReranker
) -> None:
    adapter = Adapter(model=smollm2.path, heads=CALIBRATED, dtype="float32")
    adapter.close()
    assert adapter.best() == 1
    own = adapter._loaded_reranker()
    assert copy.deepcopy(adapter)._loaded_reranker() is own
    await adapter.aclose()
    with pytest.raises(ClosedError):
        own.score(QUERY, DOCUMENTS)
    assert await adapter.abest() == 1
    adapter.close()
    shared = Adapter(reranker=calibrated)
    await shared.aclose()
    assert shared.best() == 1


def test_an_error_does_not_show_the_token_of_the_reranker(calibrated: CoReReranker) -> None:
    with pytest.raises(ValueError, match="token contradicts the given reranker") as error:
        RerankerFields(reranker=calibrated, token="another")
    assert "made with" not in str(error.value)
