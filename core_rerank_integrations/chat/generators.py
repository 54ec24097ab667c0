"""What writes the answers: nothing, the embedded model, or any OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from core_rerank_integrations.errors import GeneratorError, InvalidInputError, requires_extra
from core_rerank_integrations.models.resolve import DEFAULT_MODEL, resolve

with requires_extra("chat"):
    import httpx
    import openai
    from langchain_core.language_models import BaseChatModel
    from langchain_openai import ChatOpenAI

ANSWER_TOKENS = 400
EMBEDDED_ANSWER_TOKENS = 80
"""The embedded model seldom stops by itself, and says nothing new after a few sentences."""
SECONDS = 60.0
"""That an endpoint may be silent."""


@dataclass(frozen=True)
class Generator:
    """A way to an answer.

    Attributes:
        name: What it is called on the page.
        note: What to expect of it.
        llm: Makes the model, once it is wanted; ``None`` answers with the documents' sentences.
        rewrites: Whether it is good enough to rewrite follow-up questions.
    """

    name: str
    note: str
    llm: Callable[[], BaseChatModel] | None = None
    rewrites: bool = False

    def model(self) -> BaseChatModel | None:
        """The model, loaded."""
        return self.llm() if self.llm else None

    @contextmanager
    def clear_errors(self) -> Iterator[None]:
        """Around its use: what an endpoint does wrong, as an error of this package.

        Raises:
            GeneratorError: It cannot be reached, refuses or breaks off.
        """
        try:
            yield
        except (openai.OpenAIError, httpx.HTTPError) as error:
            raise GeneratorError(
                f"{self.name} did not answer, or broke off ({error}). Look whether it runs and "
                "knows that model, or choose another way to answer under Settings"
            ) from error


EXTRACTS = Generator(
    "Sentences of the documents", "Nothing is generated: the strongest sentences, quoted."
)


def generators(url: str | None = None, model: str | None = None) -> list[Generator]:
    """The ways to an answer, the first of them the one to begin with.

    The endpoint is the operator's to name, never a visitor's, for the key goes there:
    ``OPENAI_API_KEY``, if it is set.

    Args:
        url: Of an OpenAI-compatible endpoint, like ``http://localhost:8000/v1``.
        model: Its name there.

    Raises:
        InvalidInputError: Only one of the two was given, or the URL is none.
    """
    embedded = Generator(
        "The embedded model",
        "135M parameters: slow, and often wrong. Trust the evidence.",
        _embedded_model,
    )
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
        timeout=SECONDS,
        max_retries=1,
    )


@cache
def _embedded_model() -> BaseChatModel:
    with requires_extra("chat"):
        from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
    generation = {
        "max_new_tokens": EMBEDDED_ANSWER_TOKENS,
        "do_sample": False,
        "return_full_text": False,
    }
    pipeline = HuggingFacePipeline.from_model_id(
        str(resolve(DEFAULT_MODEL).path), task="text-generation", pipeline_kwargs=generation
    )
    return ChatHuggingFace(llm=pipeline)
