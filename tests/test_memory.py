from __future__ import annotations

import sys

import numpy as np
import psutil
import pytest

from core_rerank_integrations._internal.memory import return_freed_memory

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems return memory by themselves")
def test_freed_memory_is_returned() -> None:
    process = psutil.Process()
    arrays = [np.ones(10_000) for _ in range(3_000)]
    last = arrays[-1]  # Behind it the C library would return memory by itself.
    full = process.memory_info().rss
    arrays.clear()
    return_freed_memory()
    assert full - process.memory_info().rss > 150 * MIB
    assert last.size
