"""What a request may cost."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from core_rerank_integrations.heads.scoring_config import Count, Positive
from core_rerank_integrations.serving.errors import RefusedError
from core_rerank_integrations.settings import CheckedModel


class Limits(CheckedModel):
    """Limits of a server; more is answered with an error that names the limit."""

    max_body_bytes: Count = Field(default=16 << 20, description="Maximum size of a request.")
    max_documents: Count = Field(default=1000, description="Maximum documents of a request.")
    max_characters: Count = Field(
        default=1_000_000,
        description="Maximum characters of a request, in its query and its documents.",
    )
    max_waiting: Count = Field(
        default=256, description="Maximum requests that wait for the model or are being read."
    )
    max_request_seconds: Positive = Field(
        default=300.0, description="Maximum time of a request, with its waiting."
    )
    max_body_seconds: Positive = Field(
        default=30.0,
        description="Maximum time for a client to send its request, or to go on reading a reply.",
    )
    shutdown_seconds: Count = Field(
        default=30, description="Time for requests in progress when the server is stopped."
    )
    cache_documents: bool = Field(
        default=True,
        description="Whether clients may store documents ahead: POST /v1/documents.",
    )

    def check_number(self, documents: int) -> None:
        """Check the number of documents.

        Raises:
            RefusedError: There are too many.
        """
        if documents > self.max_documents:
            raise RefusedError(
                413,
                f"{documents} documents are more than the {self.max_documents} that a request may "
                "have: send them in several requests",
            )

    def check(self, documents: Sequence[str], query: str = "") -> None:
        """Check the size of a list.

        Raises:
            RefusedError: There are too many documents or characters.
        """
        self.check_number(len(documents))
        characters = len(query) + sum(map(len, documents))
        if characters > self.max_characters:
            raise RefusedError(
                413,
                f"{characters} characters are more than the {self.max_characters} that a request "
                "may have: send fewer or shorter documents",
            )
