"""Probes in the workers of an engine that generates; named by ``worker_extension_cls``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cachetools import LRUCache

from core_rerank_integrations.backends.vllm.compat import check_version, step_requests
from core_rerank_integrations.backends.vllm.request import (
    RESULT_KEY,
    TRAILING_TOKENS,
    rerank_options,
)
from core_rerank_integrations.backends.vllm.worker.attention_sum import (
    AttentionSum,
    StepPart,
    add_step,
)
from core_rerank_integrations.backends.vllm.worker.probe import Probes
from core_rerank_integrations.errors import CoReError

UNFETCHED_RESULTS = 1024
"""Results that wait to be fetched; the client fetches each at once, or says that it will not."""


class CoReWorkerExtension:
    """vLLM mixes this into its worker class; its methods are called through ``collective_rpc``."""

    model_runner: Any

    def core_rerank_install(self, heads: Sequence[tuple[int, int, float]]) -> str:
        """Probe the heads' layers. Returns what was wrong, or nothing."""
        if hasattr(self, "core_rerank_steps"):
            return "another reranker has its probes in this engine; close it first"
        try:
            check_version()
            self.core_rerank_steps = _ProbedSteps(self.model_runner, heads)
        except CoReError as error:
            return str(error)
        return ""

    def core_rerank_fetch(self, key: str) -> bytes:
        """Take a finished request's `AttentionSum.vector`, as bytes; empty if there is none."""
        steps = getattr(self, "core_rerank_steps", None)  # None once the reranker is closed.
        result: bytes = steps.results.pop(key, b"") if steps else b""
        return result

    def core_rerank_pending(self) -> int:
        """How many requests and results are held."""
        return len(self.core_rerank_steps.sums) + len(self.core_rerank_steps.results)

    def core_rerank_remove(self) -> None:
        """Take the probes out."""
        if hasattr(self, "core_rerank_steps"):
            self.core_rerank_steps.remove()
            del self.core_rerank_steps


class _ProbedSteps:
    """Sums attention after each step of a model runner."""

    def __init__(self, runner: Any, heads: Sequence[tuple[int, int, float]]) -> None:
        self.sums: dict[str, tuple[str, AttentionSum]] = {}
        self.results: LRUCache[str, bytes] = LRUCache(UNFETCHED_RESULTS)
        self._heads = len(heads)
        self._runner = runner
        self._probes = Probes(runner.vllm_config, heads)
        execute = runner.execute_model

        def execute_model(scheduler_output: Any, *arguments: Any, **kwargs: Any) -> Any:
            for request in scheduler_output.finished_req_ids:
                self.sums.pop(request, None)
            output = execute(scheduler_output, *arguments, **kwargs)
            self._after(scheduler_output)
            return output

        runner.execute_model = execute_model

    def remove(self) -> None:
        del self._runner.execute_model
        self._probes.remove()

    def _after(self, scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            options = rerank_options(new.sampling_params)
            if options is not None and new.req_id not in self.sums:
                length = len(new.prompt_token_ids) - TRAILING_TOKENS
                attention = AttentionSum(options, self._heads, length, self._runner.device)
                self.sums[new.req_id] = (options[RESULT_KEY], attention)
        if self.sums:
            parts = []
            first_token = 0
            for place, (request, begin, scheduled) in enumerate(
                step_requests(self._runner, scheduler_output)
            ):
                if request in self.sums:
                    attention = self.sums[request][1]
                    end = min(begin + scheduled, attention.length)
                    parts.append((request, StepPart(place, first_token, begin, end, attention)))
                first_token += scheduled
            add_step(self._probes, [part for _, part in parts])
            for request, part in parts:
                if part.end == part.sum.length:
                    key, attention = self.sums.pop(request)
                    self.results[key] = attention.vector().cpu().numpy().tobytes()
        self._probes.forget()
