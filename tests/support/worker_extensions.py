"""A worker whose steps of one token no probe sees, as where they run in a graph of their own."""

from __future__ import annotations

from typing import Any

from core_rerank_integrations.backends.vllm.worker.extension import CoReWorkerExtension


class BlindToSingleTokens(CoReWorkerExtension):
    def core_rerank_install(self, heads: Any) -> str:
        problem = super().core_rerank_install(heads)
        steps = self.core_rerank_steps
        after = steps._after

        def blind(scheduled: Any) -> None:
            if scheduled.total_num_scheduled_tokens == 1:
                steps._probes.clear_cache()
            after(scheduled)

        steps._after = blind
        return problem
