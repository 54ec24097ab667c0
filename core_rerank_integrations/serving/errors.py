"""The error of a request that is answered with a status."""

from __future__ import annotations


class RefusedError(Exception):
    """A request is answered with an error.

    Args:
        status: Status of the reply.
        message: What is wrong, and what helps.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
