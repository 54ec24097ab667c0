"""Generators of answers: none, the embedded model, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from core_rerank_integrations.errors import (
    CoReError,
    GeneratorError,
    InvalidInputError,
    requires_extra,
)
from core_rerank_integrations.models.aliases import DEFAULT_MODEL
from core_rerank_integrations.models.resolve import resolve

with requires_extra("chat"):
    import httpx
    import openai
    from langchain_core.language_models import BaseChatModel
    from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
    from langchain_openai import ChatOpenAI

ANSWER_TOKENS = 400
EMBEDDED_ANSWER_TOKENS = 80
"""The embedded model seldom stops by itself, and repeats itself after a few sentences."""
TIMEOUT_SECONDS = 60.0
"""Maximum time between two messages of an endpoint."""


@dataclass(frozen=True)
class Generator:
    """A way to write answers.

    Attributes:
        name: Name on the page.
        note: What to expect, in a sentence.
        load: Returns the language model, or ``None`` to answer with sentences of the documents.
        rewrites: Whether the model is good enough to rewrite follow-up questions.
    """

    name: str
    note: str
    load: Callable[[], BaseChatModel | None] = lambda: None
    rewrites: bool = False

    @contextmanager
    def clear_errors(self) -> Iterator[None]:
        """Raise the errors of an endpoint as an error of this package.

        Raises:
            GeneratorError: The endpoint cannot be reached, refuses the request or stops early.
            CoReError: Another error of this package, which is not changed.
        """
        try:
            yield
        except CoReError:
            raise
        # The client raises the last three if an answer is not one of this API.
        except (
            openai.OpenAIError,
            httpx.HTTPError,
            httpx.InvalidURL,
            ValueError,
            TypeError,
            AttributeError,
        ) as error:
            raise self.failure(error) from error

    def failure(self, reason: object) -> GeneratorError:
        """Return an error that names the generator, the reason and the remedy."""
        return GeneratorError(
            f"{self.name} did not answer, or stopped early ({reason}). Check that it runs and "
            "serves that model, or choose another generator under Settings"
        )


EXTRACTS = Generator(
    "Sentences of the documents", "Nothing is generated: the strongest sentences, quoted."
)


def generators(url: str | None = None, model: str | None = None) -> list[Generator]:
    """Return the generators that visitors can choose; the first is the default.

    Only the operator can name an endpoint, because ``OPENAI_API_KEY`` is sent to it.

    Args:
        url: An OpenAI-compatible endpoint, like ``http://localhost:8000/v1``.
        model: Name of the model at the endpoint.

    Raises:
        InvalidInputError: Only one of the two is given, or ``url`` is not a URL.
    """
    note = "135M parameters: slow, and often wrong. Trust the evidence."
    embedded = Generator("The embedded model", note, _embedded_model)
    if url is None and model is None:
        return [EXTRACTS, embedded]
    if url is None or model is None:
        raise InvalidInputError(
            f"an endpoint takes a URL and a model's name: got --llm-url {url!r} and --llm {model!r}"
        )
    if not url.startswith(("http://", "https://")):
        raise InvalidInputError(
            f"--llm-url must begin with http:// or https://, like http://localhost:8000/v1, "
            f"got {url!r}"
        )
    endpoint = Generator(
        f"{model} at {url}", "It reads the passages.", lambda: _endpoint(url, model), rewrites=True
    )
    return [endpoint, EXTRACTS, embedded]


@cache
def _endpoint(url: str, model: str) -> BaseChatModel:
    return ChatOpenAI(
        base_url=url,
        model=model,
        api_key=os.environ.get("OPENAI_API_KEY") or "none",  # type: ignore[arg-type]
        max_completion_tokens=ANSWER_TOKENS,
        temperature=0.0,
        timeout=TIMEOUT_SECONDS,
        max_retries=1,
    )


@cache
def _embedded_model() -> BaseChatModel:
    pipeline = HuggingFacePipeline.from_model_id(
        str(resolve(DEFAULT_MODEL).path),
        task="text-generation",
        pipeline_kwargs={
            "max_new_tokens": EMBEDDED_ANSWER_TOKENS,
            "do_sample": False,
            "return_full_text": False,
        },
    )
    return ChatHuggingFace(llm=pipeline)
