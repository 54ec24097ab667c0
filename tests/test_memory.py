from __future__ import annotations

import subprocess
import sys

import numpy as np
import psutil
import pytest

from core_rerank_integrations._internal.memory import return_freed_memory

MIB = 1 << 20


pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="other systems return memory by themselves"
)


def test_freed_memory_is_returned() -> None:
    process = psutil.Process()
    arrays = [np.ones(10_000) for _ in range(3_000)]
    last = arrays[-1]  # Behind it the C library would return memory by itself.
    full = process.memory_info().rss
    arrays.clear()
    return_freed_memory()
    assert full - process.memory_info().rss > 150 * MIB
    assert last.size


BETWEEN = """
import psutil, numpy as np
from core_rerank_integrations._internal.memory import return_large_blocks
{call}
np.ones(2_000_000)  # Freed, it raises the size from which a block is one of its own.
blocks = [np.ones(100_000) for _ in range(200)]
full = psutil.Process().memory_info().rss
blocks = blocks[::20]  # What lies between those that are left is freed.
print(full - psutil.Process().memory_info().rss)
"""


def test_large_blocks_are_returned_as_soon_as_they_are_freed() -> None:
    freed = {
        call: int(subprocess.check_output([sys.executable, "-c", BETWEEN.format(call=call)]))
        for call in ("", "return_large_blocks()")
    }
    assert freed["return_large_blocks()"] > 130 * MIB
    assert freed[""] < 50 * MIB
