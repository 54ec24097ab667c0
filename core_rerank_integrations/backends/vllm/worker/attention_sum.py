"""The attention of a request, summed over its query rows while the steps of its prefill run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core_rerank_integrations.backends.vllm.request import RequestOptions
from core_rerank_integrations.backends.vllm.worker.probe import Probes, QueryRows


class AttentionSum:
    """The attention of one request, over this rank's heads and the rows computed so far.

    Args:
        options: What the request asks for.
        heads: Number of heads in the head set, over all ranks.
        length: Number of tokens of the prompt.
        device: Device of the probes.
    """

    def __init__(
        self, options: RequestOptions, heads: int, length: int, device: torch.device
    ) -> None:
        self.options = options
        self.length = length
        self.is_complete = False  # Whether the last step reached the end of the prompt.
        columns = 1 if options.is_self_test else options.columns
        self._sum = torch.zeros(heads if options.per_head else 1, columns, device=device)
        self._next_row = options.first_row
        self._rows = 0

    def rows(self, begin: int, end: int) -> range:
        """Return the query rows among tokens ``begin`` to ``end - 1`` that were not added before.

        A request that is preempted starts again, and its rows must not count twice.
        """
        return range(max(self._next_row, begin), end)

    def add(self, rows: range, attention: Tensor, probes: Probes) -> None:
        """Add the attention of ``rows``, summed over them, shape [local heads, tokens]."""
        attention = attention[:, : self._sum.shape[1]]
        # The rows of an instruction may see fewer tokens than there are columns.
        columns = self._sum[:, : attention.shape[1]]
        if self.options.per_head:
            columns[probes.indices] += attention
        else:
            columns[0] += probes.weights @ attention
        self._rows += len(rows)
        self._next_row = rows.stop

    def set_error(self, error: float) -> None:
        """Set the result of a self-test."""
        self._sum.fill_(error)
        self._rows = 1

    def vector(self) -> Tensor:
        """Return the sums, then the number of rows: float32 [(heads or 1) * columns + 1].

        The sums of tensor parallel ranks add up; the number of rows is the same on each. A
        self-test has the largest error and 1, or zeros if its prompt was split over steps.
        """
        # The number is filled in on the device: a copy from the host would wait for its turn.
        return torch.cat((self._sum.flatten(), self._sum.new_full((1,), self._rows)))


def add_step(probes: Probes, batch: Sequence[tuple[AttentionSum | None, int, int]]) -> None:
    """Add the attention that the probes saw in a step to the sums of its requests.

    Rows that no probe saw are not counted.

    Args:
        probes: The probes; their step ends.
        batch: For each request of the step, in order, its sum (``None`` if this package did not
            send it), the index of its first token in this step, and the index after its last.
    """
    counted: list[tuple[AttentionSum, range, QueryRows]] = []
    next_token = 0
    for request, (attention_sum, begin, end) in enumerate(batch):
        first_token, next_token = next_token, next_token + end - begin
        if attention_sum is None:
            continue
        stop = min(end, attention_sum.length)
        attention_sum.is_complete = stop == attention_sum.length
        rows = attention_sum.rows(begin, stop)
        if rows and probes.ready:
            first_row = first_token + rows.start - begin
            query_rows = QueryRows(request, first_row, len(rows), stop)
            if not attention_sum.options.is_self_test:
                counted.append((attention_sum, rows, query_rows))
            elif len(rows) == attention_sum.length:  # Parts of a prompt do not compare.
                attention_sum.set_error(probes.error(query_rows))
    attentions = probes.attention([query_rows for _, _, query_rows in counted])
    for (attention_sum, rows, _), attention in zip(counted, attentions, strict=True):
        attention_sum.add(rows, attention, probes)
    probes.end_step()
