from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.models.encoder import load_encoder
from core_rerank_integrations.models.local_model import LocalModel


@pytest.fixture
def chat_model(smollm2: LocalModel, tmp_path: Path) -> Callable[[str], LocalModel]:
    """Return a maker of models that have the small model's tokenizer and a chat template."""
    for path in smollm2.path.iterdir():
        if "chat_template" not in path.name:
            (tmp_path / path.name).symlink_to(path)

    def make(template: str) -> LocalModel:
        (tmp_path / "chat_template.jinja").write_text(template)
        return LocalModel(tmp_path, None)

    return make


def test_a_chat_template_that_prints_the_date_has_a_fixed_one(
    chat_model: Callable[[str], LocalModel],
) -> None:
    template = load_encoder(
        chat_model(
            "{%- if not date_string is defined %}"
            "{%- set date_string = strftime_now('%d %b %Y, %H:%M:%S') %}{%- endif %}"
            "Today is {{ date_string }}. <user>{{ messages[0]['content'] }}</user>"
        )
    ).template
    assert template.turn_start == "Today is 26 Jul 2024, 00:00:00. <user>"
    assert template.turn_end == "</user>"


@pytest.mark.parametrize("template", ["{{ raise_exception('no system prompt') }}", "{% if %}"])
def test_a_chat_template_that_fails_names_the_remedy(
    template: str, chat_model: Callable[[str], LocalModel]
) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot be rendered: .*; pass template="):
        load_encoder(chat_model(template))
