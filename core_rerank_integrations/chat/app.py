"""The page: the conversation on the left, its evidence on the right."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core_rerank_integrations.chat import rendering
from core_rerank_integrations.chat.conversation import ChatSettings, Turn, answer
from core_rerank_integrations.chat.conversion import MAX_FILE_BYTES, SUFFIXES
from core_rerank_integrations.chat.generators import Generator
from core_rerank_integrations.chat.knowledge import HANDBOOK, KnowledgeBase, printable
from core_rerank_integrations.chat.server import MAX_UPLOAD_BYTES, Guard
from core_rerank_integrations.errors import CoReError, requires_extra
from core_rerank_integrations.reranker import CoReReranker

with requires_extra("chat"):
    import gradio as gr
    from fastapi import FastAPI

TITLE = "CoRe reranker"
STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("citations.js")
MAX_CONCURRENT_QUESTIONS = 8
"""Questions that are answered at once; more wait."""
MAX_SESSIONS = 200
"""Conversations in memory; a new one drops the one that was not used for longest."""
QUESTIONS = (
    "What did they rub the glass with in the old days, when men still lived there?",
    "I've paid for the boat and the museum. What happens to my money if fog stops the crossing?",
    "What is the capital of Australia?",
)
"""Examples for the handbook, which does not answer the last one."""


def build_app(
    knowledge: KnowledgeBase,
    reranker: CoReReranker,
    generators: list[Generator],
    host: str,
    names: Sequence[str] = (),
) -> Guard:
    """Return the page. Visitors share its documents; each has a conversation of their own.

    Args:
        knowledge: The documents.
        reranker: Ranks the candidates.
        generators: The generators that visitors can choose; the first is the default.
        host: The address that the server listens on.
        names: More names of the server.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(knowledge.uploads)  # Gradio has no other setting for it.
    blocks = gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True)
    blocks.state_session_capacity = MAX_SESSIONS
    with blocks:
        _Page(knowledge, reranker, generators).connect(blocks)
    blocks.queue(default_concurrency_limit=MAX_CONCURRENT_QUESTIONS)
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        path="/",
        server_name=host,
        run_history=False,
        footer_links=[],
        show_error=False,
        max_file_size=MAX_UPLOAD_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=_theme(),
        css_paths=STYLE,
    )
    return Guard(app, host=host, names=names, uploads=knowledge.uploads)


def _theme() -> gr.themes.Base:
    # These fonts are on every machine, so no other server is asked for them.
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
        radius_size="lg",
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        checkbox_background_color_selected="*primary_700",
        slider_color="*primary_700",
        slider_color_dark="*primary_400",
    )


class _Page:
    """The components of the page, and the functions that their events call."""

    def __init__(
        self, knowledge: KnowledgeBase, reranker: CoReReranker, generators: list[Generator]
    ) -> None:
        self._knowledge = knowledge
        self._reranker = reranker
        self._generators = {generator.name: generator for generator in generators}
        self._turns = gr.State(())
        _html(
            f'<header class="core-head"><h1>{TITLE}</h1><p>Answers from your documents, with their '
            "evidence.</p></header>"
        )
        with gr.Row(elem_classes="core-room"):
            with gr.Column(scale=4, min_width=300, elem_classes="core-left"):
                self._lay_out_conversation()
                with gr.Accordion("Documents", open=False):
                    self._lay_out_documents()
                with gr.Accordion("Settings", open=False):
                    self._settings = self._lay_out_settings()
            with gr.Column(scale=6, min_width=300, elem_classes="core-right"):
                self._findings = _html(rendering.findings([]))

    def _lay_out_conversation(self) -> None:
        self._conversation = _html(rendering.conversation([]), SCRIPT.read_text(encoding="utf-8"))
        has_handbook = HANDBOOK in self._knowledge.sources
        with gr.Column(elem_classes="core-examples", visible=has_handbook) as self._examples:
            _html('<p class="core-note">For example:</p>')
            self._example_buttons = [gr.Button(question, size="sm") for question in QUESTIONS]
        with gr.Row(elem_classes="core-ask"):
            self._question = gr.Textbox(
                label="Your question",
                show_label=False,
                container=False,
                placeholder="Ask about the documents …",
                autofocus=True,
                scale=6,
                max_lines=4,
            )
            self._ask_button = gr.Button("Ask", variant="primary", scale=1, min_width=72)
        self._restart = gr.Button("New conversation", size="sm", elem_classes="core-quiet")

    def _lay_out_documents(self) -> None:
        self._upload = gr.File(
            label="Add documents", file_count="multiple", height=150, elem_id="core-upload"
        )
        _html(
            f'<p class="core-note">{", ".join(SUFFIXES)}; at most {MAX_FILE_BYTES >> 20} MiB each.'
            "</p>"
        )
        self._notice = _html()
        self._stop = gr.Button("Stop adding", size="sm", visible=False)
        self._documents = gr.CheckboxGroup(label="In the knowledge base (passages)")
        self._remove_button = gr.Button("Remove selected documents", size="sm")

    def _lay_out_settings(self) -> dict[str, Any]:
        """Return the component of each field of `ChatSettings`."""
        defaults = ChatSettings()
        default_generator, *_ = self._generators.values()
        has_abstention = self._reranker.heads.scoring.abstention is not None
        rerank = gr.Checkbox(defaults.rerank, label="Rerank")
        generator = gr.Radio(
            list(self._generators), value=default_generator.name, label="Answer with"
        )
        self._generator_note = _html(rendering.notice(default_generator.note))
        return {
            "generator": generator,
            "rerank": rerank,
            "candidates": gr.Slider(
                5, 50, defaults.candidates, step=1, label="Candidates of the first stage"
            ),
            "top_n": gr.Slider(1, 10, defaults.top_n, step=1, label="Passages for the answer"),
            "abstain": gr.Checkbox(
                has_abstention,
                label="Answer nothing if the documents do not seem to hold the answer",
                visible=has_abstention,
            ),
            "min_probability": gr.Slider(
                0,
                0.3,
                defaults.min_probability,
                step=0.005,
                label="Minimum probability",
                info="Leave out passages below, and answer nothing if none is left. 0 keeps all.",
            ),
            "extract": gr.Slider(
                0.1,
                1,
                defaults.extract,
                step=0.1,
                label="Extraction",
                info="Share of each passage that a model reads: its strongest sentences.",
            ),
        }

    def connect(self, app: gr.Blocks) -> None:
        """Connect the events of the page and of its components to their functions."""
        options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        inputs = [self._turns, *self._settings.values()]
        outputs = [self._question, self._turns, self._conversation, self._findings]
        sources = [
            (self._question, [self._question.submit, self._ask_button.click]),
            *((button, [button.click]) for button in self._example_buttons),
        ]
        for question, triggers in sources:
            gr.on(
                triggers,
                self._ask,
                [question, *inputs],
                outputs,
                trigger_mode="once",
                concurrency_limit=MAX_CONCURRENT_QUESTIONS,
                **options,
            ).then(lambda: gr.Column(visible=False), None, self._examples, **options)
        empty = (), rendering.conversation([]), rendering.findings([])
        self._restart.click(lambda: empty, None, outputs[1:], **options)
        documents = [self._notice, self._documents]
        adding = [*documents, self._upload, self._stop]
        upload = self._upload.upload(self._add, self._upload, adding, **options)
        self._stop.click(self._stopped, None, adding, cancels=[upload], **options)
        self._remove_button.click(self._remove, self._documents, documents, **options)
        self._settings["generator"].change(
            lambda name: rendering.notice(self._generators[name].note),
            self._settings["generator"],
            self._generator_note,
            **options,
        )
        app.load(self._document_choices, None, self._documents, **options)

    def _ask(self, question: str, turns: Sequence[Turn], *values: Any) -> Iterator[tuple[Any, ...]]:
        fields = dict(zip(self._settings, values, strict=True))
        settings = ChatSettings(**fields | {"generator": self._generators[fields["generator"]]})
        findings = ""
        for turn in answer(question, turns, self._knowledge, self._reranker, settings):
            now = [*turns, turn]
            before, findings = findings, rendering.findings(now)
            # Findings are long, and the pieces of an answer do not change them.
            update = gr.skip() if findings == before else findings
            yield "", now, rendering.conversation(now), update

    def _add(self, paths: list[str] | None) -> Iterator[tuple[Any, ...]]:
        files = [Path(path) for path in paths or []]
        errors, added = [], []
        try:
            for path in files:
                try:
                    for progress in self._knowledge.add_file(path):
                        notice = rendering.notice(str(progress))
                        yield notice, gr.skip(), gr.skip(), gr.Button(visible=True)
                    added.append(printable(path.name))
                except CoReError as error:
                    errors.append(rendering.notice(str(error), "error"))
        finally:
            for path in files:
                path.unlink(missing_ok=True)
        notice = rendering.notice(f"Added {', '.join(added)}." if added else "")
        yield notice + "".join(errors), *self._after_adding()

    def _stopped(self) -> tuple[Any, ...]:
        return rendering.notice("Stopped. The documents below can be asked."), *self._after_adding()

    def _after_adding(self) -> tuple[Any, ...]:
        return self._document_choices(), None, gr.Button(visible=False)

    def _remove(self, names: list[str]) -> tuple[str, gr.CheckboxGroup]:
        for name in names:
            self._knowledge.remove(name)
        message = f"Removed {', '.join(names)}." if names else "Select documents first."
        return rendering.notice(message), self._document_choices()

    def _document_choices(self) -> gr.CheckboxGroup:
        sources = self._knowledge.sources.items()
        return gr.CheckboxGroup([(f"{name} ({count})", name) for name, count in sources], value=[])


def warm_up(knowledge: KnowledgeBase, reranker: CoReReranker) -> None:
    """Rerank once, because libraries delay some of their initialization until then."""
    question = "What is this about?"
    candidates = knowledge.search(question, ChatSettings.candidates)
    reranker.rerank(question, [document.page_content for document in candidates], evidence=True)


def _html(content: str = "", script: str | None = None) -> gr.HTML:
    return gr.HTML(content, js_on_load=script, apply_default_css=False)
