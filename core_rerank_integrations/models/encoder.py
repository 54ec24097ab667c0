"""The prompt encoder of a model."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from core_rerank_integrations.errors import HeadSetError, InvalidInputError, requires_extra
from core_rerank_integrations.heads.shipped import default_head_set
from core_rerank_integrations.method.prompt import PromptEncoder
from core_rerank_integrations.method.templates import TEMPLATES, PromptTemplate
from core_rerank_integrations.models.local_model import LocalModel

FIXED_DATE = datetime(2024, 7, 26)
"""Date that chat templates show as today's, so that scores do not change from day to day. It is the
one that Llama 3.1's template shows where it does not know the date."""


def load_encoder(model: LocalModel, template: str | PromptTemplate | None = None) -> PromptEncoder:
    """Load the tokenizer of a model and choose a prompt template.

    Args:
        model: The model.
        template: A template or its name; ``None`` selects the template of the head set that is
            shipped for the model, else the model's chat template.

    Raises:
        InvalidInputError: There is no template of this name, or the model's chat template cannot
            be used.
    """
    tokenizer = model.tokenizer()
    chosen = template or _shipped_template(model)
    if isinstance(chosen, str):
        if chosen not in TEMPLATES:
            raise InvalidInputError(
                f"there is no prompt template {chosen!r}; use one of {', '.join(TEMPLATES)}"
            )
        chosen = TEMPLATES[chosen]
    return PromptEncoder(tokenizer.backend_tokenizer, chosen or _chat_template(tokenizer))


def _shipped_template(model: LocalModel) -> str | None:
    try:
        return default_head_set(model.model_id).template
    except HeadSetError:
        return None


def _chat_template(tokenizer: Any) -> PromptTemplate:
    if not tokenizer.chat_template:
        return TEMPLATES["plain"]
    with requires_extra("cpu"):
        from jinja2 import TemplateError

    def render(message: str) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                [{"role": "user", "content": message}],
                tokenize=False,
                add_generation_prompt=True,
                strftime_now=FIXED_DATE.strftime,
            )
        except TemplateError as error:
            raise InvalidInputError(
                f"the model's chat template cannot be rendered: {error}; pass "
                "template=PromptTemplate(name, turn_start, turn_end) instead"
            ) from error
        # The tokenizer adds its begin-of-sequence token by itself.
        adds_bos = tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return text.removeprefix(tokenizer.bos_token) if adds_bos else text

    return PromptTemplate.from_chat(render)
