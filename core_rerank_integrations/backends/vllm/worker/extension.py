"""Probes in the workers of an engine that generates; named by ``worker_extension_cls``."""

from __future__ import annotations

from typing import Any

from cachetools import LRUCache

from core_rerank_integrations.backends.vllm.compat import check_version, step_requests
from core_rerank_integrations.backends.vllm.request import TRAILING_TOKENS, RequestOptions
from core_rerank_integrations.backends.vllm.worker.attention_sum import AttentionSum, add_step
from core_rerank_integrations.backends.vllm.worker.probe import Probes
from core_rerank_integrations.errors import CoReError
from core_rerank_integrations.heads.head_set import HeadSet

MAX_RESULTS = 1024
"""Number of results that wait to be fetched. The client fetches each, also of cancelled calls."""


class CoReWorkerExtension:
    """vLLM mixes this into its worker class; the client calls its methods by ``collective_rpc``."""

    model_runner: Any

    def core_rerank_install(self, heads: Any) -> str:
        """Attach probes for heads, given as JSON; return the problem, or an empty string."""
        if hasattr(self, "core_rerank_steps"):
            return "another reranker has its probes in this engine; close it first"
        try:
            check_version()
            self.core_rerank_steps = ProbedSteps(self.model_runner, HeadSet(heads=heads))
        except CoReError as error:
            return str(error)
        return ""

    def core_rerank_fetch(self, name: str) -> bytes:
        """Take a finished request's `AttentionSum.vector`; empty if there is none."""
        steps = getattr(self, "core_rerank_steps", None)  # None once the reranker is closed.
        result: bytes = steps.results.pop(name, b"") if steps else b""
        return result

    def core_rerank_remove(self) -> None:
        """Remove the probes."""
        if hasattr(self, "core_rerank_steps"):
            self.core_rerank_steps.remove()
            del self.core_rerank_steps


class ProbedSteps:
    """Sum attention after each step of a model runner."""

    def __init__(self, runner: Any, head_set: HeadSet) -> None:
        self.sums: dict[str, AttentionSum] = {}  # Of unfinished requests.
        self.results: LRUCache[str, bytes] = LRUCache(MAX_RESULTS)
        self.probes = Probes(runner.vllm_config, head_set)
        self._heads = len(head_set.heads)
        self._runner = runner
        execute = runner.execute_model

        def execute_model(scheduler_output: Any, *arguments: Any, **kwargs: Any) -> Any:
            for request in scheduler_output.finished_req_ids:
                self.sums.pop(request, None)
            output = execute(scheduler_output, *arguments, **kwargs)
            self.end_step(scheduler_output)
            return output

        runner.execute_model = execute_model

    def remove(self) -> None:
        """Restore the model runner and the layers."""
        del self._runner.execute_model
        self.probes.remove()

    def end_step(self, scheduler_output: Any) -> None:
        """Add what a step computed to the sums of its requests."""
        for new in scheduler_output.scheduled_new_reqs:
            options = RequestOptions.of(new.sampling_params)
            if options is not None and new.req_id not in self.sums:
                length = len(new.prompt_token_ids) - TRAILING_TOKENS
                device = self._runner.device
                self.sums[new.req_id] = AttentionSum(options, self._heads, length, device)
        batch = step_requests(self._runner, scheduler_output) if self.sums else []
        add_step(self.probes, [(self.sums.get(name), begin, end) for name, begin, end in batch])
        for name, attention_sum in list(self.sums.items()):
            if attention_sum.is_complete:
                result = attention_sum.vector().cpu().numpy().tobytes()
                self.results[attention_sum.options.result] = result
                del self.sums[name]
