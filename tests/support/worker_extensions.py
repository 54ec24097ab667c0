"""Workers of an engine that generates, as tests need them."""

from __future__ import annotations

from typing import Any

from core_rerank_integrations.backends.vllm.worker import CoReWorkerExtension


class CountingExtension(CoReWorkerExtension):
    """A worker that tells how many requests and results it holds."""

    def core_rerank_pending(self) -> int:
        return len(self.core_rerank_steps.sums) + len(self.core_rerank_steps.results)


class WithHalfTheScale(CoReWorkerExtension):
    """A worker whose probes divide their logits by two."""

    def core_rerank_install(self, heads: Any) -> str:
        problem = super().core_rerank_install(heads)
        for group in self.core_rerank_steps.probes._groups:
            group._scale = group._scale / 2
        return problem


class BlindToSingleTokens(CoReWorkerExtension):
    """A worker whose probes do not see steps of one token, as in a captured graph."""

    def core_rerank_install(self, heads: Any) -> str:
        problem = super().core_rerank_install(heads)
        steps = self.core_rerank_steps
        end_step = steps.end_step

        def blind(scheduled: Any) -> None:
            if scheduled.total_num_scheduled_tokens == 1:
                steps.probes.end_step()
            end_step(scheduled)

        steps.end_step = blind  # type: ignore[method-assign]
        return problem
