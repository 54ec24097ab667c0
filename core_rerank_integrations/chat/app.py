"""The page: a conversation on the left, on the right what it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core_rerank_integrations.chat import rendering
from core_rerank_integrations.chat.conversation import Turn, Wishes, answer
from core_rerank_integrations.chat.conversion import MAX_FILE_BYTES, SUFFIXES
from core_rerank_integrations.chat.generators import Generator
from core_rerank_integrations.chat.knowledge import HANDBOOK, KnowledgeBase, printable
from core_rerank_integrations.errors import CoReError, InvalidInputError, requires_extra
from core_rerank_integrations.heads.scoring_config import Threshold
from core_rerank_integrations.reranker import CoReReranker

with requires_extra("chat"):
    import gradio as gr

TITLE = "CoRe reranker"
STYLE = Path(__file__).with_name("style.css")
CONCURRENT = 8
"""Visitors that are answered at once; more wait their turn."""
QUESTIONS = (
    "What did they rub the glass with in the old days, when men still lived there?",
    "I've paid for the boat and the museum. What happens to my money if fog stops the crossing?",
    "What is the capital of Australia?",
)
"""Of the handbook; nothing there answers the last."""
# A link to a place of the page would load it anew where its address has a query.
JUMP = """
element.addEventListener('click', (event) => {
  const link = event.target.closest('a.core-cite');
  if (!link) return;
  event.preventDefault();
  const card = document.getElementById(link.getAttribute('href').slice(1));
  if (!card) return;
  const folded = card.closest('details');
  if (folded) folded.open = true;
  card.scrollIntoView({block: 'center', behavior: 'smooth'});
  card.focus({preventScroll: true});
});
"""


def build_app(
    knowledge: KnowledgeBase, reranker: CoReReranker, generators: list[Generator]
) -> gr.Blocks:
    """The page over a knowledge base, shared by all who open it; a conversation is each one's own.

    Args:
        knowledge: What is asked about.
        reranker: Ranks what is found.
        generators: The ways to an answer; the first is chosen.
    """
    knows = reranker.heads.scoring.abstention is not None
    by_name = {generator.name: generator for generator in generators}

    def ask(
        question: str,
        turns: list[Turn],
        way: str,
        reranks: bool,
        candidates: int,
        top_n: int,
        by_heads: bool,
        threshold: float,
        extract: float,
    ) -> Iterator[tuple[Any, ...]]:
        least: Threshold = "auto" if by_heads else threshold or None
        wishes = Wishes(candidates, top_n, least, extract, reranks)
        shown = ""
        for turn in answer(question, turns, knowledge, reranker, by_name[way], wishes):
            now = [*turns, turn]
            before, shown = shown, rendering.findings(now)
            # Pieces of an answer change nothing there, and it is long.
            beside = gr.skip() if shown == before else shown
            yield "", now, rendering.conversation(now), beside

    def begin_anew() -> tuple[Any, ...]:
        return [], rendering.conversation([]), rendering.findings([])

    def add(paths: list[str] | None) -> Iterator[tuple[Any, ...]]:
        errors, added = [], []
        for path in map(Path, paths or []):
            try:
                for progress in knowledge.add_file(path):
                    yield (
                        rendering.notice(
                            f"Reading {progress.source}: {progress.done} of {progress.total} "
                            "passages"
                        ),
                        gr.skip(),
                        gr.skip(),
                    )
                added.append(printable(path.name))
            except CoReError as error:
                errors.append(rendering.notice(str(error), "error"))
            finally:
                path.unlink(missing_ok=True)
        said = rendering.notice(f"Added {', '.join(added)}." if added else "")
        yield said + "".join(errors), None, documents()

    def remove(names: list[str]) -> tuple[Any, ...]:
        for name in names:
            knowledge.remove(name)
        said = f"Removed {', '.join(names)}." if names else "Choose what to remove first."
        return rendering.notice(said), documents()

    def documents() -> gr.CheckboxGroup:
        choices = [(f"{name} ({count})", name) for name, count in knowledge.sources.items()]
        return gr.CheckboxGroup(choices=choices, value=[])

    def note(way: str) -> str:
        return rendering.notice(by_name[way].note)

    app = gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True)
    with app:
        turns = gr.State([])
        _html(
            f'<header class="core-head"><h1>{TITLE}</h1><p>Answers from your documents, and what '
            "they rest on.</p></header>"
        )
        with gr.Row(elem_classes="core-room"):
            with gr.Column(scale=4, min_width=300, elem_classes="core-left"):
                talk = _html(rendering.conversation([]), JUMP)
                with gr.Column(elem_classes="core-try", visible=HANDBOOK in knowledge.sources) as t:
                    _html('<p class="core-note">For example:</p>')
                    tries = [gr.Button(question, size="sm") for question in QUESTIONS]
                with gr.Row(elem_classes="core-ask"):
                    question = gr.Textbox(
                        label="Your question",
                        show_label=False,
                        container=False,
                        placeholder="Ask about the documents …",
                        autofocus=True,
                        scale=6,
                        max_lines=4,
                        elem_id="core-question",
                    )
                    button = gr.Button("Ask", variant="primary", scale=1, min_width=72)
                anew = gr.Button("New conversation", size="sm", elem_classes="core-quiet")
                with gr.Accordion("Documents", open=False):
                    upload = gr.File(
                        label="Add documents",
                        file_count="multiple",
                        height=150,
                        elem_id="core-upload",
                    )
                    _html(
                        f'<p class="core-note">{", ".join(SUFFIXES)}; {MAX_FILE_BYTES >> 20} MiB '
                        "each at most.</p>"
                    )
                    said = _html()
                    listed = gr.CheckboxGroup(label="In the knowledge base (passages)")
                    removal = gr.Button("Remove the chosen ones", size="sm")
                with gr.Accordion("Settings", open=False):
                    reranks = gr.Checkbox(True, label="Rerank", elem_id="core-rerank")
                    way = gr.Radio(list(by_name), value=generators[0].name, label="Answer by")
                    about = _html(note(generators[0].name))
                    wishes = Wishes()
                    candidates = gr.Slider(
                        5, 50, wishes.candidates, step=1, label="Candidates", info="of vectors"
                    )
                    top_n = gr.Slider(
                        1, 10, wishes.top_n, step=1, label="Passages that the answer is drawn from"
                    )
                    by_heads = gr.Checkbox(
                        knows,
                        label="Judge by all passages whether anything here answers",
                        visible=knows,
                    )
                    threshold = gr.Slider(
                        0,
                        0.3,
                        0,
                        step=0.005,
                        label="Lowest probability",
                        info="Passages below it are left out; where none is left, nothing "
                        "answers. 0: all.",
                    )
                    extract = gr.Slider(
                        0.1,
                        1,
                        wishes.extract,
                        step=0.1,
                        label="Extraction",
                        info="Share of each passage that a model gets to read, its strongest "
                        "sentences.",
                    )
            with gr.Column(scale=6, min_width=300, elem_classes="core-right"):
                found = _html(rendering.findings([]))

        asked = [question, turns, way, reranks, candidates, top_n, by_heads, threshold, extract]
        shown = [question, turns, talk, found]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on(
            [question.submit, button.click],
            ask,
            asked,
            shown,
            trigger_mode="once",
            concurrency_limit=CONCURRENT,
            **quiet,
        ).then(lambda: gr.Column(visible=False), None, t, **quiet)
        for suggestion in tries:
            suggestion.click(
                ask, [suggestion, *asked[1:]], shown, concurrency_limit=CONCURRENT, **quiet
            ).then(lambda: gr.Column(visible=False), None, t, **quiet)
        anew.click(begin_anew, None, [turns, talk, found], **quiet)
        upload.upload(add, upload, [said, upload, listed], **quiet)
        removal.click(remove, listed, [said, listed], **quiet)
        way.change(note, way, about, **quiet)
        app.load(documents, None, listed, **quiet)
    return app


def _theme() -> gr.themes.Base:
    """Calm, with enough contrast, and fonts that no other server is asked for."""
    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
        radius_size="lg",
    )
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        checkbox_background_color_selected="*primary_700",
        slider_color="*primary_700",
        slider_color_dark="*primary_400",
    )


def _html(content: str = "", script: str | None = None) -> gr.HTML:
    return gr.HTML(content, js_on_load=script, apply_default_css=False)


def warm_up(knowledge: KnowledgeBase, reranker: CoReReranker) -> None:
    """Ask something, so that no visitor's first question pays for what libraries put off."""
    question = "What is this about?"
    found = knowledge.nearest(question, Wishes.candidates)
    reranker.rerank(question, [document.page_content for document in found], evidence=True)


def launch(app: gr.Blocks, host: str, port: int | None, opens: bool) -> None:
    """Serve the page until the program is interrupted.

    Args:
        app: From `build_app`.
        host: The address to listen on; only this machine reaches ``127.0.0.1``.
        port: ``None`` for the first that is free from 7860 on.
        opens: Whether to open a browser.

    Raises:
        InvalidInputError: The address cannot be had.
    """
    try:
        app.queue(default_concurrency_limit=CONCURRENT).launch(
            server_name=host,
            server_port=port,
            inbrowser=opens,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=4 * MAX_FILE_BYTES,
            footer_links=[],
            theme=_theme(),
            css_paths=STYLE,
        )
    except OSError as error:
        raise InvalidInputError(
            f"cannot listen on {host}:{port or 'a free port'} ({error}); pass another --port or "
            "--host"
        ) from error
    print(f"Open {app.local_url} in a browser; Ctrl+C ends.", flush=True)
    app.block_thread()
