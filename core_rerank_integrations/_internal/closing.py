"""What objects that have to be closed share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from core_rerank_integrations._internal.cancellation import run_in_thread


class Closeable(ABC):
    """Base of objects that are context managers, and are shared by copies of their owners."""

    @abstractmethod
    def close(self) -> None:
        """Free what the object holds."""

    async def aclose(self) -> None:
        """Close without blocking the event loop; see `close`."""
        await run_in_thread(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return the object itself, because frameworks copy their components."""
        return self
